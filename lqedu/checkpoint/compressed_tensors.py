"""The layouts of compressed-tensors, which vLLM, SGLang and transformers read, and what its schemes say.

With b bits, K inputs, N outputs, for each linear layer::

    pack-quantized     weight_packed int32 [N, K b / 32], weight_shape int64 [2]; codes q + 2**(b-1), packed along the inputs
    int-quantized      weight int8 [N, K]
    float-quantized    weight float8_e4m3fn [N, K]; "naive-quantized" is the same without quantized inputs
    all of them        weight_scale [1], [N, 1], [N, G] or [N / 128, K / 128]; static inputs: input_scale, input_zero_point [1]
    asymmetric         weight_zero_point: packed int32 [N b / 32, G] along the outputs, or int8 of the shape of the scale

    Ŵ = weight_scale (code - weight_zero_point),  signed codes and zero points: ours less 2**(b-1)

What the files leave to who reads them: the scale of a dynamic symmetric int8 input. It is max|x| / 127 here and in
the kernels of vLLM, max|x| / 127.5 in the simulation of compressed-tensors itself, so its logits differ a little.
Every other grid is the same number for number. Keys and values: ``kv_cache_scheme`` of E4M3 with a constant for all keys
and one for all values of a block, ``self_attn.k_scale`` and ``v_scale`` [1], which is what vLLM reads too
(``quantize_kv(model, "fp8-static", calibration=windows)``). Scales a token have no place there. Not written either:
``transform_config`` (rotations that run online).

transformers 5.23 cannot load packed zero points into packed weights; ``CompressedTensorsConfig(dequantize=True)``
loads them.

Source: compressed-tensors 0.19.0 ``quantization/quant_args.py``, ``compressors``. Chapter ``21-serving``.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lqedu.checkpoint.compressed_schemes import input_args, rank, scheme_of, targets_of, weight_args
from lqedu.checkpoint.layout import (
    LinearParts,
    field,
    from_unsigned,
    integer,
    nothing_else,
    refuse_transform,
    take,
    take_scale,
    unsigned,
)
from lqedu.errors import CheckpointError, ExportError
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Grid, Float8Tensor
from lqedu.formats.kv import KVStaticFloat8
from lqedu.formats.packing import pack_int32, unpack_int32
from lqedu.runtime.attention import AttentionPath
from lqedu.runtime.inputs import InputPath

NAME = "compressed-tensors"
_E4M3 = torch.float8_e4m3fn
KEYS_AND_VALUES = AttentionPath(key=KVStaticFloat8(), value=KVStaticFloat8())  # the one path that is written and read
KV_NAMES = ("k_scale", "v_scale")  # of a block's attention
_KV_SCHEME = {
    "num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "strategy": "tensor", "block_structure": None,
    "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {},
}  # fmt: skip


def encode(linear: LinearParts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a layer, by name, and its scheme (an entry of ``config_groups`` less its targets).

    Raises:
        ExportError: a layer that no layout here can hold.
    """
    refuse_transform(linear.path)
    inputs = input_args(linear.path.activation, linear.weight.shape[1])
    if isinstance(linear.weight, Float8Tensor):
        tensors, weights = _encode_float(linear.weight)
        form = "naive-quantized" if inputs is None else "float-quantized"
    else:
        weight = integer(linear.weight, NAME)
        form = "pack-quantized" if inputs is None else "int-quantized"
        tensors, weights = _encode_packed(weight) if inputs is None else _encode_int8(weight)
    if linear.static is not None:
        scale, zero = linear.static
        tensors["input_scale"] = scale
        if zero is not None:
            tensors["input_zero_point"] = zero.to(torch.int8)
    return tensors, {"weights": weights, "input_activations": inputs, "output_activations": None, "format": form}


