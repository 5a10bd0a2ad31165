"""LDLQ: rounding with linear feedback from an LDL factorization of the Hessian, the same map as GPTQ seen from QuIP.

With ``h = l diag(d) l^T``, l unit upper triangular, the loss splits into one term a column,
``tr(Δ h Δ^T) = Σ_k d_k ‖(Δ l)_k‖²`` with ``Δ = Ŵ - W``. Rounding column k of ``W - Δ[:, :k] l[:k, k]`` to nearest makes
each term as small as rounding can.

Chee et al., 2023, arXiv:2307.13304, section 3 (the paper factors with a lower triangle and goes from last to first;
this is the same algorithm with the columns reversed). Equal to GPTQ, code for code, on a fixed grid: ``04-gptq``.
"""

import torch
from torch import Tensor

from lqedu.formats import IntGrid, QTensor
from lqedu.linalg.hessian import damp, ldl_upper
from lqedu.rounding.report import RoundingReport, check_problem, proxy_loss


def ldlq(weight: Tensor, hessian: Tensor, grid: IntGrid, *, damping: float = 0.01) -> tuple[QTensor, RoundingReport]:
    """Round a weight with linear feedback; every scale is fitted to ``weight`` before the first column is rounded.

    Args:
        weight: ``[out, in]``; computed in float32, or float64 if it is float64.
        hessian: ``[in, in]``, ``(1/tokens) Σ x^T x``.
        grid: the grid, any granularity.
        damping: fraction of the Hessian's mean diagonal added to it.

    Returns:
        The quantized weight and its report. No argument is changed.

    Raises:
        GridError: a weight that is not finite, or a grid that does not fit it.
        CalibrationError: a Hessian of the wrong shape, not finite, or not positive definite after damping.
        UsageError: negative damping.

    >>> w = torch.tensor([[0.7, 0.3, 0.1, 0.6], [-0.5, -0.2, -1.5, 0.4]])
    >>> from lqedu.rounding import gptq
    >>> h = torch.eye(4) + 2.0
    >>> torch.equal(ldlq(w, h, IntGrid(bits=2))[0].codes, gptq(w, h, IntGrid(bits=2))[0].codes)
    True
    """
    check_problem(weight, hessian, damping)
    w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
    dead = hessian.diagonal() == 0
    h = damp(hessian.to(torch.float64), damping)
    h.diagonal()[dead] = 1.0
    feedback = ldl_upper(h)[0].to(w.dtype)  # [in, in], unit upper triangular

    scale, zero = grid.fit(w)
    nearest_codes = grid.encode(w, scale, zero)
    size = grid.columns_per_scale(w.shape[1])
    codes = torch.empty_like(nearest_codes)
    delta = torch.zeros_like(w)  # Ŵ - W of the columns rounded so far
    column = IntGrid(grid.bits, grid.symmetric, convention=grid.convention, scale_dtype=grid.scale_dtype)
    for k in range(w.shape[1]):
        group = k // size
        s, z = scale[:, group : group + 1], None if zero is None else zero[:, group : group + 1]
        target = w[:, k : k + 1] - delta[:, :k] @ feedback[:k, k : k + 1]  # [out, 1]
        codes[:, k : k + 1] = column.encode(target, s, z)
        delta[:, k : k + 1] = column.decode(codes[:, k : k + 1], s, z, w.dtype) - w[:, k : k + 1]

    report = RoundingReport(
        proxy_loss=proxy_loss(delta, hessian),
        damping=damping,
        dead_columns=int(dead.sum()),
        flips=float((codes != nearest_codes).double().mean()),
    )
    return QTensor(codes, scale, zero, grid), report
