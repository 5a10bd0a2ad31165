"""Weights whose inputs are sorted by group: the same function, bit for bit through a folder, bad orders refused."""

import pytest
import torch

from lqedu.errors import GridError
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.rounding import nearest
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.kinds import check_layer, describe, layer_of, rebuild
from lqedu.runtime.permuted import PermutedLinear, PermutedWeight

GRID = IntGrid(4, granularity="group", group_size=16)


def permuted(seed: int = 0) -> tuple[torch.Tensor, PermutedWeight]:
    g = torch.Generator().manual_seed(seed)
    w, order = torch.randn(24, 64, generator=g), torch.randperm(64, generator=g)
    return w, PermutedWeight(nearest(w[:, order], GRID)[0], order.to(torch.int32))


def test_each_input_meets_its_own_weights() -> None:
    w, weight = permuted()
    w_hat = torch.empty_like(w)
    for column, k in enumerate(weight.order.tolist()):
        w_hat[:, k] = weight.sorted.dequantize()[:, column]
        assert torch.equal(weight.codes[:, k], weight.sorted.codes[:, column])
    assert torch.equal(weight.dequantize(), w_hat)
    assert float((w_hat - w).abs().max()) < 0.5  # in the wrong order it is another matrix
    bias, x = torch.randn(24), torch.randn(2, 5, 64)
    layer = layer_of(weight, bias)
    assert isinstance(layer, PermutedLinear)
    want = torch.nn.functional.linear(x.double(), w_hat.double(), bias.double())
    assert torch.allclose(layer(x).double(), want, atol=1e-5)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_through_a_file() -> None:
    _, weight = permuted()
    back = rebuild(describe(weight), weight.packed())
    assert torch.equal(back.order, weight.order) and torch.equal(back.dequantize(), weight.dequantize())
    assert weight.nbytes == sum(tensor.nbytes for tensor in weight.packed().values())
    assert weight.bits_per_weight == 8 * weight.nbytes / (24 * 64)
    frame = rebuild(describe(weight), None)
    assert {name: t.shape for name, t in frame.packed().items()} == {
        name: t.shape for name, t in weight.packed().items()
    }


def test_what_makes_no_weight_is_refused() -> None:
    _, weight = permuted()
    with pytest.raises(GridError, match="the order of 64 inputs is int32"):
        PermutedWeight(weight.sorted, weight.order[:-1])
    with pytest.raises(GridError, match="the order of 64 inputs is int32"):
        PermutedWeight(weight.sorted, weight.order.long())
    twice = weight.order.clone()
    twice[0] = twice[1]
    with pytest.raises(GridError, match="not a permutation of 64 inputs"):
        rebuild(describe(weight), weight.packed() | {"order": twice})
    layer = layer_of(weight, None)
    layer.order[0] = layer.order[1]
    with pytest.raises(GridError, match="not a permutation"):
        check_layer(layer)
    with pytest.raises(GridError, match="has an order"):
        rebuild(describe(weight), weight.sorted.packed())
    with pytest.raises(GridError, match="the field sorted"):
        rebuild(describe(weight) | {"grid": {}}, None)
    with pytest.raises(GridError, match="floating-point inputs"):
        layer_of(weight, None, InputPath(activation=ActivationGrid(8)))
