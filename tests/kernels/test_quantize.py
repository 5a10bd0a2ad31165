"""Quantization of tokens against its reference, bit for bit where only one rounding decides."""

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid
from lqedu_kernels._tensors import Target
from lqedu_kernels.quantize import (
    LONGEST,
    Quantized,
    TokenGrid,
    bytes_moved,
    default_config,
    operations,
    quantize_reference,
    quantize_tokens,
    rmsnorm_quantize,
    rmsnorm_reference,
    search_space,
    silu_quantize,
    silu_reference,
)

H100 = Target("NVIDIA H100 80GB HBM3", (9, 0), 132)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GRIDS = (
    TokenGrid(), TokenGrid("int8", clip_ratio=0.7), TokenGrid("int8", symmetric=False), TokenGrid("int8", False, 0.9),
    TokenGrid("int4"), TokenGrid("int4", False), TokenGrid("int4", clip_ratio=0.9),
)  # fmt: skip
FLOATS = (TokenGrid("e4m3"), TokenGrid("e4m3", group_size=128), TokenGrid("e4m3", group_size=32))
#: Fraction of codes that float32 sums in another order, an approximate rsqrt or exponential may move to the next one:
#: an h within 2^-22 of a tie between two 16-bit numbers, 2^-11 apart.
MOVED = 2.0**-10


