"""Exercises check themselves: ``check("02-grids.1", my_function)`` says passed, not solved yet, or what differs.

>>> @exercise("00-demo.1", "round w to the nearest multiple of s")
... def _round(fn):
...     expect_close(fn([0.2, 0.4], 0.25), [0.25, 0.5], name="w_hat")
>>> check("00-demo.1", lambda w, s: ...)
00-demo.1: not solved yet: round w to the nearest multiple of s
False
>>> check("00-demo.1", lambda w, s: [0.0, 0.5])
00-demo.1: not right yet: w_hat[0] is 0, expected 0.25 (1 of 2 values differ, tolerance 1e-06)
    got      [0, 0.5]
    expected [0.25, 0.5]
False
>>> check("00-demo.1", lambda w, s: [s * round(x / s) for x in w])
00-demo.1: passed
True
"""

import functools
import importlib
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lqedu.errors import UsageError

if TYPE_CHECKING:
    import torch

_ID = re.compile(r"(?P<chapter>\d\d-[a-z0-9-]+)\.\d+")
_SHOWN = 64  # values that a message prints in full
_DIGITS = 5


@dataclass(frozen=True)
class Exercise:
    """An exercise: what it asks for, and the function that checks an answer."""

    id: str
    task: str
    checker: Callable[[Any], None]


_EXERCISES: dict[str, Exercise] = {}


class _UnsolvedError(BaseException):
    """The answer is still a stub. Not an ``Exception``, so that no checker catches it by accident."""


