"""Smoothing: divide each input channel by a scale and multiply its weights by it, until both are easy to quantize.

A per-token or per-tensor activation grid must hold the largest channel, so one outlier channel makes the step too coarse
for all others. Weights have no such channels. With ``y = (x / s)(w · s)^T`` the scale ``s`` of a channel decides who bears
its range. Derived in chapter ``08-smoothquant``. Xiao et al., 2023, arXiv:2211.10438, equation 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.options import check_number

_SMALLEST = 1e-5  # of a weight's range and of a scale, as in the reference


def smoothing_scales(activation_max: Tensor, weight_max: Tensor, alpha: float = 0.5) -> Tensor:
    """``s = max|x|^α / max|w|^(1 - α)`` for every input channel.

    At α = 0.5 activations and weights end with the same range, ``√(max|x| max|w|)``; at 1 every activation channel gets
    the range 1 and the weights bear everything, at 0 it is the other way round.

    Args:
        activation_max: largest ``|x|`` of each channel over the calibration tokens, ``[in]``.
        weight_max: largest ``|w|`` of each channel over all linears that read it, ``[in]``: :func:`channel_max`.
        alpha: migration strength, 0 to 1.

    Returns:
        float32 ``[in]``, positive. A channel that calibration never saw keeps the scale 1 (the reference gives it the
        smallest scale allowed, which multiplies it by 100,000 once it wakes up).

    Raises:
        UsageError: shapes that differ, or α outside 0 to 1.
        CalibrationError: activations that are not finite.
        GridError: weights that are not finite.

    >>> smoothing_scales(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 0.25]))
    tensor([4., 2.])
    """
    if activation_max.shape != weight_max.shape or activation_max.dim() != 1:
        raise UsageError(
            f"activation_max and weight_max are [in], got {list(activation_max.shape)} and {list(weight_max.shape)}"
        )
    check_number("alpha", alpha, least=0, most=1)
    if not bool(torch.isfinite(activation_max).all()):
        raise CalibrationError("the calibration activations hold NaN or infinite values")
    if not bool(torch.isfinite(weight_max).all()):
        raise GridError("the weights hold NaN or infinite values")
    if bool((activation_max < 0).any() | (weight_max < 0).any()):
        raise UsageError("activation_max and weight_max are largest magnitudes, and one of them is negative")
    x, w = activation_max.float(), weight_max.float().clamp(min=_SMALLEST)
    scale = (x.pow(alpha) / w.pow(1 - alpha)).clamp(min=_SMALLEST)
    return torch.where(x > 0, scale, torch.ones_like(scale))


def channel_max(weights: Sequence[Tensor]) -> Tensor:
    """Largest ``|w|`` of each input channel over the weights ``[out, in]`` of all linears that share the input, ``[in]``.

    Raises:
        UsageError: no weight at all.

    >>> channel_max([torch.tensor([[1.0, -2.0]]), torch.tensor([[-3.0, 0.5]])])
    tensor([3., 2.])
    """
    if not weights:
        raise UsageError("the largest |w| of each channel needs at least one weight")
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
