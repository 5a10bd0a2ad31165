"""The layout of GPTQ checkpoints, as AutoGPTQ began it and GPTQModel writes it.

With b bits, K inputs, N outputs, G groups, for each linear layer::

    qweight  int32 [K b / 32, N]     codes 0 to 2**b - 1, packed along the inputs
    qzeros   int32 [G, N b / 32]     zero points, packed along the outputs; version 1 ("gptq") stores z - 1, version 2 z
    scales   float16 [G, N]
    g_idx    int32 [K]               group of each input

    Ŵ[n, k] = scales[g, n] (code[n, k] - z[n, g]),  g = g_idx[k]

A symmetric grid is stored with z = 2**(b-1). In version 1 that is the well-known nibble 7; a zero point of 0 would be
-1 and is refused. Exports are version 1; both are read, with any ``g_idx`` whose groups have one size: act-order
becomes a :class:`lqedu.runtime.permuted.PermutedWeight`.

Who reads it: GPTQModel and transformers all of it, vLLM 0.33 symmetric grids of 4 and 8 bits only (``symmetric=True``
of a method).

Sources: GPTQModel 7.7.0 ``nn_modules/qlinear``, which is where files are read today. Chapter ``21-serving``.
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
from lqedu.formats.packing import pack_int32, unpack_int32
from lqedu.runtime.permuted import PermutedWeight

NAME = "gptq"
BITS = (2, 3, 4, 8)
_NOT_READ = {  # fields of GPTQModel that change what a layer computes
    "dynamic": "a grid of its own for some layers",
    "rotation": "a Hadamard transform that runs with every token",
    "adapter": "low-rank terms beside the weights",
    "is_marlin_format": "the tiles of a kernel for a layout",
}


def encode(linear: LinearParts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a layer, by name, and its scheme.

    Raises:
        ExportError: a layer that this layout cannot hold.
    """
    permuted = isinstance(linear.weight, PermutedWeight)
    weight = weight_only(LinearParts(linear.weight.sorted, linear.path) if permuted else linear, NAME)
    grid, (rows, columns) = weight.grid, weight.shape
    if grid.bits not in BITS:
        raise ExportError(f"it has {grid.bits} bits, and {NAME} has {', '.join(map(str, BITS))}")
    if grid.granularity == "tensor":
        raise ExportError(f"one scale serves the whole weight, and {NAME} has one a row or group")
    if (columns * grid.bits) % 32 or (rows * grid.bits) % 32:
        raise ExportError(f"{rows} outputs and {columns} inputs of {grid.bits} bits do not fill words of 32 bits")
    codes, zero = unsigned(weight)
    if bool((zero == 0).any()):
        raise ExportError(f"it has zero points of 0, and version 1 of {NAME} stores z - 1")
    group = torch.arange(columns) // grid.columns_per_scale(columns)
    if permuted:
        back = linear.weight.order.long().argsort()
        codes, group = codes[:, back], group[back]
    tensors = {
        "qweight": pack_int32(codes, grid.bits).T.contiguous(),
        "qzeros": pack_int32((zero - 1).T, grid.bits),
        "scales": exactly(weight.scale, torch.float16, "its scales").T.contiguous(),
        "g_idx": group.to(torch.int32),
    }
    scheme = {
        "bits": grid.bits,
        "group_size": grid.group_size or -1,
        "sym": grid.symmetric,
        "desc_act": permuted,
    }
    return tensors, scheme


def decode(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], shape: tuple[int, int]) -> LinearParts:
    """The parts of a layer ``[out, in]`` from its tensors; inverse of :func:`encode`.

    Raises:
        CheckpointError: tensors that do not fit the scheme or the shape.
    """
    nothing_else(tensors, "qweight", "qzeros", "scales", "g_idx")
    (rows, columns), bits = shape, scheme["bits"]
    size = columns if scheme["group_size"] == -1 else scheme["group_size"]
    groups = -(-columns // size)
    if columns % size:
        raise CheckpointError(f"groups of {size} do not divide its {columns} inputs")
    if (columns * bits) % 32 or (rows * bits) % 32:
        raise CheckpointError(f"{rows} outputs and {columns} inputs of {bits} bits do not fill words of 32 bits")
    qweight = take(tensors, "qweight", (columns * bits // 32, rows), torch.int32)
    qzeros = take(tensors, "qzeros", (groups, rows * bits // 32), torch.int32)
    scale = take_scale(tensors, "scales", (groups, rows)).T.contiguous()
    codes = unpack_int32(qweight.T, bits, columns)
    zero = unpack_int32(qzeros, bits, rows).T
    if scheme["version"] == 1:
        if bool((zero == (1 << bits) - 1).any()):
            raise CheckpointError(
                "it stores a zero point as -1, which spoils those beside it in version 1; "
                "let the tool that wrote it write checkpoint_format gptq_v2"
            )
        zero = zero + 1
    grid = group_grid(bits, scheme["sym"], scheme["group_size"], scale.dtype)
    order = _order(tensors.get("g_idx"), columns, size)
    if order is None:
        return LinearParts(from_unsigned(codes, scale, zero, grid))
    return LinearParts(PermutedWeight(from_unsigned(codes[:, order], scale, zero, grid), order.to(torch.int32)))


def config(schemes: Mapping[str, dict], dense: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` for layers with these schemes (ExportError where they differ).

    Args:
        schemes: of each quantized layer.
        dense: names of the linear layers that are not quantized; only the output head may be one.
    """
    if kept := sorted(set(dense) - {"lm_head"}):
        raise ExportError(f"{NAME} quantizes every linear layer of the blocks, and {kept[0]} is not")
    scheme = dict(one_scheme({n: {k: v for k, v in s.items() if k != "desc_act"} for n, s in schemes.items()}, NAME))
    return {
        "quant_method": NAME,
        **scheme,
        "desc_act": any(s["desc_act"] for s in schemes.values()),
        "lm_head": False,
        "checkpoint_format": "gptq",
        "true_sequential": True,
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
    bits = field(config, "bits", int)
    size = field(config, "group_size", int)
    version = field(config, "checkpoint_format", str, field(config, "format", str, "gptq"))
    if bits not in BITS:
        raise CheckpointError(f"it has {bits} bits, and {NAME} has {', '.join(map(str, BITS))}")
    if size != -1 and size < 1:
        raise CheckpointError(f"'group_size' of its quantization config is {size}; it is -1 or a size")
    if version not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"its checkpoint_format is {version!r}; gptq and gptq_v2 are read")
    for key, what in _NOT_READ.items():
        if config.get(key):
            raise CheckpointError(f"its config has {what} ({key!r}), which is not read")
    scheme = {
        "bits": bits,
        "group_size": size,
        "sym": field(config, "sym", bool, True),
        "version": 1 if version == "gptq" else 2,
    }
    return {name: scheme for name in shapes if f"{name}.qweight" in names}


def _order(g_idx: Tensor | None, columns: int, size: int) -> Tensor | None:
    """Which input comes where when inputs are sorted by group, ``None`` where they are sorted already."""
    if g_idx is None:
        return None
    g_idx = take({"g_idx": g_idx}, "g_idx", (columns,), torch.int32).long()
    groups = columns // size
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups or bool((g_idx.bincount(minlength=groups) != size).any()):
        raise CheckpointError(f"g_idx does not put {size} inputs into each of {groups} groups")
    order = g_idx.argsort(stable=True)
    return None if torch.equal(order, torch.arange(columns)) else order
