"""W4A16 for few tokens on Hopper: codes go from memory to the registers of the tensor cores and nowhere else. Gluon, Triton 3.6.

The plain-Triton twin is ``w4a16._few_kernel``; contract and tensors are those of ``w4a16.py``. Two things differ:

- *x stays.* A warp keeps the same ``blocks`` blocks of 128 inputs for the whole launch, so it loads its part of x once, into
  the registers from which tensor cores read it, together with the sums of x that zero points need. What a warp then walks
  over are outputs, ``rows`` at a time, and all it loads are codes, scales and zero points.
- *Codes stay in their place.* A thread loads 16 bytes, 8 words of one output. A product of 16 outputs and 16 inputs wants
  4 inputs of two outputs from each thread, and which inputs these are does not matter as long as x has the same. So the
  inputs are renumbered (:func:`_in_order_of_product`), and no code ever leaves its thread::

      thread of a row      0           1           2           3
      words               0 .. 7     8 .. 15    16 .. 23    24 .. 31
      first product       0 .. 3     8 .. 11    16 .. 19    24 .. 27
      second product      4 .. 7    12 .. 15    20 .. 23    28 .. 31

The warps of a program share the outputs and have different inputs. Their sums meet in shared memory when all outputs are
done; programs whose warps do not reach over all inputs hand in parts, which the last of them adds up, always in the same order.
"""
# ruff: noqa: RUF005, SIM108 - the language of kernels has no unpacking, and its compiler needs both branches

from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqedu_kernels._schedule import COUNTERS, counters
from lqedu_kernels._tensors import HAS_GLUON, Target
from lqedu_kernels.w4a16 import _code_ptx, _unit

BLOCK = 128  # inputs of a block, the unit of packing
SHARED = 220 * 1024  # bytes of shared memory for the programs of a multiprocessor


def available(target: Target, m: int, n: int, k: int, config: Mapping) -> bool:
    """Whether the kernel runs here, compute capability 9.0 with the Triton 3.6 whose Gluon it is written for, and takes the sizes."""
    tiles = triton.cdiv(n, config["rows"])
    return (
        target.capability == (9, 0) and HAS_GLUON and m <= config["block_m"] and tiles <= COUNTERS
        and n * triton.cdiv(k, BLOCK) * BLOCK < 2**34  # pairs of words are counted in 32 bits
    )  # fmt: skip


def search_space(m: int) -> list[dict]:
    """Launches worth timing for ``m`` tokens, best guesses first; in ``w4a16_matmul`` their ``kernel`` is "hopper_few".

    Keys: ``block_m`` 8 or 16 tokens, ``rows`` outputs at a time; ``warps`` of a program and ``blocks`` of inputs a warp keeps;
    ``programs`` a multiprocessor; ``ahead`` whether codes are loaded into registers of their own; ``registers`` a thread at most, 0: as
    many as it likes; ``overlap`` whether the launch may begin before the one in front of it has ended (``_schedule.after_previous``).
    """
    shapes = (
        [(16, 2, 1, 128), (8, 2, 2, 128), (4, 2, 4, 128), (8, 4, 1, 0)] if m <= 8
        else [(4, 2, 3, 168), (16, 2, 1, 128), (4, 2, 4, 128), (4, 4, 2, 0)]
    )  # fmt: skip
    return [
        {"block_m": 8 if m <= 8 else 16, "rows": 16, "warps": warps, "blocks": blocks, "programs": programs,
         "ahead": ahead, "registers": registers, "overlap": True}
        for warps, blocks, programs, registers in shapes for ahead in (False, True)
    ]  # fmt: skip


@gluon.jit
def _in_order_of_product(rows):
    """[W, R, 32] of words, of which a thread holds 8 neighbours, as an operand: the thread's first 4, then its last 4."""
    W: gl.constexpr = rows.shape[0]
    R: gl.constexpr = rows.shape[1]
    return rows.reshape([W, R, 4, 2, 4]).permute((0, 1, 3, 2, 4)).reshape([W, R, 32])


