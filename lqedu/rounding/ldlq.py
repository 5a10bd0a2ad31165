"""LDLQ: rounding with linear feedback from an LDL factorization of the Hessian, the same map as GPTQ seen from QuIP.

With ``h = l diag(d) l^T``, l unit upper triangular, the loss splits into one term a column,
``tr(Δ h Δ^T) = Σ_k d_k ‖(Δ l)_k‖²`` with ``Δ = Ŵ - W``. Rounding column k of ``W - Δ[:, :k] l[:k, k]`` to nearest makes
each term as small as rounding can.

Chee et al., 2023, arXiv:2307.13304, section 3 (the paper factors with a lower triangle and goes from last to first;
this is the same algorithm with the columns reversed). Equal to GPTQ, code for code, on a fixed grid: ``04-gptq``.
"""

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats import IntGrid, QTensor
from lqedu.linalg.hessian import damp, ldl_upper
from lqedu.rounding.report import RoundingReport, check_problem, proxy_loss

_BLOCK = 128  # columns updated at once before the rest of the matrix is touched: speed only


def ldlq(
    weight: Tensor,
    hessian: Tensor,
    grid: IntGrid,
    *,
    damping: float = 0.01,
    fitted: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[QTensor, RoundingReport]:
    """Round a weight with linear feedback; every scale is fitted to ``weight`` before the first column is rounded.

    Args:
        weight: ``[out, in]``; computed in float32, or float64 if it is float64.
        hessian: ``[in, in]``, ``(1/tokens) Σ x^T x``.
        grid: the grid, any granularity.
        damping: fraction of the Hessian's mean diagonal added to it.
        fitted: scale and zero point to round with, in the grid's shapes and dtypes, instead of ``grid.fit(weight)``.

    Returns:
        The quantized weight and its report. No argument is changed.

    Raises:
        GridError: a weight that is not finite, or a grid or scales that do not fit it.
        CalibrationError: a Hessian of the wrong shape, not finite, or not positive definite after damping.
        UsageError: negative damping.

    >>> w = torch.tensor([[0.7, 0.3, 0.1, 0.6], [-0.5, -0.2, -1.5, 0.4]])
    >>> from lqedu.rounding import gptq
    >>> h = torch.eye(4) + 2.0
    >>> torch.equal(ldlq(w, h, IntGrid(bits=2))[0].codes, gptq(w, h, IntGrid(bits=2))[0].codes)
    True
    """
    check_problem(weight, hessian, damping)
    w = weight.detach()
    w = w if w.dtype == torch.float64 else w.to(torch.float32)
    dead = hessian.diagonal() == 0
    h = damp(hessian.to(torch.float64), damping)
    h.diagonal()[dead] = 1.0
    feedback = ldl_upper(h)[0].to(w.dtype)  # [in, in], unit upper triangular

    scale, zero = grid.fit(w) if fitted is None else fitted
    if tuple(scale.shape) != grid.scale_shape(tuple(w.shape)):
        raise GridError(
            f"scales for a weight {list(w.shape)} have shape {grid.scale_shape(tuple(w.shape))}, got {list(scale.shape)}"
        )
    codes = _sweep(w, feedback, grid, scale, zero)
    quantized = QTensor(codes, scale, zero, grid)
    report = RoundingReport(
        proxy_loss=proxy_loss(w - quantized.dequantize(w.dtype), hessian),
        damping=damping,
        dead_columns=int(dead.sum()),
        flips=float((codes != grid.encode(w, scale, zero)).double().mean()),
    )
    return quantized, report


def _sweep(w: Tensor, feedback: Tensor, grid: IntGrid, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Codes ``[out, in]`` of ``w``, column by column; errors reach the columns behind a block once a block.

    On a GPU the columns are a chain of tiny kernels, so that a column should need few of them.
    """
    target = w.T.contiguous().clone()  # [in, out]: a column lies together in memory
    size = grid.columns_per_scale(w.shape[1])
    s_all, z_all = scale.to(w.dtype), torch.zeros_like(scale, dtype=w.dtype) if zero is None else zero.to(w.dtype)
    offset = -(w + (s_all * z_all).repeat_interleave(size, 1)).T.contiguous()  # Ŵ - W = s q - (W + s z)
    codes = []
    for start in range(0, len(target), _BLOCK):
        end = min(start + _BLOCK, len(target))
        delta = torch.empty_like(target[start:end])  # Ŵ - W of this block
        for k in range(start, end):
            s, z = s_all[:, k // size], z_all[:, k // size]  # [out] or [1]
            q = grid.nearest_code(target[k], s, z)  # [out]
            codes.append(q)
            torch.addcmul(offset[k], q, s, out=delta[k - start])
            target[k + 1 : end].addr_(feedback[k, k + 1 : end], delta[k - start], alpha=-1)
        target[end:] -= feedback[start:end, end:].T @ delta
    return torch.stack(codes, 1).to(grid.code_dtype)
