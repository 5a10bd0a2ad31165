"""How a W4A8 kernel turns 4-bit codes into int8 operands: the arithmetic of a GPU register, in plain PyTorch.

Per channel, a code may stay where it is. A signed nibble in the *upper* half of a byte reads as an int8 of 16 times its
value, so one AND (or one shift) is all the decoding there is, and the factor 16 leaves the sum with the scale:

    Σ q_x (16 q_w) = 16 Σ q_x q_w,    y = s_x (s_w / 16) Σ q_x (16 q_w)

Per group, ``q r`` must be rounded to int8 before the product. A float16 between 1024 and 2048 has a step of 1, so one
fused multiply-add, ``q r + 1152``, leaves ``round(q r) + 128`` in the low byte of its bit pattern.

Zhang et al., 2024, arXiv:2406.09904 (reference: HandH1998/QQQ, commit 54c5c99). Derived in chapter
``13-qqq``. Layers run the same integers without these bytes: :class:`lqedu.runtime.QuantLinear` and
:class:`lqedu.runtime.two_level.TwoLevelLinear`.
"""

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats import QTensor
from lqedu.runtime.integer import int_matmul

_MAGIC = 1152  # 1024 + 128: float16 steps of 1, and w8 + 128 is never negative


def pack_signed(codes: Tensor) -> Tensor:
    """Two codes a byte, in two's complement: the first in the lower nibble, the second in the upper one.

    Args:
        codes: int8 ``[..., in]`` in ``[-8, 7]``, an even number of inputs.

    Returns:
        uint8 ``[..., in / 2]``.

    Raises:
        GridError: an odd number of inputs, another dtype, or codes outside ``[-8, 7]``.

    >>> [f"{byte:08b}" for byte in pack_signed(torch.tensor([3, -2], dtype=torch.int8)).tolist()]
    ['11100011']
    """
    if codes.dtype != torch.int8 or codes.shape[-1] % 2:
        raise GridError(f"nibbles come in pairs of int8 codes, got {list(codes.shape)} {codes.dtype}")
    if codes.numel() and not -8 <= int(codes.min()) <= int(codes.max()) <= 7:
        raise GridError(f"a nibble holds -8 to 7, got [{int(codes.min())}, {int(codes.max())}]")
    bits = codes.view(torch.uint8) & 0x0F
    return bits[..., 0::2] | (bits[..., 1::2] << 4)


def high_nibbles(packed: Tensor) -> Tensor:
    """The operands of the product: 16 times each code, by one shift for the lower nibble and one AND for the upper.

    Args:
        packed: uint8 ``[..., in / 2]`` of :func:`pack_signed`.

    Returns:
        int8 ``[..., in]``, from -128 to 112: the bytes are reinterpreted, nothing is computed.

    Raises:
        GridError: another dtype.

    >>> high_nibbles(pack_signed(torch.tensor([3, -2], dtype=torch.int8)))
    tensor([ 48, -32], dtype=torch.int8)
    """
    if packed.dtype != torch.uint8:
        raise GridError(f"packed nibbles are uint8, got {packed.dtype}")
    pair = torch.stack([packed << 4, packed & 0xF0], -1)  # a register drops what is shifted out of the byte
    return pair.view(torch.int8).flatten(-2)


def high_nibble_linear(codes: Tensor, scale: Tensor, weight: QTensor) -> Tensor:
    """``x w^T`` as the per-channel kernel computes it: codes times 16 in the product, the scale divided by 16 behind it.

    Equal to :func:`lqedu.runtime.integer.integer_linear` to the last bit: 16 is a power of two.

    Args:
        codes: int8 activations ``[..., in]`` on a symmetric grid.
        scale: of the activations, float32 ``[..., 1]``.
        weight: symmetric, 4 bits, per channel, with float32 scales (in float16 a 16th of one may be subnormal).

    Returns:
        float32 ``[..., out]``.

    Raises:
        GridError: a weight on another grid.
    """
    grid = weight.grid
    if (grid.bits, grid.symmetric, grid.granularity, grid.scale_dtype) != (4, True, "channel", torch.float32):
        raise GridError(f"this kernel reads symmetric 4-bit codes per channel with float32 scales, got {grid}")
    operands = high_nibbles(pack_signed(weight.codes))
    total = int_matmul(codes.reshape(-1, codes.shape[-1]), operands)  # 16 times the plain sum
    y = total.to(torch.float32) * (weight.scale / 16).T
    return y.view(*codes.shape[:-1], -1) * scale


def requantized_bytes(codes: Tensor, ratio: Tensor) -> Tensor:
    """The operands of the per-group kernel, by its own arithmetic: it wraps where a value leaves int8.

    :meth:`lqedu.formats.requantized.RequantizedGrid.decode_int8` gives the same values and refuses those that wrap.

    Args:
        codes: int8 ``[out, in]`` in ``[-8, 7]``.
        ratio: float16 ``[out, groups]``.

    Returns:
        int8 ``[out, in]``.

    >>> codes = torch.tensor([[-8, 3, 7]], dtype=torch.int8)
    >>> requantized_bytes(codes, torch.tensor([[15.9]], dtype=torch.float16))
    tensor([[-127,   48,  111]], dtype=torch.int8)
    >>> requantized_bytes(codes, torch.tensor([[17.0]], dtype=torch.float16))   # -8 * 17 = -136 is no int8
    tensor([[112,  51, 119]], dtype=torch.int8)
    """
    exact = codes.to(torch.float64).view(*ratio.shape, -1) * ratio.to(torch.float64).unsqueeze(-1) + _MAGIC
    fused = exact.to(torch.float16)  # a fused multiply-add rounds once
    low_byte = (fused.view(torch.int16) & 0xFF).to(torch.uint8)
    return (low_byte ^ 0x80).view(torch.int8).view(codes.shape)  # minus 128 is a flip of the top bit
