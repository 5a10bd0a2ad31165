"""Four W4A16 kernels on the way to the one that ships: what chapter ``18-roofline`` grows, step by step, and times.

All compute ``y = x ((q - z) s)^T`` with groups of 128, one block of K a group, and differ in one idea each:

    naive     the layout of a GPTQ checkpoint; every code is addressed by itself, the weights are operand B
    once      every packed byte is loaded once: its two codes belong to the two halves of a block of K
    swapped   y^T = w x^T: the weights become operand A, which tensor cores read from registers
    magic     one logic instruction puts two codes into the mantissas of two float16; scales wait for the block's sum

The fifth step, work for every multiprocessor, is :func:`lqedu_kernels.w4a16.w4a16_matmul`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels._numerics import INTERPRET

GROUP = 128


def pack_words(codes: Tensor) -> Tensor:
    """uint8 ``[N, K]`` to int32 ``[K / 8, N]``: eight consecutive codes a word, the first in the lowest bits."""
    places = torch.arange(8, device=codes.device) * 4
    words = (codes.to(torch.int64).unflatten(1, (-1, 8)) << places).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).T.contiguous()


def pack_halves(codes: Tensor) -> Tensor:
    """uint8 ``[N, K]`` to ``[N, K / 2]``: in a block of 128, byte j holds code j below and code j + 64 above."""
    low, high = codes.unflatten(1, (-1, 2, GROUP // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def pack_quarters(codes: Tensor) -> Tensor:
    """uint8 ``[N, K]`` to int16 ``[N, K / 4]``: in a block of 128, word j holds codes j, j + 32, j + 64 and j + 96."""
    parts = codes.to(torch.int32).unflatten(1, (-1, 4, GROUP // 4))
    words = sum(parts[:, :, i] << 4 * i for i in range(4)).flatten(1)
    return torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)


@triton.jit
def naive(p_x, p_w, p_s, p_z, p_y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    b_y = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=o_m[:, None] < M, other=0.0)  # [BM, BK]
        b_q = tl.load(p_w + o_k[:, None] // 8 * N + o_n[None, :])  # [BK, BN]: each word is loaded 8 times
        b_q = (b_q >> (o_k[:, None] % 8 * 4)) & 0xF
        b_s = tl.load(p_s + o_k[:, None] // 128 * N + o_n[None, :])
        b_z = tl.load(p_z + o_k[:, None] // 128 * N + o_n[None, :])
        b_y = tl.dot(b_x, (b_q.to(tl.float16) - b_z) * b_s, b_y)
    tl.store(p_y + o_m[:, None] * N + o_n[None, :], b_y.to(tl.float16), mask=o_m[:, None] < M)


@triton.jit
def once(p_x, p_w, p_s, p_z, p_y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_h = tl.arange(0, BK // 2)
    b_y = tl.zeros((BM, BN), tl.float32)
    for block in range(K // BK):
        p_b = p_x + o_m[:, None] * K + block * BK + o_h[None, :]
        b_low = tl.load(p_b, mask=o_m[:, None] < M, other=0.0)  # [BM, BK / 2]
        b_high = tl.load(p_b + BK // 2, mask=o_m[:, None] < M, other=0.0)
        b_q = tl.load(p_w + o_n[None, :] * (K // 2) + block * (BK // 2) + o_h[:, None])  # [BK / 2, BN] bytes
        b_s = tl.load(p_s + block * N + o_n[None, :])  # [1, BN]: one scale a block
        b_z = tl.load(p_z + block * N + o_n[None, :])
        b_y = tl.dot(b_low, ((b_q & 0xF).to(tl.float16) - b_z) * b_s, b_y)
        b_y = tl.dot(b_high, ((b_q >> 4).to(tl.float16) - b_z) * b_s, b_y)
    tl.store(p_y + o_m[:, None] * N + o_n[None, :], b_y.to(tl.float16), mask=o_m[:, None] < M)


@triton.jit
def swapped(p_x, p_w, p_s, p_z, p_y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_h = tl.arange(0, BK // 2)
    b_y = tl.zeros((BN, BM), tl.float32)
    for block in range(K // BK):
        p_b = p_x + o_m[None, :] * K + block * BK + o_h[:, None]
        b_low = tl.load(p_b, mask=o_m[None, :] < M, other=0.0)  # [BK / 2, BM]
        b_high = tl.load(p_b + BK // 2, mask=o_m[None, :] < M, other=0.0)
        b_q = tl.load(p_w + o_n[:, None] * (K // 2) + block * (BK // 2) + o_h[None, :])  # [BN, BK / 2]
        b_s = tl.load(p_s + block * N + o_n)[:, None]
        b_z = tl.load(p_z + block * N + o_n)[:, None]
        b_y = tl.dot(((b_q & 0xF).to(tl.float16) - b_z) * b_s, b_low, b_y)
        b_y = tl.dot(((b_q >> 4).to(tl.float16) - b_z) * b_s, b_high, b_y)
    tl.store(p_y + o_m[None, :] * N + o_n[:, None], b_y.to(tl.float16), mask=o_m[None, :] < M)


def _unpack(shift: int) -> str:
    """Two words in a register: shift both, keep a nibble of each under the exponent of 1024, subtract 1024."""
    return (
        "{ .reg .b32 t, base; mov.b32 base, 0x64006400; "
        f"shr.b32 t, $1, {shift}; lop3.b32 t, t, 0x000f000f, base, 0xea; sub.f16x2 $0, t, base; }}"
    )


UNPACK_0, UNPACK_1, UNPACK_2, UNPACK_3 = (tl.constexpr(_unpack(4 * i)) for i in range(4))


@triton.jit
def codes_as_float16(b_words, i: tl.constexpr):
    """Codes number i of int16 words ``[BN, BK / 4]``, as float16."""
    if INTERPRET:
        return ((b_words >> 4 * i) & 0xF).to(tl.float16)
    ASM: tl.constexpr = UNPACK_0 if i == 0 else UNPACK_1 if i == 1 else UNPACK_2 if i == 2 else UNPACK_3
    return tl.inline_asm_elementwise(ASM, "=r,r", [b_words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def magic(p_x, p_w, p_s, p_z, p_y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_q = tl.arange(0, BK // 4)
    b_y = tl.zeros((BN, BM), tl.float32)
    for block in range(K // BK):
        p_b = p_x + o_m[None, :] * K + block * BK + o_q[:, None]
        b_w = tl.load(p_w + o_n[:, None] * (K // 4) + block * (BK // 4) + o_q[None, :])  # [BN, BK / 4] words
        b_s = tl.load(p_s + block * N + o_n).to(tl.float32)[:, None]
        b_z = tl.load(p_z + block * N + o_n)[:, None]
        b_part = tl.zeros((BN, BM), tl.float32)
        for i in tl.static_range(4):
            b_xi = tl.load(p_b + i * (BK // 4), mask=o_m[None, :] < M, other=0.0)  # [BK / 4, BM]
            b_part = tl.dot(codes_as_float16(b_w, i) - b_z, b_xi, b_part)
        b_y += b_part * b_s
    tl.store(p_y + o_m[None, :] * N + o_n[:, None], b_y.to(tl.float16), mask=o_m[None, :] < M)


STEPS = {
    "naive": (naive, pack_words),
    "once": (once, pack_halves),
    "swapped": (swapped, pack_halves),
    "magic": (magic, pack_quarters),
}


def tile(name: str, m: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, its block of K, and its warps: 64 columns for few rows, 128 for many."""
    rows = min(128, max(16, triton.next_power_of_2(m)))
    block = 32 if name == "naive" else GROUP  # naive keeps a word a code in shared memory: a longer block does not fit
    return (rows, 64, block, 4) if rows < 128 else (rows, 128, block, 8)


def step_matmul(name: str, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """One of the four: x float16 ``[M, K]``, the packed codes of its ``STEPS`` entry, scale and zero float16 ``[K / 128, N]``.

    Tiles of 64 outputs by 16 to 64 rows, or of 128 by 128. M is free.

    Raises:
        ValueError: N is no multiple of the outputs of a tile, or K none of 128: these kernels have no masks for what is left.
    """
    (m, k), n = x.shape, scale.shape[1]
    rows, columns, block, warps = tile(name, m)
    if n % columns or k % GROUP:
        raise ValueError(
            f"scale and x describe a weight of [{n}, {k}], but for {m} rows it must be a multiple of [{columns}, {GROUP}]: "
            "use w4a16_matmul, which takes any size"
        )
    y = torch.empty(m, n, dtype=torch.float16, device=x.device)
    grid = (triton.cdiv(m, rows), n // columns)
    STEPS[name][0][grid](x, packed, scale, zero, y, m, n, k, rows, columns, block, num_warps=warps, num_stages=3)
    return y
