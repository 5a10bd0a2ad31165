"""AWQ: equal to RTN where it scales nothing, to a brute-force search where it does, and kept by resume and reload."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import lqedu
from lqedu.calibration.capture import block_inputs, run_block
from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.formats import IntGrid, ScaleConvention
from lqedu.methods import AWQ
from lqedu.methods.awq import channel_scale, scaled_rounding, search_scales, weight_magnitude
from lqedu.models.anatomy import block_list, describe
from lqedu.models.copying import copy_sharing_tensors
from lqedu.rounding import nearest, proxy_loss
from lqedu.runtime import quantized_linears
from tests.compare import relative_error
from tests.models.tiny import TYPES, tiny_model, tiny_windows

GRID = IntGrid(3, granularity="group", group_size=16, convention=ScaleConvention.MINMAX)


def _method(**changes) -> AWQ:
    return AWQ(**({"bits": 4, "group_size": 16, "search_tokens": 32} | changes))


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.5, 0.95])
@pytest.mark.parametrize("duo", [False, True])
def test_scales_are_normalised(alpha, duo):
    g = torch.Generator().manual_seed(0)
    a, w = torch.rand(40, generator=g), torch.rand(40, generator=g)
    s = channel_scale(a, alpha, w if duo else None)
    assert float(s.max() * s.min()) == pytest.approx(1, rel=1e-5)
    if alpha == 0 and not duo:
        assert torch.equal(s, torch.ones(40))


def test_dead_channels_get_a_finite_scale():
    """One, whatever the others are, and the others are scaled as if it were not there."""
    for duo in (None, torch.tensor([0.5, 0.2, 0.8])):
        s = channel_scale(torch.tensor([0.0, 1.0, 2.0]), 0.5, duo)
        assert float(s[0]) == 1.0
        assert torch.equal(s[1:], channel_scale(torch.tensor([1.0, 2.0]), 0.5, None if duo is None else duo[1:]))
    assert torch.equal(channel_scale(torch.zeros(3), 0.5), torch.ones(3))
    assert bool(torch.isfinite(weight_magnitude([torch.zeros(4, 32)], 16)).all())


def test_the_search_is_the_brute_force_minimum_and_never_worse_than_no_scale():
    g = torch.Generator().manual_seed(1)
    w = torch.randn(24, 32, generator=g)
    x = torch.randn(300, 32, generator=g) * torch.exp(1.5 * torch.randn(32, generator=g))
    h = x.T @ x / len(x)

    def loss(scale):
        return proxy_loss(w - scaled_rounding(w, scale, GRID), h)

    found = search_scales(x.abs().mean(0), loss)
    direct = []
    for i in range(20):
        s = x.abs().mean(0).pow(i / 20).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        w_hat = nearest(w * s, GRID)[0].dequantize() / s
        direct.append(float((x @ (w - w_hat).T).square().sum(1).mean()))
    assert found.losses == pytest.approx(direct, rel=1e-4)
    assert found.alpha == direct.index(min(direct)) / 20
    assert min(found.losses) < found.losses[0]


@pytest.mark.parametrize("model_type", TYPES)
def test_without_scales_and_clipping_it_is_rtn(model_type):
    model, windows = tiny_model(model_type), tiny_windows(4, 16)
    result = lqedu.quantize(model, _method(alphas=1, clip=False), windows)
    for name, layer in quantized_linears(result).items():
        want, _ = nearest(model.get_submodule(name).weight.detach(), _method().grid())
        assert torch.equal(layer.quantized.codes, want.codes), name


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_preparing_a_block_without_clipping_leaves_its_function(model_type):
    model, windows = tiny_model(model_type), tiny_windows(4, 16)
    prepared, anatomy = copy_sharing_tensors(model), describe(model)
    hidden, kwargs = block_inputs(model, windows)
    want = run_block(block_list(model)[0], hidden, kwargs)
    block = block_list(prepared)[0]
    changed = _method(clip=False).prepare_block(block, anatomy.stages, hidden, kwargs)
    assert relative_error(run_block(block, hidden, kwargs), want) < 1e-5
    assert changed
    linear = block.get_submodule(anatomy.stages[0].linears[0])
    assert not torch.equal(linear.weight, block_list(model)[0].get_submodule(anatomy.stages[0].linears[0]).weight)


@torch.no_grad()
def test_the_inspected_module_is_really_what_its_loss_measures():
    """The loss of q, k, v at α = 0 against attention run by hand with rounded weights."""
    from lqedu.methods.awq import _Inputs, _record_calls

    model, windows = tiny_model("llama"), tiny_windows(2, 16)
    hidden, kwargs = block_inputs(model, windows)
    block, stages = block_list(copy_sharing_tensors(model))[0], describe(model).stages
    calls = _record_calls(block, hidden, kwargs, {stage: _Inputs() for stage in stages})
    assert set(calls) == {"self_attn", "mlp"}
    linears = [block.get_submodule(name) for name in stages[2].linears]
    dense = [linear.weight for linear in linears]
    got = calls["mlp"].loss(linears, torch.ones(32), GRID)
    assert all(linear.weight is weight for linear, weight in zip(linears, dense, strict=True))
    x = calls["mlp"].arguments[0]
    rounded = [nearest(w.detach(), GRID)[0].dequantize() for w in dense]
    w_down = block.mlp.down_proj.weight

    def mlp(gate, up):
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ w_down.T

    assert got == pytest.approx(float((mlp(*rounded) - mlp(*dense)).square().mean()), rel=1e-4)


def test_save_reload_and_resume_keep_the_changed_norms(tmp_path):
    model, windows = tiny_model("qwen2"), tiny_windows(4, 16)
    whole = lqedu.quantize(model, _method(), windows, resume_dir=tmp_path / "run")
    (tmp_path / "run" / "block-0002.safetensors").unlink()
    resumed = lqedu.quantize(model, _method(), windows, resume_dir=tmp_path / "run")
    state = whole.state_dict()
    assert state.keys() == resumed.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.state_dict().items())
    name = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(state[name], model.state_dict()[name])


def test_a_scale_that_overflows_half_precision_is_passed_over():
    """The strongest channel has a weight near the end of float16: only α = 0 keeps it finite."""
    activation = torch.tensor([100.0, 1.0, 1.0, 1.0])
    w = torch.tensor([[6e4, 1.0, 2.0, 3.0]], dtype=torch.float16)
    grid = IntGrid(4, convention=ScaleConvention.MINMAX)
    found = search_scales(
        activation, lambda s: float((w - scaled_rounding(w, s, grid)).float().square().mean()), alphas=4
    )
    assert found.alpha == 0
    assert found.losses[0] < float("inf")
    assert found.losses[1:] == (float("inf"),) * 3


@torch.no_grad()
def test_a_half_precision_model_stays_close_to_its_dense_self():
    model, windows = tiny_model("llama"), tiny_windows(4, 16)
    dense = model(windows).logits
    quantized = lqedu.quantize(tiny_model("llama").half(), _method(bits=8), windows)
    assert relative_error(quantized(windows).logits.float(), dense) < 0.05
    odd = tiny_model("qwen3")  # 48 channels: heads of a group lie in different places of a vector register
    dense = odd(windows).logits
    assert relative_error(lqedu.quantize(odd.half(), _method(bits=8), windows)(windows).logits.float(), dense) < 0.1


def test_nan_activations_are_refused_with_the_reason():
    model, windows = tiny_model("llama"), tiny_windows(4, 16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(3e38)  # finite; its products are not
    with pytest.raises(CalibrationError, match="activations hold NaN or infinite values"):
        lqedu.quantize(model, _method(), windows)


def test_a_saved_model_reloads_to_the_same_tensors(tmp_path):
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    model, windows = tiny_model("qwen2"), tiny_windows(4, 16)
    quantized = lqedu.quantize(model, _method(), windows)
    lqedu.save(quantized, tmp_path / "model", tokenizer)
    reloaded, _ = lqedu.load_model(tmp_path / "model")
    state = quantized.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in reloaded.state_dict().items())
    assert torch.equal(reloaded(windows).logits, quantized(windows).logits)


def test_bad_input():
    model, windows = tiny_model("llama"), tiny_windows(4, 16)
    with pytest.raises(UsageError, match="alphas"):
        AWQ(alphas=0)
    with pytest.raises(UsageError, match="search_tokens"):
        AWQ(search_tokens=0)
    with pytest.raises(CalibrationError, match="needs calibration windows"):
        lqedu.quantize(model, _method())
    with pytest.raises(GridError, match="does not divide"):
        lqedu.quantize(model, _method(group_size=24), windows)
    with pytest.raises(CalibrationError, match="NaN"):
        search_scales(torch.tensor([1.0, float("nan")]), lambda s: 0.0)
    with pytest.raises(UsageError, match="alphas"):
        search_scales(torch.ones(2), lambda s: 0.0, alphas=0)
    for bad in (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")]), torch.tensor([1.0, -1.0])):
        with pytest.raises(CalibrationError, match="finite and at least 0"):
            channel_scale(bad, 0.5)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="alpha is a finite number, at least 0 and at most 1"):
            channel_scale(torch.ones(2), alpha)
    with pytest.raises(UsageError, match="as many weight magnitudes"):
        channel_scale(torch.ones(2), 0.5, torch.ones(3))
    with pytest.raises(UsageError, match="divides"):
        weight_magnitude([torch.ones(2, 32)], 24)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(GridError, match=r"finite and positive in torch\.float32"):
            scaled_rounding(torch.randn(2, 32), torch.full((32,), bad), GRID)
    with pytest.raises(GridError, match=r"finite and positive in torch\.float16"):
        scaled_rounding(torch.randn(2, 32).half(), torch.full((32,), 1e6), GRID)
    with pytest.raises(UsageError, match=r"takes a scale \[32\]"):
        scaled_rounding(torch.randn(2, 32), torch.ones(31), GRID)
    with pytest.raises(CalibrationError, match="finite loss"):
        search_scales(torch.ones(2), lambda s: float("nan"))
