"""Kernel layouts lose nothing: every stored weight multiplies through its kernel as its layer multiplies."""

import re
from pathlib import Path

import pytest
import torch

from lqedu.errors import GridError, MissingDependencyError
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Grid, float8_quantize
from lqedu.formats.progressive import ProgressiveGrid, progressive_quantize
from lqedu.formats.requantized import RequantizedGrid, requantize
from lqedu.formats.stored import StoredWeight
from lqedu.rounding import nearest
from lqedu.runtime import backend
from lqedu.runtime.backend import kernel_linear, kernel_weight
from lqedu.runtime.integer import integer_linear
from lqedu.runtime.two_level import two_level_linear
from tests import problems
from tests.compare import relative_error

pytest.importorskip("triton", reason="the kernels' layouts are defined in lqedu_kernels, which needs Triton")

HALF = 2.0**-10  # one rounding of the result to float16, relative to the norm


def _x(tokens: int, columns: int) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=problems.seeded(3)).half()


@pytest.mark.parametrize(
    "grid",
    [
        IntGrid(4, granularity="group", group_size=32),
        IntGrid(4, granularity="group", group_size=64, symmetric=True),
        IntGrid(4, granularity="group", group_size=128, zero_point="float"),
        IntGrid(4, granularity="channel"),
        IntGrid(4, granularity="channel", symmetric=True, scale_dtype=torch.float32),
    ],
    ids=str,
)
def test_weight_only(grid: IntGrid) -> None:
    q, _ = nearest(problems.weight(72, 256, seed=1), grid)
    packed = kernel_weight(q)
    x = _x(5, 256)
    y = kernel_linear(x, packed)
    assert y.dtype == torch.float16
    assert relative_error(y, x.double() @ q.dequantize(torch.float64).T) < HALF
    assert packed.shape == (72, 256)


def test_weight_only_bytes_are_those_of_the_stored_weight() -> None:
    grid = IntGrid(4, granularity="group", group_size=64, zero_point="float")
    q, _ = nearest(problems.weight(64, 256, seed=1), grid)
    assert kernel_weight(q).nbytes == q.nbytes  # float zero points take no padding; integer ones get a byte each


@pytest.mark.parametrize("symmetric", [True, False])
def test_w8a8(symmetric: bool) -> None:
    q, _ = nearest(problems.weight(40, 96, seed=2), IntGrid(8, granularity="channel", symmetric=True))
    grid = ActivationGrid(8, symmetric=symmetric)
    x = _x(7, 96)
    want = integer_linear(*_codes(grid, x), q)
    assert relative_error(kernel_linear(x, kernel_weight(q, integer_inputs=True), grid), want) < HALF


def _codes(grid: ActivationGrid, x: torch.Tensor) -> tuple:
    scale, zero = grid.fit(x)
    return grid.encode(x, scale, zero), scale, zero


def _two_level(kind: str) -> StoredWeight:
    w = problems.weight(48, 256, seed=4)
    if kind == "requantized":
        return requantize(nearest(w, RequantizedGrid(128).groups())[0])
    return progressive_quantize(w, ProgressiveGrid(group_size=64, zero=kind))


@pytest.mark.parametrize("kind", ["code", "offset", "requantized"])
def test_two_levels(kind: str) -> None:
    q, grid, x = _two_level(kind), ActivationGrid(8), _x(6, 256)
    want = two_level_linear(*_codes(grid, x), q)
    assert relative_error(kernel_linear(x, kernel_weight(q), grid), want) < HALF


def test_four_bits_by_channel_with_integer_inputs() -> None:
    q, _ = nearest(problems.weight(48, 256, seed=4), IntGrid(4, granularity="channel", symmetric=True))
    grid, x = ActivationGrid(8), _x(6, 256)
    y = kernel_linear(x, kernel_weight(q, integer_inputs=True), grid)
    assert relative_error(y, integer_linear(*_codes(grid, x), q)) < HALF


@pytest.mark.parametrize(("weights", "inputs"), [("tensor", "tensor"), ("channel", "token"), ("block", "group")])
def test_fp8(weights: str, inputs: str) -> None:
    q = float8_quantize(problems.weight(200, 320, seed=5), Float8Grid(weights))
    grid, x = Float8ActivationGrid(inputs), _x(9, 320)
    y = kernel_linear(x, kernel_weight(q), grid)
    scale, _ = grid.fit(x)
    want = grid.decode(grid.encode(x, scale, None), scale, None, torch.float64) @ q.dequantize(torch.float64).T
    assert relative_error(y, want) < HALF


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 5])
def test_fewer_bits_of_activations_are_int8_codes_too(bits: int, symmetric: bool) -> None:
    q, _ = nearest(problems.weight(48, 256, seed=4), IntGrid(4, granularity="channel", symmetric=True))
    grid, x = ActivationGrid(bits, symmetric=symmetric, clip_ratio=0.9), _x(6, 256)
    want = integer_linear(*_codes(grid, x), q)
    for kept in (True, False):
        packed = kernel_weight(q, integer_inputs=True, zero_points=kept)
        assert ("w_sum" in packed.tensors) == kept
        assert relative_error(kernel_linear(x, packed, grid), want) < HALF


