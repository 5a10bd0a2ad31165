"""Opening what other tools quantized: ``lqedu.checkpoint.import_model``.

GPTQ (version 1 and 2, act-order), AWQ ("gemm"), compressed-tensors (pack-, int-, float- and naive-quantized, FP8 in
blocks), FP8 in blocks as DeepSeek and Qwen3 store it, and the W4A8 layout of QServe. Codes, scales and zero points are taken as they are; nothing is computed from
them but the model's output. What config.json asks for and lqedu does not have is refused by name. Files are
safetensors and JSON: no pickle is opened and no code of the folder runs. Chapter ``21-serving``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lqedu.checkpoint import compressed_tensors, fp8_blocks, qserve
from lqedu.checkpoint.exporting import LAYOUTS
from lqedu.checkpoint.folder import RECORD, load
from lqedu.checkpoint.layout import take_scale
from lqedu.checkpoint.weights import open_weights, shorten
from lqedu.errors import CheckpointError, GridError, UnsupportedModelError, UsageError
from lqedu.formats.kv import KVInt
from lqedu.models.anatomy import block_list, describe
from lqedu.models.shards import Shards
from lqedu.rounding import RoundingReport
from lqedu.runtime.attention import AttentionPath, set_attention_path
from lqedu.runtime.kinds import layer_of

READERS = LAYOUTS | {fp8_blocks.NAME: fp8_blocks}  # by quant_method
_OLD_CONFIG = "quantize_config.json"  # AutoGPTQ and AutoAWQ, before config.json held it
_OF_ATTENTION = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")
_COMPUTED = ("rotary_emb.inv_freq",)  # buffers of old files that a model computes for itself


def import_model(folder: Path | str) -> tuple[nn.Module, Any]:
    """Read a folder that another tool, or :func:`export`, wrote.

    Keys and values are stored as the file says where that is E4M3 with constants of a block (``kv_cache_scheme`` of
    compressed-tensors) or an export to QServe. Other schemes are left out, and they stay in floating point; the model's
    ``lqedu_notes`` tell. So they do of anything else that is not as the file has it.

    Returns:
        ``(model, tokenizer)``. The linear layers keep the packed codes; other tensors have the dtype they are stored
        in. The model can be evaluated, saved (:func:`lqedu.save`) and exported.

    Raises:
        UsageError: no such folder.
        UnsupportedModelError: a quantization method or an architecture that lqedu does not know, or no quantized model.
        CheckpointError: files that are missing, truncated, not safetensors or unfit for their config; the sentence
            names what is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; pass one that holds config.json and safetensors")
    config = read_quantization(folder)
    shards = open_weights(folder)
    if config is None and not _has_scales(shards):
        raise UnsupportedModelError(f"{folder} says of no quantization; open it with lqedu.load_model")
    method = qserve.NAME if config is None else str(config.get("quant_method"))
    if method == "lqedu":
        raise CheckpointError(
            f"{folder} was written by lqedu, and its {RECORD} is missing; fetch or save the model again"
        )
    if method not in READERS:
        raise UnsupportedModelError(
            f"{folder} is already quantized ({method}), and lqedu reads {', '.join(READERS)}; "
            "load the dense model it was made from"
        )
    model, tokenizer = _frame(folder)
    rest = set(shards)
    notes = _install(folder, model, shards, rest, method, config or {})
    _load(folder, model, shards, rest)
    model.requires_grad_(False).eval()
    said = {key: value for key, value in (config or {}).items() if isinstance(value, int | float | str)}
    model.lqedu_method = {"name": "imported", "options": {**said, "quant_method": method}}
    model.lqedu_notes, model.lqedu_tokenizer = notes, tokenizer
    return model, tokenizer


def open_quantized(folder: Path | str) -> tuple[nn.Module, Any]:
    """A quantized model and its tokenizer from a folder that :func:`lqedu.save` or another tool wrote, as it is stored.

    Raises:
        UsageError: a dense model, or no folder.
        LqeduError: as :func:`lqedu.checkpoint.load` and :func:`import_model`.
    """
    folder = Path(folder)
    if (folder / RECORD).is_file():
        return load(folder)
    if not folder.is_dir() or not is_quantized(folder):
        raise UsageError(f"{folder} holds no quantized model; 'lqedu quantize' writes one")
    return import_model(folder)


def is_quantized(folder: Path) -> bool:
    """Whether another tool quantized the model of a folder, as far as its files can be read."""
    try:
        return read_quantization(folder) is not None or _has_scales(open_weights(folder))
    except CheckpointError:
        return False


def _has_scales(shards: Shards) -> bool:
    """Whether tensors tell what no config does: the files of QServe have none."""
    return any(name.endswith(".s1_scales") for name in shards)


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its quantization, ``None`` where it says nothing.

    Raises:
        CheckpointError: a config.json that cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("quantization_config")
        if found is None and (folder / _OLD_CONFIG).is_file():
            found = {"quant_method": "gptq"} | json.loads((folder / _OLD_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json; fetch the model again") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the config.json of {folder} cannot be read ({error}); fetch the model again") from error
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"the quantization_config of {folder} is {found!r}; fetch the model again")
    return found


