"""SmoothAttention: q k^T before rounding on every architecture, RoPE pairs, grouped heads, and what the rounding gains."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lqedu.calibration.capture import block_inputs, run_block
from lqedu.errors import CalibrationError, UnsupportedModelError, UsageError
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.models.anatomy import block_list
from lqedu.models.copying import copy_sharing_tensors
from lqedu.rounding import nearest
from lqedu.transforms.smooth_attention import (
    Heads,
    apply_rope,
    attend,
    attention_heads,
    attention_scales,
    fold_attention,
    has_head_norms,
    search_attention,
)
from tests.compare import relative_error
from tests.models.tiny import tiny_model, tiny_windows
from tests.problems import seeded

ROTARY = ("llama", "mistral", "qwen2", "qwen3")
GROUPS = {"gqa": {}, "mha": {"num_key_value_heads": 4}, "one key head": {"num_key_value_heads": 1}}


def _block(model_type: str, **changes):
    """A block of its own with its inputs; its model is not kept."""
    model = tiny_model(model_type, **changes)
    hidden, kwargs = block_inputs(model, tiny_windows())
    return block_list(copy_sharing_tensors(model))[0], hidden, kwargs


def _products(heads: Heads) -> torch.Tensor:
    repeats = heads.query.shape[1] // heads.key.shape[1]
    return heads.query @ heads.key.repeat_interleave(repeats, 1).transpose(-1, -2)


def _scale(block, heads: Heads, alpha: float = 0.5, **options) -> torch.Tensor:
    return attention_scales(heads.key_max(), alpha, shared=has_head_norms(block), **options)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("model_type", ROTARY)
def test_products_of_queries_and_keys_do_not_change(model_type, groups):
    block, hidden, kwargs = _block(model_type, **GROUPS[groups])
    before, want = attention_heads(block, hidden, kwargs), run_block(block, hidden, kwargs)
    old = {name: parameter.clone() for name, parameter in block.named_parameters()}
    tensors = dict(block.named_parameters())
    scale = _scale(block, before)
    changed = fold_attention(block, scale)
    after = attention_heads(block, hidden, kwargs)
    assert relative_error(_products(after), _products(before)) <= 1e-5
    assert relative_error(run_block(block, hidden, kwargs), want) <= 1e-5
    assert torch.allclose(after.key, before.key / scale[:, None], rtol=1e-4, atol=1e-5)
    assert torch.equal(after.value, before.value)
    assert all(torch.equal(tensors[name], value) for name, value in old.items())  # the old tensors are left alone
    replaced = {name for name, parameter in block.named_parameters() if parameter is not tensors[name]}
    weights = {"self_attn.q_proj.weight", "self_attn.k_proj.weight"}
    assert set(changed) == replaced - weights and all(not p.requires_grad for p in changed.values())
    assert (
        set(changed)
        == {
            "llama": set(),
            "mistral": set(),
            "qwen2": {"self_attn.q_proj.bias", "self_attn.k_proj.bias"},
            "qwen3": {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
        }[model_type]
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_range_of_keys_that_stays_follows_alpha(alpha):
    """The larger channel of each pair ends at max^(1 - α)."""
    block, hidden, kwargs = _block("llama")
    heads = attention_heads(block, hidden, kwargs)
    fold_attention(block, _scale(block, heads, alpha))
    before, after = (h.key_max().unflatten(1, (2, -1)).amax(1) for h in (heads, attention_heads(block, hidden, kwargs)))
    assert torch.allclose(after, before ** (1 - alpha), rtol=1e-4)


def test_queries_keys_and_values_are_those_that_attention_gets(monkeypatch):
    """RoPE of the package equals that of transformers, and attention of the parts is the block's own."""
    block, hidden, kwargs = _block("qwen2")
    heads = attention_heads(block, hidden, kwargs)
    seen = {}

    def visit(x):
        seen["attended"] = x

    run_block(block, hidden, kwargs, visit={"self_attn.o_proj": visit})
    own = attend(heads.query, heads.key, heads.value).transpose(1, 2).flatten(-2)
    assert relative_error(own, seen["attended"]) <= 1e-6
    cos, sin = kwargs["position_embeddings"]
    x = torch.randn(3, 4, 11, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(apply_rope(x, cos, sin), apply_rotary_pos_emb(x, x, cos, sin)[0], atol=1e-6)
    assert torch.allclose(apply_rope(x, cos, sin).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_a_scale_that_differs_within_a_pair_would_change_the_products():
    """Why the pairs are tied: RoPE does not commute with other scales, and such a scale is refused."""
    block, hidden, kwargs = _block("llama")
    heads = attention_heads(block, hidden, kwargs)
    scale = torch.ones(heads.key_max().shape)
    scale[:, 0] = 2.0
    with pytest.raises(UsageError, match="RoPE"):
        fold_attention(block, scale)
    block.self_attn.k_proj.weight.data /= scale.reshape(-1)[:, None]
    block.self_attn.q_proj.weight.data *= scale.repeat_interleave(2, 0).reshape(-1)[:, None]
    assert relative_error(_products(attention_heads(block, hidden, kwargs)), _products(heads)) > 1e-2


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.85])
def test_both_channels_of_a_pair_get_the_same_bits(alpha):
    """A power that is computed for eight numbers at once and for the rest one by one may differ in the last bit."""
    for heads, size in ((1, 10), (1, 14), (1, 24), (2, 36), (3, 40), (5, 24), (2, 100), (3, 64)):
        key_max = torch.rand(heads, size, generator=seeded(size)) * 20
        scale = attention_scales(key_max, alpha, query_max=key_max.flip(1), beta=1 - alpha)
        assert torch.equal(*scale.chunk(2, 1)), (heads, size)


