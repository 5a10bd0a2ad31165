"""RTN: round every weight to the nearest point of its grid. The baseline; chapter ``02-grids``."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lqedu.formats import QTensor
from lqedu.methods.base import Answers, AnyGrid, QuantizedActivations
from lqedu.rounding import RoundingReport, nearest


@dataclass(frozen=True, kw_only=True)
class RTN(QuantizedActivations, AnyGrid):
    """Round to nearest: the weights, and where asked the inputs of the linears and the keys and values.

    ``RTN(bits=8, group_size=None, symmetric=True, activation_bits=8)`` is the naive W8A8 of Part III.

    >>> RTN(bits=4, group_size=64).grid().bits_per_weight((576, 576))
    4.3194...
    """

    name: ClassVar[str] = "rtn"
    title: ClassVar[str] = "RTN"
    chapter: ClassVar[str] = "02-grids"
    citation: ClassVar[str] = "nagel2021whitepaper"
    answers: ClassVar[Answers] = Answers(
        grid="INT2-8 per channel or group",
        move="nothing",
        round="nearest",
        run="W4A16: dequantize, then FP16 GEMM",
        calibration="none",
        online=("dequantize weights",),
    )
    needs_calibration: ClassVar[bool] = False

    activation_bits: int | None = None

    def quantize_linear(self, weight: Tensor, hessian: Tensor | None = None) -> tuple[QTensor, RoundingReport]:
        """Round one weight ``[out, in]``; a Hessian only serves the report."""
        return nearest(weight, self.grid(), hessian=hessian)
