"""Adaptive smoothing: scale down only the channels above a threshold, and search the threshold on the layer's output.

    s_j = max(1, max|x_j| / t)        y = (x / s)(w · s)^T

Channels below ``t`` keep their range and their weights; those above are cut down to ``t``. The threshold is tried from
``max|x|``, where nothing is smoothed, down to where every channel has the same range; what decides is the squared error
of the output with weights and activations both rounded. Zhang et al., 2024, arXiv:2406.09904 (after Outlier
Suppression+, Wei et al., 2023, arXiv:2304.09145). Derived in chapter ``13-qqq``.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lqedu.errors import CalibrationError, UsageError
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.options import check_count, check_number

_WIDEST = 1e-4  # of max|x|: thresholds below it would spend the search on channels that are all but silent


@dataclass(frozen=True)
class ThresholdSearch:
    """What a search found.

    Attributes:
        threshold: the best one.
        scale: ``s`` of that threshold, float32 ``[in]``.
        thresholds: all that were tried, from ``max|x|`` (no smoothing) downwards.
        losses: squared output error a token of each.
    """

    threshold: float
    scale: Tensor
    thresholds: list[float]
    losses: list[float]


def threshold_scales(largest: Tensor, threshold: float) -> Tensor:
    """``s = max(1, max|x| / t)`` for every input channel.

    Args:
        largest: largest ``|x|`` of each channel over the calibration tokens, ``[in]``.
        threshold: ``t``, positive.

    Returns:
        float32 ``[in]``, at least 1.

    >>> threshold_scales(torch.tensor([16.0, 1.0, 4.0]), 2.0)
    tensor([8., 1., 2.])
    """
    check_number("threshold", threshold, above=0)
    return (largest.to(torch.float32) / threshold).clamp_(min=1)


def search_threshold(
    weight: Tensor,
    x: Tensor,
    largest: Tensor,
    grid: IntGrid,
    activation: ActivationGrid | None,
    *,
    count: int = 50,
) -> ThresholdSearch:
    """The threshold with the least squared error of ``x w^T`` once both are rounded to nearest.

    Thresholds lie at equal ratios between ``max|x|`` and the range of the quietest channel (at least 1e-4 of it): below
    that all channels are scaled alike, which no per-token and per-row grid can notice.

    Args:
        weight: ``[out, in]``; the weights of all linears that read ``x``, one above the other.
        x: ``[tokens, in]``, the tokens the error is measured on.
        largest: largest ``|x|`` of each channel over all tokens, ``[in]``, positive where ``x`` is not zero.
        grid: of the weights; rounded to nearest without a search of its ranges, whatever ``grid.search`` says.
        activation: of ``x``, its scales fitted to the tokens at hand; ``None`` for no rounding.
        count: thresholds tried, at least 2.

    Returns:
        The search; its scale is 1 everywhere if no smoothing is best or no channel was active.

    Raises:
        UsageError: shapes that do not fit, or a count below 2.
        CalibrationError: activations that are not finite.
    """
    check_count("count", count, least=2)
    if x.dim() != 2 or weight.dim() != 2 or not len(x) or not x.shape[1] == weight.shape[1] == len(largest):
        raise UsageError(
            f"a search needs weight [out, in], x [tokens, in] and largest [in], got {list(weight.shape)}, "
            f"{list(x.shape)} and {list(largest.shape)}"
        )
    if not bool(torch.isfinite(largest).all() & torch.isfinite(x).all()):
        raise CalibrationError("the calibration activations hold NaN or infinite values")
    top = float(largest.max())
    if top == 0:
        return ThresholdSearch(0.0, torch.ones_like(largest, dtype=torch.float32), [], [])
    bottom = max(float(largest[largest > 0].min()), _WIDEST * top)
    thresholds = [top * (bottom / top) ** (i / (count - 1)) for i in range(count)]
    grid, want = replace(grid, search="none"), x @ weight.T
    losses = [_loss(weight, x, threshold_scales(largest, t).to(x.dtype), grid, activation, want) for t in thresholds]
    best = min(range(count), key=losses.__getitem__)  # the first of equals: the least smoothing
    return ThresholdSearch(thresholds[best], threshold_scales(largest, thresholds[best]), thresholds, losses)


def _loss(
    weight: Tensor, x: Tensor, scale: Tensor, grid: IntGrid, activation: ActivationGrid | None, want: Tensor
) -> float:
    """Squared error a token, summed over the outputs."""
    smoothed, z = weight * scale, x / scale
    s, zero = grid.fit(smoothed)
    w_hat = grid.decode(grid.encode(smoothed, s, zero), s, zero, x.dtype)
    z = z if activation is None else activation.round_trip(z)
    return float((z @ w_hat.T - want).square().sum(1).mean())
