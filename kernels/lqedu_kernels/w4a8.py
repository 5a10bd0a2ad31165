"""W4A8: INT8 activations times 4-bit weights, summed in INT32; scales enter after the sum; ``19-integer-gemm``.

The contract, with ``x`` int8 ``[M, K]`` and one scale a token, ``w8`` int8 ``[N, K]`` and one scale a channel::

    y[m, n] = x_scale[m] · (scale[n] · Σ_k x[m, k] w8[n, k])  (+ bias[n]),      fp16 or bf16

How 4 bits ``q`` become ``w8`` while a program loads them depends on ``groups``::

    groups     nibble      w8                                              format
    ``None``   signed q    q, in registers 16 q                            QQQ per channel; QoQ per channel with ``zero``
    int16      0 to 15     (q - z) s = ((q s + a) ^ 0x80),  a = 128 - z s  QoQ: integer scales of groups
    float16    q + 8       round_half_even(q r)                            QQQ: ratio of the scales of group and channel

Tensors, for G = K/g groups of g = 64 or 128 inputs::

    codes    uint8    [N, 64 ceil(K/128)]   in a block of 128 inputs byte j holds k = j (low) and k = j + 64 (high nibble)
    scale    float16 or float32 [N]         of the channel, as stored: the 16 of 16 q is shifted out of the sum
    groups   int16    [G, 8 ceil(N/8)]      low byte s (unsigned), high byte a - 1 (signed; a is in [-112, 128])
    groups   float16  [G, 8 ceil(N/8)]      r = s_group / s_channel
    zero     int32    [N]                   per channel only, of the *signed* codes (z - 8); with x_sum int32 [M] = Σ_k x

One token has no use for tensor cores, which multiply at least eight: ``dp4a`` adds four products to an int32 sum in one
instruction, nothing goes by way of shared memory, and the bytes of the weights are all that counts.

One register of a program, four bytes of one row, is eight weights; each line below is one instruction::

    bits   31-28 27-24 23-20 19-16 15-12 11-8  7-4   3-0
    k      j+67  j+3   j+66  j+2   j+65  j+1   j+64  j
    channel   w & 0xf0f0f0f0: 16 q of j+64 to j+67;     w << 4, & 0xf0f0f0f0: of j to j+3
    integer   w & 0x0f0f0f0f: q of j to j+3;   · s + a · 0x01010101: no byte carries, w8 + 128 <= 255;   ^ 0x80808080

Exact: ``Σ x w8`` is bit-equal to the reference for every split of the work, because int32 sums have no order. Rounded:
the sum to float32, two products and the bias in float32, and the result once to the output's dtype.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels._numerics import INTERPRET, round_half_even, to_dtype
from lqedu_kernels._schedule import grouped_tile
from lqedu_kernels._tensors import GLUON_LIMITS, HAS_GLUON, check_codes, check_kernel, check_tensor, target_of
from lqedu_kernels.tuning import configuration

__all__ = [
    "bytes_moved",
    "default_config",
    "few",
    "int8_weight",
    "one",
    "operations",
    "pack_groups",
    "pack_ratios",
    "pack_w4a8",
    "search_space",
    "tile",
    "unpack_groups",
    "unpack_w4a8",
    "w4a8_matmul",
    "w4a8_reference",
]

BLOCK = 128  # inputs whose nibbles share 64 bytes of a row
MOST_K = 2**17 - BLOCK  # 16 q x sums of so many products fit int32
#: The keys of a launch, for each kernel it may name.
_KERNELS = {
    "one": "BN B num_warps AHEAD",
    "few": "BN BM B num_warps num_stages AHEAD",
    "tile": "BN BM B GROUP_M num_warps num_stages AHEAD",
    "hopper": "block_m block_n warps stages group_m share",
}


def w4a8_reference(
    x: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    *,
    groups: Tensor | None = None,
    group_size: int = 128,
    zero: Tensor | None = None,
    x_sum: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The contract in plain torch, see :func:`w4a8_matmul`. The sum is exact: float64 holds all its integers."""
    total = x.double() @ int8_weight(codes, groups, x.shape[1], group_size=group_size).double().T
    if zero is not None:
        total = total - x_sum.double()[:, None] * zero.double()
    y = total.float() * scale.float() * x_scale.float()[:, None]
    return (y if bias is None else y + bias.float()).to(dtype)


def int8_weight(codes: Tensor, groups: Tensor | None, k: int, *, group_size: int = 128) -> Tensor:
    """``w8``, int8 ``[N, K]``, of packed codes and their groups: what enters the product."""
    q = unpack_w4a8(codes, k).short()
    if groups is None:
        return ((q ^ 8) - 8).to(torch.int8)  # a nibble in two's complement
    of_inputs = groups.T[: len(codes)].repeat_interleave(group_size, 1)  # [N, K]
    if groups.dtype == torch.int16:
        return (q * (of_inputs & 0xFF) + (of_inputs >> 8) - 127).to(torch.int8)
    return torch.round((q - 8).float() * of_inputs.float()).to(torch.int8)


