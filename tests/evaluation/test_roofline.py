"""Counts against a real model's tensors, and the roofline's two regimes."""

import pytest

from lqedu.errors import UsageError
from lqedu.evaluation.roofline import (
    ModelShape,
    decode_bytes_per_token,
    decode_ops_per_token,
    kv_bytes_per_token,
    matmul_bytes,
    matmul_ops,
    roofline_time,
)
from lqedu.models import linears
from tests.models_tiny import tiny_model


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_as_the_model_has_them(gqa: bool, tied: bool) -> None:
    model = tiny_model("llama", gqa=gqa, tied=tied)
    shape = ModelShape.from_config(model.config)
    assert shape.linear_weights == sum(linear.weight.numel() for linear in linears(model).values())
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert shape.linear_weights + shape.head_weights + shape.embedding_weights == matrices


def test_kv_bytes_equal_a_real_cache() -> None:
    model = tiny_model("llama", gqa=True).half()
    from tests.models_tiny import tiny_windows

    cache = model(tiny_windows(1, 8), use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert stored == 8 * kv_bytes_per_token(ModelShape.from_config(model.config))


def test_the_two_regimes() -> None:
    ops, moved = matmul_ops(3, 5, 7), matmul_bytes(3, 5, 7)
    assert ops == 210
    assert moved == 2 * (35 + 21 + 15)
    assert roofline_time(ops, moved, peak=1.0, bandwidth=1e9) == ops
    assert roofline_time(ops, moved, peak=1e9, bandwidth=1.0) == moved


def test_batching_shares_weights_and_not_the_cache() -> None:
    shape = ModelShape(2, 64, 96, 4, 2, 16, 128)
    one = decode_bytes_per_token(shape, batch=1, context=10)
    many = decode_bytes_per_token(shape, batch=4, context=10)
    cache = 10 * kv_bytes_per_token(shape)
    assert one - cache == pytest.approx(4 * (many - cache))
    assert kv_bytes_per_token(shape, bits=4) == 2 * 2 * 2 * (8 + 4)


def test_operations_of_a_token() -> None:
    shape = ModelShape(2, 64, 96, 4, 2, 16, 128)
    empty = decode_ops_per_token(shape, context=0)
    assert empty == 2 * (shape.linear_weights + shape.head_weights)
    # scores: 4 heads, 10 keys of 16 numbers; output: as many, both with a multiplication and an addition, in 2 layers
    assert decode_ops_per_token(shape, context=10) - empty == 2 * 2 * (2 * 4 * 10 * 16)
    with pytest.raises(UsageError, match="context"):
        decode_ops_per_token(shape, context=-1)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="m must be positive"):
        matmul_ops(0, 1, 1)
    with pytest.raises(UsageError, match="bandwidth"):
        roofline_time(1, 1, peak=1, bandwidth=0)
    with pytest.raises(UsageError, match="context"):
        decode_bytes_per_token(ModelShape(1, 1, 1, 1, 1, 1, 1), batch=1, context=-1)
