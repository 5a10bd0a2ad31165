"""Clipping: give up the largest weights of a group so that the step of all the others gets smaller; chapter ``05-awq``.

Lin et al., 2023, arXiv:2306.00978 (AWQ); reference: mit-han-lab/llm-awq, auto_clip. There the error of a candidate is
measured on 512 tokens; here through the Hessian, which holds all of them: ``Σ_t (x_t δ)² = T · δ h δ^T``.
"""

import torch
from torch import Tensor

from lqedu.formats import IntGrid
from lqedu.options import check_count, check_number
from lqedu.rounding.report import check_problem

POINTS, MOST = 20, 0.5  # factors 1.00, 0.95, ... above 0.50, as the reference has them


def clip_weight(
    weight: Tensor, hessian: Tensor, grid: IntGrid, *, points: int = POINTS, most: float = MOST
) -> tuple[Tensor, Tensor]:
    """Clamp each group of a weight to the range whose rounding disturbs the group's output least.

    For each row and group, ``w`` is clamped to ``± f · max|w|`` for the factors ``f = 1 - i / points``, ``i <
    most · points``, rounded to nearest, and judged by ``δ h_gg δ^T`` with ``δ = w - ŵ`` and the group's own block of the
    Hessian. Groups are judged alone: what one does to the error of another is not seen.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]`` of the layer's inputs, ``(1/tokens) Σ x^T x``.
        grid: per channel or group along the inputs.
        points, most: the factors.

    Returns:
        ``(clipped, factor)``: the clamped weight ``[out, in]`` in its dtype, and the factors ``[out, groups]``.

    Raises:
        GridError, CalibrationError: a weight, Hessian or grid that do not fit each other.
        UsageError: ``points`` below 1 or ``most`` outside (0, 1).
    """
    check_problem(weight, hessian, damping=0.0)
    check_count("points", points, least=1)
    check_number("most", most, above=0, below=1)
    size = grid.columns_per_scale(weight.shape[1])
    grid.scale_shape(tuple(weight.shape))  # refuses groups that do not divide
    w = weight.to(torch.float32)
    grouped = w.view(len(w), -1, size)  # [out, groups, g]
    blocks = torch.stack([hessian[k : k + size, k : k + size] for k in range(0, weight.shape[1], size)]).float()
    limit = grouped.abs().amax(-1, keepdim=True)
    best, least = torch.ones_like(limit), torch.full_like(limit, torch.inf)
    for i in range(max(1, int(most * points))):
        factor = 1 - i / points
        clamped = grouped.clamp(-factor * limit, factor * limit).reshape(w.shape)
        w_hat = grid.decode(grid.encode(clamped, *(fitted := grid.fit(clamped))), *fitted).view(grouped.shape)
        delta = (grouped - w_hat).transpose(0, 1)  # [groups, out, g]
        loss = ((delta @ blocks) * delta).sum(-1).T.unsqueeze(-1)  # [out, groups, 1]
        better = loss < least
        best, least = torch.where(better, factor, best), torch.where(better, loss, least)
    clipped = grouped.clamp(-best * limit, best * limit).reshape(w.shape)
    return clipped.to(weight.dtype), best.squeeze(-1)
