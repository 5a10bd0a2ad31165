"""Four weights in a 32-bit register: how a kernel turns 4-bit codes into int8, one instruction for four of them.

No instruction multiplies four bytes by a fifth. A kernel that decodes ``w8 = q s_g - offset``
(``lqedu.formats.progressive``) lets an ordinary 32-bit multiplication do it: codes stand in the bytes of a register, and
a product that stays below 256 never reaches its neighbour. The subtraction then needs an addition *without* carries
between bytes, and every byte is right modulo 256: as int8 it is right if the decoded value fits int8, which the protective
range sees to.

These functions compute with words as a register holds them, in ``[0, 2**32)``, stored as int64 because PyTorch has no
unsigned 32-bit arithmetic. They are a model to test kernels against, not a fast path, and they wrap as silently as a
register does.

Lin et al., 2024, arXiv:2405.04532 (QServe: register-level parallelism, subtraction after multiplication). Derived in
chapter ``12-progressive``.
"""

import torch
from torch import Tensor

_BYTES = 4
_WORD = 1 << 32
_ONES = 0x01010101  # times a byte: that byte in all four places
_NIBBLES = 0x0F0F0F0F
_LOW_BITS, _TOP_BITS = 0x7F7F7F7F, 0x80808080


def to_words(values: Tensor) -> Tensor:
    """Four consecutive bytes as one word, the first in the lowest bits.

    Args:
        values: int8 (two's complement) or uint8, ``[..., 4 n]``.

    Returns:
        int64 ``[..., n]`` in ``[0, 2**32)``.

    Raises:
        TypeError: another dtype.
        ValueError: a last axis that is not a multiple of 4.

    >>> hex(to_words(torch.tensor([1, 2, 3, -1], dtype=torch.int8)))
    '0xff030201'
    """
    if values.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"a register holds int8 or uint8, got {values.dtype}")
    if values.shape[-1] % _BYTES:
        raise ValueError(f"a word holds 4 bytes, so the row length must be a multiple of 4, got {values.shape[-1]}")
    places = torch.arange(_BYTES, device=values.device) * 8
    return ((values.to(torch.int64) & 0xFF).unflatten(-1, (-1, _BYTES)) << places).sum(-1)


def to_int8(words: Tensor) -> Tensor:
    """The four bytes of each word as signed numbers: int64 ``[..., n]`` to int8 ``[..., 4 n]``.

    >>> to_int8(torch.tensor([0xFF030201]))
    tensor([ 1,  2,  3, -1], dtype=torch.int8)
    """
    places = torch.arange(_BYTES, device=words.device) * 8
    return ((words.unsqueeze(-1) >> places) & 0xFF).to(torch.uint8).view(torch.int8).flatten(-2)


def unpack_nibbles(words: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high nibbles of each word, in the bytes of two words: one mask, and one shift for the second.

    Args:
        words: ``[...]``, eight 4-bit codes each; int64 words, or int32 as :func:`lqedu.formats.pack_words` returns them.

    Returns:
        Two words each: bytes in ``[0, 15]``. Of codes packed in the layout "halves" the first holds codes 0 to 3, the
        second codes 4 to 7.

    >>> [hex(w) for w in unpack_nibbles(torch.tensor(0x73625140))]
    ['0x3020100', '0x7060504']
    """
    words = words.to(torch.int64) % _WORD
    return words & _NIBBLES, (words >> 4) & _NIBBLES


def multiply(words: Tensor, scale: Tensor | int) -> Tensor:
    """A 32-bit product, modulo ``2**32``: all four bytes times ``scale`` if none of the products exceeds 255.

    Beyond that, the excess of a byte is added to the next one. ``scale`` broadcasts against ``words``.

    >>> [hex(multiply(torch.tensor(0x0F0F0F0F), s)) for s in (16, 18)]   # 15 * 16 = 240 fits a byte, 15 * 18 = 270 not
    ['0xf0f0f0f0', '0xf0f0f0e']
    """
    return (words * scale) % _WORD


def add_bytes(a: Tensor, b: Tensor) -> Tensor:
    """Byte by byte ``a + b`` modulo 256, without carries from one byte to the next: CUDA's ``__vadd4``.

    The lower seven bits of each byte are added, which cannot leave the byte; the sum of the top bits is an exclusive or.

    >>> hex(add_bytes(torch.tensor(0x01FF01FF), torch.tensor(0x00010001)))   # an ordinary sum is 0x2000200
    '0x1000100'
    """
    return ((a & _LOW_BITS) + (b & _LOW_BITS)) ^ ((a ^ b) & _TOP_BITS)


def decode_words(words: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """int8 weights ``q scale - offset`` from packed 4-bit codes, by register arithmetic.

    Multiplication comes first: a code minus its zero point may be negative, and a negative byte times a scale borrows
    from its neighbours. Of a progressive weight, ``offset`` is ``zero * group_scale`` with ``zero="code"`` and ``zero``
    itself with ``zero="offset"``; a kernel keeps its negative.

    Args:
        words: int32 ``[..., n]``, codes packed by ``pack_words(codes, "halves")``.
        scale: integers in ``[0, 255]``, broadcast against ``words``.
        offset: integers, of which the lowest eight bits count; as ``scale``.

    Returns:
        int8 ``[..., 8 n]``: right modulo 256 as long as ``15 scale <= 255``, and right if the value fits int8.

    >>> from lqedu.formats import pack_words
    >>> codes = torch.tensor([[0, 1, 2, 3, 4, 8, 14, 15]])
    >>> decode_words(pack_words(codes, "halves"), torch.tensor([[16]]), torch.tensor([[7 * 16]]))
    tensor([[-112,  -96,  -80,  -64,  -48,   16,  112, -128]], dtype=torch.int8)
    """
    minus = ((-offset.to(torch.int64)) % 256) * _ONES
    low, high = (add_bytes(multiply(part, scale.to(torch.int64)), minus) for part in unpack_nibbles(words))
    return to_int8(torch.stack((low, high), -1)).flatten(-2)
