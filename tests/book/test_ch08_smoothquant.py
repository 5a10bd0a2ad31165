"""The checkers of chapter 08-smoothquant pass the right answers and tell the usual wrong ones apart."""

import pytest
import torch

from lqedu.book import check
from tests.book.answers import right_and_wrong


def _scale(a, weights, alpha, first=False):
    m = weights[0].abs().amax(0) if first else torch.cat(weights).abs().amax(0)
    return a**alpha / m ** (1 - alpha)


def _epilogue(q_x, s_x, z_x, q_w, s_w, tokens=False):
    correction = z_x * q_x.sum(1, keepdim=True) if tokens else z_x * q_w.sum(1)
    return s_x * s_w.T * (q_x @ q_w.T - correction)


def _static(x, bits, largest=False):
    top = 2 ** (bits - 1) - 1
    steps = [(1 - i / 100) * float(x.abs().max()) / top for i in range(80)]
    return (
        steps[0]
        if largest
        else min(steps, key=lambda s: float((x - s * (x / s).round().clamp(-top - 1, top)).square().sum()))
    )


RIGHT = {
    "08-smoothquant.1": 7,
    "08-smoothquant.2": _scale,
    "08-smoothquant.3": _epilogue,
    "08-smoothquant.4": lambda x, w, s: (2 ** (s - 1) - 1) // 2 ** (x + w - 2),
    "08-smoothquant.5": _static,
}
WRONG = {
    "08-smoothquant.1": 6,  # zero forgotten
    "08-smoothquant.2": lambda *a: _scale(*a, first=True),  # the other linears of the stage forgotten
    "08-smoothquant.3": lambda *a: _epilogue(*a, tokens=True),
    "08-smoothquant.4": lambda x, w, s: 2 ** (s - 1) // 2 ** (x + w - 2),  # one too many: the sum may just not fit
    "08-smoothquant.5": lambda *a: _static(*a, largest=True),
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)


def test_the_balanced_answer_is_the_formula_in_reverse(capsys: pytest.CaptureFixture[str]) -> None:
    assert not check("08-smoothquant.2", lambda a, weights, alpha: 1 / _scale(a, weights, alpha))
    assert not check("08-smoothquant.5", lambda x, bits: float(x.abs().mean()))
    assert "worse than" in capsys.readouterr().out
