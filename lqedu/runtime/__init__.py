"""Running quantized models: layers that keep packed codes (chapter ``02-grids``)."""

from lqedu.runtime.linear import QuantLinear, quantized_linears

__all__ = ["QuantLinear", "quantized_linears"]
