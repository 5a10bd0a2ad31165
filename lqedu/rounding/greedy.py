"""Greedy passes: visit the columns again and move each code to its best place given all the others.

With every other column fixed, the loss ``tr(Δ H Δ^T)`` is a parabola in column k with its lowest point at

    ŵ_k - g_k / h_kk,      g = Δ H,  Δ = Ŵ - W,

and the best code is the nearest to that point. Coordinate descent: the loss never rises, and a pass that changes
nothing has found a point that no single code can improve. LDLQ looks ahead and never back; this looks both ways, but
only from where it stands.

Chee et al., 2023, arXiv:2307.13304, section 6 and supplement (greedy updates after LDLQ). Chapter ``07-quip``.
"""

import torch
from torch import Tensor

from lqedu.errors import CalibrationError, UsageError
from lqedu.formats import QTensor
from lqedu.options import check_count
from lqedu.rounding.report import check_problem, proxy_loss

_BLOCK = 128


def refine(weight: Tensor, hessian: Tensor, quantized: QTensor, *, passes: int = 1) -> QTensor:
    """Improve the codes of a rounded weight by coordinate descent on its fixed grid.

    Args:
        weight: ``[out, in]``, the weight before rounding.
        hessian: ``[in, in]``. Not damped here: the loss that never rises is the one you pass.
        quantized: where to start; its scales and zero points stay.
        passes: sweeps over all columns; it ends earlier when a sweep changes no code.

    Returns:
        The same grid with codes of equal or lower loss. No argument is changed.

    Raises:
        GridError, CalibrationError: a weight or Hessian that is not finite, or of the wrong shape.
        UsageError: a negative or fractional number of passes.

    >>> from lqedu.formats import IntGrid
    >>> from lqedu.rounding import nearest
    >>> w, h = torch.tensor([[0.4, 0.4, 2.0]]), torch.full((3, 3), 0.9) + 0.1 * torch.eye(3)
    >>> start = nearest(w, IntGrid(bits=2), hessian=h)[0]
    >>> refine(w, h, start).codes, start.codes
    (tensor([[0, 1, 3]], dtype=torch.uint8), tensor([[1, 1, 3]], dtype=torch.uint8))
    """
    check_problem(weight, hessian, damping=0.0)
    if not isinstance(quantized, QTensor):
        raise UsageError(f"quantized is a QTensor, got {type(quantized).__name__}")
    if weight.shape != quantized.codes.shape:
        raise CalibrationError(f"a weight {list(weight.shape)} does not fit codes {list(quantized.codes.shape)}")
    check_count("passes", passes)
    grid, dtype = quantized.grid, torch.float64 if weight.dtype == torch.float64 else torch.float32
    size = grid.columns_per_scale(weight.shape[1])
    curvature = hessian.diagonal().to(torch.float64)
    # Column k of g / h_kk, so that a visit needs no division; a dead column has no curvature and keeps its code.
    h = (hessian.to(torch.float64) / torch.where(curvature > 0, curvature, torch.inf)).to(dtype)
    live = (curvature > 0).tolist()
    s_all = quantized.scale.to(dtype)
    z_all = torch.zeros_like(s_all) if quantized.zero is None else quantized.zero.to(dtype)
    shift = (s_all * z_all).repeat_interleave(size, 1).T  # [in, out] or [in, 1]: ŵ = s q - shift
    w_hat = quantized.dequantize(dtype).T.contiguous()  # [in, out]: a column lies together in memory
    target = weight.detach().to(dtype).T
    codes = list(quantized.codes.T.to(dtype))
    for _ in range(passes):
        before = w_hat.clone()
        g = h.T @ (w_hat - target)  # [in, out], afresh each pass: rounding errors of updates do not pile up
        offset = -(w_hat + shift)
        for start in range(0, len(w_hat), _BLOCK):
            end = min(start + _BLOCK, len(w_hat))
            moves = torch.zeros_like(w_hat[start:end])
            for k in range(start, end):
                if live[k]:
                    s, z = s_all[:, k // size], z_all[:, k // size]
                    codes[k] = grid.nearest_code(w_hat[k] - g[k], s, z)
                    torch.addcmul(offset[k], codes[k], s, out=moves[k - start])  # the new ŵ_k less the old one
                    g[start:end].addr_(h[k, start:end], moves[k - start])
            w_hat[start:end] += moves
            g[end:] += h[start:end, end:].T @ moves  # columns before this block are not visited again in this pass
        if torch.equal(w_hat, before):
            break
    refined = QTensor(torch.stack(codes, 1).to(grid.code_dtype), quantized.scale, quantized.zero, grid)
    # In float32 a tie may go the wrong way by one part in 10^7; what is promised is promised exactly.
    rose = _loss(weight, hessian, refined) > _loss(weight, hessian, quantized)
    return quantized if rose else refined


def _loss(weight: Tensor, hessian: Tensor, quantized: QTensor) -> float:
    return proxy_loss(weight.detach().to(torch.float64) - quantized.dequantize(torch.float64), hessian)
