"""The W4A8 layout of QServe, which its kernels read without moving a nibble.

With K inputs, N outputs, groups of 128, for each linear layer::

    qweight      int8 [N, K / 2]        codes 0 to 15, two a byte, see below
    per channel  s1_scales float16 [N], s1_szeros float16 [N]              Ŵ = s1 q - szeros,   szeros = z s1
    per group    s1_scales float16 [N], s2_scales, s2_zeros int8 [G, N]    Ŵ = s1 (q s2 + s2_zeros mod 256),  s2_zeros = -z s2

Tiles of 32 outputs by 32 inputs follow each other. Inside one, byte (r, 4 f + e) of a row r = 4 a + b of 16 bytes
holds the codes of two outputs that lie 16 apart::

    low nibble   output  8 (f mod 2) + a        input 16 (f div 2) + 4 b + e         high nibble   output 16 more

so that a thread finds what it multiplies in one word. Group scales and zeros of 32 outputs come in the order
0, 8, 16, 24, 1, 9, ... for the same reason.

``s1_szeros`` is z s1 rounded to float16: z is recovered exactly, and the product that QServe computes differs from s1
(q - z) by that rounding, at most ``2**-11`` of z s1. Inputs are int8 with one scale a token, as the kernels make
them. The files of QServe carry no config; exports write one that lqedu reads (``group_size``, ``sym``, ``zero``).

Source: QServe ``modeling/layers/quantized_linear/w4a8_linear.py`` (mit-han-lab/omniserve, commit 02b2925). Chapters
``14-qoq``, ``21-serving``.
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
    integer,
    nothing_else,
    one_scheme,
    refuse_transform,
    take,
    take_scale,
    unsigned,
)
from lqedu.errors import CheckpointError, ExportError
from lqedu.formats import QTensor
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.progressive import ProgressiveGrid, ProgressiveTensor
from lqedu.runtime.inputs import InputPath

NAME = "qserve"
GROUP = 128  # the only one that its kernels know
_TILE = 32
_INPUTS = InputPath(activation=ActivationGrid(8))


def pack_tiles(codes: Tensor) -> Tensor:
    """Codes 0 to 15, ``[out, in]`` with both multiples of 32, as ``qweight``: int8 ``[out, in / 2]``."""
    rows, columns = codes.shape
    # outputs as (tile, half, eight, row), inputs as (tile, half, four, byte)
    split = codes.to(torch.uint8).view(rows // _TILE, 2, 2, 8, columns // _TILE, 2, 4, 4)
    low, high = split.permute(1, 0, 4, 3, 6, 5, 2, 7)
    return (low | high << 4).reshape(rows, columns // 2).view(torch.int8)


def unpack_tiles(qweight: Tensor) -> Tensor:
    """Inverse of :func:`pack_tiles`: uint8 ``[out, in]``."""
    rows, columns = qweight.shape[0], 2 * qweight.shape[1]
    bytes_ = qweight.contiguous().view(torch.uint8).view(rows // _TILE, columns // _TILE, 8, 4, 2, 2, 4)
    halves = torch.stack((bytes_ & 15, bytes_ >> 4))  # half, row tile, column tile, row, four, input half, eight, byte
    return halves.permute(1, 0, 6, 3, 2, 5, 4, 7).reshape(rows, columns)


def pack_groups(x: Tensor) -> Tensor:
    """Numbers of groups, ``[out, groups]`` with out a multiple of 32, in the order of the kernel: ``[groups, out]``."""
    return x.T.unflatten(1, (-1, 4, 8)).transpose(-2, -1).flatten(1).contiguous()


def unpack_groups(x: Tensor) -> Tensor:
    """Inverse of :func:`pack_groups`."""
    return x.unflatten(1, (-1, 8, 4)).transpose(-2, -1).flatten(1).T.contiguous()


def encode(linear: LinearParts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a layer, by name, and its scheme.

    Raises:
        ExportError: a layer that this layout cannot hold.
    """
    refuse_transform(linear.path)
    weight = linear.weight
    if not isinstance(weight, ProgressiveTensor):
        integer(weight, NAME)
    if linear.path != _INPUTS:
        raise ExportError(f"its inputs are not int8 with one symmetric scale a token, and those of {NAME} are")
    rows, columns = weight.shape
    if rows % _TILE or columns % _TILE:
        raise ExportError(f"tiles of {_TILE} do not divide its {rows} outputs and {columns} inputs")
    return _encode_groups(weight) if isinstance(weight, ProgressiveTensor) else _encode_channels(weight)


