"""Layers for two-level weights: 4-bit codes that become int8 while they are loaded, with one scale a row.

    y = s_x s_c (q_x - z_x) w8^T = s_x s_c [ q_x w8^T - z_x Σ_in w8 ]

The product runs over all inputs in int32, with no scale of a group inside. That is what the second level is for:
compare :func:`lqedu.runtime.integer.integer_linear`, which returns to floating point after every group. Chapters
``12-progressive`` and ``13-qqq``.
"""

from typing import Protocol

import torch
from torch import Tensor

from lqedu.runtime.integer import int_matmul
from lqedu.runtime.linear import QuantLinear


class TwoLevelWeight(Protocol):
    """What a stored weight must offer to be run here; formats ``progressive`` and ``requantized`` do.

    Attributes:
        channel_scale: ``[out, 1]``.
    """

    channel_scale: Tensor

    def int8(self) -> Tensor:
        """What enters the product, int8 ``[out, in]``."""
        ...


def two_level_linear(codes: Tensor, scale: Tensor, zero: Tensor | None, weight: TwoLevelWeight) -> Tensor:
    """``x w^T`` from the codes of both, exact until the two scales are applied.

    Args:
        codes: int8 activations ``[..., in]``.
        scale, zero: of the activations, float32, ``[..., 1]`` or ``[1]``; the zero point holds integers or is ``None``.
        weight: the stored weight.

    Returns:
        float32 ``[..., out]``.
    """
    w8 = weight.int8()
    total = int_matmul(codes.reshape(-1, codes.shape[-1]), w8)  # int32 [tokens, out]
    if zero is not None:
        total = total - zero.reshape(-1, 1).to(torch.int32) * w8.sum(1, dtype=torch.int32)
    y = total.to(torch.float32) * weight.channel_scale.to(torch.float32).T
    return y.view(*codes.shape[:-1], -1) * scale


class TwoLevelLinear(QuantLinear):
    """``y = x (s_c w8)^T + bias`` with ``w8`` computed from 4-bit codes and group scales at every call.

    Buffers: what the weight's ``packed`` returns, and those of :class:`QuantLinear` for a static input grid.
    """

    def product(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """See :func:`two_level_linear`."""
        return two_level_linear(codes, scale, zero, self.quantized)
