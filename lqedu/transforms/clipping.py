"""Clipping: give up the largest weights of a group so that the step of all the others gets smaller; chapter ``05-awq``.

Lin et al., 2023, arXiv:2306.00978 (AWQ); reference: mit-han-lab/llm-awq, auto_clip. There the error of a candidate is
measured on 512 tokens; here through the Hessian, which holds all of them: ``Σ_t (x_t δ)² = T · δ h δ^T``.
"""

import torch
from torch import Tensor

from lqedu.formats import IntGrid
from lqedu.formats.progressive import ProgressiveGrid
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
    grouped, blocks = _grouped(weight, hessian, grid)
    w, limit = weight.to(torch.float32), grouped.abs().amax(-1, keepdim=True)
    best, least = torch.ones_like(limit), torch.full_like(limit, torch.inf)
    for factor in _factors(points, most):
        clamped = grouped.clamp(-factor * limit, factor * limit).reshape(w.shape)
        w_hat = grid.decode(grid.encode(clamped, *(fitted := grid.fit(clamped))), *fitted)
        loss = _group_loss(grouped - w_hat.view(grouped.shape), blocks)
        better = loss < least
        best, least = torch.where(better, factor, best), torch.where(better, loss, least)
    clipped = grouped.clamp(-best * limit, best * limit).reshape(w.shape)
    return clipped.to(weight.dtype), best.squeeze(-1)


def fit_clipped(
    weight: Tensor, hessian: Tensor, grid: IntGrid | ProgressiveGrid, *, points: int = POINTS, most: float = MOST
) -> tuple[Tensor, ...]:
    """The grid of each group whose rounding to nearest disturbs the group's output least.

    The same search as :func:`clip_weight`, but the weight stays: a rounding with error feedback takes the grid and makes
    up for what the range cuts off. On a progressive grid the channel scales stay those of the whole range, so that what a
    group's range is judged by is what it will get.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]`` of the layer's inputs.
        grid: per channel or group along the inputs, or progressive.
        points, most: the factors.

    Returns:
        What ``grid.fit`` returns.

    Raises:
        As :func:`clip_weight`.
    """
    check_problem(weight, hessian, damping=0.0)
    check_count("points", points, least=1)
    check_number("most", most, above=0, below=1)
    grouped, blocks = _grouped(weight, hessian, grid)
    w, limit = weight.to(torch.float32), grouped.abs().amax(-1, keepdim=True)
    channel = grid.fit(w)[0] if isinstance(grid, ProgressiveGrid) else None
    best: tuple[Tensor | None, ...] = ()
    least = torch.full_like(limit, torch.inf)
    for factor in _factors(points, most):
        clamped = grouped.clamp(-factor * limit, factor * limit).reshape(w.shape)
        if channel is None:
            fitted = grid.fit(clamped)
            w_hat = grid.decode(grid.encode(w, *fitted), *fitted)
        else:
            fitted = grid.fit(clamped, channel)
            w_hat = grid.decode_int8(grid.encode(w, *fitted), *fitted[1:]) * channel.float()
        loss = _group_loss(grouped - w_hat.view(grouped.shape), blocks)
        better = (loss < least).squeeze(-1)  # [out, groups]; channel scales are the same in all candidates
        least = torch.minimum(loss, least)
        best = tuple(
            new if old is None or old.shape != better.shape else torch.where(better, new, old)
            for new, old in zip(fitted, best or fitted, strict=True)
        )
    return best


def _grouped(weight: Tensor, hessian: Tensor, grid: IntGrid | ProgressiveGrid) -> tuple[Tensor, Tensor]:
    """The weight as ``[out, groups, g]`` and each group's own block of the Hessian, ``[groups, g, g]``, in float32."""
    if isinstance(grid, IntGrid):
        grid.columns_per_scale(weight.shape[1])  # refuses groups along the outputs
    groups = grid.scale_shape(tuple(weight.shape))[1]  # refuses groups that do not divide
    grouped = weight.to(torch.float32).view(len(weight), groups, -1)
    size = grouped.shape[-1]
    blocks = torch.stack([hessian[k : k + size, k : k + size] for k in range(0, weight.shape[1], size)])
    return grouped, blocks.float()


def _factors(points: int, most: float) -> list[float]:
    return [1 - i / points for i in range(max(1, int(most * points)))]


def _group_loss(delta: Tensor, blocks: Tensor) -> Tensor:
    """``δ h_gg δ^T`` of each row and group, ``[out, groups, 1]``, of errors ``[out, groups, g]``."""
    delta = delta.transpose(0, 1)  # [groups, out, g]
    return ((delta @ blocks) * delta).sum(-1).T.contiguous().unsqueeze(-1)
