"""Calibration by several processes: each reads its part of the windows, and what is learned from them is that of all.

    with data_parallel():                        # inside torchrun, once torch.distributed is initialized
        lqedu.quantize(model, method, calibration)

Every process holds the model (or streams it) and is given all windows; of ``n`` processes number ``r`` runs the windows
``r, r + n, r + 2 n, ...``. Sums (Hessians) and maxima (ranges) go through all-reduce, which leaves the same bits in every
process, so all of them take the same decisions and hold the same result. It differs from that of one process by the order
of the sums. Searches look at few tokens: those are given to every process. Chapter ``21-serving``.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lqedu.errors import CalibrationError, UsageError


@dataclass(frozen=True)
class Processes:
    """How many processes share the calibration, and which of them this is."""

    rank: int = 0
    count: int = 1


_active = Processes()


def processes() -> Processes:
    """Those that share the calibration now: one, outside of :func:`data_parallel`."""
    return _active


@contextmanager
def data_parallel() -> Iterator[Processes]:
    """Inside, :func:`lqedu.quantize` and :func:`lqedu.quantize_folder` share their work among all processes.

    Each process calls them with the same arguments. One alone writes to disk.

    Raises:
        UsageError: ``torch.distributed`` is not initialized.
    """
    import torch.distributed as dist

    global _active
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError("call torch.distributed.init_process_group first, or start the command with torchrun")
    before, _active = _active, Processes(dist.get_rank(), dist.get_world_size())
    try:
        yield _active
    finally:
        _active = before


@contextmanager
def torchrun(device: str | torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """:func:`data_parallel` among the processes that torchrun started; nothing where it started none.

    Args:
        device: "cuda" becomes the GPU of this process, with NCCL; anything else stays, with Gloo.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Processes(), device
        return
    if torch.device(device).type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    with data_parallel() as own:
        yield own, device
    dist.destroy_process_group()  # not behind an error: the others may wait for this process, and torchrun ends them


def my_windows(windows: Tensor) -> Tensor:
    """This process's part of the windows ``[n, ...]``: every ``count``-th.

    Raises:
        CalibrationError: fewer windows than processes.
    """
    if len(windows) < _active.count:
        raise CalibrationError(
            f"{_active.count} processes share {len(windows)} calibration windows; use as many windows, or fewer processes"
        )
    return windows[_active.rank :: _active.count]


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over processes, in the tensor's dtype; the tensor itself where there is one process."""
    return _reduced(tensor, "SUM")


def all_max(tensor: Tensor) -> Tensor:
    """The largest of each element over processes; the tensor itself where there is one process."""
    return _reduced(tensor, "MAX")


def all_extremes(tensor: Tensor) -> Tensor:
    """What has the range of ``tensor`` in all processes: the tensor itself where there is one, else ``[least, largest]``."""
    if _active.count == 1:
        return tensor
    least, largest = -all_max(-tensor.amin()), all_max(tensor.amax())
    return torch.stack([least, largest])


def first_of_all(values: Tensor, count: int) -> Tensor:
    """The first ``count`` of all windows, in every process.

    Args:
        values: an entry for each of this process's windows, ``[n, ...]``.
        count: of windows, at most all there are.
    """
    if _active.count == 1:
        return values[:count]
    gathered = values.new_zeros(count, *values.shape[1:])
    mine = gathered[_active.rank :: _active.count]
    mine.copy_(values[: len(mine)])
    return all_sum(gathered)  # of one value and zeros: exact


def tokens_of_all(values: Tensor, tokens: Tensor) -> Tensor:
    """Tokens by their number in all windows, in every process.

    Args:
        values: of this process's windows, ``[n, length, features]``.
        tokens: numbers ``window * length + position``, int64 ``[k]``.

    Returns:
        ``[k, features]``.
    """
    windows, positions = tokens // values.shape[1], tokens % values.shape[1]
    mine = windows % _active.count == _active.rank
    gathered = values.new_zeros(len(tokens), values.shape[-1])
    gathered[mine] = values[windows[mine] // _active.count, positions[mine]]
    return all_sum(gathered)


def from_first(value: Any) -> Any:
    """What the first process holds, in every process."""
    if _active.count == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def check_agreement(digest: bytes, what: str) -> None:
    """Refuse (CalibrationError) to go on where processes hold different results: they would drift apart unseen."""
    if _active.count == 1:
        return
    number = torch.tensor(int.from_bytes(digest[:7], "big"))
    if int(all_max(number)) != -int(all_max(-number)):
        raise CalibrationError(
            f"the processes have different results for {what}; run them on equal machines and builds"
        )


def _reduced(tensor: Tensor, operation: str) -> Tensor:
    if _active.count == 1:
        return tensor
    import torch.distributed as dist

    device = tensor.device
    if dist.get_backend() == "nccl" and not tensor.is_cuda:
        device = torch.device("cuda", torch.cuda.current_device())
    result = tensor.detach().to(device, copy=True).contiguous()
    dist.all_reduce(result, getattr(dist.ReduceOp, operation))
    return result.to(tensor.device)
