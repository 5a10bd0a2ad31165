"""The Gluon kernel of 8-bit matrices on a Hopper GPU; elsewhere there is nothing to run it (tests/kernels_compiled compiles it).

Each case runs twice into poisoned memory, against float64 sums of the codes.
"""

import pytest
import torch
from torch import Tensor

from lqedu_kernels._tensors import INTERPRET, target_of

if INTERPRET or not torch.cuda.is_available():
    pytest.skip("Gluon has no interpreter: this kernel needs a Hopper GPU", allow_module_level=True)

from lqedu_kernels import hopper_dense
from lqedu_kernels.fp8 import fp8_matmul, fp8_reference
from lqedu_kernels.w8a8 import row_sums, w8a8_matmul, w8a8_reference

if not hopper_dense.available(target_of(torch.empty(1, device="cuda"), "x")):
    pytest.skip("this kernel needs compute capability 9.0 and Triton 3.6", allow_module_level=True)

#: m, n, k: less than a tile; ragged in each, K shorter than the ring and not whole steps; several rounds of tiles, many
#: times around the ring.
SHAPES = [(1, 144, 272), (300, 1008, 1040), (130, 4112, 96), (1100, 11008, 640), (700, 4096, 4096)]
TILES = [(128, 256), (256, 128), (128, 192), (128, 128), (128, 96), (128, 64)]


def _config(rows: int, cols: int, lead: int) -> dict[str, int | str]:
    stages = hopper_dense._stages(rows, cols)
    tile = {"kernel": "hopper", "block_m": rows, "block_n": cols, "block_k": 128}
    return {**tile, "stages": stages, "group_m": 8, "lead": lead}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def _int8(rows: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-128, 128, (rows, k), dtype=torch.int8, device="cuda", generator=generator)


def _e4m3(rows: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, k, device="cuda", generator=generator).to(torch.float8_e4m3fn)


def _scales(rows: int, runs: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, runs, device="cuda", generator=generator) + 0.5


def _assert_close(y: Tensor, again: Tensor, want: Tensor, bound: float) -> None:
    """Both runs alike; every row and column within a bound relative to outputs of ordinary size (scales differ by three)."""
    assert torch.equal(y, again)
    error = (y.double() - want.double()).square().nan_to_num(nan=float("inf"))
    ordinary = want.double().square().mean().sqrt()
    for axis in (0, 1):
        assert error.mean(dim=axis).sqrt().max() <= 3 * bound * ordinary


@pytest.mark.parametrize("lead", [0, 2])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integer_sums_are_exact(
    shape: tuple[int, int, int], tile: tuple[int, int], lead: int, generator: torch.Generator
) -> None:
    m, n, k = shape
    x, w = _int8(m, k, generator), _int8(n, k, generator)
    scale, one = torch.full((1, 1), 2.0**-12, device="cuda"), torch.ones(1, 1, device="cuda")
    for _ in range(2):
        y = w8a8_matmul(x, scale, w, one, config=_config(*tile, lead))
        assert torch.equal(y, ((x.double() @ w.double().T).float() * 2.0**-12).half())


@pytest.mark.parametrize(
    ("tile", "dtype"), [(t, torch.float16) for t in TILES] + [((128, 192), torch.bfloat16)], ids=str
)
def test_scales_zero_points_and_bias(tile: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    m, n, k = 300, 1000, 1040  # N is no multiple of 16: another compilation
    x, w = _int8(m, k, generator), _int8(n, k, generator)
    scales = _scales(m, 1, generator), _scales(n, 1, generator) / k / 100
    zero = torch.randint(-128, 128, (m, 1), dtype=torch.int32, device="cuda", generator=generator)
    more = dict(x_zero=zero, w_sum=row_sums(w), bias=torch.randn(n, device="cuda", generator=generator), dtype=dtype)
    y, again = (w8a8_matmul(x, scales[0], w, scales[1], config=_config(*tile, 2), **more) for _ in range(2))
    _assert_close(
        y, again, w8a8_reference(x, scales[0], w, scales[1], **more), 2.0**-10 if dtype == torch.float16 else 2.0**-7
    )


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float8(shape: tuple[int, int, int], tile: tuple[int, int], generator: torch.Generator) -> None:
    m, n, k = shape
    x, w = _e4m3(m, k, generator), _e4m3(n, k, generator)
    x_scale, w_scale = _scales(m, 1, generator), _scales(n, 1, generator) / k
    y, again = (fp8_matmul(x, x_scale, w, w_scale, config=_config(*tile, 2)) for _ in range(2))
    # Gaussian codes: Hopper's sums are within 2^-12 of Σ|x||w|, which is some √k times the norm of a sum.
    _assert_close(y, again, fp8_reference(x, x_scale, w, w_scale), 2.0**-10 + 2.0**-12 * k**0.5)


@pytest.mark.parametrize(
    ("tile", "kind", "lead"),
    [(tile, "both", lead) for tile in [(128, 256), (128, 128), (128, 64)] for lead in (0, 1)]
    + [((128, 256), "tokens", 2), ((128, 256), "weights", 2)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float8_blocks(
    shape: tuple[int, int, int], kind: str, tile: tuple[int, int], lead: int, generator: torch.Generator
) -> None:
    m, n, k = shape
    runs = -(-k // 128)
    if runs == 1:
        pytest.skip("one block of K is a scale of a token")
    x, w = _e4m3(m, k, generator), _e4m3(n, k, generator)
    x_scale = _scales(m, 1 if kind == "weights" else runs, generator)
    w_scale = (_scales(n, 1, generator) if kind == "tokens" else _scales(-(-n // 128), runs, generator)) / k
    y, again = (fp8_matmul(x, x_scale, w, w_scale, config=_config(*tile, lead)) for _ in range(2))
    _assert_close(y, again, fp8_reference(x, x_scale, w, w_scale), 2.0**-8)


def test_refusals(generator: torch.Generator) -> None:
    x, w, one = _e4m3(16, 256, generator), _e4m3(256, 256, generator), torch.ones(1, 1, device="cuda")
    with pytest.raises(ValueError, match="whole blocks"):
        fp8_matmul(x, _scales(16, 2, generator), w, one, config=_config(128, 192, 2))
