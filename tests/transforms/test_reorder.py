"""Reordering: the same logits on every architecture, salient channels together, and the groups of rounded weights."""

import pytest
import torch

from lqedu.calibration.capture import block_inputs, run_block
from lqedu.errors import CalibrationError, UsageError
from lqedu.formats import IntGrid
from lqedu.models.anatomy import block_list, describe, linears
from lqedu.rounding import nearest
from lqedu.transforms.reorder import RESIDUAL, channel_order, find_orders, reorder_model
from tests.compare import relative_error
from tests.models.tiny import TYPES, tiny_model, tiny_windows

GROUPS = {"gqa": {}, "mha": {"num_key_value_heads": 4}}


def _salience(model, windows) -> dict[str, torch.Tensor]:
    """Largest |x| of every stage's input, by the name that find_orders uses."""
    found = {}
    hidden, kwargs = block_inputs(model, windows)
    for index, block in enumerate(block_list(model)):
        visit = {
            s.linears[0]: (
                lambda x, name=f"{index}.{s.linears[0]}": found.update({name: x.flatten(0, -2).abs().amax(0)})
            )
            for s in describe(model).stages
        }
        hidden = run_block(block, hidden, kwargs, visit=visit)
    return found


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("model_type", TYPES)
def test_logits_do_not_change(model_type, groups):
    changes = {} if model_type == "opt" else GROUPS[groups]
    model, windows = tiny_model(model_type, **changes), tiny_windows()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    orders = find_orders(model, windows, residual=True)
    reordered = reorder_model(model, orders)
    assert relative_error(reordered(windows).logits, model(windows).logits) <= 1e-5
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())
    moved = {
        name for name, layer in linears(reordered).items() if not torch.equal(layer.weight, linears(model)[name].weight)
    }
    assert moved == set(linears(model))  # nothing was left out
    for name, parameter in reordered.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, before[name].flatten().sort().values), name


@pytest.mark.parametrize("model_type", TYPES)
def test_salience_falls_along_the_channels(model_type):
    model, windows = tiny_model(model_type), tiny_windows()
    orders = find_orders(model, windows)
    after = _salience(reorder_model(model, orders), windows)
    attended = "self_attn.out_proj" if model_type == "opt" else "self_attn.o_proj"
    hidden = "fc2" if model_type == "opt" else "mlp.down_proj"
    assert set(orders) == {f"{i}.{name}" for i in range(3) for name in (attended, hidden)}
    for name in orders:
        x = after[name]
        if name.endswith(attended):  # within value heads; four query heads on two value heads, except OPT's
            size = block_list(model)[0].self_attn.head_dim
            x = x.view(orders[name].shape[0], -1, size).amax(1)
        assert bool((x.diff(dim=-1) <= 1e-5 * x.max()).all()), name


def test_tied_embeddings_stay_tied():
    model, windows = tiny_model("llama"), tiny_windows()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    reordered = reorder_model(model, find_orders(model, windows, residual=True))
    assert reordered.lm_head.weight is reordered.get_input_embeddings().weight


def test_the_residual_order_weighs_all_readers_alike():
    """One reader with a gain of 1000 does not decide alone: channels are voted on relative to each reader's mean."""
    model, windows = tiny_model("llama"), tiny_windows()
    usual = find_orders(model, windows, residual=True)[RESIDUAL]
    with torch.no_grad():
        block_list(model)[2].post_attention_layernorm.weight *= 1000
    assert torch.equal(find_orders(model, windows, residual=True)[RESIDUAL], usual)


def test_groups_of_like_channels_round_with_less_error():
    """Weights that are small where activations are large, as smoothing leaves them: sorted groups fit both kinds."""
    g = torch.Generator().manual_seed(0)
    size = torch.exp(torch.randn(256, generator=g))
    w, h = torch.randn(64, 256, generator=g) / size, torch.diag(size.square())
    grid = IntGrid(4, granularity="group", group_size=32)
    order = channel_order(size)

    def loss(order):
        return nearest(w[:, order], grid, hessian=h[order][:, order])[1].proxy_loss

    assert loss(order) < 0.5 * loss(torch.arange(256))


def test_within_a_group_no_order_matters():
    """Round to nearest sees the largest and smallest weight of a group only."""
    g = torch.Generator().manual_seed(0)
    w, grid = torch.randn(8, 64, generator=g), IntGrid(4, granularity="group", group_size=32)
    order = torch.cat([torch.randperm(32, generator=g), 32 + torch.randperm(32, generator=g)])
    assert torch.equal(nearest(w[:, order], grid)[0].codes, nearest(w, grid)[0].codes[:, order])


def test_what_does_not_fit_is_refused():
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="no channels"):
        reorder_model(model, {"7.mlp.down_proj": torch.arange(48)})
    with pytest.raises(UsageError, match="no channels"):
        reorder_model(model, {"0.mlp.up_proj": torch.arange(32)})
    for order in (torch.arange(47), torch.zeros(48, dtype=torch.int64)):
        with pytest.raises(UsageError, match="permute"):
            reorder_model(model, {"0.mlp.down_proj": order})
    with pytest.raises(UsageError, match="permute"):
        reorder_model(model, {RESIDUAL: torch.arange(31)})
    with pytest.raises(UsageError, match="permute"):  # across heads
        reorder_model(model, {"0.self_attn.o_proj": torch.arange(32)})
    with pytest.raises(CalibrationError):
        channel_order(torch.tensor([1.0, float("nan")]))