def decode(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], shape: tuple[int, int]) -> LinearParts:
    """The parts of a layer ``[out, in]`` from its tensors; inverse of :func:`encode`.

    Raises:
        CheckpointError: tensors that do not fit the scheme or the shape.
    """
    rows, columns = shape
    if rows % _TILE or columns % _TILE or (scheme["group_size"] != -1 and columns % scheme["group_size"]):
        raise CheckpointError(f"tiles of {_TILE} or its groups do not divide its {rows} outputs and {columns} inputs")
    codes = unpack_tiles(take(tensors, "qweight", (rows, columns // 2), torch.int8))
    scale = take_scale(tensors, "s1_scales", (rows,))
    if scale.dtype != torch.float16:
        raise CheckpointError(f"s1_scales has dtype {scale.dtype}, expected float16")
    read = _decode_channels if scheme["group_size"] == -1 else _decode_groups
    return LinearParts(read(tensors, codes, scale[:, None].contiguous(), scheme), _INPUTS)


def config(schemes: Mapping[str, dict], dense: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` for layers with these schemes (ExportError where they differ)."""
    if kept := sorted(set(dense) - {"lm_head"}):
        raise ExportError(f"{NAME} quantizes every linear layer of the blocks, and {kept[0]} is not")
    return {"quant_method": NAME, "w_bits": 4, "a_bits": 8, **one_scheme(schemes, NAME)}


def schemes(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], names: set[str]
) -> dict[str, dict[str, Any]]:
    """The scheme of each quantized layer.

    Args:
        config: ``quantization_config``, or nothing: the files of QServe have none, and their tensors tell.
        shapes: ``[out, in]`` of each linear layer of the model, by name.
        names: of all tensors of the checkpoint.

    Raises:
        CheckpointError: a config that this layout does not know.
    """
    layers = [name for name in shapes if f"{name}.qweight" in names]
    grouped = any(f"{name}.s2_scales" in names for name in layers)
    size = field(config, "group_size", int, GROUP if grouped else -1)
    if size not in (-1, GROUP):
        raise CheckpointError(f"'group_size' of its quantization config is {size}; it is -1 or {GROUP}")
    zero = field(config, "zero", (str, type(None)), None)
    if zero not in (None, "code", "offset"):
        raise CheckpointError(f"'zero' of its quantization config is {zero!r}; it is 'code' or 'offset'")
    scheme = {"group_size": size, "sym": field(config, "sym", bool, False), "zero": zero}
    return dict.fromkeys(layers, scheme)


def _encode_channels(weight: QTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if weight.grid.bits != 4 or weight.grid.granularity != "channel":
        raise ExportError(
            f"{NAME} has 4 bits per channel or in two levels, and it has {weight.grid.bits} per {weight.grid.granularity}"
        )
    codes, zero = unsigned(weight)
    scale = exactly(weight.scale, torch.float16, "its scales").reshape(-1)
    scaled = (zero.reshape(-1).to(torch.float32) * scale.to(torch.float32)).to(torch.float16)
    if not torch.equal(_channel_zero(scaled, scale), zero.reshape(-1)):
        raise ExportError("a product of scale and zero point is beyond float16, so that the zero point would be lost")
    tensors = {"qweight": pack_tiles(codes), "s1_scales": scale, "s1_szeros": scaled}
    return tensors, {"group_size": -1, "sym": weight.grid.symmetric, "zero": None}


def _decode_channels(tensors: Mapping[str, Tensor], codes: Tensor, scale: Tensor, scheme: Mapping[str, Any]) -> QTensor:
    nothing_else(tensors, "qweight", "s1_scales", "s1_szeros")
    scaled = take(tensors, "s1_szeros", (len(scale),), torch.float16)
    zero = _channel_zero(scaled, scale.reshape(-1))
    again = (zero.to(torch.float32) * scale.reshape(-1).to(torch.float32)).to(torch.float16)
    if not torch.equal(again, scaled):
        raise CheckpointError(
            "s1_szeros is not a zero point of 0 to 15 times s1_scales; lqedu reads integer zero points"
        )
    return from_unsigned(codes, scale, zero[:, None], group_grid(4, scheme["sym"], -1, torch.float16))


def _channel_zero(scaled: Tensor, scale: Tensor) -> Tensor:
    """``z`` from ``z s`` rounded to float16."""
    quotient = scaled.to(torch.float64) / scale.to(torch.float64)
    return torch.nan_to_num(quotient, nan=0, posinf=0, neginf=0).round().clamp(0, 15).to(torch.uint8)


def _encode_groups(weight: ProgressiveTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    grid = weight.grid
    if grid.group_size != GROUP:
        raise ExportError(f"its groups have {grid.group_size} inputs, and the kernels of {NAME} know {GROUP}")
    if int(weight.group_scale.max()) > 127:
        raise ExportError("a group scale is beyond int8")
    scale, zero = weight.group_scale.to(torch.int16), weight.zero.to(torch.int16)
    offset = -zero * scale if grid.zero == "code" else -zero
    wrapped = (offset & 0xFF).to(torch.uint8).view(torch.int8)  # the kernel adds bytes, and what it adds may wrap
    read = _group_zero(wrapped, weight.group_scale, grid.zero)
    if read is None or not torch.equal(read, weight.zero):
        raise ExportError("a product of group scale and zero point is beyond a byte")
    tensors = {
        "qweight": pack_tiles(weight.codes),
        "s1_scales": weight.channel_scale.reshape(-1),
        "s2_scales": pack_groups(weight.group_scale.to(torch.int8)),
        "s2_zeros": pack_groups(wrapped),
    }
    return tensors, {"group_size": GROUP, "sym": False, "zero": grid.zero}


def _decode_groups(
    tensors: Mapping[str, Tensor], codes: Tensor, scale: Tensor, scheme: Mapping[str, Any]
) -> ProgressiveTensor:
    nothing_else(tensors, "qweight", "s1_scales", "s2_scales", "s2_zeros")
    shape = (codes.shape[1] // scheme["group_size"], codes.shape[0])
    group = unpack_groups(take(tensors, "s2_scales", shape, torch.int8))
    offset = unpack_groups(take(tensors, "s2_zeros", shape, torch.int8))
    if int(group.min()) < 1:
        raise CheckpointError("s2_scales holds numbers below 1")
    group = group.to(torch.uint8)
    for kind in (scheme["zero"],) if scheme["zero"] else ("code", "offset"):
        zero = _group_zero(offset, group, kind)
        if zero is not None:
            weight = ProgressiveTensor(codes, scale, group, zero, ProgressiveGrid(scheme["group_size"], kind))
            weight.int8()  # GridError where the kernel would wrap
            return weight
    raise CheckpointError("s2_zeros is no zero point of 0 to 15 times s2_scales; the file is damaged")


def _group_zero(offset: Tensor, scale: Tensor, kind: str) -> Tensor | None:
    """Zero points, int8, from offsets modulo 256; ``None`` where there are none of this kind."""
    z = -offset.to(torch.int16) & 0xFF  # 0 to 255
    if kind == "offset":
        return None if int(z.max()) > 127 else z.to(torch.int8)
    quotient = z // scale
    return None if bool((quotient * scale != z).any()) or int(quotient.max()) > 15 else quotient.to(torch.int8)