@gluon.jit
def _code(pairs, Q: gl.constexpr, dtype: gl.constexpr, A: gl.constexpr):
    """Code Q of each word of pairs of words, int32 [W, R, 16], as in ``w4a16._code``: an operand [W, R, 32]."""
    both = gl.inline_asm_elementwise(
        _code_ptx(Q, dtype == gl.bfloat16), "=r,r", [pairs], dtype=gl.int32, is_pure=True, pack=1
    )
    codes = gl.join(both.to(gl.int16), (both >> 16).to(gl.int16)).reshape([pairs.shape[0], pairs.shape[1], 32])
    return gl.convert_layout(_in_order_of_product(codes.to(dtype, bitcast=True)), A, assert_trivial=True)


@gluon.jit
def _load(p_words, p_scale, p_zero, tile, some, begin, end, N, GROUPS, blocks, b: gl.constexpr, B: gl.constexpr,
          W: gl.constexpr, R: gl.constexpr, GROUP: gl.constexpr, EVEN: gl.constexpr, L: gl.constexpr, S: gl.constexpr):  # fmt: skip
    """Block b of each warp, for R outputs: pairs of words [W, R, 16], and scales and zero points [W, R], one a group.

    Outputs beyond the end are read as the last one and never stored. Blocks beyond the end meet zeros of x.
    """
    o_n = gl.minimum(tile * R + gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, L))), N - 1)
    o_block = begin + gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, L))) * B + b
    o_pair = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    p = p_words + ((o_n * (blocks * 16))[None, :, None] + (o_block * 16)[:, None, None] + o_pair[None, None, :])
    if EVEN:
        words = gl.load(p, mask=some, eviction_policy="evict_first")
    else:
        words = gl.load(p, mask=some & (o_block < end)[:, None, None], eviction_policy="evict_first")
    o_n_s = gl.minimum(tile * R + gl.arange(0, R, gl.SliceLayout(0, S)), N - 1)
    o_block_s = begin + gl.arange(0, W, gl.SliceLayout(1, S)) * B + b
    scales = ()
    zeros = ()
    for g in gl.static_range(128 // GROUP if GROUP > 0 else 1):
        if GROUP > 0:
            row = gl.minimum(o_block_s * (128 // GROUP) + g, GROUPS - 1)
        else:
            row = 0 * o_block_s
        o_s = row[:, None] * N + o_n_s[None, :]
        scales = scales + (gl.load(p_scale + o_s, mask=some),)
        if p_zero is not None:
            zeros = zeros + (gl.load(p_zero + o_s, mask=some),)
    return words, scales, zeros


@gluon.jit
def _multiply(acc, loaded, xs, x_sums, b: gl.constexpr, dtype: gl.constexpr, GROUP: gl.constexpr, C: gl.constexpr, A: gl.constexpr):  # fmt: skip
    """Add block b to the sums [W, R, BM]: products with bare codes, a sum a group; then s (sum q x - z sum x)."""
    words, scales, zeros = loaded
    PER: gl.constexpr = 128 // GROUP if GROUP > 0 else 1
    fresh = gl.zeros(acc.shape, gl.float32, C)
    even, odd = fresh, fresh
    for q in gl.static_range(4):
        if q % 2 == 1 and dtype == gl.float16:
            odd = mma_v2(_code(words, q, dtype, A), xs[4 * b + q], odd)
        else:
            even = mma_v2(_code(words, q, dtype, A), xs[4 * b + q], even)
        if (q + 1) * PER % 4 == 0:
            scale = scales[q * PER // 4].to(gl.float32)
            acc += even * (scale * _unit(0, dtype)).expand_dims(2)
            if dtype == gl.float16:
                acc += odd * (scale * _unit(1, dtype)).expand_dims(2)
            if len(zeros) == 0:
                zero = scale * -8.0
            else:
                zero = scale * -zeros[q * PER // 4].to(gl.float32)
            acc += zero.expand_dims(2) * x_sums[(4 * b + q) * PER // 4].expand_dims(1)
            even, odd = fresh, fresh
    return acc


@gluon.jit
def _hopper_few_kernel(p_x, p_words, p_scale, p_zero, p_bias, p_y, p_partial, p_counter, M, N, K, GROUPS, blocks, parts,
                       GROUP: gl.constexpr, B: gl.constexpr, R: gl.constexpr, BM: gl.constexpr, TILES: gl.constexpr,
                       SPLITS: gl.constexpr, EVEN: gl.constexpr, EVEN_K: gl.constexpr, AHEAD: gl.constexpr,
                       OVERLAP: gl.constexpr):  # fmt: skip
    W: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = p_x.dtype.element_ty
    # Layouts: sums and operands of the products; loads of words and of x; one number an output of the sums.
    C: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 4)
    X: gl.constexpr = gl.DotOperandLayout(1, C, 4)
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [W, 1, 1], [2, 1, 0])
    LX: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [W, 1, 1], [2, 1, 0])
    S: gl.constexpr = gl.SliceLayout(2, C)
    # 1. Place: this program has some of the inputs, and every ``parts``-th tile of R outputs.
    split = gl.program_id(0) % SPLITS
    part = gl.program_id(0) // SPLITS
    tiles = gl.cdiv(N, R)
    count = gl.cdiv(tiles - part, parts)
    begin = split * blocks // SPLITS
    end = (split + 1) * blocks // SPLITS
    if OVERLAP:  # the next launch may come; nothing is read before the one in front has ended
        gdc_launch_dependents()
        gdc_wait()
    now = ()
    for b in gl.static_range(B):
        now = now + (
            _load(
                p_words,
                p_scale,
                p_zero,
                part,
                part < tiles,
                begin,
                end,
                N,
                GROUPS,
                blocks,
                b,
                B,
                W,
                R,
                GROUP,
                EVEN,
                L,
                S,
            ),
        )
    # 2. Load x of these inputs, as operands [W, 32, BM], and sum it up by products with ones.
    o_m = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, LX)))
    o_block = begin + gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, LX))) * B
    o_k = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, LX)))
    p_xs = p_x + (o_m.to(gl.int64) * K)[None, :, None] + (o_block * 128)[:, None, None] + o_k[None, None, :]
    left = (gl.minimum(K, end * 128) - o_block * 128)[:, None, None] - o_k[None, None, :]
    PER: gl.constexpr = 128 // GROUP if GROUP > 0 else 1
    ones = gl.full([W, 16, 32], 1.0, dtype, A)
    x_sum = gl.zeros([W, 16, BM], gl.float32, C)
    xs = ()
    x_sums = ()
    for i in gl.static_range(4 * B):
        if EVEN_K:  # whole blocks
            here = (o_block + i // 4 < end)[:, None, None]
        else:
            here = left > i * 32
        x = gl.load(p_xs + i * 32, mask=here & (o_m < M)[None, :, None], other=0.0)
        xs = xs + (gl.convert_layout(_in_order_of_product(x).permute((0, 2, 1)), X, assert_trivial=True),)
    for i in gl.static_range(4 * B):
        x_sum = mma_v2(ones, xs[i], x_sum)
        if (i + 1) * PER % 4 == 0:
            x_sums = x_sums + (gl.sum(x_sum, 1) * 0.0625,)  # 16 equal rows
            x_sum = gl.zeros([W, 16, BM], gl.float32, C)
    slots = gl.allocate_shared_memory(gl.float32, [TILES, W, R, BM], gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0]))
    for i in range(count):
        # 3. Multiply what is there and load what comes next, into the registers that become free or into others.
        tile = part + (i + 1) * parts
        acc = gl.zeros([W, R, BM], gl.float32, C)
        coming = ()
        if AHEAD:
            for b in gl.static_range(B):
                coming = coming + (
                    _load(
                        p_words,
                        p_scale,
                        p_zero,
                        tile,
                        i + 1 < count,
                        begin,
                        end,
                        N,
                        GROUPS,
                        blocks,
                        b,
                        B,
                        W,
                        R,
                        GROUP,
                        EVEN,
                        L,
                        S,
                    ),
                )
        for b in gl.static_range(B):
            acc = _multiply(acc, now[b], xs, x_sums, b, dtype, GROUP, C, A)
            if not AHEAD:
                coming = coming + (
                    _load(
                        p_words,
                        p_scale,
                        p_zero,
                        tile,
                        i + 1 < count,
                        begin,
                        end,
                        N,
                        GROUPS,
                        blocks,
                        b,
                        B,
                        W,
                        R,
                        GROUP,
                        EVEN,
                        L,
                        S,
                    ),
                )
        slots.index(i).store(acc)
        now = coming
    # 4. Add up over the warps, for all tiles at once; then over the programs that share them.
    WM: gl.constexpr = min(W, BM // 2)
    D: gl.constexpr = gl.BlockedLayout([W, 1, 1], [1, 16, 2], [W // WM, 1, WM], [1, 2, 0])
    flat = slots._reinterpret(gl.float32, [TILES * W, R, BM], gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0]))
    y = gl.sum(flat.load(D).reshape([TILES, W, R, BM]), 1)
    T: gl.constexpr = y.type.layout
    o_t = gl.arange(0, TILES, gl.SliceLayout(1, gl.SliceLayout(2, T)))[:, None, None]
    o_r = gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, T)))[None, :, None]
    o_m_y = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, T)))[None, None, :]
    tile = part + o_t * parts
    whole = True
    if SPLITS > 1:
        p_part = p_partial + tile * (R * BM) + o_m_y * R + o_r
        used = (o_t < count) & (o_m_y < M)
        gl.store(p_part + split * (tiles * R * BM), y, mask=used)
        gl.thread_barrier()  # all threads have written before the program says so
        whole = gl.atomic_add(p_counter + part, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if whole:
            gl.store(p_counter + part, 0)
            y = gl.load(p_part, mask=used, cache_modifier=".cg")
            for other in gl.static_range(1, SPLITS):
                y += gl.load(p_part + other * (tiles * R * BM), mask=used, cache_modifier=".cg")
    # 5. Store.
    if whole:
        o_n = tile * R + o_r
        if p_bias is not None:
            y += gl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(gl.float32)
        real = (o_t < count) & (o_n < N) & (o_m_y < M)
        gl.store(p_y + o_m_y.to(gl.int64) * N + o_n, y.to(p_y.dtype.element_ty), mask=real)


def w4a16(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, y: Tensor, *,
    group_size: int | None, config: Mapping, processors: int,
) -> Tensor:  # fmt: skip
    """``w4a16_matmul`` of checked arguments into ``y``; ``group_size`` 32, 64, 128, or ``None`` per channel."""
    (m, k), n, groups = x.shape, words.shape[0], scale.shape[0]
    w, b, r, bm = config["warps"], config["blocks"], config["rows"], config["block_m"]
    blocks, tiles = triton.cdiv(k, BLOCK), triton.cdiv(n, r)
    splits = triton.cdiv(blocks, w * b)  # programs that share the inputs
    most = SHARED // config["programs"] // (4 * w * r * bm)  # tiles whose sums fit in shared memory
    count = min(triton.cdiv(tiles, max(1, config["programs"] * processors // splits)), 1 << most.bit_length() - 1)
    parts = triton.cdiv(tiles, count)  # programs that share the outputs: as few as make the longest run no longer
    partial = torch.empty(splits * tiles * r * bm if splits > 1 else 0, dtype=torch.float32, device=y.device)
    registers = config["registers"] if group_size != 32 else 0  # four scales and zero points a block need more
    _hopper_few_kernel[(parts * splits,)](
        x, words.view(torch.int32), scale, zero, bias, y, partial, counters(y.device), m, n, k, groups, blocks, parts,
        group_size or 0, b, r, bm, triton.next_power_of_2(count), splits, blocks % (splits * w * b) == 0, k % BLOCK == 0,
        config["ahead"], config["overlap"],
        num_warps=w, maxnreg=registers or None, launch_pdl=config["overlap"],
    )  # fmt: skip
    return y
