"""The explorer of chapter 19 unpacks words as the package's register arithmetic does, wraps included, and moves."""

import itertools

import pytest
import torch

import lqedu.viz
from lqedu.runtime import registers
from lqedu.runtime.nibbles import high_nibbles
from tests.viz.js import assert_every_control_matters, compute, explorer_page

CODES = [3, 9, 0, 15, 7, 12, 1, 8]
START = {"codes": CODES, "trick": "flip", "place": 2, "code": 5, "scale": 17, "zero": 8}


def _codes(one: dict) -> list[int]:
    return [one["code"] if i == one["place"] else c for i, c in enumerate(one["codes"])]


def _word(codes: list[int]) -> torch.Tensor:
    return torch.tensor(sum(c << 4 * i for i, c in enumerate(codes)))


def _packed(codes: list[int]) -> torch.Tensor:
    return torch.tensor([low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)], dtype=torch.uint8)


def test_numbers_equal_python() -> None:
    two = itertools.product(("add", "flip"), (0, 5), range(16), (1, 9, 16, 17, 18, 20), (0, 3, 8, 15))
    inputs = [START | dict(zip(("trick", "place", "code", "scale", "zero"), values, strict=True)) for values in two]
    inputs += [
        START | {"trick": t, "place": p, "code": c} for t in ("magic", "upper") for p in range(8) for c in range(16)
    ]
    wrong = set()
    for one, got in zip(inputs, compute("unpacking", inputs), strict=True):
        codes = _codes(one)
        word = _word(codes)
        assert got["word"] == int(word) and got["q"] == codes
        if one["trick"] == "magic":
            want = codes
        elif one["trick"] == "upper":
            want = high_nibbles(_packed(codes)).tolist()
        else:
            s, z = one["scale"], one["zero"]
            low, high = registers.unpack_nibbles(word)
            if one["trick"] == "add":
                minus = ((-z * s) % 256) * 0x01010101
                parts = [registers.add_bytes(registers.multiply(p, s), torch.tensor(minus)) for p in (low, high)]
            else:
                a = ((128 - z * s) % 256) * 0x01010101
                parts = [((p * s + a) % 2**32) ^ 0x80808080 for p in (low, high)]
            low, high = (registers.to_int8(p.reshape(1)).tolist() for p in parts)
            want = [v for pair in zip(low, high, strict=True) for v in pair]
        assert got["operands"] == want
        assert got["wrong"] == sum(a != b for a, b in zip(want, got["wanted"], strict=True))
        wrong.add(got["wrong"] > 0)
    assert wrong == {False, True}


def test_instructions_are_those_of_the_steps() -> None:
    got = compute("unpacking", [START | {"trick": t} for t in ("magic", "upper", "add", "flip")])
    assert [one["instructions"] for one in got] == [9, 3, 13, 7]


@pytest.fixture(scope="module")
def example():
    return lqedu.viz.explorer("unpacking", START, title="One word, eight weights", description="Choose an unpacking.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=[1, 2, 3, 4, 0])


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("unpacking", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert ", ".join(str(v).replace("-", "−") for v in result["operands"]) in words
    assert "7 instructions for 8 weights" in words
