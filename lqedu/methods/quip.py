"""QuIP: make weight and Hessian incoherent, round with linear feedback, look back once; chapter ``07-quip``.

Grid: INT2-8, one scale for the matrix. Move: rotate, undone online. Round: LDLQ and greedy passes.
Run: rotate, W2A16, rotate back. Chee et al., 2023, arXiv:2307.13304.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lqedu.errors import UsageError
from lqedu.formats import IntGrid
from lqedu.formats.integer import ScaleConvention
from lqedu.linalg.hessian import damp
from lqedu.methods.base import Answers, Method
from lqedu.options import check_count, check_number
from lqedu.rounding import RoundingReport, ldlq
from lqedu.rounding.greedy import refine
from lqedu.rounding.report import proxy_loss
from lqedu.runtime.incoherent import IncoherentWeight
from lqedu.transforms.incoherence import LARGEST_SEED, gaussian_range, incoherent

RANGES = ("gaussian", "reference")


@dataclass(frozen=True, kw_only=True)
class QuIP(Method):
    """QuIP on one grid for the whole matrix, with two of the reference's choices replaced by what measures better.

    The reference is ``QuIP(rescale=True, grid_range="reference")``. Rescaling turns an input with massive activations
    into a column that no rotation can spread (QuIP# leaves it off too), and ± 2.4 root mean squares is the best range
    of a Gaussian at 4 bits, far from it at 2. Chapter ``07-quip`` measures both.

    Attributes:
        bits: 2 to 8.
        rescale: balance the input channels with a diagonal first.
        rotate: rotate inputs and outputs with random Kronecker factors.
        grid_range: half-width of the grid in root mean squares of the rotated matrix: "gaussian" for the best one of a
            Gaussian, "reference" for 2.4.
        passes: greedy passes after LDLQ, at most; 0 is LDLQ alone.
        damping: fraction of the Hessian's mean diagonal added to it, once (rotations leave it as it is; the reference
            adds it before and again after).
        seed: of the rotations.
        true_sequential: calibrate each linear of a block on the outputs of the already quantized ones before it.
    """

    name: ClassVar[str] = "quip"
    title: ClassVar[str] = "QuIP"
    chapter: ClassVar[str] = "07-quip"
    citation: ClassVar[str] = "chee2023quip"
    answers: ClassVar[Answers] = Answers(
        grid="INT2-8 per matrix, in root mean squares",
        move="rotate inputs and outputs",
        round="linear feedback (LDLQ), then greedy passes",
        run="rotate, dequantize and FP16 GEMM, rotate back",
        calibration="a Hessian of each linear's inputs",
        online=("dequantize weights", "rotate inputs and outputs"),
    )
    needs_calibration: ClassVar[bool] = True
    needs_hessian: ClassVar[bool] = True

    bits: int = 2
    rescale: bool = False
    rotate: bool = True
    grid_range: str = "gaussian"
    passes: int = 1
    damping: float = 0.01
    seed: int = 0
    true_sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grid()  # contradictions die here
        if self.grid_range not in RANGES:
            raise UsageError(f"grid_range is {' or '.join(map(repr, RANGES))}, got {self.grid_range!r}")
        check_number("damping", self.damping, above=0)
        check_count("passes", self.passes)
        check_count("seed", self.seed, most=LARGEST_SEED)

    def grid(self) -> IntGrid:
        """The grid these hyper-parameters describe."""
        return IntGrid(self.bits, granularity="tensor", zero_point="float", convention=ScaleConvention.RMS)

    def quantize_linear(self, weight: Tensor, hessian: Tensor) -> tuple[IncoherentWeight, RoundingReport]:
        """Round one weight ``[out, in]`` with the Hessian ``[in, in]`` of its inputs, and report its undamped loss."""
        transforms, w, h = incoherent(weight, hessian, seed=self.seed, rescale=self.rescale, rotate=self.rotate)
        fitted = self.fit(w)
        start, report = ldlq(w, h, self.grid(), damping=self.damping, fitted=fitted)
        rotated = refine(w, damp(h, self.damping), start, passes=self.passes)
        return IncoherentWeight(rotated, transforms), replace(
            report,
            proxy_loss=proxy_loss(w - rotated.dequantize(w.dtype), h),  # the same number in every basis
            dead_columns=int((hessian.diagonal() == 0).sum()),  # rotated, no column is dead any more
            flips=float((rotated.codes != self.grid().encode(w, *fitted)).double().mean()),
        )

    def fit(self, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a rotated weight ``[out, in]``: the grid's own, at this method's range."""
        scale, zero = self.grid().fit(rotated)
        if self.grid_range == "reference":
            return scale, zero
        half = (self.grid().levels - 1) / 2
        wanted = (gaussian_range(self.bits) * rotated.square().mean().sqrt() / half).to(scale.dtype).reshape(1, 1)
        # a weight of zeros has no range: the grid's own answer decodes to zeros
        return torch.where(wanted == 0, scale, wanted), torch.where(wanted == 0, zero, torch.full_like(zero, half))
