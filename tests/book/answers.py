"""What every chapter's exercises are tested for: the right answer passes, and each usual wrong one is told apart."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from lqedu.book import check
from lqedu.book.checking import exercises


def right_and_wrong(right: Mapping[str, Any], wrong: Mapping[str, Any]) -> Callable[..., None]:
    """A test of a chapter's checkers, one case an exercise.

    Args:
        right: the right answer of each exercise, by its id.
        wrong: an answer that readers give, or a list of them, by the same ids.
    """
    chapter = next(iter(right)).rpartition(".")[0]

    @pytest.mark.parametrize("name", right)
    def test(name: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert set(right) == set(wrong) == {exercise.id for exercise in exercises(chapter)}
        assert check(name, right[name])
        assert "passed" in capsys.readouterr().out
        for answer in wrong[name] if isinstance(wrong[name], list) else [wrong[name]]:
            assert not check(name, answer)
            assert "not right yet" in capsys.readouterr().out

    return test
