"""A quantized model as a folder that other tools load: ``lqedu.checkpoint.export``.

What goes where (each cell is what a method has to be asked for; nothing is approximated, what is not here is refused)::

    method        compressed-tensors                 gptq            awq      qserve
    rtn           2-8 bits, inputs 8 bits or none    2, 3, 4, 8 bits 4 bits   4 bits per channel, inputs 8 bits per token
    gptq          2-8 bits                           2, 3, 4, 8 bits 4 bits   -
    awq           2-8 bits                           2, 3, 4, 8 bits 4 bits   -
    hqq           -                                  -               -        -         float zero points
    quip          -                                  -               -        -         rotates online
    smoothquant   yes                                -               -        -
    quarot        -                                  -               -        -         rotates online
    spinquant     online=false, kv_bits=null, A8     -               -        -
    qqq           group_size=null                    -               -        -         groups are rounded twice
    qoq           group_size=null, kv_bits=null      -               -        yes
    fp8           kv="none"                          -               -        -

Everywhere: groups along the inputs and integer zero points (gptq: none of 0). Keys and values, whatever the method:
gptq and awq leave them in floating point; compressed-tensors has E4M3 with a constant for the keys and one for the
values of a block (``lqedu.runtime.quantize_kv(model, "fp8-static", calibration=windows)``) and no scales a token;
qserve keeps them in 4 or 8 bits with a scale a token, as its kernels do. A symmetric grid is written with the zero point in the middle, 8
of 4 bits. The table is tested: tests/checkpoint/test_export.py tries every cell. Chapter ``21-serving``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lqedu.atomic import atomic_directory
from lqedu.checkpoint import awq, compressed_tensors, gptq, qserve
from lqedu.checkpoint.card import CARD, Facts, card_of, facts_of
from lqedu.checkpoint.layout import LinearParts, parts_of
from lqedu.checkpoint.weights import distinct, write_weights
from lqedu.errors import ExportError, GridError, UsageError
from lqedu.formats.kv import KVInt
from lqedu.models.anatomy import block_list, describe
from lqedu.runtime.attention import SCALES, AttentionPath, constants_of
from lqedu.runtime.inputs import TransformedLinear
from lqedu.runtime.linear import quantized_linears

__all__ = ["LAYOUTS", "TABLE", "exported"]  # export itself is in lqedu.checkpoint

#: The layouts by the name of their format.
LAYOUTS: dict[str, ModuleType] = {module.NAME: module for module in (compressed_tensors, gptq, awq, qserve)}
#: The table above.
TABLE: str = (__doc__ or "").split("\n\n")[2]


def export(
    model: nn.Module,
    folder: Path | str,
    format: str,
    tokenizer: Any = None,
    *,
    max_shard_size: int | str = "5GB",
    facts: Facts | None = None,
) -> Path:
    """Write a quantized model in the format of another tool to a new folder, all of it or nothing.

    Codes, scales and zero points are those of the model, bit for bit, and :func:`import_model` gives them back.
    Embeddings, norms and biases are written in the dtype they have: quantize what
    ``lqedu.load_model(..., dtype=torch.float16)`` returns for smaller files.

    Args:
        model: a model that :func:`lqedu.quantize` or :func:`lqedu.load_model` returned.
        folder: must not exist yet. It gets config.json with a ``quantization_config``, generation_config.json, the
            tokenizer, safetensors (with an index where there are several) and the model card.
        format: "compressed-tensors", "gptq", "awq" or "qserve".
        tokenizer: by default the one that :func:`lqedu.load_model` gave.
        max_shard_size: of a safetensors file, in bytes or with a unit.
        facts: see :func:`lqedu.save`.

    Returns:
        The folder.

    Raises:
        ExportError: the format cannot hold the model; the sentence says which layer, why, and what can.
        UsageError: no such format, a model that is not quantized, or no tokenizer.
        CheckpointError: the folder exists, or cannot be written (a full disk, for instance).
    """
    if format not in LAYOUTS:
        raise UsageError(f"no format {format!r}; there are {', '.join(LAYOUTS)}")
    if hasattr(model, "lqedu_kernels"):
        raise UsageError(
            "the model runs on kernels, whose layouts are not stored; export the one that to_kernels was given"
        )
    if not quantized_linears(model):
        raise UsageError("the model has no quantized layers; call lqedu.quantize first")
    tokenizer = tokenizer or getattr(model, "lqedu_tokenizer", None)
    if tokenizer is None:
        raise UsageError("the model carries no tokenizer; pass tokenizer=")
    tensors, quantization = exported(model, format)
    card = card_of(model, facts_of(model) if facts is None else facts, format)
    folder = Path(folder)
    with atomic_directory(folder) as temporary:
        model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _write_config(model, quantization, temporary)
        write_weights(tensors, temporary, max_shard_size)
        (temporary / CARD).write_text(card, encoding="utf-8")
    return folder


def exported(model: nn.Module, format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a model in a format, on the CPU, and its ``quantization_config`` (ExportError as in ``export``)."""
    layout, layers = LAYOUTS[format], quantized_linears(model)
    of_attention = _explain(lambda: _attention_config(model, format), model, "the attention", format)
    tensors, schemes = _attention_tensors(model), {}
    own = {f"{name}.{buffer}" for name, layer in layers.items() for buffer, _ in layer.named_buffers(recurse=False)}
    own |= {name for name, _ in model.named_buffers() if name.rpartition(".")[2] in SCALES}
    for name, layer in layers.items():
        parts = _on_cpu(parts_of(layer))
        found, schemes[name] = _explain(lambda parts=parts: layout.encode(parts), model, name, format)
        tensors |= {f"{name}.{key}": tensor for key, tensor in found.items()}
    dense = _dense(model)
    if online := [name for name in dense if isinstance(model.get_submodule(name), TransformedLinear)]:
        raise ExportError(
            f"{online[0]} transforms its input while the model runs, which no format here holds; use lqedu.save"
        )
    config = _explain(lambda: layout.config(schemes, dense), model, "the model", format)
    config |= of_attention
    others = distinct({key: tensor for key, tensor in model.state_dict().items() if key not in own})[0]
    tensors |= others
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, config


