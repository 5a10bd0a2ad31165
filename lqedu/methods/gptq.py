"""GPTQ: round to nearest with second-order error feedback; chapter ``04-gptq``.

Grid: INT2-8. Move: nothing. Round: error feedback through the Hessian. Run: W4A16.
Frantar et al., 2023, arXiv:2210.17323.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lqedu.formats import QTensor
from lqedu.methods.base import Answers, AnyGrid
from lqedu.options import check_number
from lqedu.rounding import RoundingReport, gptq
from lqedu.rounding.gptq import check_schedule


@dataclass(frozen=True, kw_only=True)
class GPTQ(AnyGrid):
    """GPTQ with the reference's defaults, except that every layer is calibrated behind already quantized ones.

    Attributes:
        damping: fraction of the Hessian's mean diagonal added to it.
        block_size: columns updated at once; speed only.
        order: "natural" or "activation" (largest Hessian diagonal first, static group scales).
        true_sequential: calibrate each linear of a block on the outputs of the already quantized ones before it. The
            reference leaves this off; here it is on, because one streaming pass gives it at no cost.
    """

    name: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ"
    chapter: ClassVar[str] = "04-gptq"
    citation: ClassVar[str] = "frantar2023gptq"
    answers: ClassVar[Answers] = Answers(
        grid="INT2-8 per channel or group",
        move="nothing",
        round="error feedback through the Hessian",
        run="W4A16: dequantize, then FP16 GEMM",
        calibration="a Hessian of each linear's inputs",
        online=("dequantize weights",),
    )
    needs_calibration: ClassVar[bool] = True
    needs_hessian: ClassVar[bool] = True

    damping: float = 0.01
    block_size: int = 128
    order: str = "natural"
    true_sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule(self.grid(), self.block_size, self.order)
        check_number("damping", self.damping, above=0)

    def quantize_linear(self, weight: Tensor, hessian: Tensor) -> tuple[QTensor, RoundingReport]:
        """Round one weight ``[out, in]`` with the Hessian ``[in, in]`` of its inputs."""
        return gptq(weight, hessian, self.grid(), damping=self.damping, block_size=self.block_size, order=self.order)
