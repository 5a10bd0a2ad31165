"""The checkers of chapter 00-setup pass the right answers and explain the usual wrong ones."""

import math

import pytest

from lqedu.book import check

RIGHT = {
    "00-setup.1": lambda out, inputs, bits, g: (out * inputs * bits + out * inputs // g * (16 + bits)) // 8,
    "00-setup.2": math.exp,
}
WRONG = {
    "00-setup.1": lambda out, inputs, bits, g: (out * inputs * bits + out * inputs // g * 16) // 8,  # no zero point
    "00-setup.2": lambda delta: 1 + delta,
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_and_wrong(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(name, RIGHT[name])
    assert "passed" in capsys.readouterr().out
    assert not check(name, WRONG[name])
    assert "not right yet" in capsys.readouterr().out
