"""W4A8: INT8 activations times 4-bit weights, summed in INT32; scales enter after the sum.

The contract, with ``x`` int8 ``[M, K]`` and one scale a token, ``w8`` int8 ``[N, K]`` and one scale a channel:

    y[m, n] = x_scale[m] · (scale[n] · Σ_k x[m, k] w8[n, k])  (+ bias[n]),      fp16 or bf16

How 4 bits ``q`` become ``w8`` while a program loads them depends on ``groups``:

    groups     nibble      w8                                              format
    ``None``   signed q    q, in registers 16 q                            QQQ per channel; QoQ per channel with ``zero``
    int16      0 to 15     (q - z) s = ((q s + a) ^ 0x80),  a = 128 - z s  QoQ: integer scales of groups
    float16    q + 8       round_half_even(q r)                            QQQ: ratio of the scales of group and channel

Tensors, for G = K/g groups of g = 64 or 128 inputs:

    codes    uint8    [N, 64 ceil(K/128)]   in a block of 128 inputs byte j holds k = j (low) and k = j + 64 (high nibble)
    scale    float16 or float32 [N]         of the channel, as stored: the 16 of 16 q is shifted out of the sum
    groups   int16    [ceil(G/2), N, 2]     two neighbouring groups side by side: one 32-bit word, which ``cp.async`` can copy;
                                            each: low byte s (unsigned), high byte a - 1 (signed; a is in [-112, 128])
    groups   float16  [ceil(G/2), N, 2]     each: r = s_group / s_channel
    zero     int32    [N]                   per channel only, of the *signed* codes (z - 8); with x_sum int32 [M] = Σ_k x

One register of a program, four bytes of one row, is eight weights; each line below is one instruction:

    bits   31-28 27-24 23-20 19-16 15-12 11-8  7-4   3-0
    k      j+67  j+3   j+66  j+2   j+65  j+1   j+64  j
    channel   w & 0xf0f0f0f0: 16 q of j+64 to j+67;     w << 4, & 0xf0f0f0f0: of j to j+3
    integer   w & 0x0f0f0f0f: q of j to j+3;   · s + a · 0x01010101: no byte carries, w8 + 128 <= 255;   ^ 0x80808080

Exact: ``Σ x w8`` is bit-equal to the reference for every split of the work, because int32 sums have no order. Rounded:
the sum to float32, two products and the bias in float32, and the result once to the output's dtype.
"""

import contextlib
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels._numerics import INTERPRET, round_half_even, to_dtype
from lqedu_kernels._schedule import counters, first_step, grouped_tile, program_of
from lqedu_kernels._tensors import check_tensor, target_of
from lqedu_kernels.tuning import configuration

BLOCK = 128  # inputs whose nibbles share 64 bytes of a row
MOST_K = 2**17 - BLOCK  # 16 q x sums of so many products fit int32


