"""Comparisons that point at the element that differs, and judge the worst column instead of the mean."""

import torch
from torch import Tensor


def assert_codes_equal(got: Tensor, want: Tensor, *, group_size: int | None = None) -> None:
    """Codes are equal everywhere; a failure names the first coordinate, both codes, the count and the group."""
    assert got.shape == want.shape, f"shapes differ: {list(got.shape)} and {list(want.shape)}"
    wrong = (got.to(torch.int64) != want.to(torch.int64)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        group = "" if group_size is None else f", group {column // group_size}"
        raise AssertionError(
            f"{len(wrong)} of {got.numel()} codes differ; first at [{row}, {column}]{group}: "
            f"got {int(got[row, column])}, want {int(want[row, column])}"
        )


def code_mismatch(got: Tensor, want: Tensor) -> float:
    """Fraction of codes that differ."""
    return float((got.to(torch.int64) != want.to(torch.int64)).double().mean())


def assert_close_by_column(got: Tensor, want: Tensor, bound: float) -> None:
    """Relative error of every column is within the bound; an unwritten column cannot hide in a mean."""
    got, want = got.double().flatten(0, -2), want.double().flatten(0, -2)
    error = (got - want).norm(dim=0) / want.norm(dim=0).clamp(min=1e-12)
    worst = int(error.argmax())
    assert float(error[worst]) <= bound, f"column {worst} is off by {float(error[worst]):.3g}, bound {bound:.3g}"


def relative_error(got: Tensor, want: Tensor) -> float:
    """``‖got - want‖ / ‖want‖`` over all elements, in float64."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())
