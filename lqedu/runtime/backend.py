"""Stored weights as the kernels read them; the only module of ``lqedu`` that imports ``lqedu_kernels``.

    packed = kernel_weight(quantized)          # the same codes and scales, in the order of a GPU's registers
    y = kernel_linear(x, packed)               # the Triton kernel on a GPU, its reference in PyTorch elsewhere

Nothing is rounded on the way: a kernel's weight decodes to what the stored one decodes to. Chapters ``04`` to ``17`` compare
their layers with this in their section *On hardware*.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lqedu.errors import GridError, MissingDependencyError
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Tensor
from lqedu.formats.progressive import ProgressiveTensor
from lqedu.formats.qtensor import QTensor
from lqedu.formats.requantized import RequantizedTensor
from lqedu.formats.stored import StoredWeight

if TYPE_CHECKING:
    from lqedu.runtime.codes import Inputs


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


def kernel_weight(weight: StoredWeight, *, integer_inputs: bool = False, zero_points: bool = False) -> KernelWeight:
    """A stored weight in the layout of the kernel that runs it, losslessly.

    Args:
        weight: 4-bit codes by channel or in groups of 32, 64 or 128 (for 16-bit activations); with ``integer_inputs`` 8-bit
            symmetric codes by channel or tensor, or 4-bit codes by channel; a progressive or requantized weight in groups of
            64 or 128 (W4A8); FP8.
        integer_inputs: the activations will be int8 codes.
        zero_points: these codes will have zero points. The sums of the weight's rows, which a zero point is multiplied
            with, are computed here and kept as ``w_sum``.

    Raises:
        GridError: a weight that no kernel reads; the sentence says which ones do.
        MissingDependencyError: Triton is not installed.
    """
    if isinstance(weight, QTensor):
        return _integer_channels(weight, zero_points) if integer_inputs else _weight_only(weight)
    if isinstance(weight, ProgressiveTensor):
        return _progressive(weight)
    if isinstance(weight, RequantizedTensor):
        return _requantized(weight)
    if isinstance(weight, Float8Tensor):
        return _float8(weight)
    raise GridError(f"no kernel reads a {type(weight).__name__}; kernels read QTensor, two-level and FP8 weights")


def kernel_linear(
    x: Tensor,
    weight: KernelWeight,
    grid: ActivationGrid | Float8ActivationGrid | None = None,
    *,
    static: tuple[Tensor, Tensor | None] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x w^T + bias`` through the kernel on a GPU, through its PyTorch reference elsewhere.

    Args:
        x: activations ``[..., in]``, float16 or bfloat16 (references: float32 too), on the device of the weight.
        weight: from :func:`kernel_weight`.
        grid: how activations become codes; needed for all but W4A16.
        static: scale and zero point of a static grid.
        bias: ``[out]``.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        GridError: activations on a grid that this kernel does not multiply, or (found on the CPU only) that are not finite.
    """
    from lqedu.runtime.codes import encode_inputs  # which asks this module for kernels

    flat = x.reshape(-1, x.shape[-1])
    with torch.cuda.device_of(x):  # Triton launches on the current device, and a model may be spread over several
        inputs: Tensor | Inputs = flat
        if weight.operation != "w4a16":
            check_inputs_grid(weight, grid)
            inputs = encode_inputs(flat, grid, static, sums="zero" in weight.tensors)
        y = kernel_product(inputs, weight, x.dtype, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def kernel_product(
    inputs: "Tensor | Inputs", weight: KernelWeight, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """The product alone: ``[tokens, out]`` in ``dtype`` from activations ``[tokens, in]`` or their codes.

    Args:
        inputs: what :func:`lqedu.runtime.codes.encode_inputs` returns; the activations themselves for W4A16.
        weight, dtype, bias: as in :func:`kernel_linear`.
    """
    tensors, options, operation = dict(weight.tensors), weight.options, weight.operation
    if operation == "w4a16":
        run = kernel_function(operation, f"{operation}_matmul", f"{operation}_reference", inputs)
        return run(inputs, **tensors, **options, bias=bias)
    run = kernel_function(operation, f"{operation}_matmul", f"{operation}_reference", inputs.codes)
    w_sum = tensors.pop("w_sum", None)
    if operation == "w4a8":
        arguments = {"x": inputs.codes, "x_scale": inputs.scale.reshape(-1)}
        if inputs.zero is not None:  # a zero point of tokens is to rows what one of rows is to tokens
            w_sum = _sums_of_nibbles(weight) if w_sum is None else w_sum
            arguments |= {"zero": w_sum, "x_sum": inputs.zero.reshape(-1).to(torch.int32)}
        elif "zero" in tensors:
            arguments["x_sum"] = inputs.sums.reshape(-1)
    else:
        arguments = {"x_codes": inputs.codes, "x_scale": inputs.scale}
        if inputs.zero is not None:
            w_sum = kernels("w8a8").row_sums(tensors["w_codes"]) if w_sum is None else w_sum
            arguments |= {"x_zero": inputs.zero, "w_sum": w_sum}
    return run(**arguments, **tensors, **options, bias=bias, dtype=dtype)


def check_inputs_grid(weight: KernelWeight, grid: object) -> None:
    """Refuse (GridError) a grid of activations that the kernel of this weight does not multiply."""
    wanted = Float8ActivationGrid if weight.operation == "fp8" else ActivationGrid
    if not isinstance(grid, wanted):
        raise GridError(f"the {weight.operation} kernel multiplies codes of a {wanted.__name__}, got {grid!r}")
    if weight.operation == "fp8":
        if grid.format != "E4M3" or (grid.granularity == "group" and grid.group_size != 128):
            raise GridError(f"the FP8 kernel multiplies E4M3 codes, with groups of 128 if any, got {grid!r}")
    elif weight.operation == "w4a8" and not grid.symmetric and ("groups" in weight.tensors or "zero" in weight.tensors):
        raise GridError(
            "the W4A8 kernel multiplies symmetric codes of activations with this weight, because zero points of one side "
            "are all it takes; use ActivationGrid(symmetric=True)"
        )


def kernel_function(family: str, fast: str, reference: str, like: Tensor) -> Callable[..., Any]:
    """One of a family's two functions by the device of a tensor: the kernel on a GPU, the reference elsewhere."""
    return getattr(kernels(family), fast if runs_kernels(like) else reference)


def runs_kernels(x: Tensor) -> bool:
    """Whether what is done to a tensor is done by kernels: on a GPU. The one place that says so."""
    return x.is_cuda


def kernels(family: str) -> ModuleType:
    """One family's module; imported here and not above, because ``lqedu`` works without Triton.

    Raises:
        MissingDependencyError: Triton is not installed.
    """
    from importlib import import_module

    try:
        return import_module(f"lqedu_kernels.{family}")
    except ImportError as error:
        raise MissingDependencyError(str(error)) from error


# --- weights ----------------------------------------------------------------------------------------------------------


def _weight_only(weight: QTensor) -> KernelWeight:
    grid, w4a16 = weight.grid, kernels("w4a16")
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


def _integer_channels(weight: QTensor, zero_points: bool) -> KernelWeight:
    grid, shape = weight.grid, tuple(weight.codes.shape)
    if grid.bits == 8 and grid.symmetric and grid.granularity in ("channel", "tensor"):
        codes = weight.codes.contiguous()
        tensors = {"w_codes": codes, "w_scale": weight.scale}
        return KernelWeight("w8a8", tensors | _sums(codes, zero_points), {}, shape)
    whole = grid.symmetric or (grid.zero_point == "integer" and not zero_points)
    if grid.bits != 4 or grid.granularity != "channel" or not whole:
        raise GridError(
            "integer kernels read symmetric codes of 8 bits by channel or tensor, or of 4 bits by channel (with integer zero "
            f"points where the activations have none), got {grid}; groups need a second level (formats progressive and requantized)"
        )
    # nibbles are signed: an unsigned code moves by 8, and its zero point with it
    codes = (weight.codes.to(torch.int16) - (0 if grid.symmetric else 8)).to(torch.int8)
    scale = weight.scale.flatten()
    tensors = {
        "codes": kernels("w4a8").pack_w4a8(codes),
        "scale": scale if scale.dtype == torch.float16 else scale.float(),
    }
    if weight.zero is not None:
        tensors["zero"] = (weight.zero.to(torch.int32) - 8).flatten()
    return KernelWeight("w4a8", tensors | _sums(codes, zero_points), {}, shape)


def _sums(codes: Tensor, zero_points: bool) -> dict[str, Tensor]:
    return {"w_sum": codes.sum(1, dtype=torch.int32)} if zero_points else {}


def _sums_of_nibbles(weight: KernelWeight) -> Tensor:
    return kernels("w4a8").int8_weight(weight.tensors["codes"], None, weight.shape[1]).sum(1, dtype=torch.int32)


def _progressive(weight: ProgressiveTensor) -> KernelWeight:
    _check_groups(weight.grid.group_size)
    w4a8 = kernels("w4a8")
    step, zero = weight.group_scale, weight.zero.to(torch.int32)
    offset = zero * step.to(torch.int32) if weight.grid.zero == "code" else zero
    groups = w4a8.pack_groups(step, offset)
    tensors = {"codes": w4a8.pack_w4a8(weight.codes), "scale": weight.channel_scale.flatten(), "groups": groups}
    return KernelWeight("w4a8", tensors, {"group_size": weight.grid.group_size}, tuple(weight.codes.shape))


def _requantized(weight: RequantizedTensor) -> KernelWeight:
    _check_groups(weight.grid.group_size)
    w4a8 = kernels("w4a8")
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


def _check_groups(size: int) -> None:
    if size not in (64, 128):
        raise GridError(f"the W4A8 kernel reads groups of 64 or 128 inputs, got {size}; quantize with one of these")
