"""4-bit weights times 8- or 16-bit activations on Hopper: unpacked in registers, multiplied from registers. Gluon, Triton 3.6.

The plain-Triton twins are ``w4a8.py`` and ``w4a16.py``; this file computes the same contracts from the same tensors where
they run compute-bound. Hopper's ``wgmma`` reads its first operand from registers or shared memory, its second from shared
memory only. So the product is transposed, ``y^T [N, M] = W [N, K] x^T [K, M]``: weights go from shared memory to registers,
are unpacked there and never written back.

Blocks of threads, one or two a multiprocessor, take tiles of ``block_n`` outputs x ``block_m`` tokens in turn. A block is

- a *producer* (one warp): asks the TMA unit for the next block of 128 inputs of w, x and group scales, into a ring of
  ``stages`` buffers, as soon as a buffer is empty;
- *consumers* (``warps`` 8: two warpgroups, half of the outputs each; 4: one, and a second block of threads beside it, whose
  products fill the time in which this one scales and stores): unpack block k + 1 while the products of block k run.

      producer    load 4   load 5   load 6   ...
      registers   unpack 2      unpack 3      unpack 4
      tensor core      multiply 1    multiply 2    multiply 3

A loop iteration, a *step*, is two blocks with registers of their own: products read their registers until they are done.
y^T is turned around in shared memory, in the buffers of the tile's last blocks, which the producer gets back when y has left.
Inputs beyond K are zero (TMA fills them in), so blocks are counted up to an even number. Integer sums are exact, so are
the codes of all formats; W4A16 rounds each weight (q - z) s to the dtype of x as the twin does.
"""
# ruff: noqa: RUF005, SIM102 - the language of kernels has neither unpacking nor `and` between a constant and a number

from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lqedu_kernels._numerics import round_half_even
from lqedu_kernels._schedule import after_previous, counters, grouped_tile
from lqedu_kernels._tensors import HAS_GLUON, Target
from lqedu_kernels.w4a16 import _weight_ptx

BLOCK = 128  # inputs of a block, the unit of packing
BLOCK_K = gl.constexpr(BLOCK)


def available(target: Target, *tensors: Tensor) -> bool:
    """Whether the kernels run here, compute capability 9.0 with the Triton 3.6 whose Gluon they are written for, and take the tensors.

    TMA wants rows that start at multiples of 16 bytes: of x, packed weights, y, and scales or zero points of groups.
    """
    aligned = all(t.shape[0] == 1 or t.shape[1] * t.element_size() % 16 == 0 for t in tensors)
    return target.capability == (9, 0) and HAS_GLUON and aligned


def search_space(m: int, n: int, k: int, dtype: torch.dtype) -> list[dict]:
    """Launches worth timing for ``m`` tokens of this dtype, best guesses first."""
    # Outputs and tokens of a tile, warps, and stages that fill shared memory.
    if dtype == torch.int8:
        shapes = [
            (128, 128, 4, 4),
            (64, 256, 4, 3),
            (128, 256, 8, 5),
            (64, 64, 4, 6),
            (128, 128, 8, 8),
            (128, 64, 8, 10),
        ]
    else:  # 128 rows of 16-bit weights a warpgroup would be more registers than there are
        shapes = [(128, 256, 8, 3), (128, 128, 8, 5), (128, 64, 8, 8)]
    found = []
    for share in (False, True):
        for block_n, block_m, warps, stages in shapes:
            left = triton.cdiv(m, block_m) * triton.cdiv(n, block_n) % 132
            fits = (block_m == 64 or block_m < 2 * m) and (block_m > 64 or m <= 256)
            if fits and (not share or (warps == 8 and 0 < left <= 66)):
                for group_m in (8, 16) if m > 8 * block_m and not share else (8,):
                    tile = {"block_n": block_n, "block_m": block_m, "warps": warps, "stages": stages}
                    tile |= {"group_m": group_m, "share": share}
                    found.append(tile)
                    if dtype == torch.int8 and m <= 256 and warps == 4:
                        found.append(tile | {"ahead": True})  # launched before the kernel in front of it has ended
    return found


