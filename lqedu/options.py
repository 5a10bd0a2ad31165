"""Checks of hyper-parameters: one sentence that names the option, what it may be and what it was, before any work."""

import math
from operator import ge, gt, le, lt

from lqedu.errors import LqeduError, UsageError


def check_count(
    name: str, value: object, *, least: int = 0, most: int | None = None, error: type[LqeduError] = UsageError
) -> None:
    """Refuse what is not a whole number from ``least`` to ``most``: bools, floats and text too.

    Args:
        name: of the option, for the sentence.
        value: whatever the caller gave.
        least, most: both allowed; ``None`` for no largest value.
        error: class to raise.

    >>> check_count("steps", 2.5)
    Traceback (most recent call last):
        ...
    lqedu.errors.UsageError: steps is a whole number, at least 0, got 2.5
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise error(f"{name} is a whole number, {allowed}, got {value!r}")


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    error: type[LqeduError] = UsageError,
) -> None:
    """Refuse what is not a finite number in a range: NaN, infinities, bools and text too.

    Args:
        name: of the option, for the sentence.
        value: whatever the caller gave.
        least, above: lower end of the range, inside it and outside it.
        most, below: upper end of the range, inside it and outside it.
        error: class to raise.

    >>> check_number("p", 0.0, above=0, most=1)
    Traceback (most recent call last):
        ...
    lqedu.errors.UsageError: p is a finite number, above 0 and at most 1, got 0.0
    """
    given = (("at least", ge, least), ("above", gt, above), ("at most", le, most), ("below", lt, below))
    bounds = [(words, holds, bound) for words, holds, bound in given if bound is not None]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    finite = number and -math.inf < value < math.inf  # false for NaN
    if not finite or not all(holds(value, bound) for _, holds, bound in bounds):
        allowed = " and ".join(f"{words} {bound}" for words, _, bound in bounds)
        raise error(f"{name} is a finite number, {allowed}, got {value!r}")