def tokens(m: int, k: int, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> Tensor:
    """Random, and among them: zeros, one element alone, numbers near the ends of the dtype, and exact ties."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 3
    special = [torch.zeros(k), torch.zeros(k), torch.full((k,), 60000.0), x[0] * 1e-6, torch.arange(k) % 255 - 127.0]
    for row, values in zip(range(m - 1, 0, -1), special, strict=False):
        x[row] = values
    if m > 2:
        x[m - 2, k // 2] = -2.0
    return x.to(dtype).to(device)


def assert_equal(got: Quantized, want: Quantized) -> None:
    for name, a, b in zip(Quantized._fields, got, want, strict=True):
        assert (a is None) == (b is None), name
        if b is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            a, b = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (a, b))
            wrong = (a != b).nonzero()
            assert len(wrong) == 0, f"{name}: {len(wrong)} differ, first at {wrong[0].tolist()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 64), (7, 130), (3, 1280)])
def test_codes_scales_zeros_and_sums_are_those_of_the_reference(
    m: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = tokens(m, k, dtype, device)
    for grid in GRIDS:
        got = quantize_tokens(x, grid, sums=True)
        assert_equal(got, quantize_reference(x, grid, sums=True))
        assert_equal(got, quantize_tokens(x, grid, sums=True))
    for grid in FLOATS:
        assert_equal(quantize_tokens(x, grid), quantize_reference(x, grid))


@pytest.mark.parametrize(
    "grid", [TokenGrid(), TokenGrid("int4", clip_ratio=0.9), TokenGrid("int8", False), TokenGrid("int4", False, 0.8)]
)
def test_reference_is_the_activation_grid_of_lqedu(grid: TokenGrid) -> None:
    x = tokens(7, 320, torch.float16, torch.device("cpu"))
    bits = {"int8": 8, "int4": 4}[grid.format]
    theirs = ActivationGrid(bits=bits, symmetric=grid.symmetric, clip_ratio=grid.clip_ratio)
    scale, zero = theirs.fit(x)
    assert_equal(quantize_reference(x, grid), Quantized(theirs.encode(x, scale, zero), scale, zero))


@pytest.mark.parametrize("size", [None, 128])
def test_reference_is_the_float8_grid_of_lqedu(size: int | None) -> None:
    x = tokens(7, 320, torch.float16, torch.device("cpu"))
    theirs = Float8ActivationGrid() if size is None else Float8ActivationGrid("group", group_size=size)
    scale, _ = theirs.fit(x)
    codes = theirs.encode(x, scale).view(torch.float8_e4m3fn)
    assert_equal(quantize_reference(x, TokenGrid("e4m3", group_size=size)), Quantized(codes, scale))


def test_all_codes_occur(device: torch.device) -> None:
    x = torch.linspace(-1, 1, 4096, device=device).half()[None]
    assert set(quantize_tokens(x).codes.unique().tolist()) == set(range(-127, 128))
    assert set(quantize_tokens(x, TokenGrid("int4")).codes.unique().tolist()) == set(range(-7, 8))
    x = torch.linspace(-0.5, 1, 4096, device=device).half()[None]
    assert set(quantize_tokens(x, TokenGrid("int8", False)).codes.unique().tolist()) == set(range(-128, 128))


@pytest.mark.parametrize("config", [
    dict(piece=256, warps=4, stages=1, resident=0), dict(piece=1024, warps=2, stages=2, resident=1),
    dict(piece=128, warps=1, stages=3, resident=2),
])  # fmt: skip
def test_pieces_and_shared_programs_change_nothing(config: dict, device: torch.device) -> None:
    x = tokens(7, 700, torch.float16, device)
    for grid in (TokenGrid(), TokenGrid("int8", False), TokenGrid("e4m3"), TokenGrid("e4m3", group_size=64)):
        sums = grid.format != "e4m3"
        assert_equal(quantize_tokens(x, grid, sums=sums, config=config), quantize_reference(x, grid, sums=sums))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [96, 1200])
def test_rmsnorm(k: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual = tokens(6, k, dtype, device).clamp(-100, 100), tokens(6, k, dtype, device, seed=1).clamp(-100, 100)
    weight = tokens(1, k, dtype, device, seed=2)[0]
    for other in (None, residual):
        h, hidden = rmsnorm_reference(x, weight, 1e-5, other)
        for grid in (TokenGrid(), TokenGrid("int8", False), TokenGrid("e4m3")):
            sums = grid.format != "e4m3"
            got = rmsnorm_quantize(x, weight, grid, eps=1e-5, residual=other, sums=sums)
            assert_near(got, quantize_reference(h, grid, sums=sums))
            assert (got.hidden is None) if other is None else torch.equal(got.hidden, hidden)
            if sums:
                assert torch.equal(got.sums, got.codes.sum(1, keepdim=True, dtype=torch.int32))


def test_the_norm_is_that_of_torch(device: torch.device) -> None:
    x, weight = tokens(3, 512, torch.float32, device), tokens(1, 512, torch.float32, device)[0]
    torch.testing.assert_close(rmsnorm_reference(x, weight, 1e-5)[0], functional.rms_norm(x, (512,), weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_halves_of_one_output(dtype: torch.dtype, device: torch.device) -> None:
    both = tokens(7, 2 * 704, dtype, device).clamp(-80, 80)
    gate, up = both[:, :704], both[:, 704:]
    assert not gate.is_contiguous()
    h = silu_reference(gate, up)
    torch.testing.assert_close(h.float(), functional.silu(gate.float()) * up.float(), rtol=2**-7, atol=1e-3)
    for grid in (TokenGrid(), TokenGrid("int4"), TokenGrid("e4m3")):
        assert_near(silu_quantize(gate, up, grid), quantize_reference(h, grid))


def assert_near(got: Quantized, want: Quantized) -> None:
    """Scales within two roundings of a 16-bit h, codes one step apart at most, and few of them."""
    torch.testing.assert_close(got.scale, want.scale, rtol=2.0**-7, atol=0)
    a, b = (t.codes.float() if t.codes.dtype == torch.float8_e4m3fn else t.codes.int() for t in (got, want))
    assert float((a != b).double().mean()) <= MOVED
    assert ((a - b).abs() <= (b.abs() / 8 + 2.0**-9 if a.is_floating_point() else 1)).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_token_of_nan_or_infinity_shows_it(device: torch.device) -> None:
    x = tokens(5, 200, torch.float16, device)
    x[1, 7], x[2, 150] = float("nan"), float("-inf")
    for grid in (TokenGrid(), TokenGrid("int8", False), TokenGrid("e4m3")):
        got, want = quantize_tokens(x, grid), quantize_reference(x, grid)
        assert got.scale[1].isnan() and not got.scale[2].isfinite()
        for row in (0, 3, 4):
            assert torch.equal(got.codes[row].view(torch.uint8), want.codes[row].view(torch.uint8))


def test_quotients_of_every_mantissa(device: torch.device) -> None:
    """Scales of all kinds: x / s is the IEEE quotient, so a code beside a tie falls to torch's side."""
    x = torch.rand(60, 128, generator=torch.Generator().manual_seed(3)).half().to(device)
    x[:, 0] = torch.linspace(1, 2, 60).half().to(device)
    assert_equal(quantize_tokens(x, TokenGrid("e4m3")), quantize_reference(x, TokenGrid("e4m3")))
    assert_equal(quantize_tokens(x), quantize_reference(x))


def test_no_tokens(device: torch.device) -> None:
    got = quantize_tokens(torch.empty(0, 64, dtype=torch.float16, device=device), sums=True)
    assert got.codes.shape == (0, 64) and got.scale.shape == got.sums.shape == (0, 1)


def test_arguments_are_unchanged(device: torch.device) -> None:
    x, residual, weight = (tokens(3, 96, torch.float16, device, seed=s) for s in range(3))
    before = [t.clone() for t in (x, residual, weight)]
    rmsnorm_quantize(x, weight[0].clone(), eps=1e-5, residual=residual)
    silu_quantize(x, residual)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, residual, weight), strict=True))