def test_scales_by_hand():
    key_max = torch.tensor([[16.0, 1.0, 4.0, 9.0], [4.0, 0.0, 1.0, 0.0]])
    query_max = torch.tensor([[4.0, 9.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(attention_scales(key_max), torch.tensor([[4.0, 3, 4, 3], [2, 1, 2, 1]]))
    assert torch.equal(attention_scales(key_max, 0.0), torch.ones(2, 4))
    assert torch.equal(attention_scales(key_max, shared=True), torch.tensor([[4.0, 3, 4, 3]] * 2))
    both = attention_scales(key_max, 0.5, query_max=query_max, beta=0.5)
    assert torch.equal(both, torch.tensor([[2.0, 1, 2, 1], [2, 1, 2, 1]]))


def test_query_max_covers_all_heads_that_read_a_key():
    query = torch.zeros(1, 4, 2, 2)
    query[0, 1, 1, 0], query[0, 3, 0, 1] = -5.0, 2.0
    heads = Heads(query, torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
    assert torch.equal(heads.query_max(), torch.tensor([[5.0, 0.0], [0.0, 2.0]]))


@pytest.mark.parametrize("bits", [4, 8])
def test_folding_costs_the_weights_no_rounding_error(bits):
    """A row that is multiplied by a number is rounded to the same codes, in float32 up to ties."""
    block, hidden, kwargs = _block("llama")
    heads = attention_heads(block, hidden, kwargs)
    grid = IntGrid(bits, granularity="group", group_size=8, scale_dtype=torch.float32)
    before = nearest(block.self_attn.k_proj.weight.detach(), grid)[0].codes
    fold_attention(block, _scale(block, heads))
    after = nearest(block.self_attn.k_proj.weight.detach(), grid)[0].codes
    assert float((before != after).float().mean()) <= 1e-2


def _outliers(seed: int = 0) -> Heads:
    """Keys with a channel pair fifteen times as large as the others."""
    g = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, 64, 16, generator=g) for heads in (4, 2, 2))
    key[..., 3] *= 15
    key[..., 11] *= 15
    return Heads(query / 4, key, value)


def test_smoothing_keeps_more_of_the_output_of_4_bit_keys():
    heads, grid = _outliers(), ActivationGrid(4, symmetric=False)
    want = attend(heads.query, heads.key, heads.value)

    def error(scale):
        rounded = grid.round_trip(heads.key / scale[:, None])
        query = heads.query * scale.repeat_interleave(2, 0)[:, None]
        return relative_error(attend(query, rounded, heads.value), want)

    assert error(attention_scales(heads.key_max())) < 0.7 * error(torch.ones(2, 16))


def test_the_search_finds_the_least_loss_of_its_candidates():
    heads, grid = _outliers(), ActivationGrid(4, symmetric=False)
    found = search_attention(heads, grid, points=4)
    assert list(found.losses) == [
        (0, 0),
        (0.25, 0),
        (0.25, 0.75),
        (0.5, 0),
        (0.5, 0.5),
        (0.75, 0),
        (0.75, 0.25),
        (1, 0),
    ]
    assert found.losses[found.alpha, found.beta] == min(found.losses.values()) < 0.7 * found.losses[0, 0]
    want = attention_scales(heads.key_max(), found.alpha, query_max=heads.query_max(), beta=found.beta)
    assert torch.equal(found.scale, want)
    # each loss is the mean squared error of the output, computed here once more
    scale = attention_scales(heads.key_max(), 0.5)[:, None]
    rounded = attend(heads.query * scale.repeat_interleave(2, 0), grid.round_trip(heads.key / scale), heads.value)
    loss = (rounded - attend(heads.query, heads.key, heads.value)).square().mean()
    assert found.losses[0.5, 0] == pytest.approx(float(loss), rel=1e-5)


def test_without_a_need_the_search_leaves_keys_alone():
    """Keys that a fine grid holds exactly: no candidate beats λ = 1, and the first of equals is kept."""
    g = torch.Generator().manual_seed(0)
    key = torch.randint(-7, 8, (1, 2, 32, 8), generator=g).float()
    key[..., 0], key[..., 1] = -8.0, 7.0
    heads = Heads(torch.randn(1, 2, 32, 8, generator=g), key, torch.randn(1, 2, 32, 8, generator=g))
    found = search_attention(heads, ActivationGrid(4, symmetric=False), points=5)
    assert (found.alpha, found.beta) == (0.0, 0.0) and torch.equal(found.scale, torch.ones(2, 8))


def test_what_does_not_fit_is_refused():
    block, hidden, kwargs = _block("llama")
    shape = attention_heads(block, hidden, kwargs).key_max().shape
    for scale in (torch.ones(3, 8), torch.zeros(shape), torch.full(shape, float("inf"))):
        with pytest.raises(UsageError):
            fold_attention(block, scale)
    with pytest.raises(UsageError, match="share"):
        qwen3, *_ = _block("qwen3")
        fold_attention(qwen3, torch.tensor([[1.0], [2.0]]).expand(2, 12))
    for options in ({"alpha": 2}, {"beta": -1}, {"beta": 0.5}):
        with pytest.raises(UsageError):
            attention_scales(torch.ones(2, 4), **options)
    with pytest.raises(UsageError, match="even"):
        attention_scales(torch.ones(2, 3))
    with pytest.raises(CalibrationError):
        attention_scales(torch.full((2, 4), float("nan")))
    with pytest.raises(UsageError, match="points"):
        search_attention(_outliers(), ActivationGrid(4), points=0)
    model = tiny_model("opt")
    with pytest.raises(UnsupportedModelError, match="rotary"):
        attention_heads(block_list(model)[0], *block_inputs(model, tiny_windows()))
