"""HQQ: zero points by half-quadratic splitting, no data; chapter ``06-hqq``.

Grid: INT2-8 with float zero points. Move: nothing. Round: nearest, after the zero point has moved. Run: W4A16.
Badri & Shaji, 2023.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lqedu.formats import IntGrid, QTensor, ScaleConvention
from lqedu.methods.base import Answers, WeightOnly
from lqedu.rounding import RoundingReport, hqq
from lqedu.rounding.hqq import check_options


@dataclass(frozen=True, kw_only=True)
class HQQ(WeightOnly):
    """HQQ with the defaults of its package.

    Attributes:
        axis: 1 for groups of inputs of a row, 0 for groups of outputs of a column (better, and no fast kernel reads it).
        p, beta, kappa, iterations: see :func:`lqedu.rounding.hqq`.
    """

    name: ClassVar[str] = "hqq"
    title: ClassVar[str] = "HQQ"
    chapter: ClassVar[str] = "06-hqq"
    citation: ClassVar[str] = "badri2023hqq"
    answers: ClassVar[Answers] = Answers(
        grid="INT2-8 per group, float zero points",
        move="nothing",
        round="half-quadratic: zero points for a p-norm, then nearest",
        run="W4A16: dequantize, then FP16 GEMM",
        calibration="none",
        online=("dequantize weights",),
    )
    needs_calibration: ClassVar[bool] = False

    group_size: int | None = 64
    axis: int = 1
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.p, self.beta, self.kappa, self.iterations)

    def grid(self) -> IntGrid:
        """The grid these hyper-parameters describe."""
        return IntGrid(
            self.bits,
            granularity=self.granularity,
            group_size=self.group_size,
            axis=self.axis,
            zero_point="float",
            convention=ScaleConvention.MINMAX,
        )

    def quantize_linear(self, weight: Tensor, hessian: Tensor | None = None) -> tuple[QTensor, RoundingReport]:
        """Round one weight ``[out, in]``; a Hessian is not looked at."""
        return hqq(weight, self.grid(), p=self.p, beta=self.beta, kappa=self.kappa, iterations=self.iterations)
