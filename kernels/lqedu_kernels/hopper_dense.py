"""8-bit times 8-bit on Hopper: TMA fills a ring of shared memory, two warpgroups multiply it, nobody waits. Gluon, Triton 3.6.

The plain-Triton twins are ``w8a8.py`` (INT8) and ``fp8.py`` (E4M3); this file computes the same contracts from the same tensors
where there are enough tokens to keep the tensor cores busy. Written out, with s of tokens x channels or of blocks of 128:

    y[m, n] = s_x[m] s_w[n] (Σ_k q_x[m, k] q_w[n, k] − z_x[m] Σ_k q_w[n, k]) + b[n]
    y[m, n] = Σ_j s_x[m, j] s_w[n/128, j] Σ_{k in block j} q_x[m, k] q_w[n, k] + b[n]

Both operands go to the tensor cores (``wgmma``) from shared memory as they are stored, K last. One block of threads stays on each
multiprocessor and takes one output tile after another. Its warps split the work (*warp specialization*):

- the *producer*, one warp: asks the TMA unit for the next 128 bytes of K of both operands, as soon as a buffer is empty;
- two *consumers*, warpgroups of 128 threads: each multiplies half of the tile's rows, in 64 or 128 accumulators a thread.

      producer     load 5   load 6   load 7  |  load 0 of the next tile ...
      ring          3  4  5  6                   STAGES buffers; ``full`` and ``empty`` are barriers, one pair a buffer
      consumer 0   multiply 4   multiply 5   ...   scale, round, store  |  multiply 0 ...
      consumer 1        multiply 2   multiply 3   ...   multiply 7  |  scale, round, store

Consumer 1 starts LEAD steps late and stays behind. So the two do not stop at the same time: while one stores its half, or adds a
block outside the tensor cores, the other has the tensor cores to itself. Registers move from the producer, which needs 40, to the
consumers, 232 each (``setmaxnreg``). The next launch prepares its barriers while this one ends (:func:`after_previous`).

Integer sums are exact. FP8 sums are those of Hopper's tensor cores, as in the twin: all of K in one go for scales outside the sum
(``use_fast_accum=True`` of ``torch._scaled_mm``), 128 products at a time and then float32 for blocks. The operations after the
sum are the twin's, in its order. Bytes and operations: see the twins.
"""

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

from lqedu_kernels._dense import has_descriptors
from lqedu_kernels._schedule import after_previous, grouped_tile, overlapped
from lqedu_kernels._tensors import HAS_GLUON, Target, row_major, target_of

#: Inputs of a step, a row of shared memory (128 bytes, one swizzle); also inputs and outputs that share a scale of a block.
BLOCK = 128
#: Shared memory of a block of threads that rings and outputs may fill; barriers take the rest of 227 KiB.
_SHARED = 232448 - 1024


def available(target: Target) -> bool:
    """Whether these kernels run: on compute capability 9.0 with Triton 3.6, whose Gluon they are written for."""
    return target.capability == (9, 0) and HAS_GLUON


# ---- launch configurations ---------------------------------------------------------------------------------------------------


def default_config(m: int, n: int, k: int, target: Target, *, blocks: bool = False) -> dict[str, int | str]:
    """The tile that should finish first: rounds of tiles over the multiprocessors, times what a tile costs."""
    return search_space(m, n, k, target, blocks=blocks)[0]


def search_space(m: int, n: int, k: int, target: Target, *, blocks: bool = False) -> list[dict[str, int | str]]:
    """Configurations worth timing at a shape, the likely best first."""

    def cost(tile: tuple[int, int]) -> int:
        tiles = triton.cdiv(m, tile[0]) * triton.cdiv(n, tile[1])
        return (
            triton.cdiv(tiles, target.processors) * tile[0] * (tile[1] + 32)
        )  # measured: a column less saves less than a column

    tiles = [(128, 256), (128, 128), (128, 64)] + ([] if blocks else [(256, 128), (128, 192), (128, 96)])
    tiles = sorted((t for t in tiles if t[0] == 128 or m > 128), key=cost)[:4]
    leads = (1, 2) if blocks else (2, 0)
    return [
        {
            "kernel": "hopper",
            "block_m": rows,
            "block_n": cols,
            "block_k": BLOCK,
            "stages": _stages(rows, cols),
            "group_m": group,
            "lead": lead,
        }
        for rows, cols in tiles
        for lead in leads
        for group in (8, 16)
        if group == 8 or m > 8 * rows
    ]


