"""Which program computes what: tiles in an order that shares operands in the L2 cache, and tiles shared by programs.

A product of ``[M, K]`` and ``[N, K]`` is cut into output tiles, and the sum of a tile into steps of BLOCK_K. Counted tile
after tile, the steps form one line; *stream-K* (Osama et al., arXiv:2301.03598) cuts that line into equal runs, one a program:

    step      0  1  2  3 | 4  5  6  7 | 8  9 10 11        3 tiles of 4 steps
    program   0  0  0  0   0  0  1  1   1  1  1  1        2 programs of 6 steps: tile 1 belongs to both

With as many programs as tiles times s, it is *split-K*: each tile is shared by s programs. A program that holds a part of
a tile writes its partial sum to a slot of its own and counts up the tile's counter; the one that arrives last adds the
parts in the order of the programs and stores the tile. The result is the same for every order of arrival, one launch
is enough, and the counter is set back to 0 for the next launch.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqedu_kernels._tensors import INTERPRET, Target

#: Counters a stream of launches has: no launch shares more tiles than this.
COUNTERS = 4096
_STREAMS = 128


def overlapped(target: Target) -> dict[str, bool]:
    """Arguments of a launch that may begin before the kernel before it has ended; the kernel calls :func:`after_previous`."""
    able = target.capability >= (9, 0) and not INTERPRET
    return {"OVERLAP": able, "launch_pdl": able}


@triton.jit
def after_previous(OVERLAP: tl.constexpr):
    """Wait until the kernel before this one in the stream has ended, when launched before that (``launch_pdl``, Hopper).

    *Programmatic dependent launch*: the next kernel is told at once that it may come, its programs take the places that become
    free, compute what depends on no memory, and wait here. Nothing is read or written before, so results are those of
    launches one after another; a call costs about 1 µs less.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile; GROUP_M rows of tiles are walked together, column by column, so that neighbours share."""
    in_group = GROUP_M * tiles_n
    first_m = (tile // in_group) * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (tile % in_group) % rows, (tile % in_group) // rows


@triton.jit
def first_step(program, steps, programs):
    """Where the run of a program starts on the line of steps; the first ``steps % programs`` runs are one step longer."""
    return program * (steps // programs) + tl.minimum(program, steps % programs)


@triton.jit
def program_of(step, steps, programs):
    """Whose run a step is in: the inverse of :func:`first_step`."""
    run, longer = steps // programs, steps % programs
    in_longer = longer * (run + 1)
    return tl.where(step < in_longer, step // (run + 1), longer + (step - in_longer) // tl.maximum(run, 1))


@triton.jit
def sum_of_programs(b_sum, p_partial, p_counter, tile, begin, steps_k, steps, programs):
    """Hand in a part of a tile's sum; the last of the tile's programs gets the whole.

    Args:
        b_sum: this program's part, ``[ROWS, COLUMNS]``.
        p_partial: two slots of ROWS * COLUMNS numbers for each program: the first for a part that does not begin its tile.
        p_counter: one a tile, 0 between launches.
        tile, begin: the tile, and the step of it at which the part begins.
        steps_k, steps: steps of a tile, and of all tiles.

    Returns:
        The sum, and whether it is the whole.
    """
    ROWS: tl.constexpr = b_sum.shape[0]
    COLUMNS: tl.constexpr = b_sum.shape[1]
    o_slot = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    slot = 2 * tl.program_id(0) + tl.where(begin == 0, 1, 0)
    tl.store(p_partial + slot * (ROWS * COLUMNS) + o_slot, b_sum)
    first = program_of(tile * steps_k, steps, programs)
    last = program_of((tile + 1) * steps_k - 1, steps, programs)
    tl.debug_barrier()  # all threads have written before the program says so
    arrived = tl.atomic_add(p_counter + tile, 1, sem="acq_rel", scope="gpu")
    whole = arrived == last - first
    if whole:
        tl.store(p_counter + tile, 0)
        # The part of the first program begins the tile, those of the others do not.
        b_sum = tl.load(p_partial + (2 * first + 1) * (ROWS * COLUMNS) + o_slot, cache_modifier=".cg")
        for other in range(first + 1, last + 1):
            b_sum += tl.load(p_partial + 2 * other * (ROWS * COLUMNS) + o_slot, cache_modifier=".cg")
    return b_sum, whole


@triton.jit
def sum_of_parts(b_sum, p_partial, p_counter, tile, part, PARTS: tl.constexpr):
    """As :func:`sum_of_programs` where each tile has PARTS programs of its own (split-K), one a part, in this order.

    Args:
        b_sum: the sum of one part, ``[ROWS, COLUMNS]``.
        p_partial: PARTS slots of ROWS * COLUMNS numbers for each tile.
        p_counter: one a tile, 0 between launches.
        tile, part: which this is.
    """
    ROWS: tl.constexpr = b_sum.shape[0]
    COLUMNS: tl.constexpr = b_sum.shape[1]
    p_slot = p_partial + tile * (PARTS * ROWS * COLUMNS)
    p_slot += tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(p_slot + part * (ROWS * COLUMNS), b_sum)
    tl.debug_barrier()  # all threads have written before the program says so
    whole = tl.atomic_add(p_counter + tile, 1, sem="acq_rel", scope="gpu") == PARTS - 1
    if whole:
        tl.store(p_counter + tile, 0)
        b_sum = tl.load(p_slot, cache_modifier=".cg")
        for other in tl.static_range(1, PARTS):
            b_sum += tl.load(p_slot + other * (ROWS * COLUMNS), cache_modifier=".cg")
    return b_sum, whole


@functools.cache
def _counter_pool(device: torch.device) -> tuple[torch.Tensor, dict[int, int]]:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call of a kernel that shares tiles cannot be inside a CUDA graph: call it once before"
        )
    pool = torch.zeros(_STREAMS, COUNTERS, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return pool, {}


def counters(device: torch.device) -> torch.Tensor:
    """The counters of the current stream, int32 zeros; launches of one stream follow one another and can share them.

    A captured CUDA graph keeps those of the stream it was captured on: two such graphs must not run at the same time.

    Raises:
        RuntimeError: a first call on this device during the capture of a graph, or more than 128 streams.
    """
    pool, rows = _counter_pool(device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    row = rows.setdefault(stream, len(rows))
    if row >= _STREAMS:
        raise RuntimeError(f"kernels that share tiles ran on {_STREAMS} streams already: reuse one of them")
    return pool[row]
