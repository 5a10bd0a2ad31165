"""The explorer of chapter 24 answers as the package does, and moves."""

import itertools
import math

import pytest

import lqedu.viz
from lqedu.book.choosing import EFFORTS, HARDWARE, OPTIONS, Situation, estimate, explorer_data, recommend
from tests.viz.js import assert_every_control_matters, compute

DATA = explorer_data()
START = {
    "hardware": "hopper", "shape": "llama-3-8b", "memory": 80, "exponent": 4, "reach": 10, "work": "decode", "level": 8,
    "effort": 1, "layout": "any",
}  # fmt: skip


def test_numbers_equal_python() -> None:
    grid = itertools.product(
        HARDWARE, ("llama-3-8b", "llama-2-7b"), (5, 24, 80), (1, 32, 256), (256, 16384), ("decode", "prefill"),
        (0.001, 0.03, 0.2), (0, 2), ("any", "compressed-tensors"),
    )  # fmt: skip
    keys = ("hardware", "shape", "memory", "batch", "context", "work", "loss", "effort", "layout")
    inputs = [dict(zip(keys, values, strict=True)) for values in grid][::5]
    answers = set()
    for one, got in zip(inputs, compute("choose", [DATA | one for one in inputs]), strict=True):
        request = Situation(**one | {"memory": 1e9 * one["memory"], "effort": EFFORTS[one["effort"]]})
        want = recommend(request)
        assert got["best"] == (want.best and want.best.option.name), one
        assert got["closest"] == (want.closest and want.closest.option.name), one
        assert set(got["frontier"]) == {e.option.name for e in want.frontier}
        for row, option in zip(got["rows"], OPTIONS, strict=True):
            e = estimate(option, request)
            assert (row["name"], tuple(row["broken"])) == (option.name, e.broken)
            assert math.isclose(row["bytes"], e.bytes, rel_tol=1e-12)
            assert math.isclose(row["score"], e.score, rel_tol=1e-9)
            if e.speed is not None:
                assert (got["batch"], got["context"]) == (e.speed.batch, e.speed.context)
        answers.add(got["best"])
    assert len(answers) > 6 and None in answers


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(width: int) -> None:
    example = lqedu.viz.explorer("choose", DATA | START, title="Which one", description="Answer the questions.")
    assert_every_control_matters(example, width=width, order=range(9))
