"""The checkers of chapter 05-awq pass the right answers and tell the usual wrong ones apart."""

import pytest
import torch

from lqedu.book import check
from tests.book.answers import right_and_wrong


def _scale(a, alpha, centre=True):
    s = (a**alpha).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt() if centre else s


def _tie(a, heads, value_heads, repeat_inside=True):
    groups = (
        a.view(value_heads, heads // value_heads, -1) if repeat_inside else a.view(-1, value_heads, len(a) // heads)
    )
    axis = 1 if repeat_inside else 0
    return groups.mean(axis, keepdim=True).expand_as(groups).reshape(-1)


RIGHT = {
    "05-awq.1": _scale,
    "05-awq.2": lambda h, r: 7 * h**0.25 / r**0.5,
    "05-awq.3": lambda gain, bias, w, s: (gain / s, bias / s, w * s),
    "05-awq.4": _tie,
    "05-awq.5": 0.0,
}
WRONG = {
    "05-awq.1": lambda a, alpha: _scale(a, alpha, centre=False),
    "05-awq.2": lambda h, r: h**0.5 / r,  # all of it to the activations: twice the exponent
    "05-awq.3": lambda gain, bias, w, s: (gain / s, bias, w * s),  # the bias forgotten
    "05-awq.4": lambda a, heads, value_heads: _tie(a, heads, value_heads, repeat_inside=False),
    "05-awq.5": 1.0,
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)


def test_a_scale_of_the_wrong_shape_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert not check("05-awq.2", lambda h, r: torch.ones(2))
    assert "one positive scale" in capsys.readouterr().out
