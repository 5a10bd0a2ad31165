"""Packing codes into bytes: one little-endian bit stream for every width, and the nibble orders that kernels use.

A row of n codes of b bits is one stream: code i occupies the bits ``[i*b, (i+1)*b)``, lowest bit first, and the row is
padded with zeros to a whole byte. For b = 2, 4, 8 that is the familiar "first code in the low bits"; for b = 3 eight
codes share three bytes. Seen as little-endian int32 words, the same bytes are the layout of GPTQ checkpoints.

Derived in chapter ``02-grids``.
"""

import torch
from torch import Tensor

from lqedu.errors import GridError

#: Word layouts: which of eight consecutive codes sits in nibble 0, 1, ... 7 of a 32-bit word (nibble 0 = lowest bits).
WORD_LAYOUTS: dict[str, tuple[int, ...]] = {
    "sequential": (0, 1, 2, 3, 4, 5, 6, 7),  # GPTQ checkpoints; this module's bit stream
    "awq": (0, 2, 4, 6, 1, 3, 5, 7),  # AWQ GEMM checkpoints: even codes low, odd codes high
    "halves": (0, 4, 1, 5, 2, 6, 3, 7),  # code i beside code i + 4: one shift splits a word into two runs of four
}


def packed_width(n: int, bits: int) -> int:
    """Bytes that one row of ``n`` codes of ``bits`` bits takes.

    >>> packed_width(8, 3), packed_width(5, 4)
    (3, 3)
    """
    return -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes into a little-endian bit stream, row by row.

    Args:
        codes: integers in ``[0, 2**bits)``, shape ``[..., n]``, any integer dtype.
        bits: width of a code, 1 to 8.

    Returns:
        uint8 ``[..., packed_width(n, bits)]``.

    Raises:
        GridError: a code does not fit into ``bits`` bits, or ``bits`` is not 1 to 8.

    >>> pack(torch.tensor([[1, 2, 3, 15]]), 4)
    tensor([[ 33, 243]], dtype=torch.uint8)
    >>> unpack(pack(torch.tensor([[1, 2, 3, 15]]), 4), 4, 4)
    tensor([[ 1,  2,  3, 15]], dtype=torch.uint8)
    """
    _check_bits(bits)
    if codes.is_floating_point() or codes.is_complex():
        raise GridError(f"codes to pack must be integers, got {codes.dtype}; round and cast them first")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise GridError(
            f"codes to pack must lie in [0, {(1 << bits) - 1}] for {bits} bits, "
            f"got [{int(codes.min())}, {int(codes.max())}]; subtract the grid's smallest code first"
        )
    codes = codes.to(torch.uint8)
    n = codes.shape[-1]
    if bits == 8:
        return codes.clone()
    period, width = _period(bits)  # `period` codes fill `width` bytes exactly
    padded = torch.nn.functional.pad(codes, (0, -n % period)).unflatten(-1, (-1, period)).to(torch.int64)
    shifts = torch.arange(period, device=codes.device) * bits
    word = (padded << shifts).sum(-1, keepdim=True)  # [..., n/period, 1], at most 56 bits wide
    bytes_ = (word >> (8 * torch.arange(width, device=codes.device))) & 0xFF
    return bytes_.to(torch.uint8).flatten(-2)[..., : packed_width(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of :func:`pack`.

    Args:
        packed: uint8 ``[..., packed_width(n, bits)]``.
        bits: width of a code, 1 to 8.
        n: codes in a row.

    Returns:
        uint8 ``[..., n]``.

    Raises:
        GridError: the dtype is not uint8, or the row does not have the number of bytes that ``n`` codes take.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise GridError(f"packed codes must be uint8, got {packed.dtype}")
    if packed.shape[-1] != packed_width(n, bits):
        raise GridError(f"{n} codes of {bits} bits take {packed_width(n, bits)} bytes a row, got {packed.shape[-1]}")
    if bits == 8:
        return packed.clone()
    if 8 % bits == 0:  # codes never straddle a byte: shift and mask without leaving uint8
        parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(-2)[..., :n].contiguous()
    period, width = _period(bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % width)).unflatten(-1, (-1, width))
    word = (padded.to(torch.int64) << (8 * torch.arange(width, device=packed.device))).sum(-1, keepdim=True)
    codes = (word >> (bits * torch.arange(period, device=packed.device))) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :n].contiguous()


def pack_words(codes: Tensor, layout: str = "sequential") -> Tensor:
    """Pack eight 4-bit codes into each 32-bit word, in one of the orders of :data:`WORD_LAYOUTS`.

    Args:
        codes: integers in ``[0, 16)``, shape ``[..., n]`` with n a multiple of 8.
        layout: "sequential" (GPTQ), "awq" (AWQ GEMM) or "halves".

    Returns:
        int32 ``[..., n/8]`` (the top nibble may set the sign bit).

    >>> [hex(w & 0xFFFFFFFF) for w in pack_words(torch.arange(8), "awq").tolist()]
    ['0x75316420']
    """
    order = _word_order(layout)
    if codes.shape[-1] % 8:
        raise GridError(f"a word holds 8 codes, so the row length must be a multiple of 8, got {codes.shape[-1]}")
    shuffled = codes.unflatten(-1, (-1, 8))[..., order].flatten(-2)
    return pack(shuffled, 4).view(torch.int32)


def unpack_words(words: Tensor, layout: str = "sequential") -> Tensor:
    """Inverse of :func:`pack_words`: int32 ``[..., n/8]`` to uint8 ``[..., n]``."""
    order = torch.tensor(_word_order(layout))
    if words.dtype != torch.int32:
        raise GridError(f"packed words must be int32, got {words.dtype}")
    codes = unpack(words.contiguous().view(torch.uint8), 4, words.shape[-1] * 8)
    return codes.unflatten(-1, (-1, 8))[..., order.argsort()].flatten(-2)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """The bit stream of :func:`pack` in whole 32-bit words, the layout of checkpoints; a row is filled up with zeros.

    Args:
        codes: integers in ``[0, 2**bits)``, shape ``[..., n]``.
        bits: width of a code, 1 to 8; codes of 3, 5, 6 or 7 bits run on from one word into the next.

    Returns:
        int32 ``[..., ceil(n * bits / 32)]``.

    Raises:
        GridError: as :func:`pack`.

    >>> pack_int32(torch.arange(8), 4), pack_int32(torch.arange(11) % 8, 3).shape
    (tensor([1985229328], dtype=torch.int32), torch.Size([2]))
    """
    stream = pack(codes, bits)
    words = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 4))
    return words.clone(memory_format=torch.contiguous_format).view(torch.int32)  # a row of a transpose has odd strides


def unpack_int32(words: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of :func:`pack_int32`: int32 ``[..., ceil(n * bits / 32)]`` to uint8 ``[..., n]``.

    Raises:
        GridError: another dtype, or another number of words than ``n`` codes take.
    """
    _check_bits(bits)
    want = -(-n * bits // 32)
    if words.dtype != torch.int32 or words.dim() == 0 or words.shape[-1] != want:
        raise GridError(
            f"{n} codes of {bits} bits take {want} words of int32 a row, got {words.dtype} {list(words.shape)}"
        )
    stream = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)[..., : packed_width(n, bits)]
    return unpack(stream.contiguous(), bits, n)


def _word_order(layout: str) -> list[int]:
    if layout not in WORD_LAYOUTS:
        raise GridError(f"unknown word layout {layout!r}; choose one of {', '.join(WORD_LAYOUTS)}")
    return list(WORD_LAYOUTS[layout])


def _period(bits: int) -> tuple[int, int]:
    """The smallest (codes, bytes) that end together: 8 codes in ``bits`` bytes, less where they share a factor."""
    return {1: (8, 1), 2: (4, 1), 4: (2, 1), 6: (4, 3)}.get(bits, (8, bits))


def _check_bits(bits: int) -> None:
    if bits not in range(1, 9):
        raise GridError(f"codes have 1 to 8 bits, got {bits!r}")