def _stages(rows: int, cols: int) -> int:
    return min(8, (_SHARED - rows * 128) // ((rows + cols) * BLOCK))  # 64 outputs of each row wait for their store


def _parts(cols: int, *, halves: bool) -> tuple[int, ...]:
    """Columns of a tile as one or two operands of ``wgmma``: powers of two, of int8 and of blocks at most 128."""
    if cols == 256 and halves:
        return 128, 128
    return {192: (128, 64), 96: (64, 32)}.get(cols, (cols,))


# ---- the producer ------------------------------------------------------------------------------------------------------------


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    """The buffer after this one on the ring; each time around, the phase of its barriers flips."""
    around = slot + 1 == STAGES
    return gl.where(around, 0, slot + 1), gl.where(around, phase ^ 1, phase)


@gluon.jit
def _produce(d_x, d_w0, d_w1, ring, work, PARTS: gl.constexpr, GROUP_M: gl.constexpr):
    s_x, s_w0, s_w1, full, empty = ring
    tiles_m, tiles_n, steps = work
    STAGES: gl.constexpr = s_x.shape[0]
    BLOCK_M: gl.constexpr = s_x.shape[1]
    BLOCK_K: gl.constexpr = s_x.shape[2]
    PART: gl.constexpr = s_w0.shape[1]
    BLOCK_N: gl.constexpr = PART + (s_w1.shape[1] if PARTS == 2 else 0)
    slot = 0
    phase = 1  # empty buffers count as given back once already
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        for step in range(steps):
            mbarrier.wait(empty.index(slot), phase)
            arrived = full.index(slot)
            mbarrier.expect(arrived, (BLOCK_M + BLOCK_N) * BLOCK_K)
            tma.async_copy_global_to_shared(d_x, [tile_m * BLOCK_M, step * BLOCK_K], arrived, s_x.index(slot))
            tma.async_copy_global_to_shared(d_w0, [tile_n * BLOCK_N, step * BLOCK_K], arrived, s_w0.index(slot))
            if PARTS == 2:
                tma.async_copy_global_to_shared(
                    d_w1, [tile_n * BLOCK_N + PART, step * BLOCK_K], arrived, s_w1.index(slot)
                )
            slot, phase = _next(slot, phase, STAGES)


# ---- the consumers -----------------------------------------------------------------------------------------------------------


@gluon.jit
def _zeros(ROWS: gl.constexpr, COLS: gl.constexpr, dtype: gl.constexpr):
    """[ROWS, COLS] over a warpgroup, as ``wgmma`` keeps it: each warp 16 rows of 64."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 32])
    return gl.zeros([ROWS, COLS], dtype, layout)


@gluon.jit
def _sum(
    ring,
    turn,
    slot,
    phase,
    steps,
    first,
    ROW: gl.constexpr,
    ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    LEAD: gl.constexpr,
):
    """Sums of one tile's rows, over all steps: one step's products run while the next step is waited for."""
    s_x, s_w0, s_w1, full, empty = ring
    STAGES: gl.constexpr = s_x.shape[0]
    dtype: gl.constexpr = gl.int32 if s_x.dtype == gl.int8 else gl.float32
    b_sum0 = _zeros(ROWS, s_w0.shape[1], dtype)
    b_sum1 = _zeros(ROWS, s_w1.shape[1], dtype)
    for step in range(steps):
        mbarrier.wait(full.index(slot), phase)
        x = s_x.index(slot).slice(ROW, ROWS)
        b_sum0 = warpgroup_mma(x, s_w0.index(slot).permute((1, 0)), b_sum0, use_acc=step > 0, is_async=True)
        if PARTS == 2:
            b_sum1 = warpgroup_mma(x, s_w1.index(slot).permute((1, 0)), b_sum1, use_acc=step > 0, is_async=True)
            b_sum0, b_sum1 = warpgroup_mma_wait(2, deps=[b_sum0, b_sum1])
        else:
            b_sum0 = warpgroup_mma_wait(1, deps=[b_sum0])
        # The step before is done. Its buffer by number: a variable that is "the slot before" would be taken for a constant.
        mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)), pred=step > 0)
        if first & (step == gl.minimum(LEAD, steps) - 1):
            mbarrier.arrive(turn)
        slot, phase = _next(slot, phase, STAGES)
    if PARTS == 2:
        b_sum0, b_sum1 = warpgroup_mma_wait(0, deps=[b_sum0, b_sum1])
    else:
        b_sum0 = warpgroup_mma_wait(0, deps=[b_sum0])
    mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)))
    return b_sum0, b_sum1, slot, phase


@gluon.jit
def _add_scaled(b_sum, b_block, b_scale):
    """b_sum + b_block * b_scale, here and not later: left to itself the compiler moves it behind the next product, which then
    needs registers of its own, and there are none."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;",
        "=f,f,f,f",
        [b_block, b_scale[:, None], b_sum],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _sum_of_blocks(
    ring, turn, slot, phase, steps, first, row, col, inner,
    ROW: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """As :func:`_sum`; each step's products leave the tensor cores, are scaled and added in float32, one part after the other."""
    s_x, s_w0, s_w1, full, empty = ring
    p_x_scale, p_w_blocks, M, N, x_stride, x_stride_k = inner
    STAGES: gl.constexpr = s_x.shape[0]
    COLS: gl.constexpr = s_w0.shape[1]
    b_sum0 = _zeros(ROWS, COLS, gl.float32)
    b_sum1 = b_sum0
    b_block = b_sum0
    o_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, b_sum0.type.layout))
    p_s = p_x_scale + gl.minimum(o_m, M - 1) * x_stride
    for step in range(steps):
        b_s0 = gl.load(p_s + step * x_stride_k)  # [ROWS]
        b_s1 = b_s0
        if p_w_blocks is not None:
            b_s0 *= gl.load(p_w_blocks + col // 128 * steps + step)
            if PARTS == 2:
                b_s1 *= gl.load(p_w_blocks + gl.minimum(col + COLS, N - 1) // 128 * steps + step)
        mbarrier.wait(full.index(slot), phase)
        x = s_x.index(slot).slice(ROW, ROWS)
        b_block = warpgroup_mma(x, s_w0.index(slot).permute((1, 0)), b_block, use_acc=False, is_async=True)
        b_block = warpgroup_mma_wait(0, deps=[b_block])
        if first & (step == gl.minimum(LEAD, steps) - 1):
            mbarrier.arrive(turn)
        b_sum0 = _add_scaled(b_sum0, b_block, b_s0)
        if PARTS == 2:
            b_block = warpgroup_mma(x, s_w1.index(slot).permute((1, 0)), b_block, use_acc=False, is_async=True)
            b_block = warpgroup_mma_wait(0, deps=[b_block])
            b_sum1 = _add_scaled(b_sum1, b_block, b_s1)
        mbarrier.arrive(empty.index(slot))
        slot, phase = _next(slot, phase, STAGES)
    return b_sum0, b_sum1, slot, phase


@gluon.jit
def _finish(b_sum, d_y, s_y, row, col, output, BLOCKS: gl.constexpr):
    """Sums to outputs, and through shared memory to y."""
    p_x_scale, p_w_scale, p_x_zero, p_w_sum, p_bias, M, N, x_stride, w_stride = output
    ROWS: gl.constexpr = b_sum.shape[0]
    COLS: gl.constexpr = b_sum.shape[1]
    layout: gl.constexpr = b_sum.type.layout
    # Vectors are loaded as vectors and then spread: [ROWS, 1] would be loaded again for every column a thread holds.
    o_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    o_n = col + gl.arange(0, COLS, gl.SliceLayout(0, layout))
    m_m, m_n = o_m < M, o_n < N
    if p_x_zero is not None:
        b_zero = gl.load(p_x_zero + o_m, mask=m_m, other=0).to(gl.int32)
        b_sum -= b_zero[:, None] * gl.load(p_w_sum + o_n, mask=m_n, other=0)[None, :]
    b_y = b_sum.to(gl.float32)
    if not BLOCKS:
        b_y *= gl.load(p_x_scale + o_m * x_stride, mask=m_m, other=0.0)[:, None]
    if p_w_scale is not None:
        b_y *= gl.load(p_w_scale + o_n * w_stride, mask=m_n, other=0.0).to(gl.float32)[None, :]
    if p_bias is not None:
        b_y += gl.load(p_bias + o_n, mask=m_n, other=0.0).to(gl.float32)[None, :]
    b_y = b_y.to(d_y.dtype)
    if s_y.shape[1] == COLS:
        _store(b_y, d_y, s_y, row, col)
    else:
        b_left, b_right = b_y.reshape([ROWS, 2, COLS // 2]).permute((0, 2, 1)).split()
        _store(b_left, d_y, s_y, row, col)
        _store(b_right, d_y, s_y, row, col + COLS // 2)


@gluon.jit
def _store(b_y, d_y, s_y, row, col):
    tma.store_wait(0)  # the store before has read s_y
    s_y.store(b_y)
    fence_async_shared()
    tma.async_copy_shared_to_global(d_y, [row, col], s_y)


@gluon.jit
def _consume(
    d_y, s_y, ring, turn, work, inner, output,
    WHO: gl.constexpr, PARTS: gl.constexpr, GROUP_M: gl.constexpr, BLOCKS: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    s_x, s_w0, s_w1, _, _ = ring
    tiles_m, tiles_n, steps = work
    BLOCK_M: gl.constexpr = s_x.shape[1]
    BLOCK_N: gl.constexpr = s_w0.shape[1] + (s_w1.shape[1] if PARTS == 2 else 0)
    ROWS: gl.constexpr = BLOCK_M // 2
    ROW: gl.constexpr = WHO * ROWS
    slot = 0
    phase = 0
    if LEAD > 0 and WHO == 1:
        mbarrier.wait(turn, 0)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        # 1. Place.
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        row, col = tile_m * BLOCK_M + ROW, tile_n * BLOCK_N
        first = (WHO == 0) & (tile == gl.program_id(0))
        # 2. Load: the producer does. 3. Multiply.
        if BLOCKS:
            b_sum0, b_sum1, slot, phase = _sum_of_blocks(
                ring, turn, slot, phase, steps, first, row, col, inner, ROW, ROWS, PARTS, LEAD
            )
        else:
            b_sum0, b_sum1, slot, phase = _sum(ring, turn, slot, phase, steps, first, ROW, ROWS, PARTS, LEAD)
        # 4. Scale. 5. Store.
        _finish(b_sum0, d_y, s_y, row, col, output, BLOCKS)
        if PARTS == 2:
            _finish(b_sum1, d_y, s_y, row, col + s_w0.shape[1], output, BLOCKS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "K", "x_stride", "x_stride_k"])
def _hopper_dense_kernel(
    d_x, d_w0, d_w1, d_y, p_x_scale, p_w_scale, p_w_blocks, p_x_zero, p_w_sum, p_bias, M, N, K, x_stride, x_stride_k, w_stride,
    STAGES: gl.constexpr, PARTS: gl.constexpr, GROUP_M: gl.constexpr, BLOCKS: gl.constexpr, LEAD: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = d_x.block_type.shape[0]
    BLOCK_K: gl.constexpr = d_x.block_type.shape[1]
    PART0: gl.constexpr = d_w0.block_type.shape[0]
    PART1: gl.constexpr = d_w1.block_type.shape[0]
    s_x = gl.allocate_shared_memory(d_x.dtype, [STAGES, BLOCK_M, BLOCK_K], d_x.layout)
    s_w0 = gl.allocate_shared_memory(d_w0.dtype, [STAGES, PART0, BLOCK_K], d_w0.layout)
    s_w1 = s_w0
    if PARTS == 2:
        s_w1 = gl.allocate_shared_memory(d_w1.dtype, [STAGES, PART1, BLOCK_K], d_w1.layout)
    s_y = gl.allocate_shared_memory(d_y.dtype, [2, BLOCK_M // 2, d_y.block_type.shape[1]], d_y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)  # the producer, and the bytes it announced
        mbarrier.init(empty.index(slot), count=2)  # both consumers
    mbarrier.init(turn, count=1)
    after_previous(OVERLAP)
    ring = (s_x, s_w0, s_w1, full, empty)
    work = (gl.cdiv(M, BLOCK_M), gl.cdiv(N, PART0 + (PART1 if PARTS == 2 else 0)), gl.cdiv(K, BLOCK_K))
    inner = (p_x_scale, p_w_blocks, M, N, x_stride, x_stride_k)  # scales inside the sum, and behind it
    output = (p_x_scale, p_w_scale, p_x_zero, p_w_sum, p_bias, M, N, x_stride, w_stride)
    gl.warp_specialize(
        [
            (_consume, (d_y, s_y.index(0), ring, turn, work, inner, output, 0, PARTS, GROUP_M, BLOCKS, LEAD)),
            (_consume, (d_y, s_y.index(1), ring, turn, work, inner, output, 1, PARTS, GROUP_M, BLOCKS, LEAD)),
            (_produce, (d_x, d_w0, d_w1, ring, work, PARTS, GROUP_M)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[232, 40],
    )


# ---- what the twins call -----------------------------------------------------------------------------------------------------


def matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    *,
    x_zero: Tensor | None = None,
    w_sum: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
    config: Mapping[str, int | str],
) -> Tensor:
    """``w8a8_matmul`` of int8 and ``fp8_matmul`` of float8_e4m3fn codes, whose arguments these are, already checked.

    Args:
        config: one of :func:`search_space`.

    Raises:
        ValueError: a GPU or a version of Triton these kernels are not for, rows that TMA cannot walk over, or a configuration that
            scales of blocks cannot have.
    """
    (m, k), n, target = x_codes.shape, w_codes.shape[0], target_of(x_codes, "x_codes")
    if not available(target) or not has_descriptors(n, k, target):
        raise ValueError(
            f"config asks for the kernel of Hopper and Triton 3.6 with K a multiple of 16 and N of 8, but this is a {target.name} "
            f"with Triton {triton.__version__} and w_codes is {[n, k]}: take another config"
        )
    rows, cols, stages = config["block_m"], config["block_n"], config["stages"]
    by_block = tuple(w_scale.shape) == (-(-n // BLOCK), -(-k // BLOCK)) and tuple(w_scale.shape) not in ((1, 1), (n, 1))
    blocks = by_block or x_scale.shape[1] > 1
    if blocks and (rows > 128 or (cols % BLOCK and BLOCK % cols)):
        raise ValueError(
            f"config has tiles of {rows} x {cols}, but with scales of blocks they are 128 x 64, 128 or 256: whole blocks"
        )
    y = torch.empty((m, n), dtype=dtype, device=x_codes.device)
    code = gl.int8 if x_codes.dtype == torch.int8 else gl.float8e4nv
    parts = _parts(cols, halves=blocks or code == gl.int8)
    left = _SHARED - stages * (rows + cols) * BLOCK
    width = parts[-1] if rows * parts[-1] * 2 <= left and len(set(parts)) == 1 else parts[0] // 2

    def descriptor(tensor: Tensor, shape: list[int], element: gl.dtype) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(
            row_major(tensor), shape, gl.NVMMASharedLayout.get_default_for(shape, element)
        )

    descriptors = (
        descriptor(x_codes, [rows, BLOCK], code),
        descriptor(w_codes, [parts[0], BLOCK], code),
        descriptor(w_codes, [parts[-1], BLOCK], code),
        descriptor(y, [rows // 2, width], gl.float16 if dtype == torch.float16 else gl.bfloat16),
    )
    scales = (x_scale, None if by_block else w_scale, w_scale if by_block else None)
    x_strides = (x_scale.shape[1] if x_scale.shape[0] > 1 else 0, int(x_scale.shape[1] > 1))
    tiles = triton.cdiv(m, rows) * triton.cdiv(n, cols)
    _hopper_dense_kernel[(min(tiles, target.processors),)](
        *descriptors, *scales, x_zero, None if x_zero is None else w_sum, bias, m, n, k, *x_strides, int(w_scale.numel() > 1),
        STAGES=stages, PARTS=len(parts), GROUP_M=config["group_m"], BLOCKS=blocks, LEAD=config["lead"],
        num_warps=4, **overlapped(target),
    )  # fmt: skip
    return y
