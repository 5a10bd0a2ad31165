"""The explorer of chapter 13 decodes bytes as the package's kernel arithmetic does, wraps included, and moves."""

import itertools

import pytest
import torch

import lqedu.viz
from lqedu.runtime.nibbles import high_nibbles, pack_signed, requantized_bytes
from tests.viz.js import assert_every_control_matters, compute, explorer_page

CODES, X = [3, -2, 7, -5, 0, 1, -7, 4], [-61, 25, 127, 8, -90, 44, 3, -128]
DATA = {"codes": CODES, "x": X, "sx": 0.02, "sw": 0.005}


def _row(one: dict) -> torch.Tensor:
    q = torch.tensor(one["codes"], dtype=torch.int8)
    q[2 * one["byte"]], q[2 * one["byte"] + 1] = one["first"], one["second"]
    return q


def test_numbers_equal_python() -> None:
    pairs = list(itertools.product(range(-8, 8), repeat=2))
    ratios = (0.25, 1.0, 5.75, 15.75, 16.0, 17.0, 20.0)
    keys = ("mode", "byte", "first", "second", "ratio")
    choices = [("channel", i % 4, *pair, 1.0) for i, pair in enumerate(pairs)]
    choices += [("group", i % 4, *pair, ratio) for i, (pair, ratio) in enumerate(itertools.product(pairs, ratios))]
    inputs = [DATA | dict(zip(keys, choice, strict=True)) for choice in choices]
    x = torch.tensor(X)
    seen = set()
    for one, got in zip(inputs, compute("nibbles", inputs), strict=True):
        q = _row(one)
        packed = pack_signed(q)
        assert got["q"] == q.tolist() and got["packed"] == packed.tolist()
        if one["mode"] == "channel":
            operands, step = high_nibbles(packed), DATA["sw"] / 16
            assert got["total"] == 16 * int((q.long() * x).sum()) == got["exact"] and not any(got["wrapped"])
            assert got["y"] == pytest.approx(got["wanted"], rel=1e-12)
        else:
            operands = requantized_bytes(q[None], torch.tensor([[one["ratio"]]], dtype=torch.float16))[0]
            step, true = DATA["sw"] / one["ratio"], torch.round(q.double() * one["ratio"])
            assert got["wrapped"] == (operands.double() != true).tolist()
            assert got["exact"] == int((true * x).sum())
        assert got["operands"] == operands.tolist()
        assert got["total"] == int((operands.long() * x).sum()) == sum(got["products"])
        assert got["y"] == pytest.approx(DATA["sx"] * step * got["total"], rel=1e-12)
        assert got["wanted"] == pytest.approx(DATA["sx"] * DATA["sw"] * int((q.long() * x).sum()), rel=1e-12)
        seen |= {any(got["wrapped"])}
    assert seen == {False, True}


@pytest.fixture(scope="module")
def example():
    data = DATA | {"mode": "channel", "byte": 0, "first": 3, "second": -2, "ratio": 17.0}
    return lqedu.viz.explorer("nibbles", data, title="A W4A8 dot product", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=range(5))  # the first one shows what the ratio is for


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("nibbles", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert "Byte 0 is 11100011: codes 3 and −2." in words and "operands are 48 and −32" in words
    assert f"the sum of all products is {result['total']}".replace("-", "−") in words