def test_configurations_fit_their_tokens() -> None:
    for k in (1, 64, 576, 4096, 5120, 11008, 14336, 28672, 53248, LONGEST):
        for c in (default_config(1024, k, H100), *search_space(1024, k, H100)):
            pieces = -(-k // c["piece"])
            assert c["piece"] & (c["piece"] - 1) == 0 and pieces <= 16 and 1 <= c["warps"] <= 32
        assert len(search_space(1024, k, H100)) <= 24
    assert default_config(1, 11008, H100) == dict(piece=4096, warps=8, stages=1, resident=0)


def test_counts() -> None:
    assert bytes_moved(16, 4096) == 16 * (3 * 4096 + 4)
    assert bytes_moved(1, 100, residual=True) == 704 and bytes_moved(1, 100, gate=True) == 504
    assert operations(2, 10) == 180


X = torch.zeros(3, 96, dtype=torch.float16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: quantize_tokens(x.int()), TypeError, "x must be float16, bfloat16 or float32, got int32"),
        (lambda x: quantize_tokens(x.tolist()), TypeError, "x must be a tensor, got list"),
        (lambda x: quantize_tokens(x[0]), ValueError, "x must have shape [M, K] with K from 1 to 57344, got [96]"),
        (lambda x: quantize_tokens(x[:, ::2]), ValueError, "x has elements 2 apart in a row: pass x.contiguous()"),
        (lambda x: quantize_tokens(x, TokenGrid("int2")), ValueError, "grid must be a TokenGrid of format"),
        (lambda x: quantize_tokens(x, TokenGrid("e4m3"), sums=True), ValueError, "no sums of codes"),
        (lambda x: quantize_tokens(x, TokenGrid("e4m3", False)), ValueError, "has no zero point"),
        (
            lambda x: quantize_tokens(x, TokenGrid(clip_ratio=1.5)),
            ValueError,
            "clip_ratio above 0 and at most 1, got 1.5",
        ),
        (lambda x: quantize_tokens(x, TokenGrid(group_size=128)), ValueError, "group_size None, or"),
        (lambda x: rmsnorm_quantize(x, x[0].float(), eps=1e-5), TypeError, "weight must be a tensor of the first"),
        (lambda x: rmsnorm_quantize(x, x[0, :64], eps=1e-5), ValueError, "weight must have shape [96], got [64]"),
        (lambda x: rmsnorm_quantize(x, x[0], eps=1e-5, residual=x.T), ValueError, "residual must have shape [3, 96]"),
        (
            lambda x: rmsnorm_quantize(x, x[0], eps=1e-5, residual=torch.stack((x, x), 1)[:, 0]),
            ValueError,
            "residual is not contiguous",
        ),
        (lambda x: silu_quantize(x, x[:2]), ValueError, "up must have shape [3, 96], got [2, 96]"),
        (lambda x: silu_quantize(x.int(), x), TypeError, "gate must be float16"),
        (lambda x: silu_quantize(x, x.to("meta")), ValueError, "up is on meta, the first argument on"),
    ],
)
def test_refusals(call, error: type[Exception], message: str, device: torch.device) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(X.to(device))
