"""FP8 grids: closed forms, an independent loop over ragged tiles, what the search finds, and what is refused."""

import pytest
import torch

from lqedu.errors import GridError
from lqedu.formats.fp8 import DTYPES, Float8ActivationGrid, Float8Grid, Float8Tensor, float8_quantize
from lqedu.formats.smallfloat import FORMATS
from tests import problems

GRANULARITIES = ["tensor", "channel", "block"]
EIGHT = [form.name for form in DTYPES]


def _by_loop(w: torch.Tensor, height: int, width: int, name: str) -> torch.Tensor:
    """The rounded weight, tile by tile, in float64 from the format's table of values."""
    form, result = FORMATS[name], torch.empty_like(w)
    table = form.values()[torch.isfinite(form.values())].unique().double()
    for i in range(0, w.shape[0], height):
        for j in range(0, w.shape[1], width):
            tile = w[i : i + height, j : j + width]
            scale = (tile.abs().max() / form.max).to(torch.float32)
            x = (tile / scale).double().reshape(-1, 1)
            nearest = table[(x - table).abs().argmin(1)]
            result[i : i + height, j : j + width] = (nearest.float() * scale).view(tile.shape)
    return result


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(40, 72), (32, 64), (5, 3), (1, 33)])
def test_weights_are_rounded_to_the_nearest_value_of_their_tile(name, granularity, shape):
    w = problems.weight(*shape, seed=0)
    grid = Float8Grid(granularity, block_size=16, format=name)
    height, width = {"tensor": shape, "channel": (1, shape[1]), "block": (16, 16)}[granularity]
    got, want = float8_quantize(w, grid), _by_loop(w, height, width, name)
    assert got.scale.shape == (-(-shape[0] // height), -(-shape[1] // width))
    different = got.dequantize() != want  # on a tie argmin takes the first of two, encoding the even one
    assert torch.allclose((got.dequantize() - w).abs()[different], (want - w).abs()[different], rtol=1e-5)
    assert float(different.float().mean()) < 0.01


def test_the_scale_is_the_largest_weight_on_the_largest_code_bit_for_bit():
    """The rule of torchao and compressed-tensors: w / s, s = max|w| / 448 in float32, clamped, cast."""
    w = problems.weight(24, 100, seed=1)
    stored = float8_quantize(w, Float8Grid("channel"))
    scale = w.abs().amax(1, keepdim=True) / 448
    assert torch.equal(stored.scale, scale)
    assert torch.equal(stored.codes, (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    assert bool(((stored.codes & 127).amax(1) == 126).all())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_error_is_at_most_half_a_unit_in_the_last_place(granularity):
    """2^-4 relative for normal numbers, half a subnormal step below; the float32 scale adds a few 2^-24."""
    w = problems.weight(300, 200, seed=2)
    stored = float8_quantize(w, Float8Grid(granularity))
    scale = stored.grid._tiled(torch.ones_like(w)) * stored.scale[:, None, :, None]
    bound = torch.maximum(2.0**-4 * stored.grid._tiled(w).abs(), 2.0**-10 * scale) * (1 + 1e-5)
    assert bool(((stored.grid._tiled(stored.dequantize()) - stored.grid._tiled(w)).abs() <= bound).all())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_search_covers_an_octave_and_never_loses(granularity):
    w = problems.weight(150, 140, seed=3)
    plain, searched = (float8_quantize(w, Float8Grid(granularity, search=s)) for s in ("none", "mse"))
    ratio = searched.scale / plain.scale
    assert bool(((ratio >= 1) & (ratio < 2)).all())
    errors = [plain.grid._tiled(q.dequantize() - w).square().sum((1, 3)) for q in (plain, searched)]
    assert bool((errors[1] <= errors[0]).all()) and float(errors[1].sum()) < float(errors[0].sum())
    # a grid of normal numbers times two is itself: another octave has nothing to offer
    codes, double = plain.grid.encode(w, plain.scale), plain.grid.encode(w, 2 * plain.scale)
    normal = (double & 127) > 8
    assert torch.equal(codes[normal].int() - 8, double[normal].int())


def test_zeros_tiny_and_huge_weights():
    w = torch.zeros(4, 8)
    w[1], w[2, 0], w[3] = 1e-42, 1e-30, 3e38
    stored = float8_quantize(w, Float8Grid("channel"))
    assert stored.scale[0].item() == 1 and torch.isfinite(stored.dequantize()).all()
    assert torch.equal(stored.dequantize()[0], w[0])
    assert torch.allclose(stored.dequantize()[2:], w[2:], rtol=2**-4, atol=0)
    assert bool((stored.scale >= torch.finfo(torch.float32).tiny).all())
    with pytest.raises(GridError, match="overflows float32"):
        float8_quantize(torch.full((2, 2), 1e200, dtype=torch.float64), Float8Grid())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    w = torch.ones(4, 4)
    w[1, 2] = bad
    for granularity in GRANULARITIES:
        with pytest.raises(GridError, match="NaN or infinite"):
            float8_quantize(w, Float8Grid(granularity))
    for granularity in ("token", "tensor", "group"):
        with pytest.raises(GridError, match="NaN or infinite"):
            Float8ActivationGrid(granularity).fit(w)
    with pytest.raises(GridError, match="floating-point"):
        float8_quantize(torch.ones(4, 4, dtype=torch.int8), Float8Grid())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_stored_weight_counts_its_bytes_and_comes_back(granularity):
    w = problems.weight(130, 576, seed=4)
    before = w.clone()
    grid = Float8Grid(granularity)
    stored = float8_quantize(w, grid)
    assert torch.equal(w, before)
    packed = stored.packed()
    assert sum(t.nbytes for t in packed.values()) == stored.nbytes == grid.nbytes((130, 576))
    assert stored.bits_per_weight == 8 * stored.nbytes / (130 * 576)
    again = Float8Tensor.from_packed(packed, Float8Grid.from_dict(grid.to_dict()), stored.shape)
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert torch.equal(Float8Tensor.empty(grid, (130, 576)).dequantize(), torch.zeros(130, 576))
    assert stored.dequantize(torch.bfloat16).dtype == torch.bfloat16
    exact = stored.dequantize(torch.float64)
    assert torch.equal(exact.float(), stored.dequantize())  # eight bits of code times 24 of scale fit float64


def test_shapes_of_blocks_are_ragged():
    assert Float8Grid("block").scale_shape((576, 1536)) == (5, 12)  # 576 = 4.5 * 128
    assert Float8Grid("block").scale_shape((1, 1)) == (1, 1)
    assert Float8Grid("tensor").scale_shape((576, 1536)) == (1, 1)


def test_foreign_tensors_are_refused():
    stored = float8_quantize(problems.weight(20, 30, seed=0), Float8Grid("block", block_size=16))
    packed = stored.packed()
    for change, sentence in (
        ({"zero": packed["scale"]}, "codes and scale"),
        ({"codes": packed["codes"][:, 1:]}, "do not fit"),
        ({"codes": packed["codes"].to(torch.int8)}, "uint8"),
        ({"scale": packed["scale"].half()}, "float32"),
        ({"scale": packed["scale"][:1]}, "shape"),
    ):
        with pytest.raises(GridError, match=sentence):
            Float8Tensor.from_packed(packed | change, stored.grid, stored.shape)
    for d in ({"granularity": "tensor"}, None, "block"):
        with pytest.raises(GridError, match="fields"):
            Float8Grid.from_dict(d)
    with pytest.raises(GridError, match="grid is a Float8Grid"):
        Float8Tensor(stored.codes, stored.scale, "block")
    with pytest.raises(GridError, match="scale of an FP8 weight is a tensor"):
        Float8Tensor(stored.codes, 1.0, stored.grid)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scales_that_scale_nothing_are_refused(granularity):
    w = problems.weight(20, 36, seed=0)
    stored = float8_quantize(w, Float8Grid(granularity, 16))
    grid, packed = stored.grid, stored.packed()
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        scale = stored.scale.clone()
        scale[-1, -1] = bad
        for use in (
            lambda scale=scale: grid.encode(w, scale),
            lambda scale=scale: grid.decode(stored.codes, scale),
            lambda scale=scale: Float8Tensor(stored.codes, scale, grid),
            lambda scale=scale: Float8Tensor.from_packed(packed | {"scale": scale}, grid, stored.shape),
        ):
            with pytest.raises(GridError, match="zero, negative"):
                use()
    others = [torch.ones(5, 7), torch.ones(3), torch.ones(()), stored.scale[None]]
    for scale in others:
        for use in (lambda s=scale: grid.encode(w, s), lambda s=scale: grid.decode(stored.codes, s)):
            with pytest.raises(GridError, match="have shape"):
                use()
    with pytest.raises(GridError, match="floating-point"):
        grid.encode(w, stored.scale.to(torch.int32))
    for wrong in (w.to(torch.int8), w.to(torch.float8_e4m3fn), w.tolist()):
        for use in (lambda x=wrong: grid.encode(x, stored.scale), lambda x=wrong: grid.fit(x)):
            with pytest.raises(GridError, match="floating-point"):
                use()
        with pytest.raises(GridError, match="floating-point"):
            float8_quantize(wrong, grid)
    with pytest.raises(GridError, match="grid is a Float8Grid"):
        float8_quantize(w, granularity)


@pytest.mark.parametrize(
    ("cls", "fields", "sentence"),
    [
        (Float8Grid, {"granularity": "group"}, "granularity"),
        (Float8Grid, {"block_size": 0}, "block_size"),
        (Float8Grid, {"block_size": True}, "block_size"),
        (Float8Grid, {"format": "E2M1"}, "format"),
        (Float8Grid, {"format": None}, "format"),
        (Float8Grid, {"search": "yes"}, "search"),
        (Float8ActivationGrid, {"granularity": "channel"}, "granularity"),
        (Float8ActivationGrid, {"static": True}, "granularity='tensor'"),
        (Float8ActivationGrid, {"granularity": "tensor", "static": "yes"}, "static is True or False"),
        (Float8ActivationGrid, {"group_size": 1.5}, "group_size"),
        (Float8ActivationGrid, {"format": "FP8"}, "format"),
    ],
)
def test_contradictions_are_refused(cls, fields, sentence):
    with pytest.raises(GridError, match=sentence):
        cls(**fields)


def test_the_scales_of_activations():
    x = problems.weight(6, 40, seed=5).view(2, 3, 40) * torch.logspace(-2, 2, 3)[:, None]
    token, tensor, group = (Float8ActivationGrid(g, group_size=16) for g in ("token", "tensor", "group"))
    assert torch.equal(token.fit(x)[0], x.abs().amax(-1, keepdim=True) / 448)
    assert torch.equal(tensor.fit(x)[0], (x.abs().max() / 448).reshape(1))
    want = torch.stack([x[..., i : i + 16].abs().amax(-1) / 448 for i in (0, 16, 32)], -1)
    scale, zero = group.fit(x)
    assert torch.equal(scale, want) and zero is None
    pieces = [token.round_trip(x[..., i : i + 16]) for i in (0, 16, 32)]
    assert torch.equal(group.round_trip(x), torch.cat(pieces, -1))
    assert group.encode(x, scale).dtype == torch.uint8 and group.round_trip(x.half()).dtype == torch.float16
    for grid in (token, tensor, group):
        assert torch.equal(grid.round_trip(torch.zeros(2, 5)), torch.zeros(2, 5))


def test_a_static_scale_saturates_what_it_has_not_seen():
    grid = Float8ActivationGrid("tensor", static=True)
    scale, _ = grid.fit(torch.tensor([1.0, -2.0]))
    seen = grid.decode(grid.encode(torch.tensor([5.0, -torch.inf, 2.0]), scale), scale)
    assert torch.allclose(seen, torch.tensor([2.0, -2.0, 2.0]))


def test_activation_grids_as_data():
    grid = Float8ActivationGrid("tensor", static=True, format="E5M2")
    assert Float8ActivationGrid.from_dict(grid.to_dict()) == grid
    for d in ({"kind": "float8"}, grid.to_dict() | {"kind": "integer"}, {}, None):
        with pytest.raises(GridError, match="fields"):
            Float8ActivationGrid.from_dict(d)


@pytest.mark.parametrize("granularity", ["token", "tensor", "group"])
def test_activations_that_are_none_are_refused(granularity):
    grid = Float8ActivationGrid(granularity, group_size=16)
    for wrong in (
        1.0,
        None,
        torch.ones(2, 40, dtype=torch.int8),
        torch.ones(2, 40) > 0,
        torch.ones(2).to(torch.float8_e5m2),
    ):
        for use in (grid.fit, grid.round_trip, lambda x: grid.encode(x, torch.ones(1))):
            with pytest.raises(GridError, match="floating-point"):
                use(wrong)
    for wrong in (torch.ones(()), torch.ones(3, 0)):
        with pytest.raises(GridError, match="a token and a feature"):
            grid.fit(wrong)
    if granularity == "tensor":
        with pytest.raises(GridError, match="a token and a feature"):
            grid.fit(torch.ones(0, 40))
    else:
        assert grid.fit(torch.ones(0, 40))[0].numel() == 0
    x = torch.ones(2, 40)
    for scale in (torch.ones(2, 2), torch.ones(()), torch.ones(2, 40)):
        with pytest.raises(GridError, match="features have scales"):
            grid.encode(x, scale)
        with pytest.raises(GridError, match="features have scales"):
            grid.decode(torch.ones(2, 40, dtype=torch.uint8), scale)
