"""Integer products are exact: compared with int64 arithmetic."""

import pytest
import torch

from lqedu.errors import GridError
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.rounding import nearest
from lqedu.runtime.integer import int_matmul, integer_linear


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (17, 8, 1023), (4, 6, 1025), (2, 3, 5000)])
def test_equal_to_int64(shape):
    tokens, outs, inputs = shape
    g = torch.Generator().manual_seed(inputs)
    x = torch.randint(-128, 128, (tokens, inputs), generator=g).to(torch.int8)
    w = torch.randint(-128, 128, (outs, inputs), generator=g).to(torch.int8)
    got = int_matmul(x, w)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), x.long() @ w.long().T)


def test_the_worst_case_is_exact():
    x = torch.full((2, 131071), -128, dtype=torch.int8)
    assert int(int_matmul(x, x)[0, 0]) == 128 * 128 * 131071
    odd = torch.full((1, 4099), 127, dtype=torch.int8)
    assert int(int_matmul(odd, odd)[0, 0]) == 127 * 127 * 4099


def test_bad_arguments():
    x = torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(TypeError, match="int8"):
        int_matmul(x, x.float())
    with pytest.raises(ValueError, match="got"):
        int_matmul(x, torch.zeros(2, 4, dtype=torch.int8))


@pytest.mark.parametrize("weight_symmetric", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("layout", [("tensor", None), ("channel", None), ("group", 16)])
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_linear_is_the_product_of_the_decoded(weight_symmetric, symmetric, granularity, layout, bits):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(24, 48, generator=g)
    x = 3 * torch.randn(2, 5, 48, generator=g) + 1
    weight, _ = nearest(w, IntGrid(bits, weight_symmetric, layout[0], layout[1]))
    grid = ActivationGrid(bits, symmetric, granularity)
    scale, zero = grid.fit(x)
    codes = grid.encode(x, scale, zero)
    got = integer_linear(codes, scale, zero, weight)
    want = grid.decode(codes, scale.double(), zero, torch.float64) @ weight.dequantize(torch.float64).T
    assert got.shape == (2, 5, 24)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-6


def test_float_zero_points_and_other_axes_are_refused():
    w = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(1, 32, dtype=torch.int8)
    for grid, sentence in (
        (IntGrid(4, granularity="group", group_size=16, zero_point="float"), "integer zero points"),
        (IntGrid(4, granularity="group", group_size=16, axis=0), "axis=1"),
    ):
        with pytest.raises(GridError, match=sentence):
            integer_linear(x, torch.ones(1), None, nearest(w, grid)[0])
