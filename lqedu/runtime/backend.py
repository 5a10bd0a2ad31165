"""Stored weights as the kernels read them; the only module of ``lqedu`` that imports ``lqedu_kernels``.

    packed = kernel_weight(quantized)          # the same codes and scales, in the order of a GPU's registers
    y = kernel_linear(x, packed)               # the Triton kernel on a GPU, its reference in PyTorch elsewhere

Nothing is rounded on the way: a kernel's weight decodes to what the stored one decodes to. Chapters ``04`` to ``17`` compare
their layers with this in their section *On hardware*.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from lqedu.errors import GridError, MissingDependencyError
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Tensor
from lqedu.formats.progressive import ProgressiveTensor
from lqedu.formats.qtensor import QTensor
from lqedu.formats.requantized import RequantizedTensor
from lqedu.formats.stored import StoredWeight


@dataclass(frozen=True)
class KernelWeight:
    """A weight in a kernel's layout.

    Attributes:
        operation: which family of kernels reads it.
        tensors: what it is called with, by the names of its arguments.
        options: the arguments that are no tensors.
        shape: ``(out, in)``.
    """

    operation: Literal["w4a16", "w8a8", "w4a8", "fp8"]
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def to(self, device: torch.device | str) -> "KernelWeight":
        """The same weight on another device."""
        tensors = {name: t.to(device) for name, t in self.tensors.items()}
        return KernelWeight(self.operation, tensors, self.options, self.shape)


def kernel_weight(weight: StoredWeight, *, integer_inputs: bool = False) -> KernelWeight:
    """A stored weight in the layout of the kernel that runs it, losslessly.

    Args:
        weight: 4-bit codes by channel or in groups of 32, 64 or 128 (for 16-bit activations); with ``integer_inputs`` 8-bit
            codes by channel, or symmetric 4-bit codes by channel; a progressive or requantized weight (W4A8); FP8.
        integer_inputs: the activations will be int8 codes.

    Raises:
        GridError: a weight that no kernel reads; the sentence says which ones do.
        MissingDependencyError: Triton is not installed.
    """
    if isinstance(weight, QTensor):
        make = _integer_channels if integer_inputs else _weight_only
        return make(weight)
    if isinstance(weight, ProgressiveTensor):
        return _progressive(weight)
    if isinstance(weight, RequantizedTensor):
        return _requantized(weight)
    if isinstance(weight, Float8Tensor):
        return _float8(weight)
    raise GridError(f"no kernel reads a {type(weight).__name__}; kernels read QTensor, two-level and FP8 weights")


def kernel_linear(x: Tensor, weight: KernelWeight, grid: ActivationGrid | Float8ActivationGrid | None = None) -> Tensor:
    """``x w^T`` through the kernel on a GPU, through its PyTorch reference elsewhere.

    Args:
        x: activations ``[..., in]``, float16 or bfloat16, on the device of the weight.
        weight: from :func:`kernel_weight`.
        grid: how activations become codes; needed for all but W4A16.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        GridError: activations on a grid that this kernel does not multiply.
    """
    flat = x.reshape(-1, x.shape[-1])
    run = _function(weight.operation, on_gpu=x.is_cuda)
    with torch.cuda.device_of(x):  # Triton launches on the current device, and a model may be spread over several
        if weight.operation == "w4a16":
            y = run(flat, **weight.tensors, **weight.options)
        else:
            y = run(**_inputs(flat, weight, grid), **weight.tensors, **weight.options, dtype=x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def _function(operation: str, *, on_gpu: bool) -> Callable[..., Tensor]:
    return getattr(_kernels(operation), f"{operation}_{'matmul' if on_gpu else 'reference'}")


def _kernels(family: str) -> ModuleType:
    """One family's module; imported here and not above, because ``lqedu`` works without Triton."""
    from importlib import import_module

    try:
        return import_module(f"lqedu_kernels.{family}")
    except ImportError as error:
        raise MissingDependencyError(str(error)) from error


# --- weights ----------------------------------------------------------------------------------------------------------


