"""The checkers of chapter 11-spinquant pass the right answers and tell the usual wrong ones apart."""

import pytest
import torch

from lqedu.book import check
from tests.book.answers import right_and_wrong


def _direction(x, rotation, rounded, slope, basis=True):
    error = rounded @ rotation.T - x if basis else rounded - x @ rotation
    return (slope.T @ error - error.T @ slope) / 2


def _iterate(rotation, skew, tau, iterations, start=True):
    y = rotation - tau * skew @ rotation if start else rotation
    for _ in range(iterations):
        y = rotation - tau / 2 * skew @ (rotation + y)
    return y


def _qr_slope(rotation, gradient, triangular=True):
    m = rotation.T @ gradient
    if not triangular:
        return -((m - m.T) / 2).square().sum()  # of Cayley steps
    below = m.tril(-1)
    return -(m * (below - below.T)).sum()


RIGHT = {
    "11-spinquant.1": _direction,
    "11-spinquant.2": _iterate,
    "11-spinquant.3": lambda a, lr: min(lr, 1 / float(a.abs().sum(0).max())),
    "11-spinquant.4": 2**-11 * 2 / 5**0.5,
    "11-spinquant.5": _qr_slope,
}
WRONG = {
    "11-spinquant.1": lambda *a: _direction(*a, basis=False),  # the error in the rotated basis
    "11-spinquant.2": lambda *a: _iterate(*a, start=False),
    "11-spinquant.3": lambda a, lr: min(lr, 1 / float(a.abs().max())),
    "11-spinquant.4": 2**-11,  # the general bound
    "11-spinquant.5": lambda *a: _qr_slope(*a, triangular=False),
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)


def test_a_step_that_is_too_short_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert not check("11-spinquant.3", lambda a, lr: min(lr, 0.5 / float(a.abs().sum(0).max())))
    assert "shorter than the bound allows" in capsys.readouterr().out
    assert not check("11-spinquant.1", lambda x, *_: torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype))
