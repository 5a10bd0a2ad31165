"""The layout of AWQ checkpoints, version "gemm", as AutoAWQ wrote it and its successors read it.

With K inputs, N outputs, G groups, for each linear layer::

    qweight  int32 [K, N / 8]    codes 0 to 15, packed along the outputs
    qzeros   int32 [G, N / 8]    zero points, packed in the same way
    scales   float16 [G, N]

    Ŵ[n, k] = scales[g, n] (code[n, k] - z[n, g]),  g = k // group_size

Nibble i of word c holds output ``8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]``: even ones low, odd ones high, which a kernel
splits with one shift. The layout has four bits only. A symmetric grid is stored with z = 8; ``"sym": true`` in the
config, which only lqedu reads, tells it from one whose zero points happen to be 8.

Source: AutoAWQ 0.2.9 ``modules/linear/gemm.py``. Chapter ``21-serving``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lqedu.checkpoint.layout import (
    LinearParts,
    exactly,
    field,
    from_unsigned,
    group_grid,
    nothing_else,
    one_scheme,
    take,
    take_scale,
    unsigned,
    weight_only,
)
from lqedu.errors import CheckpointError, ExportError
from lqedu.formats.packing import pack_words, unpack_words

NAME = "awq"


def encode(linear: LinearParts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a layer, by name, and its scheme.

    Raises:
        ExportError: a layer that this layout cannot hold.
    """
    weight = weight_only(linear, NAME)
    grid, rows = weight.grid, weight.shape[0]
    if grid.bits != 4:
        raise ExportError(f"it has {grid.bits} bits, and {NAME} has 4")
    if grid.granularity == "tensor":
        raise ExportError(f"one scale serves the whole weight, and {NAME} has one a row or group")
    if rows % 8:
        raise ExportError(f"{rows} outputs do not fill words of 8 codes")
    codes, zero = unsigned(weight)
    tensors = {
        "qweight": pack_words(codes.T, "awq"),
        "qzeros": pack_words(zero.T, "awq"),
        "scales": exactly(weight.scale, torch.float16, "its scales").T.contiguous(),
    }
    return tensors, {"bits": 4, "group_size": grid.group_size or -1, "sym": grid.symmetric}


def decode(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], shape: tuple[int, int]) -> LinearParts:
    """The parts of a layer ``[out, in]`` from its tensors; inverse of :func:`encode`.

    Raises:
        CheckpointError: tensors that do not fit the scheme or the shape.
    """
    nothing_else(tensors, "qweight", "qzeros", "scales")
    rows, columns = shape
    size = columns if scheme["group_size"] == -1 else scheme["group_size"]
    if columns % size:
        raise CheckpointError(f"groups of {size} do not divide its {columns} inputs")
    if rows % 8:
        raise CheckpointError(f"{rows} outputs do not fill words of 8 codes")
    codes = unpack_words(take(tensors, "qweight", (columns, rows // 8), torch.int32), "awq").T
    zero = unpack_words(take(tensors, "qzeros", (columns // size, rows // 8), torch.int32), "awq").T
    scale = take_scale(tensors, "scales", (columns // size, rows)).T.contiguous()
    grid = group_grid(4, scheme["sym"], scheme["group_size"], scale.dtype)
    return LinearParts(from_unsigned(codes.contiguous(), scale, zero, grid))


def config(schemes: Mapping[str, dict], dense: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` for layers with these schemes (ExportError where they differ).

    Args:
        schemes: of each quantized layer.
        dense: names of the linear layers that are not quantized.
    """
    return {
        "quant_method": NAME,
        "version": "gemm",
        **one_scheme(schemes, NAME),
        "zero_point": True,
        "modules_to_not_convert": sorted(dense) or None,
    }


def schemes(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], names: set[str]
) -> dict[str, dict[str, Any]]:
    """The scheme of each quantized layer.

    Args:
        config: ``quantization_config``.
        shapes: ``[out, in]`` of each linear layer of the model, by name.
        names: of all tensors of the checkpoint.

    Raises:
        CheckpointError: a config that this layout does not know.
    """
    bits = field(config, "bits", int, field(config, "w_bit", int, 4))
    size = field(config, "group_size", int, field(config, "q_group_size", int, 128))
    version = field(config, "version", str, "gemm").lower()
    if bits != 4:
        raise CheckpointError(f"it has {bits} bits, and {NAME} has 4")
    if size != -1 and size < 1:
        raise CheckpointError(f"'group_size' of its quantization config is {size}; it is -1 or a size")
    if version != "gemm":
        raise CheckpointError(f"its version is {version!r}, and only 'gemm' is read")
    scheme = {"bits": 4, "group_size": size, "sym": field(config, "sym", bool, False)}
    return {name: scheme for name in shapes if f"{name}.qweight" in names}