def pack_w4a8(q: Tensor) -> Tensor:
    """Nibbles ``[N, K]`` to the bytes a kernel reads, uint8 ``[N, 64 ceil(K/128)]``; missing inputs are nibble 0.

    Args:
        q: int8 in ``[-8, 7]`` (per channel) or uint8 in ``[0, 15]`` (in groups).

    Raises:
        TypeError, ValueError: other numbers or another shape.

    >>> pack_w4a8(torch.tensor([[-8, 7] + [0] * 62 + [1]], dtype=torch.int8))[0, :2].tolist()   # 0x18, 0x07
    [24, 7]
    """
    check_codes(q)
    n, k = q.shape
    blocks = torch.nn.functional.pad(q.to(torch.int8), (0, -k % BLOCK)).view(torch.uint8).view(n, -1, 2, BLOCK // 2)
    return ((blocks[:, :, 0] & 15) | (blocks[:, :, 1] << 4)).view(n, -1)


def unpack_w4a8(codes: Tensor, k: int) -> Tensor:
    """Inverse of :func:`pack_w4a8`: nibbles 0 to 15, uint8 ``[N, K]`` (a negative code as 16 more)."""
    halves = codes.view(codes.shape[0], -1, BLOCK // 2)
    return torch.stack((halves & 15, halves >> 4), 2).view(codes.shape[0], -1)[:, :k].contiguous()


def pack_groups(group_scale: Tensor, offset: Tensor) -> Tensor:
    """Integer groups ``w8 = q group_scale - offset`` as words, int16 ``[G, 8 ceil(N/8)]``.

    Args:
        group_scale: uint8 ``[N, G]``, at most 17: 15 times it must fit a byte.
        offset: integers ``[N, G]`` in ``[0, 240]``: the zero point times the group scale (QoQ), or as stored (QServe).

    Raises:
        ValueError: numbers outside these ranges.

    >>> pack_groups(torch.tensor([[16, 1]], dtype=torch.uint8), torch.tensor([[112, 0]]))[:, 0].tolist()   # 15 * 256 + 16
    [3856, 32513]
    """
    s, b = group_scale.to(torch.int32), offset.to(torch.int32)
    if s.numel() and (int(s.max()) > 17 or int(b.min()) < 0 or int(b.max()) > 240):
        raise ValueError("group_scale must be at most 17 and offset within [0, 240]: see the protective range of QoQ")
    return pack_ratios(((127 - b) * 256 + s).to(torch.int16))


def pack_ratios(ratio: Tensor) -> Tensor:
    """Float16 ratios ``[N, G]`` in the order of a kernel, ``[G, 8 ceil(N/8)]``: outputs side by side, filled up with 0."""
    filled = torch.nn.functional.pad(ratio, (0, 0, 0, -len(ratio) % 8))
    return filled.T.clone(memory_format=torch.contiguous_format)  # one group's row, too, gets the stride of a row


def unpack_groups(groups: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack_groups`: group scale uint8 and offset int16, both ``[N, G]``."""
    return (groups & 0xFF).to(torch.uint8).T[:n].contiguous(), (127 - (groups >> 8)).T[:n].contiguous()


def bytes_moved(m: int, n: int, k: int, *, group_size: int | None = None) -> int:
    """Fewest bytes of a call: each input read once, the output written once."""
    return m * k + n * k // 2 + 2 * m * n + 4 * m + 4 * n + (2 * n * k // group_size if group_size else 0)


def operations(m: int, n: int, k: int) -> int:
    """Multiplications and additions of the product."""
    return 2 * m * n * k


@triton.jit
def _signed(b_w):
    """uint8 ``[B, BN, 64]`` to int8 of 16 q, for the low and the high nibbles: three instructions for eight weights."""
    if INTERPRET:
        return (b_w << 4).to(tl.int8, bitcast=True), (b_w & 0xF0).to(tl.int8, bitcast=True)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0; }",
        "=r,=r,r",
        [b_w],
        dtype=(tl.int8, tl.int8),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _by_integer(b_w, b_group, HIGH: tl.constexpr):
    """Nibbles of uint8 ``[.., BN, 64]`` to int8 ``(q s + a) ^ 0x80``; the words of their groups in the low half of int32 ``[.., BN]``."""
    b_s, b_a = tl.expand_dims(b_group & 0xFF, -1), tl.expand_dims((b_group << 16) >> 24, -1) + 1
    if INTERPRET:
        b_q = (b_w >> 4 if HIGH else b_w & 15).to(tl.int32)
        return (b_q * b_s + b_a - 128).to(tl.int8)
    SHIFT: tl.constexpr = "shr.u32 t, $1, 4; and.b32 t, t, 0x0f0f0f0f;" if HIGH else "and.b32 t, $1, 0x0f0f0f0f;"
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; " + SHIFT + " mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080; }",
        "=r,r,r,r,r,r,r,r,r,r",
        [b_w, tl.broadcast_to(b_s, b_w.shape), tl.broadcast_to(b_a * 0x01010101, b_w.shape)],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


def _ratio_ptx(mask: str, eight: str) -> str:
    """Nibbles under a mask of ``$1`` to four int8, by the packed float16 ratio ``$2``: see :func:`_by_ratio`."""
    return (
        f"{{ .reg .b32 t, u, e, m; mov.b32 e, {eight}; mov.b32 m, 0x66006600; shr.u32 u, $1, 8; "
        f"lop3.b32 t, $1, {mask}, 0x64006400, 0xea; lop3.b32 u, u, {mask}, 0x64006400, 0xea; "
        "sub.f16x2 t, t, e; sub.f16x2 u, u, e; fma.rn.f16x2 t, t, $2, m; fma.rn.f16x2 u, u, $2, m; "
        "prmt.b32 $0, t, u, 0x6240; }"
    )


_LOW_RATIO = tl.constexpr(_ratio_ptx("0x000f000f", "0x64086408"))  # less 1024 + 8
_HIGH_RATIO = tl.constexpr(_ratio_ptx("0x00f000f0", "0x64806480"))  # less 1024 + 16 · 8


@triton.jit
def _by_ratio(b_w, b_group, HIGH: tl.constexpr):
    """Nibbles of uint8 ``[.., BN, 64]`` to int8 ``round_half_even((q - 8) r)``; float16 r in the low half of int32 ``[.., BN]``.

    In float16, 1024 + q is a nibble set into the last bits of 0x6400, and 1536 + q r, rounded once by the multiply-add,
    has ``w8`` in its lowest byte. A high nibble stays where it is, 16 q, and meets r/16.
    """
    b_r = b_group.to(tl.int16).to(tl.float16, bitcast=True)
    if INTERPRET:
        b_q = (b_w >> 4 if HIGH else b_w & 15).to(tl.float32) - 8
        return round_half_even(b_q * tl.expand_dims(b_r.to(tl.float32), -1)).to(tl.int8)
    b_two = ((b_r * 0.0625 if HIGH else b_r).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x00010001
    return tl.inline_asm_elementwise(
        _HIGH_RATIO if HIGH else _LOW_RATIO,
        "=r,r,r,r,r,r",
        [b_w, tl.broadcast_to(tl.expand_dims(b_two, -1), b_w.shape)],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _row_of_pairs(o_tile):
    """Which output a row of the tile is: rows r and r + 8, which one thread holds, are neighbours 2 r and 2 r + 1."""
    return o_tile // 16 * 16 + o_tile % 8 * 2 + o_tile // 8 % 2


@triton.jit
def _halves_to_columns(b_low, b_high):
    """Two ``[.., n]`` to ``[.., 2, n]``, the low half first, still two registers side by side."""
    b_both = tl.join(b_low, b_high)
    return b_both.permute(0, 2, 1) if len(b_low.shape) == 2 else b_both.permute(0, 1, 3, 2)


@triton.jit
def _pairs_to_rows(b_pair, BATCH: tl.constexpr):
    """int32 ``[.., BN / 2]``, two 16-bit words each, to int32 ``[.., BN]``, one in the low half, in the order of the rows."""
    PAIRS: tl.constexpr = b_pair.shape[-1]
    b_pair = b_pair.reshape(b_pair.shape[0], PAIRS // 8, 8) if BATCH else b_pair.reshape(PAIRS // 8, 8)
    b_rows = _halves_to_columns(b_pair & 0xFFFF, b_pair >> 16)
    return b_rows.reshape(b_rows.shape[0], 2 * PAIRS) if BATCH else b_rows.reshape(2 * PAIRS)


@triton.jit
def _unpack(b_w, b_pair, b_pair_high, FORM: tl.constexpr):
    """Packed ``[.., BN, 64]`` and words ``[.., BN / 2]`` of the groups of the two halves to int8 ``[.., BN, 128]``."""
    BATCH: tl.constexpr = len(b_w.shape) == 3
    if FORM == "channel":
        b_low, b_high = _signed(b_w)
    elif FORM == "integer":
        b_low = _by_integer(b_w, _pairs_to_rows(b_pair, BATCH), False)
        b_high = _by_integer(b_w, _pairs_to_rows(b_pair_high, BATCH), True)
    else:
        b_low = _by_ratio(b_w, _pairs_to_rows(b_pair, BATCH), False)
        b_high = _by_ratio(b_w, _pairs_to_rows(b_pair_high, BATCH), True)
    b_w8 = _halves_to_columns(b_low, b_high)  # moves no register, nor does the reshape
    return b_w8.reshape(b_w.shape[0], b_w.shape[1], 128) if BATCH else b_w8.reshape(b_w.shape[0], 128)


@triton.jit
def _scale_and_store(b_sum, b_x_scale, b_scale, p_zero, p_x_sum, p_bias, p_y, M, N, o_n, o_m, FORM: tl.constexpr):
    """``y`` of int32 sums ``[BN, BM]``."""
    BN: tl.constexpr = b_sum.shape[0]
    BM: tl.constexpr = b_sum.shape[1]
    m_n, m_m = o_n < N, o_m < M
    b_sum = b_sum >> 4 if FORM == "channel" else b_sum.reshape(BN // 16, 2, 8, BM).permute(0, 2, 1, 3).reshape(BN, BM)
    if p_zero is not None:
        b_sum -= tl.load(p_zero + o_n, mask=m_n)[:, None] * tl.load(p_x_sum + o_m, mask=m_m)[None, :]
    b_y = b_sum.to(tl.float32) * b_scale[:, None] * b_x_scale[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=m_n).to(tl.float32)[:, None]
    p_out = p_y + o_m.to(tl.int64)[None, :] * N + o_n[:, None]
    tl.store(p_out, to_dtype(b_y, p_y.dtype.element_ty), mask=m_n[:, None] & m_m[None, :])


@triton.jit(do_not_specialize=["M", "blocks"])
def _few_kernel(
    p_x, p_x_scale, p_codes, p_scale, p_groups, p_zero, p_x_sum, p_bias, p_y, M, N, K, blocks, stride_g,
    FORM: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, B: tl.constexpr, EVEN_K: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """BN outputs of BM tokens. B blocks of the inputs at a time, one a warp: the warps share nothing but the last sum."""
    # 1 Place.
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    m_m = (o_m < M)[None, None, :]
    o_row = tl.minimum(o_n if FORM == "channel" else tl.program_id(0) * BN + _row_of_pairs(tl.arange(0, BN)), N - 1)
    o_pair = tl.minimum(tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2), stride_g - 1)
    o_b = tl.arange(0, B)
    o_k = o_b[:, None, None] * 128 + tl.arange(0, 128)[None, :, None]  # [B, 128, 1]
    p_w = (
        p_codes
        + (o_row.to(tl.int64) * (blocks * 64))[None, :, None]
        + (o_b[:, None] * 64 + tl.arange(0, 64)[None, :])[:, None, :]
    )
    p_t = p_x + (o_m.to(tl.int64) * K)[None, None, :] + o_k
    b_sum = tl.zeros((B, BN, BM), tl.int32)
    if AHEAD:
        tl.extra.cuda.gdc_wait()  # for the launch in front of this one, which may have made x
    b_scale = tl.load(p_scale + o_n, mask=o_n < N, other=0).to(tl.float32)  # early: nobody waits for them
    b_x_scale = tl.load(p_x_scale + o_m, mask=o_m < M, other=0)
    for step in range(tl.cdiv(blocks, B)):
        # 2 Load 64 bytes of each weight row and 128 inputs of each token, B times.
        o_block = step * B + o_b
        if EVEN_K:
            b_w = tl.load(p_w)  # [B, BN, 64]
            b_x = tl.load(p_t, mask=m_m, other=0)  # [B, 128, BM]
        else:
            b_w = tl.load(p_w, mask=(o_block < blocks)[:, None, None], other=0)
            b_x = tl.load(p_t, mask=m_m & (step * (B * 128) + o_k < K), other=0)
        # 3 Unpack: the low nibbles are the first half of a block, the high ones the second.
        b_g, b_h = b_w, b_w  # not looked at per channel
        if FORM != "channel":
            o_group = tl.minimum(o_block, blocks - 1) * (128 // GROUP)
            p_g = p_groups + o_group.to(tl.int64)[:, None] * stride_g + o_pair[None, :]
            b_g = tl.load(p_g)  # [B, BN / 2]
            b_h = b_g
            if GROUP == 64:  # a last half block without a group meets only zeros of x
                b_h = tl.load(p_g + tl.where(o_block * 128 + 64 < K, stride_g, 0)[:, None])
        b_w8 = _unpack(b_w, b_g, b_h, FORM)
        # 4 Accumulate.
        b_sum = tl.dot(b_w8, b_x, b_sum, out_dtype=tl.int32)
        p_w += B * 64
        p_t += B * 128
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    # 5 Scale and store.
    b_all = tl.sum(b_sum, 0)
    _scale_and_store(b_all, b_x_scale, b_scale, p_zero, p_x_sum, p_bias, p_y, M, N, o_n, o_m, FORM)


@triton.jit(do_not_specialize=["M", "blocks"])
def _tile_kernel(
    p_x, p_x_scale, p_codes, p_scale, p_groups, p_zero, p_x_sum, p_bias, p_y, M, N, K, blocks, stride_g,
    FORM: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, B: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One tile of outputs times tokens, [BN, BM]; B blocks of the inputs, one after another, in a step."""
    # 1 Place.
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    o_n = tile_n * BN + tl.arange(0, BN)
    o_m = tile_m * BM + tl.arange(0, BM)
    m_m = (o_m < M)[None, :]
    o_row = tl.minimum(o_n if FORM == "channel" else tile_n * BN + _row_of_pairs(tl.arange(0, BN)), N - 1)
    o_pair = tl.minimum(tile_n * (BN // 2) + tl.arange(0, BN // 2), stride_g - 1)
    o_byte, o_k = tl.arange(0, 64), tl.arange(0, 128)
    p_w = p_codes + (o_row.to(tl.int64) * (blocks * 64))[:, None] + o_byte[None, :]
    p_t = p_x + (o_m.to(tl.int64) * K)[None, :] + o_k[:, None]
    p_g = p_groups + o_pair
    b_sum = tl.zeros((BN, BM), tl.int32)
    if AHEAD:
        tl.extra.cuda.gdc_wait()  # for the launch in front of this one, which may have made x
    for block in range(0, blocks, B):
        for b in tl.static_range(B):
            # 2 Load 64 bytes of each weight row and 128 inputs of each token.
            b_w = tl.load(p_w + b * 64)  # [BN, 64]
            if EVEN_K:
                b_x = tl.load(p_t + b * 128, mask=m_m, other=0)  # [128, BM]
            else:
                b_x = tl.load(p_t + b * 128, mask=m_m & ((block + b) * 128 + o_k < K)[:, None], other=0)
            # 3 Unpack: the low nibbles are the first half of the block, the high ones the second.
            b_g, b_h = b_w, b_w  # not looked at per channel
            if FORM != "channel":
                b_g = tl.load(p_g)  # [BN / 2]
                b_h = b_g
                if GROUP == 64:  # a last half block without a group meets only zeros of x
                    b_h = tl.load(p_g + tl.where((block + b) * 128 + 64 < K, stride_g, 0))
                p_g += 128 // GROUP * stride_g
            b_w8 = _unpack(b_w, b_g, b_h, FORM)
            # 4 Accumulate.
            b_sum = tl.dot(b_w8, b_x, b_sum, out_dtype=tl.int32)
        p_w += B * 64
        p_t += B * 128
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    # 5 Scale and store. Scales loaded earlier would cost registers that a second block on the multiprocessor needs.
    b_scale = tl.load(p_scale + o_n, mask=o_n < N, other=0).to(tl.float32)
    b_x_scale = tl.load(p_x_scale + o_m, mask=o_m < M, other=0)
    _scale_and_store(b_sum, b_x_scale, b_scale, p_zero, p_x_sum, p_bias, p_y, M, N, o_n, o_m, FORM)


@triton.jit
def _dot4(b_a, b_b, b_sum):
    """``sum`` plus the products of the four int8 in each int32 of ``a`` and ``b``: one instruction."""
    if INTERPRET:
        for i in tl.static_range(4):
            b_sum += ((b_a << (24 - 8 * i)) >> 24) * ((b_b << (24 - 8 * i)) >> 24)
        return b_sum
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [b_a, b_b, b_sum], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _word(b_w, b_group, FORM: tl.constexpr, HIGH: tl.constexpr):
    """The four int8 weights, as one int32, of the low or the high nibbles of each int32 of ``w``."""
    if FORM == "channel":
        return (b_w if HIGH else b_w << 4) & -0x0F0F0F10  # 0xf0f0f0f0
    if FORM == "integer":
        b_q = (b_w >> 4 if HIGH else b_w) & 0x0F0F0F0F
        return (b_q * (b_group & 0xFF) + ((b_group >> 8) + 1) * 0x01010101) ^ -0x7F7F7F80  # 0x80808080
    b_r = b_group.to(tl.int16).to(tl.float16, bitcast=True)
    if INTERPRET:
        b_out = tl.zeros(b_w.shape, tl.int32)
        for i in tl.static_range(4):
            b_q = ((b_w >> (8 * i + 4 if HIGH else 8 * i)) & 15).to(tl.float32) - 8
            b_out |= (round_half_even(b_q * b_r.to(tl.float32)).to(tl.int32) & 0xFF) << (8 * i)
        return b_out
    b_two = ((b_r * 0.0625 if HIGH else b_r).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x00010001
    return tl.inline_asm_elementwise(
        _HIGH_RATIO if HIGH else _LOW_RATIO,
        "=r,r,r",
        [b_w, tl.broadcast_to(b_two, b_w.shape)],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _to_words(b_group):
    """16-bit words of the groups of blocks, ``[BN, B]``, one for each of the 16 words of a block: int32 ``[BN, 16 B]``."""
    BN: tl.constexpr = b_group.shape[0]
    B: tl.constexpr = b_group.shape[1]
    return tl.reshape(tl.broadcast_to(b_group.to(tl.int32)[:, :, None], (BN, B, 16)), (BN, 16 * B))


@triton.jit(do_not_specialize=["M", "blocks"])
def _one_kernel(
    p_x, p_x_scale, p_codes, p_scale, p_groups, p_zero, p_x_sum, p_bias, p_y, M, N, blocks, stride_g,
    FORM: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, B: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BN outputs of one token, without tensor cores: 32-bit words of four x and of eight weights; B blocks of inputs at a time."""
    # 1 Place.
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1).to(tl.int64)
    o_row = tl.minimum(o_n, N - 1)
    o_b, o_w = tl.arange(0, B), tl.arange(0, 16 * B)
    p_w = p_codes + (o_row.to(tl.int64) * (blocks * 16))[:, None] + o_w[None, :]
    p_t = p_x + m * (blocks * 32) + (o_w // 16 * 32 + o_w % 16)[None, :]
    b_sum = tl.zeros((BN, 16 * B), tl.int32)
    if AHEAD:
        tl.extra.cuda.gdc_wait()
    for block in range(0, blocks, B):
        # 2 Load 64 bytes of each row and 128 inputs, B times.
        m_w = (o_w < (blocks - block) * 16)[None, :]
        b_w = tl.load(p_w, mask=None if EVEN else m_w, eviction_policy="evict_first")  # [BN, 16 B]
        b_low = tl.load(p_t) if EVEN else tl.load(p_t, mask=m_w, other=0)  # [1, 16 B]
        b_high = tl.load(p_t + 16) if EVEN else tl.load(p_t + 16, mask=m_w, other=0)
        b_g, b_h = b_w, b_w  # not looked at per channel
        if FORM != "channel":
            o_group = tl.minimum(block + o_b, blocks - 1) * (128 // GROUP)
            p_g = p_groups + o_group.to(tl.int64)[None, :] * stride_g + o_row[:, None]
            b_g = _to_words(tl.load(p_g))
            b_h = b_g if GROUP == 128 else _to_words(tl.load(p_g + stride_g))
        # 3 Unpack, and 4 accumulate.
        b_sum = _dot4(_word(b_w, b_g, FORM, False), tl.broadcast_to(b_low, b_w.shape), b_sum)
        b_sum = _dot4(_word(b_w, b_h, FORM, True), tl.broadcast_to(b_high, b_w.shape), b_sum)
        p_w += B * 16
        p_t += B * 32
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    # 5 Scale and store.
    b_all = tl.sum(b_sum, 1)
    m_n = o_n < N
    if FORM == "channel":
        b_all = b_all >> 4
    if p_zero is not None:
        b_all -= tl.load(p_zero + o_n, mask=m_n) * tl.load(p_x_sum + m)
    b_y = b_all.to(tl.float32) * tl.load(p_scale + o_n, mask=m_n, other=0).to(tl.float32) * tl.load(p_x_scale + m)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=m_n).to(tl.float32)
    tl.store(p_y + m * N + o_n, to_dtype(b_y, p_y.dtype.element_ty), mask=m_n)


def default_config(m: int, n: int, k: int) -> dict:
    """For GPUs without measurements, the usual winner on an H100: for few tokens and outputs a warp for each block of inputs."""
    if m == 1 and k % BLOCK == 0:
        return one(4, 32, warps=4)
    if m <= 16:
        return few(32, 8 if m <= 8 else 16, 4, stages=4) if n <= 8192 else tile(64, 16, 2, warps=4, stages=4)
    if m <= 64:
        return tile(64, 32, 1, warps=4, stages=6)
    if m <= 512:
        return tile(128, 64, 1, warps=4, stages=4)
    return tile(128, 128, 1, warps=8, stages=3)


def few(block_n: int, block_m: int, blocks: int, *, stages: int, ahead: bool = False) -> dict:
    """A launch of ``_few_kernel``: ``blocks`` blocks of 128 inputs at a time, each by a warp of its own."""
    return {
        "kernel": "few", "BN": block_n, "BM": block_m, "B": blocks,
        "num_warps": blocks, "num_stages": stages, "AHEAD": ahead,
    }  # fmt: skip


def one(block_n: int, blocks: int, *, warps: int, ahead: bool = False) -> dict:
    """A launch of ``_one_kernel``, for whole blocks of inputs: ``blocks`` of them at a time."""
    return {"kernel": "one", "BN": block_n, "B": blocks, "num_warps": warps, "AHEAD": ahead}


def tile(
    block_n: int, block_m: int, blocks: int, *, warps: int, stages: int, group_m: int = 8, ahead: bool = False
) -> dict:
    """A launch of ``_tile_kernel``; ``group_m`` rows of tiles are walked together."""
    return {
        "kernel": "tile", "BN": block_n, "BM": block_m, "B": blocks, "GROUP_M": group_m,
        "num_warps": warps, "num_stages": stages, "AHEAD": ahead,
    }  # fmt: skip


def search_space(m: int, n: int, k: int) -> list[dict]:
    """Launches worth timing on an H100, best guesses first."""
    found = []
    if m >= 64 and HAS_GLUON:
        from lqedu_kernels import hopper_w4  # Gluon, which only this version of Triton can import

        found += [{"kernel": "hopper", **c} for c in hopper_w4.search_space(m, n, k, torch.int8)[:8]]
    if m == 1 and k % BLOCK == 0:
        found += [one(n, b, warps=w, ahead=a) for a in (True, False) for n in (4, 8) for b, w in ((32, 4), (16, 2))]
    if m <= 32:
        block_m = 8 if m <= 8 else 16 if m <= 16 else 32
        sizes = ((32, 4, 4), (16, 4, 5), (32, 2, 6), (16, 2, 6))
        found += [few(n, block_m, b, stages=t, ahead=a) for a in (False, True) for n, b, t in sizes]
    if m <= 64:
        block_m = 16 if m <= 16 else 32
        sizes = ((1, 8), (2, 4), (1, 6))
        found += [tile(64, block_m, b, warps=4, stages=t, ahead=a) for a in (False, True) for b, t in sizes]
    if m > 16:
        for block_n, block_m, warps, stages in ((64, 64, 4, 6), (128, 64, 4, 4), (64, 128, 4, 5)):
            if block_m < 2 * m:
                found += [tile(block_n, block_m, 1, warps=warps, stages=stages)]
    if m > 128:
        for block_n, block_m, warps, stages in ((64, 256, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4)):
            found += [tile(block_n, block_m, 1, warps=warps, stages=stages, group_m=g) for g in (2, 8)]
    return found


def w4a8_matmul(
    x: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    *,
    groups: Tensor | None = None,
    group_size: int = 128,
    zero: Tensor | None = None,
    x_sum: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    config: Mapping | None = None,
) -> Tensor:
    """``y = x_scale (scale (x w8^T)) + bias`` from int8 tokens and 4-bit weights; the tensors are described above.

    Args:
        x, x_scale: int8 ``[M, K]`` and float32 ``[M]``; of ``quantize_tokens``, ``codes`` and ``scale.flatten()``.
        codes, scale: uint8 ``[N, 64 ceil(K/128)]`` of :func:`pack_w4a8`, and float16 or float32 ``[N]``.
        groups, group_size: ``None`` per channel; int16 of :func:`pack_groups` or float16 of :func:`pack_ratios`, and 64 or 128.
        zero, x_sum: int32 ``[N]`` and ``[M]``, both or neither, per channel: ``zero[n] x_sum[m]`` leaves the sum. With
            zero points of the activations instead: their codes as ``x_sum`` and the sums of ``w8`` as ``zero``.
        bias: ``[N]`` in ``dtype`` or float32.
        dtype: float16 or bfloat16, of the result.
        config: a launch of :func:`search_space` instead of the measured or the default one.

    Returns:
        ``[M, N]``.

    Raises:
        TypeError: another dtype.
        ValueError: shapes, devices or layouts that do not fit.
    """
    m, n, k = _check(x, x_scale, codes, scale, groups, group_size, zero, x_sum, bias, dtype)
    target = target_of(x, "x")
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    if m == 0 or n == 0:
        return y
    form = "channel" if groups is None else "integer" if groups.dtype == torch.int16 else "ratio"
    check_kernel(config, _KERNELS)
    name = "w4a8/channel" if groups is None else f"w4a8/{form}{group_size}"
    launch = dict(config or configuration(name, m, n, k, gpu=target.name) or default_config(m, n, k))
    if launch["kernel"] == "hopper":
        tensors = [x, codes, y] if groups is None else [x, codes, y, groups]
        # The forms that were compared with the reference on a GPU; the others compile, see bench/notes/hopper_w4.md.
        compared = bias is None and dtype == torch.float16
        if HAS_GLUON and compared:
            from lqedu_kernels import hopper_w4

            if zero is not None and launch["warps"] != 8:
                compared = config is None
                launch = next(c for c in hopper_w4.search_space(m, n, k, torch.int8) if c["warps"] == 8)
            if compared and hopper_w4.available(target, *tensors):
                return hopper_w4.w4a8(
                    x, x_scale, codes, scale, groups, zero, x_sum, bias, y,
                    group_size=group_size, config=launch, processors=target.processors,
                )  # fmt: skip
        if config is not None:
            raise ValueError(f"config asks for the Gluon kernel, which does not take this call: {GLUON_LIMITS}")
        launch = default_config(m, n, k)
    blocks = -(-k // BLOCK)
    if launch["kernel"] == "one" and k % BLOCK:
        if config is not None:
            raise ValueError(
                f"config asks for the kernel of whole blocks of {BLOCK} inputs, x has {k}: take another, or None"
            )
        launch = default_config(m, n, k)
    launch["AHEAD"] = launch["AHEAD"] and target.capability >= (9, 0) and not INTERPRET.value
    if launch["AHEAD"]:
        launch["launch_pdl"] = True
    if launch["kernel"] == "one":
        del launch["kernel"]
        _one_kernel[(-(-n // launch["BN"]), m)](
            x.view(torch.int32), x_scale, codes.view(torch.int32), scale, codes if groups is None else groups.view(torch.int16),
            zero, x_sum, bias, y, m, n, blocks, 1 if groups is None else groups.shape[1],
            FORM=form, GROUP=group_size, EVEN=blocks % launch["B"] == 0, **launch,
        )  # fmt: skip
        return y
    tiles_m, tiles_n = -(-m // launch["BM"]), -(-n // launch["BN"])
    if launch.pop("kernel") == "few":
        kernel, grid, even = _few_kernel, (tiles_n, tiles_m), k % (BLOCK * launch["B"]) == 0
    else:
        kernel, grid, even = _tile_kernel, (tiles_n * tiles_m,), k % BLOCK == 0
        if blocks % launch["B"]:
            launch["B"] = 1
    kernel[grid](
        x, x_scale, codes, scale, codes if groups is None else groups.flatten().view(torch.int32), zero, x_sum, bias, y,
        m, n, k, blocks, 1 if groups is None else groups.shape[1] // 2,
        FORM=form, GROUP=group_size, EVEN_K=even, **launch,
    )  # fmt: skip
    return y


def _check(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, groups: Tensor | None, group_size: int,
    zero: Tensor | None, x_sum: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> tuple[int, int, int]:  # fmt: skip
    """M, N, K of arguments that fit each other."""
    check_tensor("x", x, dtype=torch.int8, shape=(None, None), device=getattr(x, "device", None), what="tokens")
    m, k = x.shape
    if not 1 <= k <= MOST_K:
        raise ValueError(
            f"x has {k} inputs, but the INT32 sums need 1 to {MOST_K}: split the inputs and add the results"
        )
    check_tensor(
        "codes", codes, dtype=torch.uint8, shape=(None, -(-k // BLOCK) * 64), device=x.device, what="pack_w4a8"
    )
    n = codes.shape[0]
    check_tensor("x_scale", x_scale, dtype=torch.float32, shape=(m,), device=x.device, what="of a column: .flatten()")
    check_tensor("scale", scale, dtype=(torch.float16, torch.float32), shape=(n,), device=x.device)
    if groups is not None:
        if group_size not in (64, 128) or isinstance(group_size, float) or k % group_size:
            raise ValueError(f"group_size must be 64 or 128 and divide the {k} inputs of x, got {group_size}")
        shape = (k // group_size, -(-n // 8) * 8)
        check_tensor(
            "groups", groups, dtype=(torch.int16, torch.float16), shape=shape, device=x.device, what="pack_groups"
        )
    if (zero is None) != (x_sum is None) or (zero is not None and groups is not None):
        raise ValueError(
            "zero and x_sum go together, and only per channel: zero points of groups are inside pack_groups"
        )
    if zero is not None:
        check_tensor("zero", zero, dtype=torch.int32, shape=(n,), device=x.device, what="of the signed codes")
        check_tensor("x_sum", x_sum, dtype=torch.int32, shape=(m,), device=x.device, what="x.sum(1), dtype=torch.int32")
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"dtype must be float16 or bfloat16, got {dtype}")
    if bias is not None:
        check_tensor("bias", bias, dtype=(dtype, torch.float32), shape=(n,), device=x.device)
    return m, n, k