# ---- unpacking: part P of the words of a block, [BLOCK_N, 64 or 32] ---------------------------------------------------------
# A part is a run of neighbouring inputs. All steps below work on whole 32-bit registers: 4 weights of 8, 2 of 16 bits.


@gluon.jit
def _times_16(q, P: gl.constexpr):
    """Signed nibble to 16 q: in the upper half of a byte it already is, as two's complement says."""
    SHIFT: gl.constexpr = "shl.b32 t, $1, 4;" if P == 0 else "mov.b32 t, $1;"
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; " + SHIFT + " and.b32 $0, t, 0xf0f0f0f0; }", "=r,r", [q], dtype=gl.int8, is_pure=True, pack=4
    )


@gluon.jit
def _two_level(q, group, P: gl.constexpr):
    """Unsigned nibble to (q - z) s = (q s + a) ^ 0x80, with a = 128 - z s; no byte carries into the next (LiquidGEMM)."""
    s = group & 0xFF
    a = (group >> 8) * 0x01010101 + 0x01010101
    SHIFT: gl.constexpr = "mov.b32 t, $1;" if P == 0 else "shr.u32 t, $1, 4;"
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; " + SHIFT + " and.b32 t, t, 0x0f0f0f0f; mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080; }",
        "=r,r,r,r,r,r,r,r,r,r",
        [q, s, a],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _ratio(q, r, P: gl.constexpr):
    """Nibble q + 8 to round_half_even(q r): 1536 + q r, in float16, has no fraction bits left, and w8 in its low byte (QQQ)."""
    CODE: gl.constexpr = (
        "lop3.b32 e, $1, 0x000f000f, 0x64006400, 0xea; shr.u32 t, $1, 8; lop3.b32 o, t, 0x000f000f, 0x64006400, 0xea;"
        " mov.b32 t, 0xe408e408; add.rn.f16x2 e, e, t; add.rn.f16x2 o, o, t;"
        if P == 0
        else "lop3.b32 e, $1, 0x00f000f0, 0x64006400, 0xea; shr.u32 t, $1, 8; lop3.b32 o, t, 0x00f000f0, 0x64006400, 0xea;"
        " mov.b32 t, 0xd480d480; mov.b32 u, 0x2c002c00; fma.rn.f16x2 e, e, u, t; fma.rn.f16x2 o, o, u, t;"
    )
    return gl.inline_asm_elementwise(
        "{ .reg .b32 e, o, t, u; "
        + CODE
        + " mov.b32 t, 0x66006600; fma.rn.f16x2 e, e, $2, t; fma.rn.f16x2 o, o, $2, t;"
        " prmt.b32 $0, e, o, 0x6240; }",
        "=r,r,r,r",
        [q, r],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _half(q, s, z, dtype: gl.constexpr, P: gl.constexpr, FLOAT_ZERO: gl.constexpr):
    """Code to (q - z) s, as ``w4a16._weight`` explains."""
    BF16: gl.constexpr = dtype == gl.bfloat16
    near = round_half_even(z) if FLOAT_ZERO else z
    minus = (-(128.0 if BF16 else 64.0 if P % 2 else 1024.0) - near).to(dtype)
    scale = s.to(dtype)
    rest = ((near - z) * s).to(dtype) if FLOAT_ZERO else scale
    bits = gl.inline_asm_elementwise(
        _weight_ptx(P, BF16, FLOAT_ZERO), "=r,r,r,r,r", [q, minus, scale, rest], dtype=gl.int16, is_pure=True, pack=2
    )
    return bits.to(dtype, bitcast=True)


# ---- the ring --------------------------------------------------------------------------------------------------------------


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    wrap = stage == STAGES - 1
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _plan(tiles, splits):
    """How many tiles are shared, and what this program does: maybe a part of one of them, then tiles of its own.

    Programs take tiles in rounds. Where the last round would leave most of them idle, ``splits`` programs share each of
    its tiles (``splits`` 1: nothing is shared).
    """
    program, programs = gl.program_id(0), gl.num_programs(0)
    shared = gl.where(splits > 1, tiles % programs, 0)
    part = gl.where(program < shared * splits, 1, 0)
    return shared, part, part + gl.cdiv(tiles - shared - program, programs)


@gluon.jit
def _place(i, shared, part, splits, steps_k):
    """Item i of the plan: a tile, and the steps of its sum, from low to high."""
    program = gl.program_id(0)
    if i < part:
        split = program // shared
        return program % shared, split * steps_k // splits, (split + 1) * steps_k // splits
    return shared + (i - part) * gl.num_programs(0) + program, 0, steps_k


@gluon.jit
def _produce(x_desc, w_desc, s_desc, z_desc, xs, ws, ss, zs, full, empty, tiles_m, tiles_n, steps_k,
             splits, GROUPED: gl.constexpr, GROUP_M: gl.constexpr):  # fmt: skip
    """The producer: fill each buffer as soon as it is empty, tile after tile."""
    ROWS: gl.constexpr = 0 if s_desc is None else ss.shape[0] // xs.shape[0]
    BYTES: gl.constexpr = (
        x_desc.block_type.nbytes + w_desc.block_type.nbytes
        + (0 if s_desc is None else ROWS * s_desc.block_type.nbytes)
        + (0 if z_desc is None else ROWS * z_desc.block_type.nbytes)
    )  # fmt: skip
    stage, phase = 0, 1  # an empty ring: the first wait for each buffer returns at once
    shared, part, items = _plan(tiles_m * tiles_n, splits)
    for i in range(items):
        tile, low, high = _place(i, shared, part, splits, steps_k)
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        n, m = tile_n * ws.shape[1], tile_m * xs.shape[1]
        for block in range(2 * low, 2 * high):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(w_desc, [n, block * ws.shape[2]], bar, ws.index(stage))
            for row in gl.static_range(ROWS):
                group = block * ROWS + row if GROUPED else 0
                tma.async_copy_global_to_shared(s_desc, [group, n], bar, ss.index(stage * ROWS + row))
                if z_desc is not None:
                    tma.async_copy_global_to_shared(z_desc, [group, n], bar, zs.index(stage * ROWS + row))
            tma.async_copy_global_to_shared(x_desc, [m, block * xs.shape[2]], bar, xs.index(stage))
            stage, phase = _next(stage, phase, xs.shape[0])


@gluon.jit
def _part(q, xs, ss, zs, stage, P: gl.constexpr, PARTS: gl.constexpr, KIND: gl.constexpr, A: gl.constexpr):
    """Unpack part P of the words q."""
    if KIND == "channel":
        w = _times_16(q, P)
    else:
        ROWS: gl.constexpr = ss.shape[0] // xs.shape[0]
        row = stage * ROWS + P * ROWS // PARTS
        s = ss.index(row).permute((1, 0)).load(A)  # [BLOCK_N, 1]
        if KIND == "integer":
            w = _two_level(q, s.to(gl.int32), P)
        elif KIND == "ratio":
            w = _ratio(q, s, P)
        elif zs is None:
            z = gl.full([q.shape[0], 1], 8.0, gl.float32, A)
            w = _half(q, s.to(gl.float32), z, xs.dtype, P, False)
        else:
            z = zs.index(row).permute((1, 0)).load(A)
            w = _half(q, s.to(gl.float32), z.to(gl.float32), xs.dtype, P, z.dtype != gl.uint8)
    return w


@gluon.jit
def _block(acc, use_acc, xs, ws, ss, zs, full, stage, phase, KIND: gl.constexpr, A: gl.constexpr):
    """Unpack one block and queue its products; those of the block before are complete when this returns."""
    PARTS: gl.constexpr = 2 if xs.dtype == gl.int8 else 4
    WIDTH: gl.constexpr = xs.shape[2] // PARTS
    mbarrier.wait(full.index(stage), phase)
    q = ws.index(stage).load(A)
    for P in gl.static_range(PARTS):
        x = xs.index(stage).slice(P * WIDTH, WIDTH, 1).permute((1, 0))  # [WIDTH, BLOCK_M]
        w = _part(q, xs, ss, zs, stage, P, PARTS, KIND, A)
        if P == 0:
            acc = warpgroup_mma(w, x, acc, use_acc=use_acc, is_async=True)
        else:
            acc = warpgroup_mma(w, x, acc, is_async=True)
    return warpgroup_mma_wait(PARTS, deps=[acc])


@gluon.jit
def _finish(acc, buffer, y_desc, p_x_scale, p_x_sum, scale, zero, bias, p_bias, m, n, M, KIND: gl.constexpr, H: gl.constexpr):  # fmt: skip
    """Scale sums of BLOCK_N outputs x some tokens from m on, and send them to y by way of a buffer of the ring."""
    acc = gl.convert_layout(acc, H, assert_trivial=True)
    o_m = m + gl.arange(0, acc.shape[1], gl.SliceLayout(0, H))
    y = acc.to(gl.float32)
    if p_x_sum is not None:
        x_sum = gl.load(p_x_sum + o_m, o_m < M, other=0)
        y = ((acc >> 4) - zero[:, None] * x_sum[None, :]).to(gl.float32)
    elif KIND == "channel":
        scale *= 0.0625
    if p_x_scale is not None:
        x_scale = gl.load(p_x_scale + o_m, o_m < M, other=0.0)
        y = y * scale[:, None] * x_scale[None, :]
    if p_bias is not None:
        y += bias[:, None]
    s_y = buffer._reinterpret(y_desc.dtype, y_desc.block_type.shape, y_desc.layout)
    s_y.permute((1, 0)).store(y.to(y_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, [m, n], s_y)


@gluon.jit
def _share(acc, p_partial, p_counter, tile, split, splits):
    """Hand in a part of a tile's sum; the program that is last to do so gets the whole, added up in the order of the parts.

    A warp holds 8 outputs x 8 tokens of a part in two registers a thread; they are neighbours in memory.
    """
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    o_n = gl.arange(0, BN, gl.SliceLayout(1, acc.type.layout))
    o_m = gl.arange(0, BM, gl.SliceLayout(0, acc.type.layout))
    o_acc = (o_n // 8 * (8 * BM) + o_n % 8 * 8)[:, None] + (o_m // 8 * 64 + o_m % 8)[None, :]
    p_part = p_partial + tile * splits * (BN * BM) + o_acc
    gl.store(p_part + split * (BN * BM), acc)
    gl.thread_barrier()  # all threads have written before the program says so
    last = gl.atomic_add(p_counter + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        gl.store(p_counter + tile, 0)
        acc = gl.load(p_part, cache_modifier=".cg")
        for other in range(1, splits):
            acc += gl.load(p_part + other * (BN * BM), cache_modifier=".cg")
    return acc, last


@gluon.jit
def _consume(xs, ws, ss, zs, full, empty, y_desc, p_x_scale, p_scale, p_zero, p_x_sum, p_bias, p_partial, p_counter, M, N,
             tiles_m, tiles_n, steps_k, splits, KIND: gl.constexpr, GROUP_M: gl.constexpr):  # fmt: skip
    """The consumers: multiply what is in the buffers, hand them back, scale and store each tile."""
    STAGES: gl.constexpr = xs.shape[0]
    BM: gl.constexpr = xs.shape[1]
    BN: gl.constexpr = ws.shape[1]
    INT8: gl.constexpr = xs.dtype == gl.int8
    WARPS: gl.constexpr = gl.num_warps()
    # Layouts: of the sums, of a weight operand, and of what is stored at a time. Triton multiplies int8 by 128 tokens at most.
    C: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS, 1], [16, min(BM, 128) if INT8 else BM, 32 if INT8 else 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, C, 4 if INT8 else 2)
    H: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM // 2 if INT8 else BM, 32 if INT8 else 16])
    stage, phase = 0, 0
    even, odd = 0, 0  # buffers of the last two blocks
    acc = gl.zeros([BN, BM], gl.int32 if INT8 else gl.float32, C)
    shared, part, items = _plan(tiles_m * tiles_n, splits)
    for i in range(items):
        tile, low, high = _place(i, shared, part, splits, steps_k)
        for step in range(low, high):
            acc = _block(acc, step > low, xs, ws, ss, zs, full, stage, phase, KIND, A)
            if step > low:
                mbarrier.arrive(empty.index(odd), count=1)
            elif i > 0:  # y of the tile before has left its buffers
                tma.store_wait(0)
                if INT8:
                    mbarrier.arrive(empty.index(even), count=1)
                mbarrier.arrive(empty.index(odd), count=1)
            even = stage
            stage, phase = _next(stage, phase, STAGES)
            acc = _block(acc, True, xs, ws, ss, zs, full, stage, phase, KIND, A)
            if INT8:
                mbarrier.arrive(empty.index(even), count=1, pred=step < high - 1)
            else:
                mbarrier.arrive(empty.index(even), count=1)
            odd = stage
            stage, phase = _next(stage, phase, STAGES)
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = tile_m * BM, tile_n * BN
        o_n = n + gl.arange(0, BN, gl.SliceLayout(1, H))
        scale, zero, bias = 1.0, 0, 0.0
        if p_scale is not None:
            scale = gl.load(p_scale + o_n, o_n < N, other=0.0).to(gl.float32)
        if p_zero is not None:
            zero = gl.load(p_zero + o_n, o_n < N, other=0)
        if p_bias is not None:
            bias = gl.load(p_bias + o_n, o_n < N, other=0.0).to(gl.float32)
        acc = warpgroup_mma_wait(0, deps=[acc])
        whole = True
        if p_partial is not None:
            if i < part:
                acc, whole = _share(acc, p_partial, p_counter, tile, gl.program_id(0) // shared, splits)
        if whole:
            if INT8:
                left, right = acc.reshape([BN, 2, BM // 2]).permute((0, 2, 1)).split()
                _finish(left, xs.index(even), y_desc, p_x_scale, p_x_sum, scale, zero, bias, p_bias, m, n, M, KIND, H)
                _finish(right, xs.index(odd), y_desc, p_x_scale, p_x_sum, scale, zero, bias, p_bias, m + BM // 2, n, M, KIND, H)  # fmt: skip
            else:
                _finish(acc, xs.index(odd), y_desc, p_x_scale, p_x_sum, scale, zero, bias, p_bias, m, n, M, KIND, H)
    tma.store_wait(0)


@gluon.jit
def _hopper_w4_kernel(x_desc, w_desc, s_desc, z_desc, y_desc, p_x_scale, p_scale, p_zero, p_x_sum, p_bias, p_partial,
                      p_counter, M, N, steps_k, splits, KIND: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
                      GROUP_M: gl.constexpr, OVERLAP: gl.constexpr):  # fmt: skip
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    ROWS: gl.constexpr = BLOCK_K // GROUP if GROUP else 1  # of scales a block
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    ws = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    if s_desc is None:
        ss: gl.constexpr = None
    else:
        ss = gl.allocate_shared_memory(s_desc.dtype, [STAGES * ROWS] + s_desc.block_type.shape, s_desc.layout)
    if z_desc is None:
        zs: gl.constexpr = None
    else:
        zs = gl.allocate_shared_memory(z_desc.dtype, [STAGES * ROWS] + z_desc.block_type.shape, z_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    tiles_m = gl.cdiv(M, BM)
    tiles_n = gl.cdiv(N, BN)
    after_previous(OVERLAP)
    gl.warp_specialize(
        [
            (_consume, (xs, ws, ss, zs, full, empty, y_desc, p_x_scale, p_scale, p_zero, p_x_sum, p_bias, p_partial, p_counter,
                        M, N, tiles_m, tiles_n, steps_k, splits, KIND, GROUP_M)),
            (_produce, (x_desc, w_desc, s_desc, z_desc, xs, ws, ss, zs, full, empty, tiles_m, tiles_n, steps_k, splits, GROUP > 0, GROUP_M)),
        ],
        [1],
        [24],
    )  # fmt: skip


# ---- launches --------------------------------------------------------------------------------------------------------------

_GL = {
    torch.int8: gl.int8, torch.uint8: gl.uint8, torch.int16: gl.int16,
    torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32,
}  # fmt: skip


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    rows, columns = tensor.shape
    unit = 16 // tensor.element_size()
    stride = triton.cdiv(columns, unit) * unit  # of a single row, none is needed, but it must be a multiple of 16 bytes
    layout = gl.NVMMASharedLayout.get_default_for(block, _GL[tensor.dtype])
    return TensorDescriptor(tensor, [rows, columns], [stride, 1], block, layout)


def _launch(x, words, s, z, y, x_scale, scale, zero, x_sum, bias, *, kind, group, config, processors) -> Tensor:
    (m, k), n = x.shape, words.shape[0]
    bn, bm = config["block_n"], config["block_m"]
    tiles, steps_k = triton.cdiv(m, bm) * triton.cdiv(n, bn), triton.cdiv(k, 2 * BLOCK)
    twice = config["warps"] == 4  # two blocks of threads on a multiprocessor
    slots = 2 * processors if twice else processors
    programs = min(slots, tiles)
    ahead = config.get("ahead", False)
    partial = counter = None
    splits = 1
    if config["share"] and tiles % slots:
        programs = slots
        splits = min(slots // (tiles % slots), steps_k)
        sums = torch.int32 if x.dtype == torch.int8 else torch.float32
        partial = torch.empty(slots * bn * bm, dtype=sums, device=y.device)
        counter = counters(y.device)
    _hopper_w4_kernel[(programs,)](
        _descriptor(x, [bm, BLOCK]),
        _descriptor(words, [bn, 64 if words.dtype == torch.uint8 else 32]),
        None if s is None else _descriptor(s, [1, bn]),
        None if z is None else _descriptor(z, [1, bn]),
        _descriptor(y, [bm // 2 if x.dtype == torch.int8 else bm, bn]),
        x_scale, scale, zero, x_sum, bias, partial, counter,
        m, n, steps_k, splits, kind, group, config["stages"], config["group_m"], ahead,
        num_warps=config["warps"], maxnreg=128 if twice else None, launch_pdl=ahead,
    )  # fmt: skip
    return y


def w4a8(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, groups: Tensor | None, zero: Tensor | None, x_sum: Tensor | None,
    bias: Tensor | None, y: Tensor, *, group_size: int, config: Mapping, processors: int,
) -> Tensor:  # fmt: skip
    """``w4a8_matmul`` of checked arguments into ``y``; ``group_size`` 64 or 128 where ``groups`` is given."""
    kind = "channel" if groups is None else "ratio" if groups.dtype == torch.float16 else "integer"
    return _launch(
        x, codes, groups, None, y, x_scale, scale, zero, x_sum, bias,
        kind=kind, group=group_size, config=config, processors=processors,
    )  # fmt: skip


def w4a16(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, y: Tensor, *,
    group_size: int | None, config: Mapping, processors: int,
) -> Tensor:  # fmt: skip
    """``w4a16_matmul`` of checked arguments into ``y``; ``group_size`` 32, 64, 128, or ``None`` per channel."""
    if group_size == 32 and config["block_m"] > 128:  # four rows of scales and zeros a block leave less room for blocks
        config = {**config, "stages": config["stages"] - 1}
    return _launch(
        x, words, scale, zero, y, None, None, None, None, bias,
        kind="half", group=group_size or 0, config=config, processors=processors,
    )  # fmt: skip