def _frame(folder: Path) -> tuple[nn.Module, Any]:
    """The dense model that a folder describes, without tensors, and the tokenizer."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedModelError(
            f"{folder} has no config or tokenizer that transformers knows: {first.strip()}"
        ) from error
    return model, tokenizer


def _install(
    folder: Path, model: nn.Module, shards: Shards, rest: set[str], method: str, config: Mapping[str, Any]
) -> tuple[str, ...]:
    """Replace linear layers by quantized ones; takes the names of their tensors out of ``rest``, returns notes."""
    layout = READERS[method]
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    try:
        schemes = layout.schemes(config, shapes, set(shards))
        notes = _keys_and_values(model, method, config, shards)
    except (CheckpointError, GridError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if not schemes:
        raise CheckpointError(f"{folder}: no linear layer of the model is quantized, although its config says {method}")
    own: dict[str, list[str]] = {}
    for key in shards:
        own.setdefault(key.rpartition(".")[0], []).append(key)
    model.lqedu_reports = {}
    for name, scheme in schemes.items():
        linear, keys = linears[name], own.get(name, [])
        tensors = {key.rpartition(".")[2]: shards.read(key) for key in keys}
        bias = tensors.pop("bias", None)
        try:
            parts = layout.decode(tensors, scheme, shapes[name])
            if bias is not None and linear.bias is None and bool((bias != 0).any()):
                raise CheckpointError("it has a bias, and its architecture has none there")
            layer = layer_of(parts.weight, linear.bias, parts.path, parts.static)
        except (CheckpointError, GridError) as error:
            raise CheckpointError(f"{folder}: {name} {list(shapes[name])}: {error}; fetch the model again") from error
        rest -= set(keys) if linear.bias is None else set(keys) - {f"{name}.bias"}  # AutoGPTQ wrote zeros for no bias
        model.set_submodule(name, layer)
        model.lqedu_reports[name] = RoundingReport(proxy_loss=None)
    return notes


def _keys_and_values(model: nn.Module, method: str, config: Mapping[str, Any], shards: Shards) -> tuple[str, ...]:
    """Store keys and values as a config says, where lqedu has the grid; returns what to note where not."""
    if method == qserve.NAME and (bits := config.get("kv_bits")) is not None:
        if bits not in (4, 8):
            raise CheckpointError(f"'kv_bits' of its quantization config is {bits!r}; it is 4 or 8")
        set_attention_path(model, AttentionPath(key=KVInt(bits), value=KVInt(bits)))
    scheme, found = config.get("kv_cache_scheme"), {name for name in shards if name.endswith(_OF_ATTENTION)}
    if method == compressed_tensors.NAME and compressed_tensors.is_known_cache(scheme):
        prefix = describe(model).blocks
        names = [
            [f"{prefix}.{i}.self_attn.{name}" for name in compressed_tensors.KV_NAMES]
            for i in range(len(block_list(model)))
        ]
        if missing := [name for pair in names for name in pair if name not in found]:
            raise CheckpointError(
                f"its kv_cache_scheme asks for constants of keys and values, and {missing[0]} is missing"
            )
        if not (found - {name for pair in names for name in pair}):
            scales = [tuple(_constant(shards, name) for name in pair) for pair in names]
            set_attention_path(model, compressed_tensors.KEYS_AND_VALUES, scales=scales)
            return ()
    if scheme or found:
        return (
            "keys and values are left in floating point: of the schemes of compressed-tensors (kv_cache_scheme) only E4M3 "
            "with a constant for all keys and one for all values of a block is read; "
            "lqedu.runtime.quantize_kv stores them in few bits with a scale a token",
        )
    return ()


def _constant(shards: Shards, name: str) -> Tensor:
    """A scale of keys or values, float32 ``[1]`` (CheckpointError for anything else)."""
    scale = take_scale({name: shards.read(name)}, name)
    if scale.numel() != 1 or not bool((scale > 0).all()):
        raise CheckpointError(f"{name} is of shape {list(scale.shape)}, expected one number above 0")
    return scale.reshape(1).to(torch.float32)


def _load(folder: Path, model: nn.Module, shards: Shards, rest: set[str]) -> None:
    """Give a model the rest of the file, and refuse what is missing or too much, all of it in one sentence."""
    rest = {key for key in rest if not key.endswith(_COMPUTED) and key.rpartition(".")[2] not in _OF_ATTENTION}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = _tied(model)
    if tied and tied[0] not in rest:
        del parameters[tied[0]]
    problems = [f"missing {name}" for name in sorted(set(parameters) - rest)]
    problems += [f"unexpected {name}" for name in sorted(rest - set(parameters))]
    for name in sorted(set(parameters) & rest):
        if tuple(parameters[name].shape) != shards[name].shape:
            problems.append(f"{name} has shape {list(shards[name].shape)}, expected {list(parameters[name].shape)}")
        elif shards[name].dtype not in (torch.float32, torch.float16, torch.bfloat16):
            problems.append(f"{name} has dtype {shards[name].dtype}")
    if problems:
        raise CheckpointError(
            f"the weights of {folder} do not fit its config: {shorten(problems)}; fetch the model again"
        )
    tensors = {name: shards.read(name) for name in rest}
    if tied:
        tensors.setdefault(tied[0], tensors[tied[1]])
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()


def _tied(model: nn.Module) -> tuple[str, str] | None:
    """Names of the weights of head and embedding where one tensor serves both."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or not isinstance(head, nn.Linear):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight"
