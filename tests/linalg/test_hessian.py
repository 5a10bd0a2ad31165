"""The accumulated Hessian equals its definition, whatever the batches."""

import pytest
import torch

from lqedu.errors import CalibrationError
from lqedu.linalg import HessianAccumulator
from tests import problems


def test_batches_add_up_to_the_definition() -> None:
    x = torch.randn(6, 10, 24, generator=problems.seeded(1))
    accumulator = HessianAccumulator(24)
    for batch in x.split([1, 2, 3]):
        accumulator.add(batch)
    flat = x.double().reshape(-1, 24)
    assert accumulator.tokens == 60
    assert torch.allclose(accumulator.result().double(), flat.T @ flat / 60, rtol=1e-5, atol=1e-6)


def test_float16_outliers_do_not_overflow() -> None:
    accumulator = HessianAccumulator(2)
    accumulator.add(torch.tensor([[1000.0, 1.0]], dtype=torch.float16))
    assert accumulator.result().tolist() == [[1e6, 1000.0], [1000.0, 1.0]]


def test_refusals() -> None:
    accumulator = HessianAccumulator(4)
    with pytest.raises(CalibrationError, match="at least one"):
        accumulator.result()
    with pytest.raises(CalibrationError, match="4 features"):
        accumulator.add(torch.ones(2, 3))
    with pytest.raises(CalibrationError, match="NaN"):
        accumulator.add(torch.full((2, 4), torch.nan))
