"""The packed layer computes what its dequantized weight computes."""

import itertools

import pytest
import torch

from lqedu.errors import GridError
from lqedu.formats import IntGrid
from lqedu.rounding import nearest
from lqedu.runtime import QuantLinear
from lqedu.runtime.inputs import InputPath
from tests import problems


@pytest.mark.parametrize(
    ("bits", "symmetric", "granularity"),
    list(itertools.product((2, 3, 4, 8), (False, True), ("tensor", "channel", "group"))),
)
def test_equals_the_dense_layer(bits: int, symmetric: bool, granularity: str) -> None:
    w = problems.weight(24, 48, seed=1)
    q, _ = nearest(w, IntGrid(bits, symmetric, granularity, 16 if granularity == "group" else None))
    bias = torch.randn(24, generator=problems.seeded(2))
    layer = QuantLinear(q, bias)
    x = torch.randn(2, 5, 48, generator=problems.seeded(3))
    assert torch.equal(layer(x), torch.nn.functional.linear(x, q.dequantize(), bias))
    assert torch.equal(layer.quantized.codes, q.codes)
    stored = sum(buffer.nbytes for buffer in layer.buffers())
    assert stored == layer.nbytes == q.nbytes


@pytest.mark.parametrize("fields", [{"hadamard": 0}, {"stride": 0}, {"hadamard": 4.0}, {"stride": True}])
def test_a_transform_of_no_features_is_refused(fields):
    with pytest.raises(GridError, match="whole number, at least 1"):
        InputPath(**fields)
