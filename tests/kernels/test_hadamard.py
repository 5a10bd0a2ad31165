"""Transforms against lqedu's, an fp64 oracle and the matrix itself; fused codes against the codes of the reference."""

import re

import pytest
import torch
from torch import Tensor

from lqedu.linalg.hadamard import _base, fast_hadamard, hadamard_factors, hadamard_matrix
from lqedu.runtime.inputs import InputPath
from lqedu_kernels._tensors import Target
from lqedu_kernels.hadamard import (
    bytes_moved,
    default_config,
    hadamard_quantize,
    hadamard_quantize_reference,
    hadamard_reference,
    hadamard_transform,
    operations,
    search_space,
)
from lqedu_kernels.hadamard_tables import factors, split, table
from lqedu_kernels.quantize import TokenGrid, quantize_reference

H100, A100, L40S = (
    Target("NVIDIA H100", (9, 0), 132),
    Target("NVIDIA A100", (8, 0), 108),
    Target("NVIDIA L40S", (8, 9), 142),
)
#: The factors of the issue that the rule m = smallest with a table leaves (40 = 20 · 2).
FACTORS = (12, 20, 28, 36, 52, 60, 108, 140, 148, 156, 172)
#: Relative error in the norm: two roundings to 16 bits, each uniform within half a unit of numbers between two powers of
#: two, 2^-11 / √3 · 0.72 = 2.04e-4 in float16, eight times that in bfloat16; twice, root of the sum of squares, 5 % room.
ERROR = {torch.float16: 2.04e-4 * 2**0.5 * 1.05, torch.bfloat16: 8 * 2.04e-4 * 2**0.5 * 1.05}
#: Codes may be one step apart where y / s is within the rounding between the products of a tie: y moves by 2.04e-4 of
#: the norm's average, a scale is a few of those divided by 127; measured 0.7 % in float16, 5 % in bfloat16.
MOVED = {torch.float16: 0.015, torch.bfloat16: 0.08}


