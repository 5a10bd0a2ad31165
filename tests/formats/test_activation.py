"""Activation grids: bounds, invariances, and what they refuse. Convention: symmetric max/(2**(b-1) - 1)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lqedu.errors import GridError
from lqedu.formats.activation import ActivationGrid


def _x(tokens=6, features=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, features, generator=g) * torch.logspace(-2, 2, tokens)[:, None] + 0.3


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_error_is_at_most_half_a_step_inside_the_range(bits, symmetric, granularity):
    grid = ActivationGrid(bits, symmetric, granularity)
    x = _x()
    scale, zero = grid.fit(x)
    codes = grid.encode(x, scale, zero)
    assert codes.dtype == torch.int8
    assert int(codes.min()) >= grid.code_min and int(codes.max()) <= grid.code_max
    # an integer zero point may move the range by half a step more
    slack = 0.5 if symmetric else 1.0
    assert bool(((grid.decode(codes, scale, zero) - x).abs() <= scale * (slack + 1e-4)).all())


def test_symmetric_hits_the_extreme_exactly():
    x = torch.tensor([[3.0, -7.0, 1.0]])
    assert ActivationGrid(4).round_trip(x).tolist() == [[3.0, -7.0, 1.0]]


def test_tokens_do_not_see_each_other():
    x = _x()
    louder = x.clone()
    louder[0] *= 1e6
    grid = ActivationGrid(8)
    assert torch.equal(grid.round_trip(x)[1:], grid.round_trip(louder)[1:])
    whole = ActivationGrid(8, granularity="tensor")
    assert not torch.equal(whole.round_trip(x)[1:], whole.round_trip(louder)[1:])


@given(st.integers(2, 8), st.booleans(), st.floats(1e-3, 1e3), st.integers(0, 5))
def test_scaling_a_token_scales_its_values(bits, symmetric, factor, seed):
    grid, x = ActivationGrid(bits, symmetric), _x(seed=seed).double().float()
    scale, zero = grid.fit(x)
    codes = grid.encode(x, scale, zero)
    bigger = grid.encode(x * factor, *grid.fit(x * factor))
    assert float((codes != bigger).double().mean()) < 0.01  # ties may fall the other way


def test_clipping_shrinks_the_range_and_saturates():
    x = torch.tensor([[1.0, 10.0]])
    scale, _ = ActivationGrid(8, clip_ratio=0.5).fit(x)
    assert float(scale) == pytest.approx(5 / 127)
    assert ActivationGrid(8, clip_ratio=0.5).round_trip(x)[0, 1] == pytest.approx(5.0)


def test_zeros_decode_to_zeros_and_shapes_are_kept():
    for grid in (ActivationGrid(), ActivationGrid(symmetric=False), ActivationGrid(granularity="tensor")):
        assert torch.equal(grid.round_trip(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))
    assert ActivationGrid().round_trip(_x().half()).dtype == torch.float16


def test_asymmetric_zero_is_exact():
    x = torch.rand(4, 30) + 5  # all positive: the range still begins at zero
    scale, zero = ActivationGrid(symmetric=False).fit(x)
    assert bool((zero == -128).all())
    assert float(scale.max()) <= 6 / 255 + 1e-6


def test_as_data():
    grid = ActivationGrid(4, False, "tensor", True, 0.9)
    assert ActivationGrid.from_dict(grid.to_dict()) == grid
    with pytest.raises(GridError, match="fields"):
        ActivationGrid.from_dict({"bits": 8})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bits": 9}, "from 2 to 8"),
        ({"bits": True}, "from 2 to 8"),
        ({"bits": 4.0}, "from 2 to 8"),
        ({"granularity": "channel"}, "'token' or 'tensor'"),
        ({"static": True}, "granularity='tensor'"),
        ({"clip_ratio": 0.0}, "clip_ratio"),
        ({"clip_ratio": "1"}, "clip_ratio"),
    ],
)
def test_contradictions_are_refused(fields, sentence):
    with pytest.raises(GridError, match=sentence):
        ActivationGrid(**fields)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    x = _x()
    x[2, 3] = bad
    with pytest.raises(GridError, match="NaN or infinite"):
        ActivationGrid().fit(x)