def _weight_only(weight: QTensor) -> KernelWeight:
    grid, w4a16 = weight.grid, _kernels("w4a16")
    whole = grid.granularity == "channel"
    groups = grid.granularity == "group" and grid.axis == 1 and grid.group_size in (32, 64, 128)
    if grid.bits != 4 or not (whole or groups):
        raise GridError(
            f"the W4A16 kernel reads 4-bit codes by channel or in groups of 32, 64 or 128 inputs, got {grid}; "
            "for 8 bits pass integer_inputs=True"
        )
    unsigned = (weight.codes.to(torch.int16) - grid.code_min).to(torch.uint8)
    scale = weight.scale.T.contiguous()
    tensors = {"words": w4a16.pack_w4a16(unsigned), "scale": scale}
    if weight.zero is not None:
        tensors["zero"] = weight.zero.T.contiguous()
    return KernelWeight("w4a16", tensors, {"group_size": None if whole else grid.group_size}, tuple(weight.codes.shape))


def _integer_channels(weight: QTensor) -> KernelWeight:
    grid = weight.grid
    if grid.granularity != "channel" or not grid.symmetric or grid.bits not in (4, 8):
        raise GridError(
            f"integer kernels read symmetric codes of 4 or 8 bits by channel, got {grid}; groups need a second level "
            "(formats progressive and requantized)"
        )
    shape = tuple(weight.codes.shape)
    if grid.bits == 8:
        return KernelWeight("w8a8", {"w_codes": weight.codes.contiguous(), "w_scale": weight.scale}, {}, shape)
    w4a8 = _kernels("w4a8")
    scale = weight.scale.to(torch.float32).flatten()
    return KernelWeight("w4a8", {"codes": w4a8.pack_w4a8(weight.codes), "scale": scale}, {}, shape)


def _progressive(weight: ProgressiveTensor) -> KernelWeight:
    w4a8 = _kernels("w4a8")
    step, zero = weight.group_scale, weight.zero.to(torch.int32)
    offset = zero * step.to(torch.int32) if weight.grid.zero == "code" else zero
    groups = w4a8.pack_groups(step, offset)
    tensors = {"codes": w4a8.pack_w4a8(weight.codes), "scale": weight.channel_scale.flatten(), "groups": groups}
    return KernelWeight("w4a8", tensors, {"group_size": weight.grid.group_size}, tuple(weight.codes.shape))


def _requantized(weight: RequantizedTensor) -> KernelWeight:
    w4a8 = _kernels("w4a8")
    nibbles = (weight.codes.to(torch.int16) + 8).to(torch.uint8)
    tensors = {
        "codes": w4a8.pack_w4a8(nibbles),
        "scale": weight.channel_scale.flatten(),
        "groups": w4a8.pack_ratios(weight.group_ratio),
    }
    return KernelWeight("w4a8", tensors, {"group_size": weight.grid.group_size}, tuple(weight.codes.shape))


def _float8(weight: Float8Tensor) -> KernelWeight:
    if weight.grid.format != "E4M3" or weight.grid.block_size != 128:
        raise GridError(f"the FP8 kernel reads E4M3 weights by tensor, channel or 128 x 128 block, got {weight.grid}")
    tensors = {"w_codes": weight.codes.view(torch.float8_e4m3fn), "w_scale": weight.scale}
    return KernelWeight("fp8", tensors, {}, tuple(weight.codes.shape))


# --- activations ------------------------------------------------------------------------------------------------------


def _inputs(x: Tensor, weight: KernelWeight, grid: ActivationGrid | Float8ActivationGrid | None) -> dict[str, Tensor]:
    """Codes and scales of activations ``[tokens, in]``, by the names of the kernel's arguments."""
    wanted = Float8ActivationGrid if weight.operation == "fp8" else ActivationGrid
    if not isinstance(grid, wanted):
        raise GridError(f"the {weight.operation} kernel multiplies codes of a {wanted.__name__}, got {grid!r}")
    scale, zero = grid.fit(x)
    codes = grid.encode(x, scale, zero)
    if weight.operation == "fp8":
        scale = scale.reshape(-1, scale.shape[-1])
        return {"x_codes": codes.view(torch.float8_e4m3fn), "x_scale": scale}
    if grid.bits != 8:
        raise GridError(f"the {weight.operation} kernel multiplies 8-bit codes, got {grid}")
    if weight.operation == "w8a8":
        inputs = {"x_codes": codes, "x_scale": scale.expand(len(x), 1).contiguous()}
        if zero is not None:
            sums = _kernels("w8a8").row_sums(weight.tensors["w_codes"])
            inputs |= {"x_zero": zero.expand(len(x), 1).to(torch.int32).contiguous(), "w_sum": sums}
        return inputs
    if zero is not None:
        raise GridError("the W4A8 kernel multiplies symmetric codes of activations; use ActivationGrid(symmetric=True)")
    return {"x": codes, "x_scale": scale.expand(len(x), 1).reshape(-1).contiguous()}
