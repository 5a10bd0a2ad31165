"""A quantized model as a folder: packed codes in safetensors, a record of what was done, the config and the tokenizer.

    config.json, generation_config.json   the dense model's own; the first says that the folder is quantized
    tokenizer files                       the model's own
    model.safetensors                     packed codes, scales, zero points; every other tensor as it was. Or several
                                          files and an index, see ``lqedu.models.shards``
    lqedu.json                            format version, method, and for each layer its grid, shape and report
    README.md                             the model card, see ``lqedu.checkpoint.card``

Nothing in it is a pickle. Chapter ``04-gptq`` writes and reads one.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lqedu import __version__
from lqedu.atomic import atomic_directory
from lqedu.checkpoint.card import CARD, Facts, card_of, facts_of
from lqedu.checkpoint.unfinished import save_safetensors
from lqedu.checkpoint.weights import distinct, shorten, write_weights
from lqedu.errors import CheckpointError, GridError, UsageError
from lqedu.models.shards import WEIGHTS, Shards
from lqedu.rounding import RoundingReport
from lqedu.runtime.incoherent import TRANSFORMS
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.kinds import check_layer, describe, layer_of, rebuild
from lqedu.runtime.linear import quantized_linears

_KV_SCALES = ("lqedu_key_scale", "lqedu_value_scale")  # lqedu.runtime.attention.SCALES, which needs transformers
RECORD = "lqedu.json"
FORMAT_VERSION = 1


def save(
    model: nn.Module,
    folder: Path | str,
    tokenizer: Any = None,
    *,
    facts: Facts | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a quantized model to a new folder, all of it or nothing.

    Args:
        model: a model that :func:`lqedu.quantize` returned.
        folder: must not exist yet.
        tokenizer: saved beside the model; by default the one that :func:`lqedu.load_model` gave with the dense model.
        facts: what the model card says of the dense model, the calibration and the measured quality; by default what the
            model carries as ``lqedu_facts``, which is what its folder said if it was loaded from one.
        max_shard_size: of a safetensors file, in bytes or with a unit such as "5GB"; ``None`` writes one file.

    Returns:
        The folder.

    Raises:
        UsageError: the model is not quantized, its tokenizer is not known, or ``max_shard_size`` is no size.
        CheckpointError: the folder exists, or cannot be written (a full disk, for instance).
    """
    if hasattr(model, "lqedu_kernels"):
        raise UsageError(
            "the model runs on kernels, whose layouts are not stored; save the one that to_kernels was given"
        )
    layers = quantized_linears(model)
    if not layers:
        raise UsageError("the model has no quantized layers; call lqedu.quantize first")
    tokenizer = tokenizer or getattr(model, "lqedu_tokenizer", None)
    if tokenizer is None:
        raise UsageError("the model carries no tokenizer; pass tokenizer=")
    tensors, tied = distinct(model.state_dict())
    described = {
        name: describe(layer.quantized) | {"input": layer.path.to_dict(), "report": asdict(model.lqedu_reports[name])}
        for name, layer in layers.items()
    }
    folder = Path(folder)
    with atomic_directory(folder) as temporary:
        write_about(model, temporary, tokenizer, described, tied, facts)
        if max_shard_size is None:
            save_safetensors(tensors, temporary / WEIGHTS, {"format": "pt"})
        else:
            write_weights(tensors, temporary, max_shard_size)
    return folder


def write_about(
    model: nn.Module, folder: Path, tokenizer: Any, layers: dict[str, dict], tied: dict[str, str], facts: Facts | None
) -> None:
    """Write all of a checkpoint but its tensors, none of which is read: the model may be on the meta device.

    Args:
        model: quantized.
        folder: exists.
        tokenizer: saved beside the model.
        layers: what the record says of each layer.
        tied: names of tensors that are not stored, and of those they are copies of.
        facts: see :func:`save`.
    """
    facts = facts_of(model) if facts is None else facts
    record = {
        "format": "lqedu",
        "format_version": FORMAT_VERSION,
        "lqedu_version": __version__,
        "method": model.lqedu_method,
        "notes": list(getattr(model, "lqedu_notes", ())),
        "facts": facts.to_dict(),
        "tied": tied,
        "attention": model.lqedu_attention.to_dict() if hasattr(model, "lqedu_attention") else None,
        "layers": layers,
    }
    _config(model).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=1))
    (folder / CARD).write_text(card_of(model, facts), encoding="utf-8")


