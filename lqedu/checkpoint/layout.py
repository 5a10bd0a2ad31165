"""What the layouts of other tools share: a linear layer as its parts, and the steps between our codes and theirs.

Every module beside this one describes one layout by the same five names::

    NAME                             its ``quant_method`` in config.json
    encode(linear)                   parts of a linear layer -> tensors of the file, and what its config says of it
    decode(tensors, scheme, shape)   the inverse
    config(schemes, dense)           config.json's ``quantization_config`` for all layers
    schemes(config, shapes, names)   the inverse: what it says of each linear layer

None of them changes a number. A layer that a layout cannot hold is an :class:`lqedu.errors.ExportError`, a file that
does not keep to its layout a :class:`lqedu.errors.CheckpointError`. Chapter ``21-serving``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lqedu.errors import CheckpointError, ExportError
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.fp8 import Float8Tensor
from lqedu.formats.progressive import ProgressiveTensor
from lqedu.formats.requantized import RequantizedTensor
from lqedu.runtime.incoherent import IncoherentWeight
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.linear import QuantLinear
from lqedu.runtime.permuted import PermutedWeight

_WORDS: dict[type, str] = {
    Float8Tensor: "FP8 weights",
    IncoherentWeight: "a weight in a rotated basis, which is rotated back while the model runs",
    ProgressiveTensor: "4-bit groups inside an 8-bit channel",
    RequantizedTensor: "4-bit groups that are rounded to 8 bits again",
}


@dataclass(frozen=True)
class LinearParts:
    """Everything a quantized linear layer is made of but its bias, which every layout stores as it is.

    Attributes:
        weight: a stored weight, see ``lqedu.runtime.kinds``.
        path: what happens to the input before the product.
        static: scale and zero point of the input's grid, float32 ``[1]``, where they are constants of the layer.
    """

    weight: Any
    path: InputPath = InputPath()  # noqa: RUF009  (frozen)
    static: tuple[Tensor, Tensor | None] | None = None


def parts_of(layer: QuantLinear) -> LinearParts:
    """The parts of a layer."""
    grid = layer.path.activation
    static = None if grid is None or not grid.static else (layer.input_scale, layer.input_zero)
    return LinearParts(layer.quantized, layer.path, static)


# --- to a file --------------------------------------------------------------------------------------------------------


def weight_only(linear: LinearParts, layout: str) -> QTensor:
    """The weight of a layer on an integer grid whose input stays in floating point (ExportError for any other)."""
    refuse_transform(linear.path)
    if linear.path.activation is not None:
        raise ExportError(f"its inputs are quantized, and {layout} holds weights only")
    return integer(linear.weight, layout)


def integer(weight: Any, layout: str) -> QTensor:
    """A weight on an integer grid with groups along the inputs and integer zero points (ExportError for any other)."""
    if isinstance(weight, PermutedWeight):
        raise ExportError(f"its groups are not runs of consecutive inputs (act-order), and those of {layout} are")
    if not isinstance(weight, QTensor):
        raise ExportError(f"{layout} has no tensors for {_WORDS.get(type(weight), type(weight).__name__)}")
    grid = weight.grid
    if grid.axis == 0:
        raise ExportError(f"its groups run along the outputs, and those of {layout} run along the inputs")
    if grid.zero_point == "float":
        raise ExportError(f"its zero points are floats, and {layout} stores integers")
    return weight


def refuse_transform(path: InputPath) -> None:
    """Refuse (ExportError) a Hadamard transform that runs with every token."""
    if path.hadamard is not None:
        raise ExportError(
            "its input goes through a Hadamard transform while the model runs, and the file has no such step"
        )


def unsigned(weight: QTensor) -> tuple[Tensor, Tensor]:
    """Codes ``[out, in]`` and zero points, both uint8: those of a symmetric grid have ``2**(b-1)`` added."""
    if weight.zero is not None:
        return weight.codes, weight.zero
    half = 1 << (weight.grid.bits - 1)
    codes = (weight.codes.to(torch.int16) + half).to(torch.uint8)
    return codes, torch.full(weight.scale.shape, half, dtype=torch.uint8)


def exactly(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A tensor in another dtype, where that changes no number (ExportError otherwise)."""
    cast = tensor.to(dtype)
    if not torch.equal(cast.to(torch.float64), tensor.to(torch.float64)):
        name = str(dtype).removeprefix("torch.")
        raise ExportError(f"{what} are {str(tensor.dtype).removeprefix('torch.')} numbers that {name} would round")
    return cast


# --- from a file ------------------------------------------------------------------------------------------------------


def from_unsigned(codes: Tensor, scale: Tensor, zero: Tensor, grid: IntGrid) -> QTensor:
    """Inverse of :func:`unsigned`, on a grid with or without zero points.

    Raises:
        CheckpointError: zero points of a symmetric grid that are not ``2**(b-1)``.
    """
    scale = scale.contiguous()
    if not grid.symmetric:
        return QTensor(codes.contiguous(), scale, zero.contiguous(), grid)
    half = 1 << (grid.bits - 1)
    if not bool((zero == half).all()):
        raise CheckpointError(f"the file calls its grid symmetric and stores zero points other than {half}")
    return QTensor((codes.to(torch.int16) - half).to(torch.int8), scale, None, grid)


def take(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The tensor of a layer called ``name``.

    Raises:
        CheckpointError: it is missing, or of another shape or dtype.
    """
    if name not in tensors:
        raise CheckpointError(f"it has no {name}; it has {', '.join(sorted(tensors)) or 'nothing'}")
    tensor = tensors[name]
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise CheckpointError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    return tensor


def take_scale(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor of scales: floating point of 16 bits or more, and finite (CheckpointError otherwise)."""
    scale = take(tensors, name, shape)
    if scale.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise CheckpointError(f"{name} has dtype {scale.dtype}; scales are float16, bfloat16 or float32")
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{name} holds NaN or infinite values")
    return scale


def nothing_else(tensors: Mapping[str, Tensor], *known: str) -> None:
    """Refuse (CheckpointError) tensors of a layer that the layout does not have."""
    if strange := sorted(set(tensors) - set(known)):
        raise CheckpointError(f"it has tensors that its layout does not: {', '.join(strange)}")


def field(config: Mapping[str, Any], name: str, kinds: type | tuple[type, ...], default: Any = ...) -> Any:
    """A field of a config, of one of the types ``kinds``.

    Raises:
        CheckpointError: it is missing without a default, or of another type.
    """
    value = config.get(name, default)
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if value is ...:
        raise CheckpointError(f"its quantization config lacks {name!r}")
    if value is not default and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
        raise CheckpointError(f"{name!r} of its quantization config is {value!r}")
    return value


def group_grid(bits: int, symmetric: bool, group_size: int, scale_dtype: torch.dtype) -> IntGrid:
    """The grid of a weight whose config says ``bits`` and ``group_size``, where -1 is one scale a row.

    How the scales were found is in no file: the grid names the usual formula of its kind, and nothing depends on it.
    """
    if group_size == -1:
        return IntGrid(bits, symmetric, "channel", scale_dtype=scale_dtype)
    return IntGrid(bits, symmetric, "group", group_size, scale_dtype=scale_dtype)


def one_scheme(schemes: Mapping[str, dict], layout: str) -> dict:
    """What all layers have in common, where a config cannot tell them apart (ExportError where they differ)."""
    first, *others = schemes.items()
    for name, scheme in others:
        if scheme != first[1]:
            raise ExportError(f"{layout} has one grid for all layers, and {first[0]} and {name} have different ones")
    return first[1]