def _on_cpu(parts: LinearParts) -> LinearParts:
    from lqedu.runtime.kinds import describe, rebuild

    weight = rebuild(describe(parts.weight), {name: t.cpu() for name, t in parts.weight.packed().items()})
    static = None if parts.static is None else tuple(None if t is None else t.cpu() for t in parts.static)
    return LinearParts(weight, parts.path, static)


def _attention_config(model: nn.Module, format: str) -> dict[str, Any]:
    """What a config says of keys and values (ExportError where a format does not store them as the model does)."""
    path: AttentionPath | None = getattr(model, "lqedu_attention", None)
    if path is None:
        return {}
    if format == compressed_tensors.NAME:
        return compressed_tensors.attention_config(path)
    if format != qserve.NAME:
        raise ExportError(
            f"keys and values are stored on a grid, and {format} says nothing of them; "
            "leave them as they come: kv_bits=None or kv='none' of a method, or lqedu.runtime.quantize_kv(model, 16)"
        )
    kept = path.key
    if path != AttentionPath(key=kept, value=kept) or kept not in (KVInt(4), KVInt(8)):
        raise ExportError(
            f"the kernels of {format} keep keys and values in 4 or 8 bits with float zero points, as they come"
        )
    return {"kv_bits": kept.bits}


def _attention_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Constant scales of keys and values under the names of compressed-tensors."""
    tensors = {}
    for index, block in enumerate(block_list(model)):
        scales = constants_of(block.self_attn)[1:]
        prefix = f"{describe(model).blocks}.{index}.self_attn"
        pairs = zip(compressed_tensors.KV_NAMES, scales, strict=True)
        tensors |= {f"{prefix}.{name}": scale.to(torch.float32) for name, scale in pairs if scale is not None}
    return tensors


def _explain(step: Callable[[], Any], model: nn.Module, name: str, format: str) -> Any:
    """The result of a step; a refusal names what it is about and the formats that can hold the model."""
    try:
        return step()
    except (ExportError, GridError) as error:
        able = [other for other in LAYOUTS if other != format and _holds(other, model)]
        remedy = (
            f"use {' or '.join(able)}" if able else "no other format here holds the model, so keep it with lqedu.save"
        )
        raise ExportError(f"{name}: {error}; {remedy}") from error


def _holds(format: str, model: nn.Module) -> bool:
    try:
        _attention_config(model, format)
        schemes = {
            name: LAYOUTS[format].encode(_on_cpu(parts_of(layer)))[1]
            for name, layer in quantized_linears(model).items()
        }
        LAYOUTS[format].config(schemes, _dense(model))
    except (ExportError, GridError):
        return False
    return True


def _dense(model: nn.Module) -> list[str]:
    """The linear layers that are not quantized."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _write_config(model: nn.Module, quantization: dict[str, Any], folder: Path) -> None:
    """config.json of the dense model, with what was done to it and the dtype its tensors have."""
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    dtype = model.get_input_embeddings().weight.dtype
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    config["quantization_config"] = quantization
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