def w4a8_reference(
    x: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    *,
    groups: Tensor | None = None,
    zero: Tensor | None = None,
    x_sum: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The contract in plain torch, see :func:`w4a8_matmul`. The sum is exact: float64 holds all its integers."""
    total = x.double() @ int8_weight(codes, groups, x.shape[1]).double().T
    if zero is not None:
        total = total - x_sum.double()[:, None] * zero.double()
    y = total.float() * scale.float() * x_scale.float()[:, None]
    return (y if bias is None else y + bias.float()).to(dtype)


def int8_weight(codes: Tensor, groups: Tensor | None, k: int) -> Tensor:
    """``w8``, int8 ``[N, K]``, of packed codes and their groups: what enters the product."""
    q = unpack_w4a8(codes, k).short()
    if groups is None:
        return ((q ^ 8) - 8).to(torch.int8)  # a nibble in two's complement
    size = k // groups.shape[0]
    if groups.dtype == torch.int16:
        s, a = groups & 0xFF, (groups >> 8) + 1
        return (q * expand(s, size) + expand(a, size) - 128).to(torch.int8)
    return torch.round((q - 8).float() * expand(groups.float(), size)).to(torch.int8)


def expand(groups: Tensor, size: int) -> Tensor:
    """``[K/g, N]`` to ``[N, K]``: each group's number for each of its inputs."""
    return groups.T.repeat_interleave(size, 1)


def pack_w4a8(q: Tensor) -> Tensor:
    """Nibbles ``[N, K]`` to the bytes a kernel reads, uint8 ``[N, 64 ceil(K/128)]``; missing inputs are nibble 0.

    Args:
        q: int8 in ``[-8, 7]`` (per channel) or uint8 in ``[0, 15]`` (in groups).

    >>> pack_w4a8(torch.tensor([[-8, 7] + [0] * 62 + [1]], dtype=torch.int8))[0, :2].tolist()   # 0x18, 0x07
    [24, 7]
    """
    n, k = q.shape
    blocks = torch.nn.functional.pad(q.to(torch.int8), (0, -k % BLOCK)).view(torch.uint8).view(n, -1, 2, BLOCK // 2)
    return ((blocks[:, :, 0] & 15) | (blocks[:, :, 1] << 4)).view(n, -1)


def unpack_w4a8(codes: Tensor, k: int) -> Tensor:
    """Inverse of :func:`pack_w4a8`: nibbles 0 to 15, uint8 ``[N, K]`` (a negative code as 16 more)."""
    halves = codes.view(codes.shape[0], -1, BLOCK // 2)
    return torch.stack((halves & 15, halves >> 4), 2).view(codes.shape[0], -1)[:, :k].contiguous()


def pack_groups(group_scale: Tensor, offset: Tensor) -> Tensor:
    """Integer groups ``w8 = q group_scale - offset`` as words, int16 ``[K/g, N]``.

    Args:
        group_scale: uint8 ``[N, K/g]``, at most 17: 15 times it must fit a byte.
        offset: integers ``[N, K/g]`` in ``[0, 240]``: the zero point times the group scale (QoQ), or as stored (QServe).

    >>> pack_groups(torch.tensor([[16, 1]], dtype=torch.uint8), torch.tensor([[112, 0]])).tolist()   # 15 * 256 + 16
    [[3856], [32513]]
    """
    s, b = group_scale.to(torch.int32), offset.to(torch.int32)
    if s.numel() and (int(s.max()) > 17 or int(b.min()) < 0 or int(b.max()) > 240):
        raise ValueError("group_scale must be at most 17 and offset within [0, 240]: see the protective range of QoQ")
    return ((127 - b) * 256 + s).to(torch.int16).T.contiguous()


def unpack_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack_groups`: group scale uint8 and offset int16, both ``[N, K/g]``."""
    return (groups & 0xFF).to(torch.uint8).T.contiguous(), (127 - (groups >> 8)).T.contiguous()


def bytes_moved(m: int, n: int, k: int, *, group_size: int | None = None) -> int:
    """Fewest bytes of a call: each input read once, the output written once."""
    return m * k + n * k // 2 + 2 * m * n + 4 * m + 4 * n + (2 * n * k // group_size if group_size else 0)


def operations(m: int, n: int, k: int) -> int:
    """Multiplications and additions of the product."""
    return 2 * m * n * k


@triton.jit
def _signed(b_w):
    """uint8 ``[BN, 64]`` to int8 of 16 q, for the low and the high nibbles: three instructions for eight weights."""
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
    """Nibbles of uint8 ``[BN, 64]`` to int8 ``(q s + a) ^ 0x80`` with the words ``[BN]`` of their groups."""
    b_s, b_a = (b_group & 0xFF).to(tl.int32)[:, None], (b_group >> 8).to(tl.int32)[:, None] + 1
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


@triton.jit
def _by_ratio(b_w, b_ratio, HIGH: tl.constexpr):
    """Nibbles of uint8 ``[BN, 64]`` to int8 ``round_half_even((q - 8) r)`` with the ratios float16 ``[BN]``.

    In float16, 1024 + q is a nibble set into the last bits of 0x6400, and 1152 + q r, rounded once by the multiply-add,
    has ``w8 + 128`` in its lowest byte. A high nibble stays where it is, 16 q, and meets r/16.
    """
    if INTERPRET:
        b_q = (b_w >> 4 if HIGH else b_w & 15).to(tl.float32) - 8
        return round_half_even(b_q * b_ratio.to(tl.float32)[:, None]).to(tl.int8)
    b_r = (b_ratio * 0.0625 if HIGH else b_ratio).to(tl.int16, bitcast=True).to(tl.int32)[:, None] & 0xFFFF
    MASK: tl.constexpr = "0x00f000f0" if HIGH else "0x000f000f"
    EIGHT: tl.constexpr = "0x64806480" if HIGH else "0x64086408"  # 1024 + 8, or 1024 + 16 * 8
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t, u, e, m; mov.b32 e, " + EIGHT + "; mov.b32 m, 0x64806480; shr.u32 u, $1, 8; "
        "lop3.b32 t, $1, " + MASK + ", 0x64006400, 0xea; lop3.b32 u, u, " + MASK + ", 0x64006400, 0xea; "
        "sub.f16x2 t, t, e; sub.f16x2 u, u, e; fma.rn.f16x2 t, t, $2, m; fma.rn.f16x2 u, u, $2, m; "
        "prmt.b32 t, t, u, 0x6240; xor.b32 $0, t, 0x80808080; }",
        "=r,r,r,r,r,r",
        [b_w, tl.broadcast_to(b_r * 0x00010001, b_w.shape)],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _groups_of(p_groups, block, o_row, N, K, GROUP: tl.constexpr):
    """The group words or ratios ``[BN]`` of the two halves of a block; behind the last group, again the last."""
    last = K // GROUP - 1
    group = block * (128 // GROUP)
    b_g = tl.load(p_groups + tl.minimum(group, last).to(tl.int64) * N + o_row)
    if GROUP == 128:
        return b_g, b_g
    return b_g, tl.load(p_groups + tl.minimum(group + 1, last).to(tl.int64) * N + o_row)


@triton.jit
def _sum_of_parts(b_sum, p_parts, p_counter, tile, begin, steps_k, steps, programs, PARTS: tl.constexpr):
    """Hand in a part of a tile's sum; the program that arrives last gets the whole. int32 sums have no order.

    Args:
        b_sum: this program's part, int32 ``[BN, BM]``.
        p_parts: two slots of BN * BM numbers for each program: the first for a part that does not begin its tile.
        begin: the step of the tile at which the part begins.
        PARTS: most programs that share a tile.
    """
    ROWS: tl.constexpr = b_sum.shape[0]
    COLUMNS: tl.constexpr = b_sum.shape[1]
    o_slot = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    slot = 2 * tl.program_id(0) + tl.where(begin == 0, 1, 0)
    tl.store(p_parts + slot.to(tl.int64) * (ROWS * COLUMNS) + o_slot, b_sum)
    first = program_of(tile * steps_k, steps, programs)
    others = program_of((tile + 1) * steps_k - 1, steps, programs) - first
    tl.debug_barrier()  # all threads have written before the program says so
    arrived = tl.atomic_add(p_counter + tile, 1, sem="acq_rel", scope="gpu")
    if arrived == others:
        tl.store(p_counter + tile, 0)
        p_first = p_parts + (2 * first).to(tl.int64) * (ROWS * COLUMNS) + o_slot
        b_sum = tl.load(p_first + ROWS * COLUMNS, cache_modifier=".cg")
        if ROWS * COLUMNS <= 4096:  # few registers: all loads are under way at once
            for part in tl.static_range(1, PARTS):
                p_part = p_first + 2 * tl.minimum(part, others) * ROWS * COLUMNS
                b_sum += tl.where(part <= others, tl.load(p_part, cache_modifier=".cg"), 0)
        else:
            for part in range(1, others + 1):
                b_sum += tl.load(p_first + 2 * part * ROWS * COLUMNS, cache_modifier=".cg")
    return b_sum, arrived == others


@triton.jit
def _w4a8_kernel(
    p_x, p_x_scale, p_codes, p_scale, p_groups, p_zero, p_x_sum, p_bias, p_y, p_parts, p_counter,
    M, N, K, blocks, whole, programs,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One program: ``whole`` tiles of its own, and before them its share of the steps of the tiles that are left over."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    steps_k = blocks // UNROLL
    shared = tiles_m * tiles_n - whole * programs
    begin = first_step(tl.program_id(0), shared * steps_k, programs)
    end = first_step(tl.program_id(0) + 1, shared * steps_k, programs)
    first = begin // steps_k
    runs = tl.cdiv(end, steps_k) - first
    for i in range(0, runs + whole):
        # 1 Place: a tile of weights times tokens, [BN, BM], and the steps of its sum.
        mine = i >= runs
        tile = tl.where(mine, shared + (i - runs) * programs + tl.program_id(0), first + i)
        low = tl.where(mine, 0, tl.maximum(begin - tile * steps_k, 0))
        high = tl.where(mine, steps_k, tl.minimum(end - tile * steps_k, steps_k))
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        o_n = tile_n * BN + tl.arange(0, BN)
        o_m = tile_m * BM + tl.arange(0, BM)
        m_n, m_m = o_n < N, o_m < M
        o_row = tl.where(m_n, o_n, 0)
        o_byte, o_k = tl.arange(0, 64), tl.arange(0, 128)
        p_w = p_codes + o_row.to(tl.int64)[:, None] * (blocks * 64) + low * (UNROLL * 64) + o_byte[None, :]  # [BN, 64]
        p_t = p_x + o_m.to(tl.int64)[None, :] * K + low * (UNROLL * 128) + o_k[:, None]  # [128, BM]
        b_sum = tl.zeros((BN, BM), tl.int32)
        if GROUP > 0:
            b_g, b_h = _groups_of(p_groups, low * UNROLL, o_row, N, K, GROUP)
        for step in range(low, high):
            for u in tl.static_range(UNROLL):
                # 2 Load 64 bytes of each weight row and 128 inputs of each token.
                block = step * UNROLL + u
                b_w = tl.load(p_w + u * 64)  # [BN, 64]
                if EVEN_K:
                    b_x = tl.load(p_t + u * 128, mask=m_m[None, :], other=0)  # [128, BM]
                else:
                    b_x = tl.load(p_t + u * 128, mask=m_m[None, :] & (block * 128 + o_k < K)[:, None], other=0)
                # 3 Unpack: the low nibbles are the first half of the block, the high ones the second.
                if GROUP == 0:
                    b_low, b_high = _signed(b_w)
                else:
                    b_next_g, b_next_h = _groups_of(p_groups, block + 1, o_row, N, K, GROUP)  # used a block later
                    if p_groups.dtype.element_ty == tl.int16:
                        b_low, b_high = _by_integer(b_w, b_g, False), _by_integer(b_w, b_h, True)
                    else:
                        b_low, b_high = _by_ratio(b_w, b_g, False), _by_ratio(b_w, b_h, True)
                    b_g, b_h = b_next_g, b_next_h
                b_w8 = tl.join(b_low, b_high).permute(0, 2, 1).reshape(BN, 128)  # moves no register
                # 4 Accumulate.
                b_sum = tl.dot(b_w8, b_x, b_sum, out_dtype=tl.int32)
            p_w += UNROLL * 64
            p_t += UNROLL * 128
        # 5 Scale and store.
        done = high - low == steps_k
        if PARTS > 1:
            if not done:
                b_sum, done = _sum_of_parts(
                    b_sum, p_parts, p_counter, tile, low, steps_k, shared * steps_k, programs, PARTS
                )
        if done:
            if GROUP == 0:
                b_sum = b_sum >> 4
            if p_zero is not None:
                b_sum -= tl.load(p_zero + o_n, mask=m_n)[:, None] * tl.load(p_x_sum + o_m, mask=m_m)[None, :]
            b_y = b_sum.to(tl.float32) * tl.load(p_scale + o_n, mask=m_n).to(tl.float32)[:, None]
            b_y *= tl.load(p_x_scale + o_m, mask=m_m)[None, :]
            if p_bias is not None:
                b_y += tl.load(p_bias + o_n, mask=m_n).to(tl.float32)[:, None]
            p_out = p_y + o_m.to(tl.int64)[None, :] * N + o_n[:, None]
            tl.store(p_out, to_dtype(b_y, p_y.dtype.element_ty), mask=m_n[:, None] & m_m[None, :])


def default_config(m: int, n: int, k: int) -> dict:
    """For GPUs without measurements: small tiles that share the sum while tokens are few, large tiles afterwards."""
    if m <= 64:
        split = max(1, min(8, k // 1024, 512 // -(-n // 64)))
        return _config(64, 16 if m <= 16 else 64, 2, split=split, warps=4, stages=4)
    if m <= 512:
        return _config(128, 64 if m <= 128 else 128, 1, persistent=2, warps=8, stages=3)
    return _config(128, 128, 1, warps=8, stages=3)


def _config(
    block_n: int, block_m: int, unroll: int, *, split: int = 1, persistent: int = 0, warps: int, stages: int, group_m: int = 8
) -> dict:
    """A launch: ``split`` programs a tile, or ``persistent`` programs a processor that share what full rounds leave over."""
    return {
        "BN": block_n, "BM": block_m, "UNROLL": unroll, "split": split, "persistent": persistent,
        "GROUP_M": group_m, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def search_space(m: int, n: int, k: int) -> list[dict]:
    """Launches worth timing on an H100, best guesses first."""
    tiles = -(-n // 64)
    splits = sorted({max(1, round(c * 132 / tiles)) for c in (1, 2, 3, 4)})
    if m <= 64:
        block_m = 16 if m <= 16 else 32 if m <= 32 else 64
        found = [_config(64, block_m, 2, split=s, warps=4, stages=t) for s in splits for t in (4, 5)]
        found += [_config(128, block_m, 1, split=2 * s, warps=w, stages=4) for s in splits[:3] for w in (4, 8)]
        return found + [_config(64, block_m, 1, split=s, warps=4, stages=6) for s in splits]
    found = []
    for block_n, block_m, warps, stages in (
        (128, 128, 8, 4), (128, 128, 8, 3), (256, 128, 16, 3), (128, 256, 16, 3), (256, 128, 8, 3), (128, 256, 8, 3),
        (64, 256, 4, 2), (128, 128, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4),
    ):  # fmt: skip
        if block_m <= max(64, m):
            occupancy = 2 if block_n * block_m <= 2**14 else 1
            found += [_config(block_n, block_m, 1, persistent=p, warps=warps, stages=stages) for p in (0, occupancy)]
    return found


def w4a8_matmul(
    x: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    *,
    groups: Tensor | None = None,
    zero: Tensor | None = None,
    x_sum: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    config: Mapping | None = None,
) -> Tensor:
    """``y = x_scale (scale (x w8^T)) + bias`` from int8 tokens and 4-bit weights; the tensors are described above.

    Args:
        x, x_scale: int8 ``[M, K]`` and float32 ``[M]``.
        codes, scale: uint8 ``[N, 64 ceil(K/128)]`` of :func:`pack_w4a8`, and float16 or float32 ``[N]``.
        groups: ``None`` per channel; int16 of :func:`pack_groups` or float16 ratios, ``[K/g, N]`` with g = 64 or 128.
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
    m, n, k = _check(x, x_scale, codes, scale, groups, zero, x_sum, bias, dtype)
    target = target_of(x, "x")
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    if m == 0 or n == 0:
        return y
    name = "w4a8/channel" if groups is None else "w4a8/integer" if groups.dtype == torch.int16 else "w4a8/ratio"
    launch = dict(config or configuration(name, m, n, k, gpu=target.name) or default_config(m, n, k))
    blocks = -(-k // BLOCK)
    if blocks % launch["UNROLL"]:
        launch["UNROLL"] = 1
    split, persistent = launch.pop("split"), launch.pop("persistent")
    tiles, steps = -(-m // launch["BM"]) * -(-n // launch["BN"]), blocks // launch["UNROLL"]
    programs = persistent * target.processors if persistent else tiles * min(split, steps)
    whole = tiles // programs
    shared = tiles - whole * programs
    run = shared * steps // programs  # the shortest; a program without work would still be waited for
    if shared and not run:
        programs, whole, run = tiles, 1, 0
    parts = 1 + -(-(steps - 1) // run) if run else 1
    part = torch.empty(2 * programs * launch["BN"] * launch["BM"] if run else 1, dtype=torch.int32, device=x.device)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _w4a8_kernel[(programs,)](
            x, x_scale, codes, scale, groups, zero, x_sum, bias, y, part, counters(x.device),
            m, n, k, blocks, whole, programs,
            GROUP=0 if groups is None else k // groups.shape[0], EVEN_K=k % BLOCK == 0, PARTS=parts, **launch,
        )  # fmt: skip
    return y


def _check(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, groups: Tensor | None, zero: Tensor | None,
    x_sum: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> tuple[int, int, int]:  # fmt: skip
    """M, N, K of arguments that fit each other."""
    check_tensor("x", x, dtype=torch.int8, shape=(None, None), device=x.device, what="tokens")
    (m, k), n = x.shape, codes.shape[0]
    if not 1 <= k <= MOST_K:
        raise ValueError(f"x has {k} inputs, but the INT32 sums need 1 to {MOST_K}: split the inputs and add the results")
    check_tensor("x_scale", x_scale, dtype=torch.float32, shape=(m,), device=x.device)
    check_tensor("codes", codes, dtype=torch.uint8, shape=(None, -(-k // BLOCK) * 64), device=x.device, what="pack_w4a8")
    check_tensor("scale", scale, dtype=(torch.float16, torch.float32), shape=(n,), device=x.device)
    if groups is not None:
        check_tensor("groups", groups, dtype=(torch.int16, torch.float16), shape=(None, n), device=x.device)
        if groups.shape[0] * 64 != k and groups.shape[0] * 128 != k:
            raise ValueError(f"groups has {groups.shape[0]} rows for {k} inputs: groups hold 64 or 128 inputs and divide K")
    if (zero is None) != (x_sum is None) or (zero is not None and groups is not None):
        raise ValueError("zero and x_sum go together, and only per channel: zero points of groups are inside pack_groups")
    if zero is not None:
        check_tensor("zero", zero, dtype=torch.int32, shape=(n,), device=x.device, what="of the signed codes")
        check_tensor("x_sum", x_sum, dtype=torch.int32, shape=(m,), device=x.device, what="x.sum(1)")
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"dtype must be float16 or bfloat16, got {dtype}")
    if bias is not None:
        check_tensor("bias", bias, dtype=(dtype, torch.float32), shape=(n,), device=x.device)
    return m, n, k
