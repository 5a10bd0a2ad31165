"""The packed incoherent layer computes what its undone dense weight computes, and counts every stored byte."""

import pytest
import torch

from lqedu.errors import GridError
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.integer import ScaleConvention
from lqedu.linalg import kronecker_sizes
from lqedu.rounding import nearest
from lqedu.runtime.incoherent import IncoherentLayout, IncoherentLinear, IncoherentWeight
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.kinds import KINDS, describe, layer_of, rebuild
from lqedu.transforms.incoherence import Incoherence, incoherent
from tests import problems
from tests.compare import relative_error

SHAPES = [(24, 48), (96, 40), (13, 31), (1, 6)]


def weight(shape: tuple[int, int], *, bits: int = 2, rescale: bool = True, rotate: bool = True) -> IncoherentWeight:
    w, h = problems.weight(*shape, seed=1), problems.hessian(shape[1], seed=2)
    grid = IntGrid(bits, granularity="tensor", zero_point="float", convention=ScaleConvention.RMS)
    transforms, rotated, _ = incoherent(w, h, rescale=rescale, rotate=rotate)
    return IncoherentWeight(nearest(rotated, grid)[0], transforms)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rescale", "rotate"), [(True, True), (True, False), (False, True), (False, False)])
def test_equals_the_dense_undone_weight(shape: tuple[int, int], rescale: bool, rotate: bool) -> None:
    stored = weight(shape, rescale=rescale, rotate=rotate)
    bias = torch.randn(shape[0], generator=problems.seeded(3))
    layer = layer_of(stored, bias)
    assert isinstance(layer, IncoherentLinear)
    x = torch.randn(2, 5, shape[1], generator=problems.seeded(4))
    want = torch.nn.functional.linear(x.double(), stored.dequantize(torch.float64), bias.double())
    assert relative_error(layer(x), want) <= 1e-5
    assert relative_error(layer(x.half()), want) <= 1e-2
    assert layer(x.half()).dtype == torch.float16
    assert sum(buffer.nbytes for buffer in layer.buffers()) == layer.nbytes == stored.nbytes
    assert sum(tensor.nbytes for tensor in stored.packed().values()) == stored.nbytes


def test_bytes_by_hand() -> None:
    """24 x 48 at 2 bits: 288 of codes, 2 + 2 of scale and zero; factors 4·6 and 6·8, permutations, channel scale."""
    stored = weight((24, 48))
    factors = 4 * (16 + 36) + 4 * (36 + 64)
    assert stored.nbytes == 288 + 4 + factors + 2 * 24 + 2 * 48 + 2 * 48
    assert stored.bits_per_weight == 8 * stored.nbytes / (24 * 48)
    assert stored.grid.macs((24, 48)) == 24 * (4 + 6) + 48 * (6 + 8)
    assert weight((24, 48), rescale=False, rotate=False).nbytes == 288 + 4


@pytest.mark.parametrize("rotate", [True, False])
def test_describes_and_rebuilds(rotate: bool) -> None:
    stored = weight((24, 48), rotate=rotate)
    description = describe(stored)
    assert description["kind"] == "incoherent"
    again = rebuild(description, stored.packed())
    assert again.grid == stored.grid == IncoherentLayout.from_dict(stored.grid.to_dict())
    assert torch.equal(again.dequantize(), stored.dequantize())
    frame = rebuild(description, None)
    layer, frame_layer = layer_of(stored, None), layer_of(frame, None)
    assert {n: (b.shape, b.dtype) for n, b in layer.named_buffers()} == {
        n: (b.shape, b.dtype) for n, b in frame_layer.named_buffers()
    }
    frame_layer.load_state_dict(layer.state_dict())
    x = torch.randn(3, 48, generator=problems.seeded(5))
    assert torch.equal(frame_layer(x), layer(x))
    assert set(KINDS) >= {"integer", "incoherent"}


def test_moving_the_model_keeps_the_stored_bits() -> None:
    layer = layer_of(weight((24, 48)), None)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.bfloat16()
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_what_does_not_fit_is_refused() -> None:
    stored = weight((24, 48))
    tensors = stored.packed()
    with pytest.raises(GridError, match="needs u_left"):
        IncoherentWeight.from_packed({k: t for k, t in tensors.items() if k != "u_left"}, stored.grid, (24, 48))
    with pytest.raises(GridError, match="needs v_order"):
        IncoherentWeight.from_packed(tensors | {"v_order": tensors["v_order"].int()}, stored.grid, (24, 48))
    with pytest.raises(GridError, match="extra"):
        IncoherentWeight.from_packed(tensors | {"extra": torch.zeros(1)}, stored.grid, (24, 48))
    with pytest.raises(GridError, match="do not make"):
        IncoherentLayout(stored.grid.grid, (5, 5), None, False).nbytes((24, 48))
    d = stored.grid.to_dict()
    with pytest.raises(GridError, match="two positive sizes"):
        IncoherentLayout.from_dict(d | {"in_factors": [3]})
    with pytest.raises(GridError, match="fields"):
        IncoherentLayout.from_dict({"grid": d["grid"]})
    with pytest.raises(GridError, match="floating-point inputs"):
        IncoherentLinear(stored, path=InputPath(activation=ActivationGrid(8)))


def test_no_transform_is_the_plain_layer() -> None:
    w = problems.weight(8, 12, seed=6)
    q = nearest(w, IntGrid(4))[0]
    stored = IncoherentWeight(q, Incoherence())
    assert torch.equal(stored.dequantize(), q.dequantize())
    assert stored.nbytes == q.nbytes
    assert kronecker_sizes(13) == (1, 13)  # a prime width still works: one dense factor
