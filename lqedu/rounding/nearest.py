"""Rounding to nearest (RTN): every weight goes to the closest grid point, whatever its neighbours do.

The baseline of every chapter, derived in ``02-grids``: its error is at most half a step per weight; it needs no data.
"""

from torch import Tensor

from lqedu.formats import IntGrid, QTensor
from lqedu.rounding.report import RoundingReport, check_problem, proxy_loss


def nearest(
    weight: Tensor,
    grid: IntGrid,
    *,
    hessian: Tensor | None = None,
    fitted: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[QTensor, RoundingReport]:
    """Round a weight to the nearest points of a grid fitted to it.

    Args:
        weight: ``[out, in]``.
        grid: the grid.
        hessian: ``[in, in]``; only used to report the proxy loss.
        fitted: scale and zero point to round with; by default ``grid.fit(weight)``.

    Returns:
        The quantized weight and its report.

    Raises:
        GridError: a weight that is not finite, or a grid that does not fit it.
        CalibrationError: a Hessian of the wrong shape.

    >>> import torch
    >>> q, report = nearest(torch.tensor([[-1.0, -0.52, 0.26, 0.5]]), IntGrid(bits=4))
    >>> q.dequantize()
    tensor([[-0.9998, -0.4999,  0.2999,  0.4999]])
    """
    if hessian is not None:
        check_problem(weight, hessian, damping=0.0)
    weight = weight.detach()  # a layer's weight may be a parameter; codes have no gradient
    scale, zero = grid.fit(weight) if fitted is None else fitted
    quantized = QTensor(grid.encode(weight, scale, zero), scale, zero, grid)
    if hessian is None:
        return quantized, RoundingReport(proxy_loss=None)
    dead = int((hessian.diagonal() == 0).sum())
    return quantized, RoundingReport(
        proxy_loss(weight - quantized.dequantize(weight.dtype), hessian), dead_columns=dead
    )
