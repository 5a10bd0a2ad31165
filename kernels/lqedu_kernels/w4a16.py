"""FP16 or BF16 activations times 4-bit weights: ``y[m, n] = sum_k x[m, k] * s[g, n] * (q[n, k] - z[g, n]) + b[n]``.

Layout (``hopper_w4.py`` reads the same tensors):

- ``words`` int16 ``[n, ceil(k / 128) * 32]``: word j of a block of 128 inputs holds the codes 0..15 of the inputs
  j, j + 32, j + 64 and j + 96 in its bits 0-3, 4-7, 8-11 and 12-15. Inputs beyond k hold code 0 and are never counted.
- ``scale`` float16, bfloat16 or float32 ``[groups, n]``, *transposed*, so that the scales a block of outputs needs are
  neighbours in memory; ``groups = ceil(k / group_size)``, or 1 row per channel (``group_size=None``).
- ``zero`` of the same shape: uint8 for integer zero points (GPTQ, AWQ), float16, bfloat16 or float32 for float ones
  (HQQ), or ``None`` for a symmetric grid, whose codes are stored plus 8: z = 8.
- ``bias`` ``[n]`` in the dtype of x.
"""

import torch
from torch import Tensor

BLOCK = 128  # inputs of a block; a group of 32, 64 or 128 never crosses one
LANES = 32  # words of a block


def pack_w4a16(codes: Tensor) -> Tensor:
    """uint8 codes ``[n, k]``, 0 to 15, to the words a kernel reads: int16 ``[n, ceil(k / 128) * 32]``.

    >>> words = pack_w4a16(torch.arange(128, dtype=torch.uint8).remainder(16)[None])
    >>> words.shape, f"{int(words[0, 1]) & 0xffff:016b}"
    (torch.Size([1, 32]), '0001000100010001')
    """
    n, k = codes.shape
    blocks = -(-k // BLOCK)
    padded = torch.nn.functional.pad(codes, (0, blocks * BLOCK - k)).to(torch.int32).view(n, blocks, 4, LANES)
    nibble = torch.arange(0, 16, 4, dtype=torch.int32, device=codes.device).view(4, 1)
    words = (padded << nibble).sum(2, dtype=torch.int32)
    return torch.where(words >= 2**15, words - 2**16, words).to(torch.int16).view(n, blocks * LANES)


def unpack_w4a16(words: Tensor, k: int) -> Tensor:
    """Inverse of :func:`pack_w4a16`: uint8 codes ``[n, k]``."""
    n = words.shape[0]
    nibble = torch.arange(0, 16, 4, dtype=torch.int32, device=words.device).view(4, 1)
    codes = (words.to(torch.int32).view(n, -1, 1, LANES) >> nibble) & 15
    return codes.view(n, -1)[:, :k].to(torch.uint8)
