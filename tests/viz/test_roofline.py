"""The explorer of chapter 01 counts exactly as lqedu.evaluation.roofline does, and moves."""

import itertools

import pytest

import lqedu.viz
from lqedu.evaluation.roofline import ModelShape, decode_bytes_per_token, decode_ops_per_token, kv_bytes_per_token
from tests.viz.js import compute, explorer_page, move, picture

SHAPES = {
    "full attention": ModelShape(32, 4096, 11008, 32, 32, 128, 32000),
    "grouped and tied": ModelShape(30, 576, 1536, 9, 3, 64, 49152, True),
}
FORMATS = {
    "FP16": {"weight": 16, "peak": 7e14},
    "W4A16": {"weight": 4.125, "peak": 7e14},
    "FP8": {"weight": 8, "peak": 1.3e15},
}
DATA = {
    "llms": {
        name: {
            "linear": one.linear_weights,
            "head": one.head_weights,
            "layers": one.layers,
            "heads": one.heads,
            "kv_heads": one.kv_heads,
            "head_dim": one.head_dim,
        }
        for name, one in SHAPES.items()
    },
    "formats": FORMATS,
    "base": 7e14,
    "bandwidth": 3e12,
    "llm": "full attention",
    "format": "W4A16",
    "cache": 16,
    "exponent": 4,
    "reach": 10,
}


def test_numbers_equal_python():
    inputs = [
        {**DATA, "llm": llm, "format": name, "cache": cache, "batch": batch, "context": context}
        for llm, name, cache, batch, context in itertools.product(
            SHAPES, FORMATS, (16, 8, 4), (1, 16, 333, 4096), (0, 1, 1000, 131072)
        )
    ]
    bounds = set()
    for one, got in zip(inputs, compute("roofline", inputs), strict=True):
        shape, batch, context = SHAPES[one["llm"]], one["batch"], one["context"]
        bits, peak = FORMATS[one["format"]]["weight"], FORMATS[one["format"]]["peak"]
        moved = batch * decode_bytes_per_token(
            shape, batch=batch, context=context, weight_bits=bits, kv_bits=one["cache"]
        )
        ops = batch * decode_ops_per_token(shape, context=context)
        assert got["ops"] == ops
        assert got["bytes"] == pytest.approx(moved, rel=1e-12)
        assert got["kv"] == batch * context * kv_bytes_per_token(shape, bits=one["cache"])
        assert got["intensity"] == pytest.approx(ops / moved, rel=1e-12)
        quantized = 2 * batch * shape.linear_weights
        arithmetic = quantized / peak + (ops - quantized) / DATA["base"]
        want = max(moved / DATA["bandwidth"], arithmetic)
        assert got["time"] == pytest.approx(want, rel=1e-12)
        assert got["per_token"] == pytest.approx(want / batch, rel=1e-12)
        assert got["bound"] == ("memory" if moved / DATA["bandwidth"] >= arithmetic else "arithmetic")
        bounds.add(got["bound"])
    assert bounds == {"memory", "arithmetic"}


@pytest.mark.parametrize("width", [320, 1280])
def test_controls_change_the_picture(width: int):
    explorer = lqedu.viz.explorer("roofline", DATA, title="Roofline", description="What bounds a step.")
    with explorer_page(explorer, width=width) as page:
        seen = [picture(page)]
        for control in range(5):
            move(page, control)
            seen.append(picture(page))
        assert len(set(seen)) == 6
