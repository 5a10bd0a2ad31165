"""Rounding onto progressive grids: to nearest, or with GPTQ's error feedback, on scales that stay; chapter ``14-qoq``.

Both levels of scales are fitted before a weight is rounded. In a group the grid is then affine, ``s (q - z)`` with
``s = s_c s_g`` and ``z`` the group's, so GPTQ's sweep runs on it as on any other, and what it compensates is the error of the
stored weight itself, not that of a 4-bit weight which is requantized later.

One thing is new. Compensated weights leave the range that the grid was fitted to, and the last code of a group may decode
outside int8: of a group with channel codes from -119 to 119 (step 16, zero point 7), code 15 means 128. So weights are cut to
the protective range before they are rounded, as the reference does (mit-han-lab/lmquant, commit 0c99067).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lqedu.formats import IntGrid
from lqedu.formats.progressive import ProgressiveGrid, ProgressiveTensor
from lqedu.rounding.gptq import check_schedule, feedback_codes
from lqedu.rounding.report import RoundingReport, check_problem, proxy_loss

Fitted = tuple[Tensor, Tensor, Tensor]  # what ProgressiveGrid.fit returns


def progressive_nearest(
    weight: Tensor, grid: ProgressiveGrid, *, hessian: Tensor | None = None, fitted: Fitted | None = None
) -> tuple[ProgressiveTensor, RoundingReport]:
    """Round a weight to the nearest points of a progressive grid.

    Args:
        weight: ``[out, in]``.
        grid: the grid.
        hessian: ``[in, in]``; only used to report the proxy loss.
        fitted: channel scale, group scale and zero point to round with; by default they are fitted to ``weight``.

    Raises:
        GridError: a weight that is not finite, or a group size that does not fit it.
        CalibrationError: a Hessian of the wrong shape.
    """
    if hessian is not None:
        check_problem(weight, hessian, damping=0.0)
    weight = weight.detach()
    fitted = grid.fit(weight) if fitted is None else fitted
    quantized = ProgressiveTensor(grid.encode(weight, *fitted), *fitted, grid)
    if hessian is None:
        quantized.int8()  # raises where a kernel would wrap
        return quantized, RoundingReport(proxy_loss=None)
    dead = int((hessian.diagonal() == 0).sum())
    error = weight - quantized.dequantize(weight.dtype)
    return quantized, RoundingReport(proxy_loss(error, hessian), dead_columns=dead)


def progressive_gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: ProgressiveGrid,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    order: str = "activation",
    fitted: Fitted | None = None,
) -> tuple[ProgressiveTensor, RoundingReport]:
    """Round a weight onto a progressive grid with second-order error feedback.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``, ``(1/tokens) Σ x^T x`` of the layer's inputs.
        grid: the grid. Its scales are static: they do not follow the compensated weights.
        damping, block_size, order: see :func:`lqedu.rounding.gptq`.
        fitted: channel scale, group scale and zero point to round with; by default they are fitted to ``weight``.

    Returns:
        The quantized weight, whose channel codes all fit int8, and its report. No argument is changed.

    Raises:
        As :func:`lqedu.rounding.gptq`.

    >>> w = torch.tensor([[0.7, 0.31, 0.1, 0.6, -0.5, -0.22, -1.5, 0.4]])
    >>> h = torch.eye(8) + 2.0                              # strongly correlated inputs
    >>> grid = ProgressiveGrid(group_size=8)
    >>> q, report = progressive_gptq(w, h, grid)
    >>> q.codes                                             # nearest would be 9 and 13 in place of 8 and 12
    tensor([[15, 12, 11, 14,  7,  8,  0, 12]], dtype=torch.uint8)
    >>> report.proxy_loss < progressive_nearest(w, grid, hessian=h)[1].proxy_loss
    True
    """
    check_problem(weight, hessian, damping)
    grid.scale_shape(tuple(weight.shape))  # refuses a group size that does not divide
    plain = affine_grid(grid)
    check_schedule(plain, block_size, order)
    w = weight.detach()
    w = w if w.dtype == torch.float64 else w.to(torch.float32)
    channel, group, zero = grid.fit(w) if fitted is None else fitted
    rounder = _Saturating(plain, grid.protective * channel[:, 0].to(w.dtype))
    scale, z = grid.affine(channel, group, zero)
    codes = feedback_codes(w, hessian, rounder, scale, z, damping=damping, block_size=block_size, order=order)
    quantized = ProgressiveTensor(codes, channel, group, zero, grid)
    report = RoundingReport(
        proxy_loss=proxy_loss(w - quantized.dequantize(w.dtype), hessian),
        damping=damping,
        dead_columns=int((hessian.diagonal() == 0).sum()),
        flips=float((codes != grid.encode(w, channel, group, zero)).double().mean()),
    )
    return quantized, report


def affine_grid(grid: ProgressiveGrid) -> IntGrid:
    """The integer grid whose codes are those of a progressive grid, once scales and zero points are given."""
    zero_point = "integer" if grid.zero == "code" else "float"
    return IntGrid(4, granularity="group", group_size=grid.group_size, zero_point=zero_point)


@dataclass(frozen=True)
class _Saturating:
    """An integer grid that cuts weights to ``± limit`` ``[out]`` before it rounds them."""

    grid: IntGrid
    limit: Tensor
    code_dtype: torch.dtype = torch.uint8

    def columns_per_scale(self, columns: int) -> int:
        return self.grid.columns_per_scale(columns)

    def nearest_code(self, w: Tensor, s: Tensor, z: Tensor | float) -> Tensor:
        return self.grid.nearest_code(torch.minimum(torch.maximum(w, -self.limit), self.limit), s, z)
