"""GPTQ: choose codes that minimise ``tr((W - Ŵ) H (W - Ŵ)^T)``, one column at a time, with error feedback.

Column i is rounded to nearest; its error, seen through the Hessian, is then spread over the columns still free:

    d = u[i, i],   err = (w_i - q_i) / d,   W[:, i:] -= err ⊗ u[i, i:],   where h^-1 = u^T u.

Frantar et al., 2023, arXiv:2210.17323, Algorithm 1 (reference: IST-DASLab/gptq, commit 2d65066). Chapter ``04-gptq``
derives it from Optimal Brain Surgeon. Where this file differs from the reference, and why:

- the Hessian is ``(1/tokens) Σ x^T x`` instead of ``(2/sequences) Σ x^T x``: damping is relative, no code changes;
- the grid of a group is fitted on weights that carry *all* compensation so far, also inside a lazy block; the reference
  reads them from before the block, so that its codes depend on the block size;
- ``order="activation"`` keeps group grids static (fitted on the original weight), so a group's scale stays where
  kernels look for it and no index array is needed;
- an input that was never active is rounded to nearest, not zeroed: calibration says nothing about it.

Cost of ``[out, in]``: 2/3 in**3 flops for the factor and its inverse (float64), about out * in**2 for the sweep.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lqedu.errors import GridError, UsageError
from lqedu.formats import IntGrid, QTensor
from lqedu.linalg.hessian import damp, inverse_factor
from lqedu.options import check_count
from lqedu.rounding.report import RoundingReport, check_problem, proxy_loss

ORDERS = ("natural", "activation")


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: IntGrid,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    order: str = "natural",
    fitted: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[QTensor, RoundingReport]:
    """Round a weight with second-order error feedback.

    Args:
        weight: ``[out, in]``; computed in float32, or float64 if it is float64.
        hessian: ``[in, in]``, ``(1/tokens) Σ x^T x`` of the layer's inputs.
        grid: the grid. Per tensor and per channel it is fitted to ``weight``; per group, to the compensated weights
            at the moment the group begins (``order="natural"``) or to ``weight`` (``order="activation"``).
        damping: fraction of the Hessian's mean diagonal added to it. More damping is safer and closer to nearest.
        block_size: columns updated at once before the rest of the matrix is touched. Speed only; the codes do not
            depend on it. Must divide, or be a multiple of, the group size.
        order: "natural" (left to right) or "activation" (largest Hessian diagonal first; scales stay static).
        fitted: scale and zero point, as ``grid.fit`` returns them, to round with instead of fitting any (for instance
            those of :func:`lqedu.transforms.clipping.fit_clipped`).

    Returns:
        The quantized weight and its report. No argument is changed.

    Raises:
        GridError: a weight that is not finite, or a grid or block size that does not fit it.
        CalibrationError: a Hessian of the wrong shape, not finite, or not positive definite after damping.
        UsageError: an unknown order, or negative damping.

    >>> w = torch.tensor([[0.7, 0.3, 0.1, 0.6], [-0.5, -0.2, -1.5, 0.4]])
    >>> h = torch.eye(4) + 2.0                              # strongly correlated inputs
    >>> q, report = gptq(w, h, IntGrid(bits=2))
    >>> q.codes
    tensor([[3, 1, 1, 2],
            [1, 2, 0, 2]], dtype=torch.uint8)
    >>> from lqedu.rounding import nearest
    >>> report.proxy_loss < nearest(w, IntGrid(bits=2), hessian=h)[1].proxy_loss
    True
    """
    check_problem(weight, hessian, damping)
    grid.scale_shape(tuple(weight.shape))  # refuses a group size that does not divide
    check_schedule(grid, block_size, order)

    w = weight.detach()
    w = w if w.dtype == torch.float64 else w.to(torch.float32)
    static = fitted is not None or order == "activation" or grid.granularity != "group"
    scale, zero = fitted or (grid.fit(w) if static else _empty_grid(grid, w))
    codes = feedback_codes(
        w, hessian, grid, scale, zero, damping=damping, block_size=block_size, order=order, static=static
    )
    quantized = QTensor(codes, scale, zero, grid)
    report = RoundingReport(
        proxy_loss=proxy_loss(w - quantized.dequantize(w.dtype), hessian),
        damping=damping,
        dead_columns=int((hessian.diagonal() == 0).sum()),
        flips=float((codes != grid.encode(w, scale, zero)).double().mean()),
    )
    return quantized, report


class Rounder(Protocol):
    """What the sweep asks of a grid; :class:`lqedu.formats.IntGrid` is one."""

    code_dtype: torch.dtype

    def columns_per_scale(self, columns: int) -> int:
        """Consecutive inputs of a row that share a scale."""
        ...

    def nearest_code(self, w: Tensor, s: Tensor, z: Tensor | float) -> Tensor:
        """Codes of one column ``[out]``; see :meth:`lqedu.formats.IntGrid.nearest_code`."""
        ...


def feedback_codes(
    w: Tensor,
    hessian: Tensor,
    grid: Rounder,
    scale: Tensor,
    zero: Tensor | None,
    *,
    damping: float,
    block_size: int,
    order: str,
    static: bool = True,
) -> Tensor:
    """The codes of :func:`gptq` for scales that are given: factor, sweep, restore the order of the columns.

    Args:
        w: ``[out, in]``, float32 or float64.
        hessian: ``[in, in]``.
        grid: how a column becomes codes.
        scale, zero: ``[out, groups]``; filled in by the sweep unless ``static``.
        damping, block_size, order: see :func:`gptq`.

    Returns:
        ``[out, in]`` in ``grid.code_dtype``.
    """
    group = grid.columns_per_scale(w.shape[1])
    dead = hessian.diagonal() == 0
    h = damp(hessian.to(torch.float64), damping)
    h.diagonal()[dead] = 1.0  # their other entries are zero: a dead column decouples and is rounded to nearest
    columns = _column_order(h, order)
    u = inverse_factor(h[columns][:, columns]).to(w.dtype)
    codes = _sweep(w[:, columns], u, grid, scale, zero, columns // group, block_size=block_size, static=static)
    return codes[:, columns.argsort()].contiguous()


def _column_order(h: Tensor, order: str) -> Tensor:
    """The order in which columns are rounded: early ones can be compensated most, late ones not at all."""
    if order == "activation":
        return torch.argsort(h.diagonal(), descending=True, stable=True)
    return torch.arange(h.shape[0], device=h.device)


def _sweep(
    w: Tensor,
    u: Tensor,
    grid: Rounder,
    scale: Tensor,
    zero: Tensor | None,
    group_of: Tensor,
    *,
    block_size: int,
    static: bool,
) -> Tensor:
    """Round the columns of ``w [out, in]`` in order; column i uses the scale of group ``group_of[i]``.

    ``w`` and ``u [in, in]`` are in processing order. Unless the grid is static, groups fill ``scale`` and ``zero`` as
    they begin. Returns the codes ``[out, in]``.
    """
    wt = w.T.contiguous()  # [in, out]: what is rounded next lies together in memory
    codes = torch.empty(wt.shape, dtype=grid.code_dtype, device=w.device)
    errors = torch.empty(min(block_size, len(wt)), w.shape[0], dtype=w.dtype, device=w.device)  # [block, out]
    size = grid.columns_per_scale(w.shape[1])
    for start in range(0, len(wt), block_size):
        end = min(start + block_size, len(wt))
        for i, k, d in zip(
            range(start, end), group_of[start:end].tolist(), u.diagonal()[start:end].tolist(), strict=True
        ):
            if not static and i % size == 0:
                _fit_group(grid, wt[i : i + size].T, scale, zero, k)  # these columns already carry every error before i
            s, z = scale[:, k].to(w.dtype), 0 if zero is None else zero[:, k].to(w.dtype)  # [out]
            q = grid.nearest_code(wt[i], s, z)  # [out]
            err = (wt[i] - s * (q - z)) / d  # [out]
            codes[i], errors[i - start] = q, err
            wt[i:end].addr_(u[i, i:end], err, alpha=-1)  # spread it over the block now ...
        wt[end:] -= u[start:end, end:].T @ errors[: end - start]  # ... and over the rest of the matrix once per block
    return codes.T


def _fit_group(grid: IntGrid, w: Tensor, scale: Tensor, zero: Tensor | None, k: int) -> None:
    """Fit group k, whose weights are ``w [out, g]`` by now, and store its scale and zero point."""
    s, z = replace(grid, granularity="channel", group_size=None).fit(w)
    scale[:, k] = s[:, 0]
    if zero is not None:
        zero[:, k] = z[:, 0]


def _empty_grid(grid: IntGrid, w: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points to be filled in by the sweep."""
    shape = grid.scale_shape(tuple(w.shape))
    scale = torch.ones(shape, dtype=grid.scale_dtype, device=w.device)
    return scale, None if grid.symmetric else torch.zeros(shape, dtype=grid.zero_dtype, device=w.device)


def check_schedule(grid: IntGrid, block_size: int, order: str) -> None:
    """Refuse an unknown order (UsageError) and a block size that would cut a group in two (GridError)."""
    if order not in ORDERS:
        raise UsageError(f"order is {' or '.join(map(repr, ORDERS))}, got {order!r}")
    check_count("block_size", block_size, least=1, error=GridError)
    if grid.granularity == "group" and block_size % grid.group_size and grid.group_size % block_size:
        raise GridError(
            f"block_size {block_size} must divide the group size {grid.group_size} or be a multiple of it, "
            "so that a group never begins inside a block that has not been updated"
        )