def rows(m: int, k: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal numbers, one row of zeros if there are several, one outlier a row."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed + k))
    x[:, k // 3] = 50.0
    if m > 1:
        x[1] = 0.0
    return x.to(dtype).to(device)


def check(x: Tensor, length: int, stride: int = 1, config: dict | None = None) -> None:
    """Transform and fused codes of x."""
    path = InputPath(hadamard=length, stride=stride)
    want = path.transform(x.double())
    y = hadamard_transform(x, length=length, stride=stride, config=config)
    assert y.dtype == x.dtype and y.shape == x.shape
    error = (y.double() - want).norm(dim=1)
    assert (error <= ERROR[x.dtype] * want.norm(dim=1) * (1 + 4 / x.shape[1] ** 0.5)).all(), error / want.norm(dim=1)
    got = hadamard_quantize(x, length=length, stride=stride, sums=True, config=config)
    near = quantize_reference(want, sums=True)
    torch.testing.assert_close(got.scale, near.scale, rtol=4 * ERROR[x.dtype], atol=0)
    apart = (got.codes.int() - near.codes.int()).abs()
    assert apart.max() <= 1 and apart.double().mean() <= MOVED[x.dtype]
    assert torch.equal(got.sums, got.codes.sum(1, keepdim=True, dtype=torch.int32))


def test_tables_are_those_of_lqedu() -> None:
    for m in range(12, 173, 8):
        assert torch.equal(table(m), _base(m).double()), m
    assert torch.equal(table(1), torch.ones(1, 1, dtype=torch.float64))


def test_the_factorization_is_that_of_lqedu() -> None:
    for n in (1, 2, 12, 40, 64, 576, 1536, 3584, 4096, 5120, 8960, 11008, 13824, 14336, 18944, 28672, 53248):
        assert factors(n) == hadamard_factors(n), n


@pytest.mark.parametrize("length", [64, 576, 1280, 11008])
def test_reference_is_the_transform_of_lqedu(length: int) -> None:
    x = rows(2, length, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(hadamard_reference(x), fast_hadamard(x), rtol=1e-12, atol=1e-12)
    y = x.half()
    assert torch.equal(hadamard_reference(y), hadamard_reference(y.float()).half())
    want = InputPath(hadamard=16, stride=4).transform(x)
    torch.testing.assert_close(hadamard_reference(x, 16, 4), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
def test_powers_of_two(length: int, device: torch.device) -> None:
    check(rows(3 if length >= 512 else 67, length, torch.float16, device), length)


@pytest.mark.parametrize("m", FACTORS)
def test_every_factor(m: int, device: torch.device) -> None:
    check(rows(3, 16 * m, torch.float16, device), 16 * m)


@pytest.mark.parametrize("length", [5120, 11008, 13824, 14336, 18944])
def test_widths_of_models(length: int, device: torch.device) -> None:
    check(rows(1, length, torch.float16, device), length)


@pytest.mark.parametrize("length", [64, 576, 1024, 8192])
def test_bfloat16(length: int, device: torch.device) -> None:
    check(rows(3, length, torch.bfloat16, device), length)


@pytest.mark.parametrize(
    ("k", "length", "stride"),
    [(1024, 64, 1), (1280, 256, 1), (768, 192, 1), (4096, 32, 128), (960, 20, 48), (1152, 12, 96), (1024, 4, 256)],
)
def test_blocks_and_heads(k: int, length: int, stride: int, device: torch.device) -> None:
    check(rows(5, k, torch.float16, device), length, stride)


@pytest.mark.parametrize("length", [14336, 12288, 20480])  # 28, 12 and 20: 64 holds no power of two of the last two
def test_two_launches_make_a_longer_transform(
    length: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lqedu_kernels import hadamard

    monkeypatch.setattr(hadamard, "_fits", lambda s, stride, target: s.elements <= 8192)
    x = rows(1, length, torch.float16, device)
    want = fast_hadamard(x.double())
    y = hadamard_transform(x)
    assert float((y.double() - want).norm() / want.norm()) <= 2 * ERROR[torch.float16]


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("resident", [0, 1])
def test_pieces_and_shared_programs(pieces: int, resident: int, device: torch.device) -> None:
    config = dict(pieces=pieces, warps=4, stages=2, resident=resident)
    check(rows(5, 1024, torch.float16, device), 1024, config=config)


def test_each_column_of_the_matrix(device: torch.device) -> None:
    """Unit vectors give the matrix itself, exactly where √n is a power of two."""
    x = torch.eye(64, device=device).half()
    assert torch.equal(hadamard_transform(x), hadamard_matrix(64).T.half().to(device) / 8)
    y = hadamard_transform(64 * torch.eye(256, device=device)[:9].half().contiguous())
    assert torch.equal(y, 4 * hadamard_matrix(256).T[:9].half().to(device))


def test_codes_of_other_grids(device: torch.device) -> None:
    x = rows(3, 1024, torch.float16, device)
    for grid in (TokenGrid("int4", clip_ratio=0.9), TokenGrid("int8", clip_ratio=0.5), TokenGrid("int8", False)):
        got, want = hadamard_quantize(x, grid), hadamard_quantize_reference(x, grid)
        torch.testing.assert_close(got.scale, want.scale, rtol=1e-3, atol=0)
        apart = (got.codes.int() - want.codes.int()).abs()
        assert apart.max() <= 1 and apart.double().mean() <= 2 * MOVED[torch.float16]
    for grid in (TokenGrid("e4m3"), TokenGrid("e4m3", group_size=128)):
        got, want = hadamard_quantize(x, grid), hadamard_quantize_reference(x, grid)
        torch.testing.assert_close(got.scale, want.scale, rtol=1e-3, atol=0)
        assert (
            (got.codes.float() - want.codes.float()).abs() <= want.codes.float().abs() / 8 + 0.25
        ).all()  # y itself moves a little


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_shows_and_stays_in_its_row(device: torch.device) -> None:
    x = rows(5, 576, torch.float16, device)
    x[2, 5] = float("nan")
    y, got = hadamard_transform(x), hadamard_quantize(x)
    assert y[2].isnan().all() and got.scale[2].isnan()
    assert y[[0, 1, 3, 4]].isfinite().all() and got.scale[[0, 1, 3, 4]].isfinite().all()


def test_launched_twice_equal_and_arguments_unchanged(device: torch.device) -> None:
    x = rows(3, 1536, torch.float16, device)
    before = x.clone()
    assert torch.equal(hadamard_transform(x), hadamard_transform(x)) and torch.equal(x, before)
    assert torch.equal(hadamard_quantize(x).codes, hadamard_quantize(x).codes)


def test_no_rows(device: torch.device) -> None:
    x = torch.empty(0, 4096, dtype=torch.float16, device=device)
    assert hadamard_transform(x).shape == (0, 4096) and hadamard_quantize(x).scale.shape == (0, 1)


def test_splits_hold_their_vectors() -> None:
    for length in (16, 128, 576, 1536, 4096, 5120, 8192, 11008, 13824, 14336, 16384, 18944, 28672):
        s = split(length)
        assert s.left * s.pieces * s.columns == length and s.left * s.vectors <= s.rows + s.more
        for target in (H100, A100, L40S):
            for config in (default_config(64, length, target), *search_space(64, length, target)):
                assert split(length, pieces=config["pieces"]) is not None
        assert len(search_space(64, length, H100)) <= 24
    assert split(53248) is None and split(4096, token=4096).vectors == 1
    assert split(128, token=4096).vectors == 32 and split(32, 128, token=4096).vectors == 2


def test_counts() -> None:
    assert bytes_moved(16, 4096) == 16 * 4096 * 4 and bytes_moved(1, 100, quantized=True) == 304
    assert operations(1, 4096) == 4096 * 12 and operations(2, 14336) == 2 * 14336 * (27 + 9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: hadamard_transform(x.float()), TypeError, "x ([M, K]) must be float16 or bfloat16, got float32"),
        (lambda x: hadamard_transform(x[0]), ValueError, "x ([M, K]) must have shape [any, any], got [96]"),
        (lambda x: hadamard_transform(x[:, :64]), ValueError, "x ([M, K]) is not contiguous"),
        (lambda x: hadamard_transform(x), ValueError, "length 96 is m · 2^k with 2^k below 16"),
        (lambda x: hadamard_transform(x, length=64), ValueError, "x has 96 columns, which transforms of length 64"),
        (lambda x: hadamard_transform(x, length=6, stride=16), ValueError, "length 6 has no Hadamard matrix here"),
        (lambda x: hadamard_transform(x, length=0), ValueError, "length must be a whole number of at least 1, got 0"),
        (lambda x: hadamard_transform(x, stride=-1), ValueError, "stride must be a whole number of at least 1, got -1"),
        (lambda x: hadamard_transform(x, stride=8), ValueError, "stride must be 1 or at least 9, got 8"),
        (
            lambda x: hadamard_transform(x, length=32, config={}),
            ValueError,
            "config lacks pieces, warps, stages, resident",
        ),
        (
            lambda x: hadamard_quantize(
                x, TokenGrid("int8", False), length=32, config=dict(pieces=1, warps=4, stages=1, resident=0)
            ),
            ValueError,
            "config is for transform and codes in one launch",
        ),
        (
            lambda x: hadamard_quantize(x, TokenGrid("int2"), length=32),
            ValueError,
            "grid must be a TokenGrid of format",
        ),
        (
            lambda x: hadamard_transform(x, length=32, config=dict(pieces=4, warps=4, stages=1, resident=0)),
            ValueError,
            "config has 4 pieces, which do not make a tile of length 32",
        ),
    ],
)
def test_refusals(call, error: type[Exception], message: str, device: torch.device) -> None:
    x = torch.zeros(3, 96, dtype=torch.float16, device=device)
    with pytest.raises(error, match=re.escape(message)):
        call(x)
