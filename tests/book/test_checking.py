"""Exercises: three verdicts, messages that point at the element, and no traceback for a reader."""

import pytest
import torch

from lqedu.book import check
from lqedu.book.checking import _EXERCISES, Exercise, exercise, exercises, expect_close, expect_equal
from lqedu.errors import UsageError

ID = "99-test.1"


@pytest.fixture
def register(monkeypatch):
    """Register a checker for this test only."""

    def do(checker, id=ID):
        monkeypatch.setitem(_EXERCISES, id, Exercise(id, "round w", checker))

    return do


def _rounding(fn):
    w = torch.tensor([[0.2, 0.4], [-0.6, 0.0]])
    expect_close(fn(w, 0.25), torch.tensor([[0.25, 0.5], [-0.5, 0.0]]), name="w_hat")


def _raises_not_implemented(w, s):
    raise NotImplementedError


@pytest.mark.parametrize(
    "stub", [None, ..., lambda w, s: None, lambda w, s: ..., lambda w, s: (None, None), _raises_not_implemented]
)
def test_stubs_are_not_solved_yet(register, capsys, stub):
    register(_rounding)
    assert check(ID, stub) is False
    assert capsys.readouterr().out == f"{ID}: not solved yet: round w\n"


def test_a_right_answer_passes(register, capsys):
    register(_rounding)
    assert check(ID, lambda w, s: torch.round(w / s) * s) is True
    assert capsys.readouterr().out == f"{ID}: passed\n"


def test_a_wrong_answer_is_shown_where_it_is_wrong(register, capsys):
    register(_rounding)
    assert check(ID, lambda w, s: torch.floor(w / s) * s) is False
    out = capsys.readouterr().out
    assert out.startswith(f"{ID}: not right yet: w_hat[0, 0] is 0, expected 0.25 (3 of 4 values differ")
    assert "got      [[    0,  0.25],\n" in out
    assert "expected [[0.25,  0.5],\n" in out


def test_an_error_in_the_readers_function_is_a_line_and_not_a_traceback(register, capsys):
    register(_rounding)

    def broken(w, s):
        return w / s.item()

    assert check(ID, broken) is False
    out = capsys.readouterr().out
    assert "your function raised AttributeError: 'float' object has no attribute 'item' (line " in out
    assert "return w / s.item())" in out


@pytest.mark.parametrize("answer", ["a string", 3, lambda w, s: "text", lambda w, s: [torch.ones(2), None]])
def test_answers_of_the_wrong_type_raise_nothing(register, capsys, answer):
    register(_rounding)
    assert check(ID, answer) is False
    assert "not right yet" in capsys.readouterr().out


def test_an_assertion_of_the_reader_is_reported(register, capsys):
    register(_rounding)

    def asserting(w, s):
        raise AssertionError

    assert check(ID, asserting) is False
    assert "an assertion failed (line " in capsys.readouterr().out


def test_a_value_can_be_an_answer(register, capsys):
    register(lambda answer: expect_close(answer, 4.3125, name="bits per weight", atol=0.01))
    assert check(ID, 4.31) is True
    assert check(ID, 4) is False
    assert check(ID, None) is False
    assert "bits per weight is 4, expected 4.3125 (tolerance 0.01)" in capsys.readouterr().out


def test_a_function_that_works_in_place_cannot_change_the_checkers_tensors(register):
    def checker(fn):
        w = torch.tensor([1.0, 2.0])
        got = fn(w)
        expect_close(got, 2 * w)

    register(checker)
    assert check(ID, lambda w: w.mul_(2)) is True


def test_unknown_ids_list_the_known_ones():
    with pytest.raises(UsageError, match=r"no exercise '98-none\.1'; there are checkers for"):
        check("98-none.1", None)
    with pytest.raises(UsageError, match="no exercise 'nonsense'"):
        check("nonsense", None)


def test_ids_are_checked_and_claimed_once(monkeypatch):
    monkeypatch.setattr("lqedu.book.checking._EXERCISES", {})
    with pytest.raises(UsageError, match=r"such as 02-grids\.1"):
        exercise("grids.one", "task")
    exercise(ID, "task")(_rounding)
    exercise(ID, "task")(_rounding)  # a module that is reloaded
    with pytest.raises(UsageError, match="two checkers claim"):
        exercise(ID, "task")(lambda fn: None)


def test_exercises_of_a_chapter_come_in_the_order_of_their_numbers(monkeypatch):
    for n in (10, 2, 1):
        monkeypatch.setitem(_EXERCISES, f"99-test.{n}", Exercise(f"99-test.{n}", "", _rounding))
    assert [item.id for item in exercises("99-test")] == ["99-test.1", "99-test.2", "99-test.10"]


# --- expect_* ---------------------------------------------------------------------------------------------------------


def test_expect_close_accepts_any_container_and_dtype():
    expect_close([0.1, 0.2], torch.tensor([0.1, 0.2], dtype=torch.float64))
    expect_close(torch.tensor([1, 2], dtype=torch.int8), [1.0, 2.0])
    expect_close(float("inf"), float("inf"))
    expect_close(float("nan"), float("nan"))
    expect_close(torch.nn.Parameter(torch.ones(2)), torch.ones(2))


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"x has shape \[2, 3\], expected \[3, 2\]"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), r"x\[1\] is nan, expected 1"),
        (float("inf"), 1.0, "x is inf, expected 1"),
        (1.0, 1.1, "x is 1, expected 1.1"),
        (None, 1.0, "x should hold numbers, got NoneType"),
        ("a", 1.0, "x should hold numbers, got str: 'a'"),
    ],
)
def test_expect_close_says_what_differs(got, want, message):
    with pytest.raises(AssertionError, match=message):
        expect_close(got, want, name="x")


def test_long_results_are_not_printed_in_full():
    with pytest.raises(AssertionError) as caught:
        expect_close(torch.zeros(1000), torch.ones(1000))
    assert str(caught.value) == "result[0] is 0, expected 1 (1000 of 1000 values differ, tolerance 1e-06)"


def test_expect_equal_is_exact_and_knows_more_than_numbers():
    expect_equal(torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([1, 2]))
    expect_equal("asymmetric", "asymmetric")
    expect_equal((8, 2), torch.Size([8, 2]))
    with pytest.raises(AssertionError, match=r"q\[0\] is 1, expected 1"):
        expect_equal(torch.tensor([1 + 1e-12], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64), name="q")
    with pytest.raises(AssertionError, match="answer is 'a', expected 'b'"):
        expect_equal("a", "b", name="answer")
