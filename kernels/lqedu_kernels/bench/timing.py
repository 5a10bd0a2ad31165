"""Seconds of a call on a GPU: CUDA-graph replays over copies of the weights that exceed the L2 cache, median of replays."""

import statistics
from collections.abc import Callable, Sequence

import torch

#: Weight copies together are at least this large; the L2 cache of an H100 holds 50 MB.
ROTATION_BYTES = 300 * 2**20
#: Replays are thrown away until this much work has been done: clocks were seen to rise 16 ms after the first replay.
WARM_SECONDS = 0.05


def copies_for(nbytes: int, *, most: int = 64) -> int:
    """How many copies of a weight of this size are rotated."""
    return max(2, min(most, -(-ROTATION_BYTES // max(nbytes, 1))))


def time_calls(calls: Sequence[Callable[[], object]], *, replays: int = 20) -> list[float]:
    """Seconds of one call, one sample a replay; ``calls`` are the same operation on different copies of its operands.

    The calls are captured once, in order, as one CUDA graph; a replay runs all of them, and its time by CUDA events is
    divided by their number, so that launch gaps and the events' resolution do not count.

    Args:
        calls: at least one; each must be capturable and must already have run once (compilation is not timed).
        replays: samples wanted, after a few that are thrown away: clocks need milliseconds of work to rise.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    warm, samples = [], []
    while len(warm) < 3 or (sum(warm) * len(calls) < WARM_SECONDS and len(warm) < 1000):
        warm.append(_replay(graph, len(calls)))
    for _ in range(replays):
        samples.append(_replay(graph, len(calls)))
    return samples


def _replay(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def median_time(calls: Sequence[Callable[[], object]], *, replays: int = 20) -> float:
    """Median of :func:`time_calls`, in seconds."""
    return statistics.median(time_calls(calls, replays=replays))
