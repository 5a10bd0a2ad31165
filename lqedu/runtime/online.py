"""What a quantized model does beside its matrix products while it runs; chapter ``22-side-by-side``."""

from torch import nn

from lqedu.runtime.incoherent import IncoherentLinear
from lqedu.runtime.linear import QuantLinear, quantized_linears
from lqedu.runtime.two_level import TwoLevelLinear

#: Everything :func:`online_work` may find, in the order in which it is told.
WORK = (
    "dequantize weights",
    "unpack weights to 8 bits",
    "quantize inputs",
    "transform inputs",
    "rotate inputs and outputs",
    "quantize keys and values",
    "transform queries and keys",
)


def online_work(model: nn.Module) -> tuple[str, ...]:
    """What runs beside the products of a model, as its layers and its attention are set up; of :data:`WORK`, in that order.

    "dequantize weights": 16-bit inputs meet codes. "unpack weights to 8 bits": codes of inputs have more bits than those of
    weights, so that these are widened while they are loaded. "transform inputs": by Hadamard matrices. A dense model does
    nothing of it.
    """
    found = {work for layer in quantized_linears(model).values() for work in _of_layer(layer)}
    path = getattr(model, "lqedu_attention", None)
    if path is not None:
        found |= {"quantize keys and values"} if (path.key or path.value) is not None else set()
        found |= {"transform queries and keys"} if path.hadamard else set()
    return tuple(work for work in WORK if work in found)


def _of_layer(layer: QuantLinear) -> set[str]:
    activation, found = layer.path.activation, set()
    if activation is None:
        found.add("dequantize weights")
    else:
        found.add("quantize inputs")
        weight_bits = 4 if isinstance(layer, TwoLevelLinear) else getattr(layer.grid, "bits", 8)
        if weight_bits < getattr(activation, "bits", 8):
            found.add("unpack weights to 8 bits")
    if layer.path.hadamard is not None:
        found.add("transform inputs")
    if isinstance(layer, IncoherentLinear) and (layer.grid.out_factors or layer.grid.in_factors):
        found.add("rotate inputs and outputs")
    return found