def decode(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], shape: tuple[int, int]) -> LinearParts:
    """The parts of a layer ``[out, in]`` from its tensors; inverse of :func:`encode`.

    Raises:
        CheckpointError: tensors that do not fit the scheme or the shape.
    """
    activation = scheme["activation"]
    known = ["weight_scale", "weight_zero_point", "weight_g_idx"]
    known += ["weight_packed", "weight_shape"] if scheme["format"] == "pack-quantized" else ["weight"]
    static = None
    if activation is not None and activation.static:
        known += ["input_scale", "input_zero_point"]
        static = _static(tensors, activation)
    nothing_else(tensors, *known)
    if "weight_g_idx" in tensors:  # of old files, also where groups are where they were
        g_idx = take(tensors, "weight_g_idx", (shape[1],)).long()
        if not torch.equal(g_idx, torch.arange(shape[1]) // scheme["grid"].columns_per_scale(shape[1])):
            raise CheckpointError(
                "its inputs are sorted into groups (actorder 'group'), which is not read; quantize again"
            )
    grid = scheme["grid"]
    decode_weight = _decode_packed if scheme["format"] == "pack-quantized" else _decode_int8
    if isinstance(grid, Float8Grid):
        decode_weight = _decode_float
    return LinearParts(decode_weight(tensors, grid, shape), InputPath(activation=activation), static)


def config(schemes: Mapping[str, dict], dense: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` for layers with these schemes.

    Args:
        schemes: of each quantized layer.
        dense: names of the linear layers that are not quantized.
    """
    groups: dict[str, tuple[dict, list[str]]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(json.dumps(scheme), (scheme, []))[1].append(name)
    forms = {scheme["format"] for scheme, _ in groups.values()}
    alone = len(groups) == 1
    return {
        "quant_method": NAME,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if alone else names, **scheme}
            for i, (scheme, names) in enumerate(groups.values())
        },
        "ignore": sorted(dense),
        "kv_cache_scheme": None,
    }


def attention_config(path: AttentionPath) -> dict[str, Any]:
    """What ``quantization_config`` says of keys and values (ExportError for any but :data:`KEYS_AND_VALUES`)."""
    if path != KEYS_AND_VALUES:
        raise ExportError(
            f"keys and values of {NAME} are E4M3 with constants of a block, and here each token of each head has a scale "
            "or keys are transformed; leave them as they come (kv_bits=None or kv='none' of a method), or take "
            "lqedu.runtime.quantize_kv(model, 'fp8-static', calibration=windows)"
        )
    return {"kv_cache_scheme": dict(_KV_SCHEME)}


def is_known_cache(scheme: Any) -> bool:
    """Whether a ``kv_cache_scheme`` is the one of :data:`KEYS_AND_VALUES`."""
    given = dict(scheme) if isinstance(scheme, Mapping) else {}
    telling = ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic")
    return {"symmetric": True, "group_size": None, "dynamic": False, "strategy": "tensor", **given}.items() >= {
        key: _KV_SCHEME[key] for key in telling
    }.items()


def schemes(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], names: set[str]
) -> dict[str, dict[str, Any]]:
    """The scheme of each quantized layer: its format, the grid of its weight and of its inputs.

    Args:
        config: ``quantization_config``.
        shapes: ``[out, in]`` of each linear layer of the model, by name.
        names: of all tensors of the checkpoint.

    Raises:
        CheckpointError: a config that is not understood, or that asks for what lqedu does not have.
    """
    for key in ("transform_config", "sparsity_config"):
        part = config.get(key) or {}
        if isinstance(part, Mapping) and part.get("format") == "dense":
            part = {}
        if part:
            raise CheckpointError(f"its config has a {key}, which is not read")
    overall = field(config, "format", str)
    groups = field(config, "config_groups", dict)
    parsed = [(targets_of(group), scheme_of(group, overall)) for group in groups.values()]
    ignored = field(config, "ignore", (list, type(None)), None) or []
    result = {}
    for name in shapes:
        ranked = [(rank(name, wanted), i) for i, (wanted, _) in enumerate(parsed)]
        ranked = [pair for pair in ranked if pair[0] is not None]
        if ranked and rank(name, ignored) is None:
            result[name] = parsed[min(ranked)[1]][1]
    return result


# --- weights ----------------------------------------------------------------------------------------------------------


def _encode_packed(weight: QTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    grid = weight.grid
    codes, zero = unsigned(weight)
    tensors = {
        "weight_packed": pack_int32(codes, grid.bits),
        "weight_scale": _as_theirs(weight.scale, grid),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not grid.symmetric:
        if grid.granularity == "tensor":
            tensors["weight_zero_point"] = _as_theirs(_signed(zero, grid), grid)
        else:
            tensors["weight_zero_point"] = pack_int32(zero.T, grid.bits).T.contiguous()
    return tensors, weight_args(grid)


def _decode_packed(tensors: Mapping[str, Tensor], grid: IntGrid, shape: tuple[int, int]) -> QTensor:
    rows, columns = shape
    stored = take(tensors, "weight_shape", (2,)).tolist()
    if stored != list(shape):
        raise CheckpointError(f"weight_shape says {stored}, and its weight is {list(shape)}")
    packed = take(tensors, "weight_packed", (rows, -(-columns * grid.bits // 32)), torch.int32)
    grid, scale = _int_scale(tensors, grid, shape)
    groups = scale.shape[1]
    zero = torch.full(scale.shape, 1 << (grid.bits - 1), dtype=torch.uint8)
    if not grid.symmetric and grid.granularity != "tensor":
        words = take(tensors, "weight_zero_point", (-(-rows * grid.bits // 32), groups), torch.int32)
        zero = unpack_int32(words.T, grid.bits, rows).T
    elif "weight_zero_point" in tensors or not grid.symmetric:
        zero = _unsigned_zero(tensors, grid, scale)
    return from_unsigned(unpack_int32(packed, grid.bits, columns), scale, zero, grid)


def _encode_int8(weight: QTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    codes, zero = unsigned(weight)
    grid = weight.grid
    tensors = {"weight": _signed(codes, grid), "weight_scale": _as_theirs(weight.scale, grid)}
    if not grid.symmetric:
        tensors["weight_zero_point"] = _as_theirs(_signed(zero, grid), grid)
    return tensors, weight_args(grid)


def _decode_int8(tensors: Mapping[str, Tensor], grid: IntGrid, shape: tuple[int, int]) -> QTensor:
    codes = take(tensors, "weight", shape, torch.int8)
    grid, scale = _int_scale(tensors, grid, shape)
    zero = torch.full(scale.shape, 1 << (grid.bits - 1), dtype=torch.uint8)
    if "weight_zero_point" in tensors or not grid.symmetric:
        zero = _unsigned_zero(tensors, grid, scale)
    return from_unsigned(_back(codes, grid, "weight"), scale, zero, grid)


def _encode_float(weight: Float8Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if weight.grid.format != "E4M3":
        raise ExportError(f"its weight is in {weight.grid.format}, and {NAME} has E4M3")
    scale = weight.scale.reshape(1) if weight.grid.granularity == "tensor" else weight.scale
    return {"weight": weight.codes.view(_E4M3), "weight_scale": scale}, weight_args(weight.grid)


def _decode_float(tensors: Mapping[str, Tensor], grid: Float8Grid, shape: tuple[int, int]) -> Float8Tensor:
    codes = take(tensors, "weight", shape, _E4M3).view(torch.uint8)
    scale = _their_scale(tensors, grid.scale_shape(shape), grid.granularity).to(torch.float32)
    if "weight_zero_point" in tensors:
        _all_zero(tensors["weight_zero_point"])
    return Float8Tensor(codes, scale, grid)


def _int_scale(tensors: Mapping[str, Tensor], grid: IntGrid, shape: tuple[int, int]) -> tuple[IntGrid, Tensor]:
    """The scale, and the grid with the scale's dtype."""
    scale = _their_scale(tensors, grid.scale_shape(shape), grid.granularity)
    return IntGrid(grid.bits, grid.symmetric, grid.granularity, grid.group_size, scale_dtype=scale.dtype), scale


def _their_scale(tensors: Mapping[str, Tensor], shape: tuple[int, int], granularity: str) -> Tensor:
    scale = take_scale(tensors, "weight_scale")
    flat = granularity in ("tensor", "channel") and scale.dim() < 2  # [1], [] and, in old files, [N]
    if tuple(scale.shape) != shape and not (flat and scale.numel() == shape[0]):
        raise CheckpointError(f"weight_scale has shape {list(scale.shape)}, expected {list(shape)}")
    return scale.reshape(shape)


def _as_theirs(tensor: Tensor, grid: IntGrid) -> Tensor:
    return tensor.reshape(1) if grid.granularity == "tensor" else tensor


def _signed(tensor: Tensor, grid: IntGrid) -> Tensor:
    return (tensor.to(torch.int16) - (1 << (grid.bits - 1))).to(torch.int8)


def _back(tensor: Tensor, grid: IntGrid, what: str) -> Tensor:
    """Inverse of :func:`_signed` (CheckpointError for what no code of the grid gives)."""
    codes = tensor.to(torch.int16) + (1 << (grid.bits - 1))
    if bool(((codes < 0) | (codes >= grid.levels)).any()):
        raise CheckpointError(f"{what} holds numbers that {grid.bits} bits do not have")
    return codes.to(torch.uint8)


def _unsigned_zero(tensors: Mapping[str, Tensor], grid: IntGrid, scale: Tensor) -> Tensor:
    zero = take(tensors, "weight_zero_point", dtype=torch.int8)
    if zero.numel() != scale.numel():
        raise CheckpointError(f"weight_zero_point has shape {list(zero.shape)}, expected {list(scale.shape)}")
    return _back(zero.reshape(scale.shape), grid, "weight_zero_point")


def _all_zero(zero: Tensor) -> None:
    if bool((zero.to(torch.float32) != 0).any()):
        raise CheckpointError("the file calls its grid symmetric and stores zero points other than 0")


def _static(tensors: Mapping[str, Tensor], grid: ActivationGrid | Float8ActivationGrid) -> tuple[Tensor, Tensor | None]:
    scale = take_scale(tensors, "input_scale")
    if scale.numel() != 1:
        raise CheckpointError(f"input_scale has shape {list(scale.shape)}, expected [1]")
    symmetric = isinstance(grid, Float8ActivationGrid) or grid.symmetric
    zero = tensors.get("input_zero_point")
    if symmetric:
        if zero is not None:
            _all_zero(zero)
        return scale.reshape(1).to(torch.float32), None
    zero = take(tensors, "input_zero_point", dtype=torch.int8)
    if zero.numel() != 1:
        raise CheckpointError(f"input_zero_point has shape {list(zero.shape)}, expected [1]")
    return scale.reshape(1).to(torch.float32), zero.reshape(1).to(torch.float32)
