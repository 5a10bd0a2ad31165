"""Linears that are joined multiply as each of them does alone."""

import pytest
import torch

from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Grid, float8_quantize
from lqedu.formats.progressive import ProgressiveGrid, progressive_quantize
from lqedu.formats.requantized import RequantizedGrid, requantize
from lqedu.rounding import nearest
from lqedu.runtime.backend import KernelWeight, kernel_linear, kernel_weight
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.projection import Part, Projection, join_weights
from tests import problems

pytest.importorskip("triton", reason="the kernels' layouts are defined in lqedu_kernels, which needs Triton")

A8, A8_ZERO, F8 = ActivationGrid(8), ActivationGrid(8, symmetric=False), Float8ActivationGrid()


def weight(kind: str, rows: int, columns: int, seed: int) -> KernelWeight:
    w = problems.weight(rows, columns, seed=seed)
    if kind.startswith("w4a16"):
        grid = {
            "w4a16": IntGrid(4, granularity="group", group_size=32),
            "w4a16 symmetric": IntGrid(4, granularity="group", group_size=64, symmetric=True),
            "w4a16 channel": IntGrid(4, granularity="channel", zero_point="float"),
        }[kind]
        return kernel_weight(nearest(w, grid)[0])
    if kind == "progressive":
        return kernel_weight(progressive_quantize(w, ProgressiveGrid(group_size=64)))
    if kind == "requantized":
        return kernel_weight(requantize(nearest(w, RequantizedGrid(64).groups())[0]))
    if kind.startswith("fp8"):
        return kernel_weight(float8_quantize(w, Float8Grid(kind.split()[1])))
    grid = {
        "w8a8": IntGrid(8, True, "channel"), "w8a8 tensor": IntGrid(8, True, "tensor"), "w4a8": IntGrid(4, True, "channel"),
        "w4a8 zero": IntGrid(4, granularity="channel"),
    }[kind]  # fmt: skip
    return kernel_weight(nearest(w, grid)[0], integer_inputs=True, zero_points=kind in ("w8a8", "w4a8"))


GRIDS = {
    "w4a16": None, "w4a16 symmetric": None, "w4a16 channel": None, "progressive": A8, "requantized": A8, "w8a8": A8_ZERO,
    "w8a8 tensor": A8, "w4a8": A8_ZERO, "w4a8 zero": A8, "fp8 tensor": F8, "fp8 channel": F8, "fp8 block": F8,
}  # fmt: skip


@pytest.mark.parametrize("kind", GRIDS)
def test_joined_weights(kind: str) -> None:
    """Numbers of outputs that no layout is made for: 24 words of groups are filled up to multiples of 8."""
    rows = (128, 12, 20) if kind == "fp8 block" else (20, 12, 128)
    parts = [weight(kind, n, 192, seed) for seed, n in enumerate(rows)]
    x = torch.randn(5, 192, generator=problems.seeded(3))
    one = join_weights(parts[0], parts[1])
    assert one.shape == (sum(rows[:2]), 192)
    want = torch.cat([kernel_linear(x, part, GRIDS[kind]) for part in parts], 1)
    torch.testing.assert_close(kernel_linear(x, one, GRIDS[kind]), want[:, : sum(rows[:2])], rtol=0, atol=0)
    projection = Projection([Part(part, None, InputPath(activation=GRIDS[kind])) for part in parts])
    assert len(projection.parts) == (2 if kind == "fp8 block" else 1)  # the third would start within a block
    torch.testing.assert_close(projection(x), want, rtol=0, atol=0)


@pytest.mark.parametrize("columns", [64, 128])
def test_blocks_of_one_column(columns: int) -> None:
    parts = [weight("fp8 block", n, columns, n) for n in (256, 64)]
    x = torch.randn(5, columns, generator=problems.seeded(3))
    want = torch.cat([kernel_linear(x, part, F8) for part in parts], 1)
    projection = Projection([Part(part, None, InputPath(activation=F8)) for part in parts])
    torch.testing.assert_close(projection(x), want, rtol=0, atol=0)


def test_what_differs_is_not_joined() -> None:
    a = weight("w4a16", 16, 192, 0)
    assert join_weights(a, weight("w4a16 symmetric", 16, 192, 0)) is None
    assert join_weights(a, weight("w8a8", 16, 192, 0)) is None
    w = weight("w8a8", 16, 192, 0)
    path, other = (InputPath(activation=ActivationGrid(8, symmetric=False, clip_ratio=c)) for c in (1.0, 0.9))
    assert len(Projection([Part(w, None, path), Part(w, None, other)]).parts) == 2
    static = InputPath(activation=ActivationGrid(8, granularity="tensor", static=True))
    scales = [(torch.tensor([s]), None) for s in (0.1, 0.1, 0.2)]
    assert [
        len(Projection([Part(w, None, static, scales[0]), Part(w, None, static, s)]).parts) for s in scales[1:]
    ] == [1, 2]


def test_biases_of_some() -> None:
    a, b = weight("w4a16", 16, 192, 0), weight("w4a16", 8, 192, 1)
    x, bias = torch.randn(3, 192, generator=problems.seeded(3)), torch.randn(8, generator=problems.seeded(4))
    projection = Projection([Part(a), Part(b, bias)])
    assert projection.nbytes == a.nbytes + b.nbytes + 4 * 24
    want = torch.cat((kernel_linear(x, a), kernel_linear(x, b, bias=bias)), 1)
    torch.testing.assert_close(projection(x), want, rtol=0, atol=0)
