"""W4A16: FP16 or BF16 activations times 4-bit weights, unpacked while they are loaded; chapter ``18-roofline``::

    y[m, n] = sum_k x[m, k] s[g, n] (q[n, k] - z[g, n])  +  b[n],      g the group of input k

Layout (``hopper_few.py`` and ``hopper_w4.py`` read the same tensors):

- ``words`` int16 ``[n, ceil(k / 128) * 32]``. Word j of a block of 128 inputs holds four codes, 0 to 15::

      bits    15 .. 12   11 .. 8   7 .. 4   3 .. 0
      input   j + 96     j + 64    j + 32   j            0 <= j < 32

  so that one instruction unpacks the same quarter of two neighbouring words, and quarters multiply contiguous inputs of x.
  Inputs beyond k hold code 0 and are never counted.
- ``scale`` float16, bfloat16 or float32 ``[groups, n]``, *transposed*, so that the scales a block of outputs needs are
  neighbours in memory; ``groups = ceil(k / group_size)``, or 1 row per channel (``group_size=None``).
- ``zero`` of the same shape: uint8 for integer zero points (GPTQ, AWQ), float16, bfloat16 or float32 for float ones
  (HQQ), or ``None`` for a symmetric grid, whose codes are stored plus 8: z = 8.
- ``bias`` ``[n]``.

Few tokens: codes are multiplied as they are, exactly; scales and zero points enter in float32, and y is rounded once. Many
tokens: each weight is rounded once to the dtype of x, as if dequantized before. Sums are float32, in the same order at every
launch. Bytes: n k / 2 and the groups, 2 m (k + n); operations: 2 m n k.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lqedu_kernels._numerics import INTERPRET, round_half_even, to_dtype
from lqedu_kernels._schedule import COUNTERS, counters, first_step, grouped_tile, sum_of_parts, sum_of_programs
from lqedu_kernels._tensors import (
    GLUON_LIMITS,
    HAS_GLUON,
    Target,
    check_codes,
    check_kernel,
    check_tensor,
    row_major,
    target_of,
)
from lqedu_kernels.tuning import configuration

__all__ = [
    "bytes_moved",
    "default_config",
    "operations",
    "pack_w4a16",
    "search_space",
    "unpack_w4a16",
    "w4a16_matmul",
    "w4a16_reference",
]

BLOCK = 128  # inputs of a block; a group of 32, 64 or 128 never crosses one
LANES = 32  # words of a block
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
#: The keys of a configuration, for each kernel it may name.
_KERNELS = {
    "few": "block_m block_n slices splits warps stages",
    "many": "block_m block_n warps stages group_m programs",
    "hopper": "block_m block_n warps stages group_m share",
    "hopper_few": "block_m rows warps blocks programs ahead registers overlap",
}


def w4a16_reference(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    group_size: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The contract in plain torch, see :func:`w4a16_matmul`: weights and sums in float32, one rounding at the end."""
    k = x.shape[1]
    codes = unpack_w4a16(words, k).float()
    group = torch.arange(k, device=x.device) // (group_size or k)
    offset = 8.0 if zero is None else zero.float()[group].T
    y = x.float() @ (scale.float()[group].T * (codes - offset)).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def pack_w4a16(codes: Tensor) -> Tensor:
    """uint8 codes ``[n, k]``, 0 to 15, to the words a kernel reads: int16 ``[n, ceil(k / 128) * 32]``.

    Raises:
        TypeError, ValueError: other numbers or another shape.

    >>> words = pack_w4a16(torch.arange(128, dtype=torch.uint8).remainder(16)[None])
    >>> words.shape, f"{int(words[0, 1]) & 0xffff:016b}"
    (torch.Size([1, 32]), '0001000100010001')
    """
    check_codes(codes)
    if codes.numel() and int(codes.min()) < 0:
        raise ValueError("codes must be within 0 to 15, and some are negative: store them plus 8, with zero=None or 8")
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