def exercise(id: str, task: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register the decorated checker under ``id`` ("02-grids.1") with its task in one line.

    Raises:
        UsageError: an id of another form, or one that another checker has.
    """
    if not _ID.fullmatch(id):
        raise UsageError(f"the id of an exercise is a chapter and a number, such as 02-grids.1, got {id!r}")

    def register(checker: Callable[[Any], None]) -> Callable[[Any], None]:
        known = _EXERCISES.get(id)
        if known is not None and _origin(known.checker) != _origin(checker):  # a reloaded module registers again
            raise UsageError(f"two checkers claim the exercise {id}; number one of them anew")
        _EXERCISES[id] = Exercise(id, task, checker)
        return checker

    return register


def check(id: str, answer: Any) -> bool:
    """Check an answer to an exercise, print the verdict and return whether it is right.

    Args:
        id: of the exercise, such as "02-grids.1".
        answer: the function that the exercise asks for, or the value. Tensors are copied before they reach a function,
            so one that works in place is judged by what it returns. ``None`` and ``...`` count as not solved yet, as
            answers and as what a function returns; so does a function that raises ``NotImplementedError``.

    Raises:
        UsageError: no exercise has this id; the sentence lists those of its chapter. A wrong answer raises nothing.
    """
    item = _find(id)
    watched = _Watched(answer)
    try:
        if _is_stub(answer):
            raise _UnsolvedError
        item.checker(watched.function if callable(answer) else answer)
    except _UnsolvedError:
        verdict = f"not solved yet: {item.task}"
    except AssertionError as error:
        verdict = f"not right yet: {error}" if str(error) else f"not right yet: an assertion failed{_place(error)}"
    except Exception as error:  # a reader's mistake must not bury the page under a traceback
        verdict = f"{type(error).__name__}: {error}"
        if error is watched.raised:
            verdict = f"not right yet: your function raised {verdict}{_place(error)}"
        else:
            verdict = f"not right yet: your answer is not of the kind that was asked for ({verdict})"
    else:
        print(f"{id}: passed")
        return True
    print(f"{id}: {verdict}")
    return False


def exercises(chapter: str) -> list[Exercise]:
    """The exercises of a chapter ("02-grids"), in order; none if it has no module of checkers."""
    module = f"lqedu.book.exercises.ch{chapter.replace('-', '_')}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    found = [item for item in _EXERCISES.values() if item.id.rsplit(".", 1)[0] == chapter]
    return sorted(found, key=lambda item: int(item.id.rsplit(".", 1)[1]))


# --- what checkers call -----------------------------------------------------------------------------------------------


def expect_close(got: Any, want: Any, name: str = "result", atol: float = 1e-6) -> None:
    """Assert that numbers agree within ``atol``; the message names the first that does not.

    Args:
        got: the reader's: tensor, array, list or number.
        want: of the same shape.
        name: what the message calls it, such as ``w_hat``.
        atol: absolute tolerance. Both are compared in float64; NaN equals NaN.
    """
    a, b = _tensor(got, name), _tensor(want, "the expected value")
    _same_shape(a, b, name)
    wrong = ~((a - b).abs() <= atol) & ~(a == b) & ~(a.isnan() & b.isnan())
    _report(a, b, wrong, name, f", tolerance {atol:.3g}" if atol else "")


def expect_equal(got: Any, want: Any, name: str = "result") -> None:
    """Assert that codes, shapes, strings or truth values are equal; the message names the first that is not.

    Args:
        got: the reader's.
        want: numbers of any container compare by value and shape, whatever their dtype; anything else by ``==``.
        name: what the message calls it, such as ``q``.
    """
    if isinstance(want, str | bool | dict | set) or want is None:
        assert got == want, f"{name} is {got!r}, expected {want!r}"
        return
    a, b = _tensor(got, name), _tensor(want, "the expected value")
    _same_shape(a, b, name)
    _report(a, b, ~(a == b) & ~(a.isnan() & b.isnan()), name, "")


def _tensor(value: Any, name: str) -> "torch.Tensor":
    """A float64 tensor of numbers in any container; codes of up to 53 bits survive exactly."""
    import torch

    try:
        return torch.as_tensor(value).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"{name} should hold numbers, got {type(value).__name__}: {_clip(repr(value))}") from None


def _same_shape(got: "torch.Tensor", want: "torch.Tensor", name: str) -> None:
    assert got.shape == want.shape, f"{name} has shape {list(got.shape)}, expected {list(want.shape)}"


def _report(got: "torch.Tensor", want: "torch.Tensor", wrong: "torch.Tensor", name: str, tolerance: str) -> None:
    places = wrong.nonzero()
    if not len(places):
        return
    at = tuple(places[0].tolist())
    where = f"{name}[{', '.join(map(str, at))}]" if at else name
    message = f"{where} is {_number(got[at])}, expected {_number(want[at])}"
    if at:
        message += f" ({len(places)} of {got.numel()} values differ{tolerance})"
    elif tolerance:
        message += f" ({tolerance.removeprefix(', ')})"
    if at and got.numel() <= _SHOWN and got.dim() <= 2:
        message += f"\n    got      {_matrix(got)}\n    expected {_matrix(want)}"
    raise AssertionError(message)


def _matrix(m: "torch.Tensor") -> str:
    """A vector on one line, a matrix with aligned columns on as many as it has rows."""
    if m.dim() < 2:
        return f"[{', '.join(_number(x) for x in m)}]"
    cells = [[_number(x) for x in row] for row in m]
    width = max(len(cell) for row in cells for cell in row)
    rows = ["[" + ", ".join(cell.rjust(width) for cell in row) + "]" for row in cells]
    return "[" + (",\n" + " " * 14).join(rows) + "]"


def _number(x: "torch.Tensor") -> str:
    return f"{x.item():.{_DIGITS}g}"


def _clip(text: str, length: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


# --- the reader's function --------------------------------------------------------------------------------------------


class _Watched:
    """The reader's function, which tells a stub from an answer and remembers what it raised."""

    def __init__(self, answer: Any) -> None:
        self.raised: Exception | None = None
        self.function: Callable[..., Any] | None = self._wrap(answer) if callable(answer) else None

    def _wrap(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            try:
                result = answer(*map(_copied, args), **{key: _copied(value) for key, value in kwargs.items()})
            except NotImplementedError:
                raise _UnsolvedError from None
            except Exception as error:
                self.raised = error
                raise
            if _is_stub(result):
                raise _UnsolvedError
            return result

        functools.update_wrapper(function, answer, assigned=("__name__", "__doc__"))
        return function


def _is_stub(value: Any) -> bool:
    parts = value if isinstance(value, tuple) and value else (value,)
    return all(part is None or part is ... for part in parts)


def _copied(value: Any) -> Any:
    return value.clone() if hasattr(value, "clone") and hasattr(value, "dtype") else value


def _place(error: BaseException) -> str:
    """Where in the reader's code it happened: the innermost frame that is not in a file of a package."""
    here = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(here) and "site-packages" not in frame.filename and frame.line:
            return f" (line {frame.lineno}: {_clip(frame.line)})"
    return ""


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _find(id: str) -> Exercise:
    match = _ID.fullmatch(id)
    if id not in _EXERCISES and match:
        exercises(match["chapter"])  # imports the module that registers it
    if id in _EXERCISES:
        return _EXERCISES[id]
    known = [item.id for item in exercises(match["chapter"])] if match else []
    if known:
        raise UsageError(f"no exercise {id!r}; the chapter has {', '.join(known)}")
    chapters = sorted(path.stem[2:].replace("_", "-") for path in (Path(__file__).parent / "exercises").glob("ch*.py"))
    raise UsageError(f"no exercise {id!r}; there are checkers for the chapters {', '.join(chapters) or '(none yet)'}")
