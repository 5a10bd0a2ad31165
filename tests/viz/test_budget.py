"""The explorer of chapter 25 picks what Python picks, and moves."""

import itertools

import pytest

import lqedu.viz
from lqedu.book import results
from tests.viz.js import assert_every_control_matters, compute, explorer_page

LINEAR, OTHER = 106_168_320, 28_346_688
SIZES = {"linear": LINEAR, "other": OTHER}


def _rows() -> list[dict]:
    found = [r for r in results("weight_only_smollm2")["values"] if r["method"] != "dense"]
    keys = ("method", "bits_per_weight", "delta_nll", "delta_stderr", "calibration_windows")
    names = ("name", "bits", "loss", "stderr", "text")
    rows = [dict(zip(names, (row[key] for key in keys), strict=True)) for row in found]
    return [row | {"text": row["text"] > 0, "name": f"{row['name']} {i}"} for i, row in enumerate(rows)]


def _pick(one: dict) -> tuple[list[bool], int]:
    """Which rows meet the budgets, and the best of them by bytes, then loss, then order."""
    meets = [
        (LINEAR * row["bits"] + OTHER * one["rest"]) / 8e6 <= one["memory"]
        and row["loss"] + 2 * row["stderr"] <= one["quality"]
        and not (one["free"] and row["text"])
        for row in one["rows"]
    ]
    able = [i for i, ok in enumerate(meets) if ok]
    key = lambda i: (one["rows"][i]["bits"], one["rows"][i]["loss"], i)  # noqa: E731
    return meets, min(able, key=key, default=-1)


def test_numbers_equal_python() -> None:
    rows = _rows()
    choices = itertools.product((60, 118, 125, 200, 260), (0.0, 0.13, 0.2, 0.5, 1.2), (8.5, 16, 32), (False, True))
    keys = ("memory", "quality", "rest", "free")
    inputs = [SIZES | {"rows": rows} | dict(zip(keys, choice, strict=True)) for choice in choices]
    picks = set()
    for one, got in zip(inputs, compute("budget", inputs), strict=True):
        meets, pick = _pick(one)
        assert got["meets"] == meets and got["pick"] == pick and got["both"] == sum(meets)
        assert got["size"] == pytest.approx([(LINEAR * r["bits"] + OTHER * one["rest"]) / 8e6 for r in rows])
        picks.add(pick)
    assert len(picks) > 4 and -1 in picks  # the grid of inputs reaches different answers


@pytest.fixture(scope="module")
def example():
    data = SIZES | {"rows": _rows(), "memory": 126, "quality": 0.15, "rest": 16, "free": False}
    return lqedu.viz.explorer("budget", data, title="Two budgets", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=range(4))


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("budget", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert example.data["rows"][result["pick"]]["name"] in words and f"{result['both']} all that was asked" in words