def bytes_moved(m: int, n: int, k: int, group_size: int | None = None, zero_bytes: int = 0) -> int:
    """Fewest bytes of a call: words, 2-byte scales and zero points of ``zero_bytes`` read once, x and y once."""
    groups = 1 if group_size is None else -(-k // group_size)
    return n * -(-k // BLOCK) * 2 * LANES + groups * n * (2 + zero_bytes) + 2 * m * (k + n)


def operations(m: int, n: int, k: int) -> int:
    """Multiplications and additions of a call."""
    return 2 * m * n * k


# --- launch configurations --------------------------------------------------------------------------------------------


def default_config(m: int, n: int, k: int, target: Target) -> dict[str, int | str | bool]:
    """Where nothing was measured.

    Keys: ``kernel`` "few" (``slices`` blocks of inputs at a time, ``splits`` programs a tile), "many" (``programs`` share the
    tiles, 0: one a tile; group_m rows of tiles are walked together) or, from a file of measured configurations, "hopper" and
    "hopper_few" with the keys of ``lqedu_kernels.hopper_w4`` and ``hopper_few``; block_m, block_n; warps, stages.
    """
    if m <= 16:
        splits = 1 if 32 * target.processors <= n + 31 else 2
        return dict(kernel="few", block_m=8 if m <= 8 else 16, block_n=32, slices=4, splits=splits, warps=4, stages=3)
    if target.capability < (9, 0) or n % 16 or k % 8:  # loads by pointers, whose addresses take registers
        block_m, block_n, warps = 32 if m <= 32 else 64, 64, 4
    else:
        block_m, block_n, warps = (32, 128, 4) if m <= 32 else (64, 128, 4) if m <= 256 else (128, 128, 8)
    tiles = -(-n // block_n) * -(-m // block_m)
    programs = 0 if tiles >= target.processors else 2 * target.processors
    return dict(kernel="many", block_m=block_m, block_n=block_n, warps=warps, stages=3, group_m=8, programs=programs)


def search_space(m: int, n: int, k: int, target: Target) -> list[dict]:
    """Configurations worth timing at a shape, the likely best first; see :func:`default_config` for the keys."""
    space = [default_config(m, n, k, target)]
    if m <= 32:
        block_m = 8 if m <= 8 else 16 if m <= 16 else 32
        for block_n, slices, warps in (
            ((32, 4, 4), (32, 2, 2), (16, 4, 2)) if m <= 8 else ((32, 4, 4), (32, 2, 2), (64, 2, 2))
        ):
            if m <= 16 or block_n == 32:
                for splits in (1, 2, 4):
                    space.append(dict(kernel="few", block_m=block_m, block_n=block_n, slices=slices, splits=splits, warps=warps, stages=3))  # fmt: skip
    if m > 16:
        sizes = ((32, 128),) if m <= 32 else ((64, 64), (64, 128)) if m <= 64 else ((64, 128), (128, 128))
        for block_m, block_n in sizes:
            for programs in {
                0: None,
                target.processors: None,
                2 * target.processors: None,
                3 * target.processors: None,
            }:
                space.append(dict(kernel="many", block_m=block_m, block_n=block_n, warps=4, stages=3, group_m=8, programs=programs))  # fmt: skip
    if m <= 16 and HAS_GLUON and target.capability == (9, 0):
        from lqedu_kernels import hopper_few

        space += [dict(kernel="hopper_few", **c) for c in hopper_few.search_space(m)]
    if m > 32 and HAS_GLUON and target.capability == (9, 0):
        from lqedu_kernels import hopper_w4

        space += [dict(kernel="hopper", **c) for c in hopper_w4.search_space(m, n, k, torch.float16)]
    return [c for i, c in enumerate(space) if c not in space[:i]]


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _pick(q, bf16, magic):
    """PTX: t = two codes q of a pair of words $1, in place, under the bits of a magic number.

    A bfloat16 has 7 bits of mantissa, so its codes move to bits 0-3; a float16 has 10, and bits 4-7 serve as well.
    """
    shift = (0, 4, 8, 12)[q] if bf16 else (0, 0, 8, 8)[q]
    mask = "0x00f000f0" if q % 2 and not bf16 else "0x000f000f"
    return f"shr.u32 t, $1, {shift}; lop3.b32 t, t, {mask}, {magic}, 0xea; "  # 0xea: (t & mask) | magic


@triton.constexpr_function
def _code_ptx(q, bf16):
    if not bf16:
        return "{ .reg .b32 t; " + _pick(q, False, "0") + "mov.b32 $0, t; }"
    minus = "mov.b32 one, 0x3f803f80; mov.b32 base, 0xc300c300; fma.rn.bf16x2 $0, t, one, base; "
    return "{ .reg .b32 t, one, base; " + _pick(q, True, "0x43004300") + minus + "}"


@triton.constexpr_function
def _weight_ptx(q, bf16, float_zero):
    """$2 is minus the magic number and z, $3 the scale, $4 what a float zero point adds."""
    if bf16:
        minus = "mov.b32 u, 0x3f803f80; fma.rn.bf16x2 t, t, u, $2; mov.b32 u, 0x80008000; "
        times = f"fma.rn.bf16x2 $0, t, $3, {'$4' if float_zero else 'u'}; "  # -0 is added
        return "{ .reg .b32 t, u; " + _pick(q, True, "0x43004300") + minus + times + "}"
    minus = "mov.b32 u, 0x2c002c00; fma.rn.f16x2 t, t, u, $2; " if q % 2 else "add.rn.f16x2 t, t, $2; "  # 1/16
    times = "fma.rn.f16x2 $0, t, $3, $4; " if float_zero else "mul.rn.f16x2 $0, t, $3; "
    return "{ .reg .b32 t, u; " + _pick(q, False, "0x64006400") + minus + times + "}"


@triton.constexpr_function
def _unit(q, dtype):
    """What a sum over the codes q is to be multiplied with: 2^24 or 2^20 for float16."""
    return 1.0 if dtype == tl.bfloat16 else 2.0**20 if q % 2 else 2.0**24


@triton.jit
def _code(words, Q: tl.constexpr, dtype: tl.constexpr):
    """Code Q of each word as a number of ``dtype``: q divided by :func:`_unit`, exact, two at a time.

    float16: where the exponent's bits are 0, a number is its mantissa times 2^-24 (*subnormal*). So a code in bits 0-3 is
    the number q 2^-24 as it stands, and one in bits 4-7 is q 2^-20; tensor cores multiply them exactly. One AND.
    bfloat16: the bits 0x4300 | q are the number 128 + q, from which 128 is subtracted.
    """
    if INTERPRET:
        return ((words >> (4 * Q)) & 15).to(tl.float32) / _unit(Q, dtype)
    bits = tl.inline_asm_elementwise(
        _code_ptx(Q, dtype == tl.bfloat16), "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
    )  # fmt: skip
    return bits.to(dtype, bitcast=True)


@triton.jit
def _weight(words, scale, zero, Q: tl.constexpr, dtype: tl.constexpr, FLOAT_ZERO: tl.constexpr):
    """Code Q of each word as the weight (q - z) s in ``dtype``, two at a time.

    float16: the mantissa of 1024 steps by 1, so 0x6400 | q is 1024 + q and 0x6400 | 16 q is 1024 + 16 q: one LOP3. Then
    (1024 + q) - (1024 + z), or (1024 + 16 q) / 16 - (64 + z), are exact, and the product with s rounds once. A float
    zero point is the nearest integer r plus a rest, which enters the last step: (q - r) s + (r - z) s.
    bfloat16: 0x4300 | q is 128 + q; the same.
    """
    near = round_half_even(zero)
    rest = to_dtype((near - zero) * scale, dtype)
    scale = to_dtype(scale, dtype)
    if INTERPRET:
        minus = ((words >> (4 * Q)) & 15).to(tl.float32) - near[:, None]
        return to_dtype(minus * scale.to(tl.float32)[:, None] + rest.to(tl.float32)[:, None], dtype)
    BASE: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 64.0 if Q % 2 else 1024.0
    minus = tl.broadcast_to((-BASE - near).to(dtype)[:, None], words.shape)
    scales = tl.broadcast_to(scale[:, None], words.shape)
    rests = tl.broadcast_to(rest[:, None], words.shape) if FLOAT_ZERO else scales
    bits = tl.inline_asm_elementwise(
        _weight_ptx(Q, dtype == tl.bfloat16, FLOAT_ZERO), "=r,r,r,r,r", [words, minus, scales, rests],
        dtype=tl.int16, is_pure=True, pack=2,
    )  # fmt: skip
    return bits.to(dtype, bitcast=True)


@triton.jit
def _dot(b_w, b_x, b_sum):
    if INTERPRET:  # which multiplies bfloat16 wrongly
        b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
    return tl.dot(b_w, b_x, b_sum, input_precision="ieee")


@triton.jit
def _group_rows(p, first, o_n, N, GROUPS, GROUP: tl.constexpr):
    """Scales (or zero points; 8 if there are none) of the four quarters of a block whose first group is ``first``.

    ``first`` and ``o_n`` are broadcast: a number and [BLOCK_N], or [SLICES, 1] and [1, BLOCK_N]. A group that spans
    quarters is loaded once.
    """
    if p is None:
        row0 = tl.full((first + o_n).shape, 8.0, tl.float32)
    elif GROUP == 0:
        row0 = tl.load(p + 0 * first + o_n).to(tl.float32)
    else:
        row0 = tl.load(p + tl.minimum(first, GROUPS - 1) * N.to(tl.int64) + o_n).to(tl.float32)
    row1, row2, row3 = row0, row0, row0
    if p is not None and (GROUP == 64 or GROUP == 32):
        row3 = tl.load(p + tl.minimum(first + 128 // GROUP - 1, GROUPS - 1) * N.to(tl.int64) + o_n).to(tl.float32)
        row2 = row3
        if GROUP == 32:
            row1 = tl.load(p + tl.minimum(first + 1, GROUPS - 1) * N.to(tl.int64) + o_n).to(tl.float32)
            row2 = tl.load(p + tl.minimum(first + 2, GROUPS - 1) * N.to(tl.int64) + o_n).to(tl.float32)
    return row0, row1, row2, row3


@triton.jit
def _few_kernel(
    p_x, p_words, p_scale, p_zero, p_bias, p_y, p_partial, p_counter,
    M, N, K, GROUPS,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, SLICES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Few tokens: SLICES blocks of inputs at a time, one (or some) a warp, and one sum over the warps at the end.

    A product of [SLICES, BLOCK_N, 32] and [SLICES, 32, BLOCK_M] is SLICES products, which Triton deals out to the warps.
    """
    # 1. Place.
    dtype: tl.constexpr = p_x.dtype.element_ty
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_n, blocks = tl.cdiv(N, BLOCK_N), tl.cdiv(K, 128)
    o_m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n_in = tl.minimum(o_n, N - 1)  # rows beyond the end read the last one; what they give is not stored
    o_j, o_s = tl.arange(0, 32), tl.arange(0, SLICES)
    p_w = p_words + o_n_in.to(tl.int64)[None, :, None] * (blocks * 32) + o_j[None, None, :]
    p_x += o_m.to(tl.int64)[None, None, :] * K + o_j[None, :, None]
    m_m = (o_m < M)[None, None, :]
    steps = tl.cdiv(blocks, SLICES)
    begin, end = split * steps // SPLITS, (split + 1) * steps // SPLITS
    first = (begin * SLICES + o_s[:, None]) * (128 // GROUP if GROUP else 0)
    scales = _group_rows(p_scale, first, o_n_in[None, :], N, GROUPS, GROUP)
    zeros = _group_rows(p_zero, first, o_n_in[None, :], N, GROUPS, GROUP)
    minus_ones = tl.full((SLICES, BLOCK_N, 32), -1.0, dtype)
    b_sum = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        # 2. Load: scales a step ahead, so that nobody waits for them; x beyond K is 0.
        o_b = step * SLICES + o_s[:, None, None]
        first = (step * SLICES + SLICES + o_s[:, None]) * (128 // GROUP if GROUP else 0)
        next_scales = _group_rows(p_scale, first, o_n_in[None, :], N, GROUPS, GROUP)
        next_zeros = _group_rows(p_zero, first, o_n_in[None, :], N, GROUPS, GROUP)
        # [SLICES, BLOCK_N, 32], then four [SLICES, 32, BLOCK_M]
        if EVEN_K:
            words = tl.load(p_w + o_b * 32, eviction_policy="evict_first")
            x0 = tl.load(p_x + o_b * 128, mask=m_m, other=0.0)
            x1 = tl.load(p_x + o_b * 128 + 32, mask=m_m, other=0.0)
            x2 = tl.load(p_x + o_b * 128 + 64, mask=m_m, other=0.0)
            x3 = tl.load(p_x + o_b * 128 + 96, mask=m_m, other=0.0)
        else:
            left = K - o_b * 128 - o_j[None, :, None]
            words = tl.load(p_w + o_b * 32, mask=o_b < blocks, other=0, eviction_policy="evict_first")
            x0 = tl.load(p_x + o_b * 128, mask=m_m & (left > 0), other=0.0)
            x1 = tl.load(p_x + o_b * 128 + 32, mask=m_m & (left > 32), other=0.0)
            x2 = tl.load(p_x + o_b * 128 + 64, mask=m_m & (left > 64), other=0.0)
            x3 = tl.load(p_x + o_b * 128 + 96, mask=m_m & (left > 96), other=0.0)
        # 3. Unpack, multiply, scale: products with bare codes, a sum a group; then s (sum q x - z sum x) in float32.
        xs = (x0, x1, x2, x3)
        fresh = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
        even, odd, minus = fresh, fresh, fresh
        for q in tl.static_range(4):
            if q % 2 and dtype == tl.float16:
                odd = _dot(_code(words, q, dtype), xs[q], odd)
            else:
                even = _dot(_code(words, q, dtype), xs[q], even)
            # Minus the sum of x, in every row: the product with a matrix of -1, by a unit that is idle.
            minus = _dot(minus_ones, xs[q], minus)
            if q == 3 or GROUP == 32 or (GROUP == 64 and q == 1):
                b_sum += even * (scales[q] * _unit(0, dtype))[:, :, None]
                if dtype == tl.float16:
                    b_sum += odd * (scales[q] * _unit(1, dtype))[:, :, None]
                b_sum += minus * (scales[q] * zeros[q])[:, :, None]
                even, odd, minus = fresh, fresh, fresh
        scales, zeros = next_scales, next_zeros
    # 4. Add up: over the warps, then over the programs that share the tile.
    b_sum = tl.sum(b_sum, 0)
    whole = True
    if SPLITS > 1:
        b_sum, whole = sum_of_parts(b_sum, p_partial, p_counter, tile, split, SPLITS)
    # 5. Store.
    if whole:
        _store(b_sum, p_bias, p_y, o_m, o_n, M, N)


@triton.jit
def _store(b_sum, p_bias, p_y, o_m, o_n, M, N):
    """Sums [BLOCK_N, BLOCK_M], with the bias, to y [M, N]."""
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    m_y = (o_m < M)[None, :] & (o_n < N)[:, None]
    tl.store(p_y + o_m.to(tl.int64)[None, :] * N + o_n[:, None], to_dtype(b_sum, p_y.dtype.element_ty), mask=m_y)


@triton.jit
def _described_rows(d, n, first, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """As :func:`_group_rows`, through a descriptor of [1, BLOCK_N]."""
    if d is None:  # noqa: SIM108, the compiler needs both branches
        row0 = tl.full((BLOCK_N,), 8.0, tl.float32)
    else:
        row0 = d.load([first, n]).reshape((BLOCK_N,)).to(tl.float32)
    row1, row2, row3 = row0, row0, row0
    if d is not None and (GROUP == 64 or GROUP == 32):
        row3 = d.load([first + 128 // GROUP - 1, n]).reshape((BLOCK_N,)).to(tl.float32)
        row2 = row3
        if GROUP == 32:
            row1 = d.load([first + 1, n]).reshape((BLOCK_N,)).to(tl.float32)
            row2 = d.load([first + 2, n]).reshape((BLOCK_N,)).to(tl.float32)
    return row0, row1, row2, row3


@triton.jit
def _many_kernel(
    x, words, scale, zero, p_bias, p_y, p_partial, p_counter, M, N, K, GROUPS,
    DESCRIBED: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, FLOAT_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Many tokens: weights in the dtype of x, unpacked in registers, are the first operand of a product.

    x, words, scale and zero are descriptors (Hopper's unit for copies fetches their blocks) or pointers.
    """
    # 1. Place: this program's run of steps, over one tile or several.
    dtype: tl.constexpr = p_y.dtype.element_ty
    tiles_m, tiles_n, steps_k = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, 128)
    programs = tl.num_programs(0)
    steps = tiles_m * tiles_n * steps_k
    step = first_step(tl.program_id(0), steps, programs)
    stop = first_step(tl.program_id(0) + 1, steps, programs)
    o_j = tl.arange(0, 32)
    while step < stop:
        tile, begin = step // steps_k, step % steps_k
        count = tl.minimum(steps_k - begin, stop - step)
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        o_m, o_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        if not DESCRIBED:  # rows beyond the end read the last one; what they give is not stored
            o_n_in = tl.minimum(o_n, N - 1)
            p_x = x + tl.minimum(o_m, M - 1).to(tl.int64)[None, :] * K + o_j[:, None]
            p_w = words + o_n_in.to(tl.int64)[:, None] * (steps_k * 32) + o_j[None, :]
            next_scales = _group_rows(scale, begin * (128 // GROUP if GROUP else 0), o_n_in, N, GROUPS, GROUP)
            next_zeros = _group_rows(zero, begin * (128 // GROUP if GROUP else 0), o_n_in, N, GROUPS, GROUP)
        b_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for block in tl.range(begin, begin + count, num_stages=STAGES):
            # 2. Load: [BLOCK_N, 32] words, four times [32, BLOCK_M] of x, 0 beyond K.
            first, k = block * (128 // GROUP if GROUP else 0), block * 128
            if DESCRIBED:
                b_words = words.load([n, block * 32])
                scales = _described_rows(scale, n, first, GROUP, BLOCK_N)
                zeros = _described_rows(zero, n, first, GROUP, BLOCK_N)
                x0, x1, x2, x3 = x.load([m, k]).T, x.load([m, k + 32]).T, x.load([m, k + 64]).T, x.load([m, k + 96]).T
            else:
                b_words = tl.load(p_w + block * 32, eviction_policy="evict_first")
                scales, zeros = next_scales, next_zeros
                first += 128 // GROUP if GROUP else 0
                next_scales = _group_rows(scale, first, o_n_in, N, GROUPS, GROUP)
                next_zeros = _group_rows(zero, first, o_n_in, N, GROUPS, GROUP)
                x0 = _rows_of_x(p_x, o_j, k, K, EVEN_K)
                x1 = _rows_of_x(p_x, o_j, k + 32, K, EVEN_K)
                x2 = _rows_of_x(p_x, o_j, k + 64, K, EVEN_K)
                x3 = _rows_of_x(p_x, o_j, k + 96, K, EVEN_K)
            # 3. Unpack and multiply.
            b_sum = _dot(_weight(b_words, scales[0], zeros[0], 0, dtype, FLOAT_ZERO), x0, b_sum)
            b_sum = _dot(_weight(b_words, scales[1], zeros[1], 1, dtype, FLOAT_ZERO), x1, b_sum)
            b_sum = _dot(_weight(b_words, scales[2], zeros[2], 2, dtype, FLOAT_ZERO), x2, b_sum)
            b_sum = _dot(_weight(b_words, scales[3], zeros[3], 3, dtype, FLOAT_ZERO), x3, b_sum)
        # 4. Share: a part of a tile is handed in, and the last program gets the sum of all.
        whole = True
        if count < steps_k:
            b_sum, whole = sum_of_programs(b_sum, p_partial, p_counter, tile, begin, steps_k, steps, programs)
        # 5. Store.
        if whole:
            _store(b_sum, p_bias, p_y, o_m, o_n, M, N)
        step += count


@triton.jit
def _rows_of_x(p_x, o_j, k, K, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(p_x + k)
    return tl.load(p_x + k, mask=(o_j < K - k)[:, None], other=0.0)


# --- what is called ---------------------------------------------------------------------------------------------------


def w4a16_matmul(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    group_size: int | None = None,
    bias: Tensor | None = None,
    config: Mapping[str, int | str] | None = None,
) -> Tensor:
    """``y = x (s (q - z))^T + b``; all arguments are laid out as the head of this module says.

    Args:
        x: float16 or bfloat16 ``[m, k]``.
        words: int16 ``[n, ceil(k / 128) * 32]``, :func:`pack_w4a16`.
        scale: float16, bfloat16 or float32 ``[groups, n]``.
        zero: uint8, float16, bfloat16 or float32 ``[groups, n]``; ``None``: 8 everywhere.
        group_size: 32, 64 or 128 inputs share a scale; ``None``: all inputs of an output.
        bias: float16, bfloat16 or float32 ``[n]``.
        config: a launch configuration, see :func:`default_config`; the measured one of this GPU if none is given.

    Returns:
        ``[m, n]`` in the dtype of x.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or layout than this; see the message.
    """
    target = _check(x, words, scale, zero, group_size, bias)
    (m, k), n, groups = x.shape, *words.shape[:1], scale.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    float_zero = zero is not None and zero.is_floating_point()
    check_kernel(config, _KERNELS)
    operation = _operation(x.dtype, group_size, float_zero)
    c = config or configuration(operation, m, n, k, gpu=target.name) or default_config(m, n, k, target)
    if c["kernel"] in ("hopper", "hopper_few"):
        if HAS_GLUON:
            from lqedu_kernels import hopper_few, hopper_w4  # Gluon, which only this version of Triton can import

            arguments = dict(group_size=group_size, config=c, processors=target.processors)
            if c["kernel"] == "hopper_few":
                if hopper_few.available(target, m, n, k, c):
                    return hopper_few.w4a16(x, words, scale, zero, bias, y, **arguments)
            elif hopper_w4.available(target, *(t for t in (x, words, y, scale, zero) if t is not None)):
                return hopper_w4.w4a16(x, words, scale, zero, bias, y, **arguments)
        if config is not None:
            raise ValueError(f"config asks for a Gluon kernel, which does not take this call: {GLUON_LIMITS}")
        c = default_config(m, n, k, target)
    block_m, block_n = c["block_m"], c["block_n"]
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    sizes = dict(GROUP=group_size or 0, BLOCK_M=block_m, BLOCK_N=block_n, STAGES=c["stages"], num_warps=c["warps"])
    if c["kernel"] == "few":
        splits = c["splits"] if tiles <= COUNTERS else 1
        partial = torch.empty(
            (tiles if splits > 1 else 0, splits, block_n, block_m), dtype=torch.float32, device=y.device
        )
        _few_kernel[(tiles, splits)](
            x, words, scale, zero, bias, y, partial, counters(y.device), m, n, k, groups,
            EVEN_K=k % (128 * c["slices"]) == 0, SLICES=c["slices"], SPLITS=splits, **sizes,
        )  # fmt: skip
        return y
    programs = min(c["programs"] or tiles, tiles * triton.cdiv(k, 128)) if tiles <= COUNTERS else tiles
    partial = torch.empty(
        (2 * programs if programs != tiles else 0, block_n, block_m), dtype=torch.float32, device=y.device
    )
    tensors = (x, words, scale, zero)
    described = c["kernel"] == "many" and target.capability >= (9, 0) and _can_be_described(*tensors)
    if described:
        blocks = ([block_m, 32], [block_n, 32], [1, block_n], [1, block_n])
        tensors = tuple(
            None if t is None else TensorDescriptor.from_tensor(row_major(t), block)
            for t, block in zip(tensors, blocks, strict=True)
        )
    _many_kernel[(programs,)](
        *tensors, bias, y, partial, counters(y.device), m, n, k, groups,
        DESCRIBED=described, EVEN_K=k % 128 == 0, FLOAT_ZERO=float_zero, GROUP_M=c["group_m"], **sizes,
    )  # fmt: skip
    return y


def _can_be_described(*tensors: Tensor | None) -> bool:
    """Whether rows start at multiples of 16 bytes, as descriptors need."""
    return all(t is None or t.shape[1] * t.element_size() % 16 == 0 for t in tensors)


def _operation(dtype: torch.dtype, group_size: int | None, float_zero: bool) -> str:
    """Whose measured configurations serve: one variant of each kind was tuned."""
    if group_size is None:
        return "w4a16/channel"
    if dtype == torch.bfloat16:
        return "w4a16/bf16-group128"
    return "w4a16/float64" if float_zero else "w4a16/group128" if group_size == 128 else "w4a16/group64"


def _check(x, words, scale, zero, group_size, bias) -> Target:
    check_tensor("x", x, dtype=(torch.float16, torch.bfloat16), shape=(None, None), device=getattr(x, "device", None))
    target = target_of(x, "x")
    (_, k), device = x.shape, x.device
    check_tensor(
        "words", words, dtype=torch.int16, shape=(None, -(-k // BLOCK) * LANES), device=device,
        what="[n, ceil(k / 128) * 32], pack_w4a16(codes)",
    )  # fmt: skip
    n = words.shape[0]
    if k == 0 or n == 0:
        raise ValueError(f"x and words describe a weight of shape {[n, k]}, but n and k must be at least 1")
    if group_size not in (None, 32, 64, 128) or isinstance(group_size, float):
        raise ValueError(f"group_size must be 32, 64, 128 or None (per channel), got {group_size!r}")
    groups = 1 if group_size is None else -(-k // group_size)
    check_tensor("scale", scale, dtype=_FLOATS, shape=(groups, n), device=device, what="[ceil(k / group_size), n]")
    if zero is not None:
        check_tensor("zero", zero, dtype=(torch.uint8, *_FLOATS), shape=(groups, n), device=device, what="as scale")
    if bias is not None:
        check_tensor("bias", bias, dtype=_FLOATS, shape=(n,), device=device)
    return target