def load(folder: Path | str) -> tuple[nn.Module, Any]:
    """Read a folder that :func:`save` wrote.

    Returns:
        ``(model, tokenizer)``; the model computes the same bits as the one that was saved.

    Raises:
        CheckpointError: a folder that is foreign, truncated or damaged; the sentence lists everything that is wrong.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    record = read_record(folder)
    tensors = Shards(folder).read_all()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):  # what transformers' own loader goes by
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder} has no usable config or tokenizer: {first_line}") from error

    install_frames(model, record, folder)
    for name, original in record["tied"].items():
        if original in tensors:
            tensors[name] = tensors[original]
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    check_tensors(folder, model, found)
    model.load_state_dict(tensors, strict=True, assign=True)
    check_values(model, folder)
    model.tie_weights()
    model.requires_grad_(False).eval()
    model.lqedu_tokenizer = tokenizer
    return model, tokenizer


def install_frames(model: nn.Module, record: dict, folder: Path) -> None:
    """Make a dense model the one that a record describes, all but its tensors: frames of zeros wait for them.

    Args:
        model: of the folder's configuration, on any device. Changed: layers, attention, and the attributes that
            :func:`lqedu.quantize` gives a model.
        record: what :func:`read_record` returned.
        folder: for messages.

    Raises:
        CheckpointError: a layer or an attention that does not fit the model.
    """
    reports = {}
    for name, layer in record["layers"].items():
        try:
            linear = model.get_submodule(name)
            frame = layer_of(rebuild(layer, None), linear.bias, InputPath.from_dict(layer["input"]))
            reports[name] = RoundingReport(**layer["report"])
        except (AttributeError, KeyError, TypeError, GridError) as error:
            raise CheckpointError(f"{folder / RECORD}: layer {name!r} does not fit the model: {error}") from error
        model.set_submodule(name, frame.to(linear.weight.device))  # meta, where no memory has been given out yet
    if record["attention"] is not None:
        from lqedu.runtime.attention import AttentionPath, set_attention_path

        try:
            set_attention_path(model, AttentionPath.from_dict(record["attention"]))
        except (GridError, TypeError) as error:
            raise CheckpointError(f"{folder / RECORD}: its attention is not understood: {error}") from error
    model.lqedu_method, model.lqedu_reports = record["method"], reports
    model.lqedu_notes = tuple(record.get("notes", ()))  # they change nothing: a folder may lack them
    model.lqedu_facts = Facts.from_dict(record.get("facts", {}))


def check_values(model: nn.Module, folder: Path) -> None:
    """Refuse (CheckpointError) tensors of the right shapes and dtypes that make no weight, or no scale of keys and values."""
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in _KV_SCALES and not bool((torch.isfinite(buffer) & (buffer > 0)).all()):
            raise CheckpointError(
                f"{folder / WEIGHTS} is damaged: {name} is {buffer.tolist()}, no finite scale above 0"
            )
    for name, layer in quantized_linears(model).items():
        try:
            check_layer(layer)
        except GridError as error:
            raise CheckpointError(f"{folder / WEIGHTS} is damaged: {name}: {error}") from error


def folder_bytes(folder: Path | str) -> dict[str, int]:
    """What a folder holds, in bytes by part; ``linears_fp16`` is what the quantized linears would take in FP16.

    Parts: ``codes``, ``scales``, ``zeros`` and online ``transforms`` of the quantized linears, ``other_tensors``
    (embeddings, norms, biases), ``files`` (everything beside the weights).
    """
    folder = Path(folder)
    record = read_record(folder)
    tensors = Shards(folder)
    parts = dict.fromkeys(("codes", "scales", "zeros", "transforms", "other_tensors", "files"), 0)
    suffix = {"codes": "codes", "scale": "scales", "group_scale": "scales", "zero": "zeros"}
    suffix |= dict.fromkeys(TRANSFORMS, "transforms")
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        part = suffix.get(kind, "other_tensors") if layer in record["layers"] else "other_tensors"
        parts[part] += tensor.nbytes
    weights = {header.path for header in tensors.values()}
    parts["files"] = sum(f.stat().st_size for f in folder.iterdir() if f.is_file() and f not in weights)
    fp16 = sum(2 * layer["shape"][0] * layer["shape"][1] for layer in record["layers"].values())
    return parts | {"linears_fp16": fp16}


def read_record(folder: Path) -> dict:
    """What ``lqedu.json`` of a folder says (CheckpointError where there is none, or one that is not understood)."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not an lqedu checkpoint: it has no {RECORD}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); save the model again") from error
    if not isinstance(record, dict) or record.get("format") != "lqedu":
        raise CheckpointError(f"{path} was not written by lqedu")
    if record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {record.get('format_version')!r}, this lqedu reads {FORMAT_VERSION}; "
            f"it was written by lqedu {record.get('lqedu_version')!r}"
        )
    missing = [key for key in ("method", "layers", "tied") if not isinstance(record.get(key), dict)]
    missing += [] if "attention" in record else ["attention"]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; save the model again")
    return record


def check_tensors(folder: Path, model: nn.Module, found: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Compare names, shapes and dtypes of what is stored with what the model expects, and list every difference at once.

    The dtype of a floating parameter is free, of codes and scales it is not.

    Args:
        folder: for the message.
        model: with its frames installed.
        found: shape and dtype of each stored tensor.

    Raises:
        CheckpointError: any difference.
    """
    want = model.state_dict()
    exact = {f"{name}.{key}" for name, layer in quantized_linears(model).items() for key, _ in layer.named_buffers()}
    problems = [f"missing {name}" for name in sorted(set(want) - set(found))]
    problems += [f"unexpected {name}" for name in sorted(set(found) - set(want))]
    for name in sorted(set(want) & set(found)):
        shape, dtype = found[name]
        if tuple(want[name].shape) != shape:
            problems.append(f"{name} has shape {list(shape)}, expected {list(want[name].shape)}")
        elif want[name].dtype != dtype and (name in exact or not want[name].is_floating_point()):
            problems.append(f"{name} has dtype {dtype}, expected {want[name].dtype}")
    if problems:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit its config: {shorten(problems)}")


def _config(model: nn.Module) -> Any:
    """The dense model's configuration with the mark by which transformers finds ``lqedu.integrations.transformers``."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype  # of the parameters; where it is missing transformers takes that of any scale it finds
    config.quantization_config = {"quant_method": "lqedu", "format_version": FORMAT_VERSION}
    return config
