"""The explorer of chapter 15 counts bytes as the package stores them, and moves."""

import itertools

import pytest

import lqedu.viz
from lqedu.evaluation.roofline import ModelShape, kv_bytes_per_token
from lqedu.formats.kv import kv_grid
from tests.viz.js import assert_every_control_matters, compute, explorer_page

MODELS = {
    "Llama-2-7B": {"layers": 32, "kv_heads": 32, "head_dim": 128, "params": 6.7},
    "SmolLM2-135M": {"layers": 30, "kv_heads": 3, "head_dim": 64, "params": 0.1},
}
FORMATS = {"16": 16, "8": 8, "fp8": "fp8", "4": 4}


def _vector(word: str, head_dim: int) -> int:
    grid = kv_grid(FORMATS[word])
    return 2 * head_dim if grid is None else grid.record_bytes(head_dim)


def test_numbers_equal_python() -> None:
    choices = itertools.product(MODELS.values(), (16, 4.125), FORMATS, FORMATS, (1, 64), (128, 4096), (24, 80))
    keys = ("weight", "key", "value", "sequences", "context", "card")
    inputs = [model | dict(zip(keys, rest, strict=True)) for model, *rest in choices]
    inputs.append(inputs[0] | {"head_dim": 96, "kv_heads": 5, "layers": 7})
    for one, got in zip(inputs, compute("kv_memory", inputs), strict=True):
        heads = one["layers"] * one["kv_heads"]
        token = heads * (_vector(one["key"], one["head_dim"]) + _vector(one["value"], one["head_dim"]))
        weights = one["params"] * 1e9 * one["weight"] / 8
        room = max(0, one["card"] * 1e9 - weights)
        assert got["token"] == token
        assert got["cache"] == token * one["sequences"] * one["context"]
        assert got["weights"] == pytest.approx(weights)
        assert got["free"] == pytest.approx(one["card"] * 1e9 - weights - got["cache"])
        assert got["tokens"] == pytest.approx(room / token, abs=1)
        assert got["fit"] == pytest.approx(room / token / one["context"], abs=1) and got["fit"] <= room / token
        both = [2 * heads * _vector(word, one["head_dim"]) for word in FORMATS]
        assert got["fits"] == [int(room / (bytes_ * one["context"])) for bytes_ in both]


def test_bytes_are_those_of_chapter_1() -> None:
    for (name, model), bits in itertools.product(MODELS.items(), (16, 8, 4)):
        shape = ModelShape(model["layers"], 1, 1, model["kv_heads"], model["kv_heads"], model["head_dim"], 1)
        data = {"weight": 16, "key": str(bits), "value": str(bits), "sequences": 1, "context": 128, "card": 24}
        (got,) = compute("kv_memory", [model | data])
        assert got["token"] == kv_bytes_per_token(shape, bits=bits), name


@pytest.fixture(scope="module")
def example():
    data = {"models": MODELS, "model": "Llama-2-7B", **MODELS["Llama-2-7B"], "weight": 4.125, "card": 24}
    data |= {"key": "16", "value": "16", "exponent": 2, "reach": 11}
    return lqedu.viz.explorer("kv_memory", data, title="Memory of a cache", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=(8, 9, 6, 7, 10, 5, 1, 2, 3, 4, 0))


def test_a_model_fills_in_its_sizes(example) -> None:
    with explorer_page(example, theme="dark") as page:
        assert "32 layers, 32 key heads of 128" in page.inner_text("[aria-live]")
        page.get_by_label("model").select_option("SmolLM2-135M")
        words = page.inner_text("[aria-live]")
        assert "30 layers, 3 key heads of 64" in words and "a token takes 23 kB" in words
        assert page.get_by_label("key heads").input_value() == "3"
