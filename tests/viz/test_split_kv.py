"""The explorer of chapter 20 counts programs, rounds and bytes, and moves."""

import itertools
import math

import pytest

import lqedu.viz
from lqedu.formats.kv import KVInt
from tests.viz.js import assert_every_control_matters, compute, explorer_page

DATA = {
    "processors": 132,
    "resident": 8,
    "bandwidth": 3e12,
    "heads": 32,
    "kv_heads": 8,
    "size": 128,
    "records": {"FP16": 256, "KV8": KVInt(8).record_bytes(128), "KV4": KVInt(4).record_bytes(128)},
}
START = {"cache": "KV4", "batch": 2, "reach": 13, "splits": 2}


def test_numbers_equal_python() -> None:
    choices = itertools.product(DATA["records"], range(8), (8, 11, 16), range(8))
    inputs = [DATA | dict(zip(START, values, strict=True)) for values in choices]
    for one, got in zip(inputs, compute("split_kv", inputs), strict=True):
        batch, tokens = 2 ** one["batch"], 2 ** one["reach"]
        parts = min(2 ** one["splits"], tokens // 64)
        programs = batch * 8 * parts
        assert got["programs"] == programs and sum(got["loads"]) == programs and len(got["loads"]) == 132
        assert got["rounds"] == math.ceil(programs / (132 * 8))
        assert got["read"] == batch * 8 * tokens * 2 * DATA["records"][one["cache"]]
        assert got["partial"] == (2 * 4 * batch * 32 * parts * 130 if parts > 1 else 0)
        even = programs / 132 / max(got["loads"])
        share = even * min(1, programs / (132 * 8)) ** 0.5
        assert got["time"] == pytest.approx((got["read"] / share + got["partial"]) / 3e12, rel=1e-12)
        assert got["time"] >= got["floor"]


@pytest.fixture(scope="module")
def example():
    return lqedu.viz.explorer("split_kv", DATA | START, title="Cutting a cache", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=range(4))


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("split_kv", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert f"{result['programs']} programs" in words and "4 sequences of 8192 tokens" in words
