"""Hyper-parameters that make no sense are refused when a method is made, by every method, in a sentence that names them."""

import math
from dataclasses import MISSING, fields
from typing import get_args

import pytest

from lqedu.errors import GridError, UsageError
from lqedu.methods import SpinQuant, available, build
from lqedu.options import check_count, check_number

METHODS = available()


def _of(kind: type) -> list[tuple[str, str]]:
    """``(method, option)`` of every option that holds this kind of value."""
    return [
        (name, field.name)
        for name, cls in METHODS.items()
        for field in fields(cls)
        if kind in (get_args(field.type) or (field.type,))
    ]


COUNTS, NUMBERS = _of(int), _of(float)
NEITHER = [True, "1", math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(("method", "option"), COUNTS)
@pytest.mark.parametrize("value", [*NEITHER, 2.0, 2.5, -1])
def test_counts(method, option, value):
    with pytest.raises((UsageError, GridError), match=rf"\b{option}\b"):
        METHODS[method](**{option: value})


@pytest.mark.parametrize(("method", "option"), NUMBERS)
@pytest.mark.parametrize("value", [*NEITHER, -0.5])
def test_numbers(method, option, value):
    with pytest.raises((UsageError, GridError), match=rf"\b{option}\b"):
        METHODS[method](**{option: value})


@pytest.mark.parametrize(("method", "option"), _of(bool) + _of(str))
@pytest.mark.parametrize("value", [1, 0.5, None])
def test_switches_and_words(method, option, value):
    with pytest.raises(UsageError, match=rf"\b{option}\b"):
        METHODS[method](**{option: value})


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_accepted_and_numbers_may_be_whole(method):
    cls = METHODS[method]
    assert all(field.default is not MISSING for field in fields(cls))
    assert build(method, cls().options()) == cls()


def test_a_float_may_be_given_as_a_whole_number():
    assert SpinQuant(learning_rate=1).learning_rate == 1


@pytest.mark.parametrize(
    ("value", "bounds", "fits"),
    [
        (0, {}, True),
        (-1, {}, False),
        (3, {"least": 3, "most": 3}, True),
        (4, {"most": 3}, False),
        (2, {"least": 3}, False),
        (10**400, {}, True),
        (None, {}, False),
    ],
)
def test_check_count(value, bounds, fits):
    if fits:
        check_count("n", value, **bounds)
    else:
        with pytest.raises(GridError, match=r"^n is a whole number, "):
            check_count("n", value, error=GridError, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "fits"),
    [
        (0, {"least": 0}, True),
        (0.0, {"above": 0}, False),
        (1, {"most": 1}, True),
        (1.0, {"below": 1}, False),
        (0.5, {"above": 0, "below": 1}, True),
        (-1e-9, {"least": 0}, False),
        (1 + 1e-9, {"most": 1}, False),
        (math.nan, {"least": 0}, False),
        (math.inf, {"least": 0}, False),
        (-math.inf, {"most": 0}, False),
    ],
)
def test_check_number(value, bounds, fits):
    if fits:
        check_number("x", value, **bounds)
    else:
        with pytest.raises(GridError, match=r"^x is a finite number, "):
            check_number("x", value, error=GridError, **bounds)