def test_four_bits_by_channel_with_zero_points() -> None:
    q, _ = nearest(problems.weight(48, 256, seed=4), IntGrid(4, granularity="channel"))
    grid, x = ActivationGrid(8), _x(6, 256)
    packed = kernel_weight(q, integer_inputs=True)
    assert relative_error(kernel_linear(x, packed, grid), integer_linear(*_codes(grid, x), q)) < HALF
    with pytest.raises(GridError, match="symmetric codes of activations"):
        kernel_linear(x, packed, ActivationGrid(8, symmetric=False))
    with pytest.raises(GridError, match="where the activations have none"):
        kernel_weight(q, integer_inputs=True, zero_points=True)


def test_eight_bits_by_tensor_and_a_static_scale() -> None:
    q, _ = nearest(problems.weight(40, 96, seed=2), IntGrid(8, True, "tensor"))
    grid, x = ActivationGrid(8, symmetric=False, granularity="tensor", static=True), _x(7, 96)
    static = grid.fit(x[:3])
    packed = kernel_weight(q, integer_inputs=True, zero_points=True)
    bias = torch.randn(40, generator=problems.seeded(9)).half()
    want = integer_linear(grid.encode(x, *static), *static, q) + bias.double()
    assert relative_error(kernel_linear(x, packed, grid, static=static, bias=bias), want) < HALF
    assert packed.nbytes == 40 * 96 + 2 + 4 * 40  # codes, one float16 scale, sums of rows


def test_leading_axes_stay() -> None:
    q, _ = nearest(problems.weight(48, 64, seed=4), IntGrid(4))
    assert kernel_linear(_x(6, 64).view(2, 3, 64), kernel_weight(q)).shape == (2, 3, 48)


def test_what_no_kernel_reads_is_refused() -> None:
    w = problems.weight(16, 64, seed=0)
    three, _ = nearest(w, IntGrid(3))
    with pytest.raises(GridError, match="4-bit codes by channel or in groups of 32, 64 or 128"):
        kernel_weight(three)
    groups, _ = nearest(w, IntGrid(4, granularity="group", group_size=32, symmetric=True))
    with pytest.raises(GridError, match="groups need a second level"):
        kernel_weight(groups, integer_inputs=True)
    with pytest.raises(GridError, match="no kernel reads a Tensor"):
        kernel_weight(w)
    with pytest.raises(GridError, match="E4M3"):
        kernel_weight(float8_quantize(w, Float8Grid("channel", format="E5M2")))
    packed = kernel_weight(progressive_quantize(w, ProgressiveGrid(group_size=64)))
    with pytest.raises(GridError, match="codes of a ActivationGrid, got None"):
        kernel_linear(_x(2, 64), packed)
    with pytest.raises(GridError, match="symmetric codes of activations"):
        kernel_linear(_x(2, 64), packed, ActivationGrid(8, symmetric=False))


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError("lqedu_kernels needs Triton 3.6 to 3.9: pip install 'lqedu[gpu]'")

    monkeypatch.setattr("importlib.import_module", absent)
    q, _ = nearest(problems.weight(16, 64, seed=0), IntGrid(4))
    with pytest.raises(MissingDependencyError, match="lqedu\\[gpu\\]"):
        kernel_weight(q)


def test_a_weight_moves_whole() -> None:
    q, _ = nearest(problems.weight(16, 64, seed=0), IntGrid(4))
    packed = kernel_weight(q)
    moved = packed.to("meta")
    assert {t.device.type for t in moved.tensors.values()} == {"meta"} and moved.options == packed.options


def test_only_one_module_of_the_package_imports_the_kernels() -> None:
    root = Path(backend.__file__).parents[1]
    importing = re.compile(r'^\s*(from|import) lqedu_kernels|import_module\(f?"lqedu_kernels', re.MULTILINE)
    importers = [p.relative_to(root).as_posix() for p in root.rglob("*.py") if importing.search(p.read_text("utf-8"))]
    assert importers == ["runtime/backend.py"]
