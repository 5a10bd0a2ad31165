"""What every wrapper asks of its arguments before a kernel is launched, and of the device that will run it.

Errors are plain :class:`TypeError` and :class:`ValueError`; each is one sentence that names the argument, what came, what
is wanted and how to get it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
from torch import Tensor

#: Whether kernels run in Triton's interpreter, on the CPU. Read once: Triton decides at decoration time.
INTERPRET: bool = bool(triton.knobs.runtime.interpret)

#: Whether the Gluon kernels can be imported: their language changes between versions of Triton, and has no interpreter.
HAS_GLUON: bool = triton.__version__.startswith("3.6.") and not INTERPRET
GLUON_LIMITS = (
    "it needs Hopper, Triton 3.6, rows of whole 16 bytes and a form that was compared on a GPU (float16, no bias, ...; "
    "bench/notes/hopper_w4.md); take another config, or None"
)


class Target(NamedTuple):
    """The device a kernel is compiled for."""

    name: str  #: as torch spells it, "NVIDIA H100 80GB HBM3"; "interpreter" without a GPU
    capability: tuple[int, int]  #: (9, 0) for Hopper
    processors: int  #: streaming multiprocessors


#: What is taken for the device instead of looking: the interpreter, or the GPU a test compiles for without having one.
assumed: Target | None = Target("interpreter", (9, 0), 4) if INTERPRET else None


def target_of(tensor: Tensor, argument: str) -> Target:
    """The device of a tensor, refused if no kernel can run there.

    Raises:
        ValueError: a tensor that is not on a CUDA device, outside the interpreter, or not on the current one, where Triton
            would launch; a GPU older than Ampere.
    """
    if assumed is not None:
        return assumed
    if not tensor.is_cuda:
        raise ValueError(
            f"{argument} is on {tensor.device}, but the kernel runs on a CUDA GPU: move it with .cuda(), "
            "or set TRITON_INTERPRET=1 before Triton is imported to run on the CPU (slow, for learning)"
        )
    if tensor.device.index != torch.cuda.current_device():
        raise ValueError(
            f"{argument} is on {tensor.device}, but kernels are launched on the current device, "
            f"cuda:{torch.cuda.current_device()}: call this inside `with torch.cuda.device({str(tensor.device)!r}):`"
        )
    properties = torch.cuda.get_device_properties(tensor.device)
    target = Target(properties.name, (properties.major, properties.minor), properties.multi_processor_count)
    if target.capability < (8, 0):
        raise ValueError(f"{argument} is on a {target.name}, but these kernels need compute capability 8.0 or newer")
    return target


def check_kernel(config: Mapping | None, kernels: Mapping[str, str]) -> None:
    """A configuration given by the caller names one of the family's kernels and has its keys (a string of words each).

    Raises:
        TypeError: it is no mapping.
        ValueError: it names no kernel, or lacks a key.
    """
    if config is None:
        return
    check_keys(config, "")
    if config.get("kernel") not in kernels:
        raise ValueError(
            f"config must name its kernel, one of {', '.join(kernels)}, got {config.get('kernel')!r}: "
            "take one from search_space, or None"
        )
    check_keys(config, kernels[config["kernel"]])


def check_keys(config: Mapping | None, keys: str) -> None:
    """A configuration given by the caller has these keys, a string of words (TypeError: no mapping; ValueError)."""
    if config is None:
        return
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a dict, got {type(config).__name__}: take one from search_space, or None")
    if lacking := [key for key in keys.split() if key not in config]:
        raise ValueError(f"config lacks {', '.join(lacking)}: take one from search_space, or None")


def check_codes(codes: Tensor) -> None:
    """Codes of 4 bits, ``[n, k]``, before they are packed: more would spill into their neighbours.

    Raises:
        TypeError: no tensor of two dimensions and whole numbers.
        ValueError: a code outside 0 to 15, or -8 to 7.
    """
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.is_complex() or codes.ndim != 2:
        got = f"{codes.dtype} of shape {list(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"codes must be uint8 or int8 [n, k], got {got}")
    low, high = (int(bound) for bound in codes.aminmax()) if codes.numel() else (0, 0)
    if low < -8 or high > (7 if low < 0 else 15):
        raise ValueError(f"codes must be within 0 to 15 or -8 to 7, got {low} to {high}: quantize to 4 bits first")


def check_tensor(
    argument: str,
    tensor: Tensor,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device,
    what: str = "",
) -> None:
    """One tensor has the dtype, shape (``None``: any size), device and layout a kernel reads.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, not contiguous, or not aligned to 16 bytes.
    """
    meaning = f" ({what})" if what else ""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}{meaning} must be a tensor, got {type(tensor).__name__}")
    wanted = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in wanted:
        names = " or ".join(str(d).removeprefix("torch.") for d in wanted)
        raise TypeError(f"{argument}{meaning} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.ndim != len(shape) or any(s is not None and s != t for s, t in zip(shape, tensor.shape, strict=True)):
        want = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{argument}{meaning} must have shape [{want}], got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{argument}{meaning} is on {tensor.device}, the first argument on {device}: move one of them")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{argument}{meaning} is not contiguous, strides {tensor.stride()}: pass {argument}.contiguous()"
        )
    if tensor.numel() and tensor.data_ptr() % 16:
        raise ValueError(f"{argument}{meaning} does not start at a multiple of 16 bytes: pass {argument}.clone()")


def row_major(matrix: Tensor) -> Tensor:
    """A contiguous matrix with the strides of its shape, as descriptors need them.

    PyTorch calls a matrix of one row contiguous whatever the stride of its rows, and ``[n, 1].T`` has a stride of one element.

    >>> column = torch.ones(64, 1)
    >>> column.T.is_contiguous(), column.T.stride(), row_major(column.T).stride()
    (True, (1, 1), (64, 1))
    """
    return matrix.as_strided(matrix.shape, (matrix.shape[1], 1))
