"""Loading models as plain dense ones, from wherever they come; ``00-setup``."""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lqedu.assets import SMOLLM2, cached_folder, smollm2_gguf
from lqedu.errors import CheckpointError, MissingDependencyError, UnsupportedModelError, UsageError
from lqedu.models.shards import INDEX, Shards

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # not ./name


def load_model(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[nn.Module, "PreTrainedTokenizerBase"]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: ``"smollm2-135m"`` (embedded: fetched and converted on first use, about a minute; seconds later,
            offline), the id of a model on the Hugging Face Hub, a local folder in its layout, or a folder that
            :func:`lqedu.save` or another tool wrote: see :func:`lqedu.checkpoint.import_model`.
        dtype: of the parameters: float32, float16, bfloat16 or float64. Codes and scales of a quantized model stay as
            they were saved.
        device: where the model goes.

    Returns:
        ``(model, tokenizer)``; the model is in evaluation mode, dense unless its folder is a quantized one, and keeps the
        tokenizer as ``model.lqedu_tokenizer`` for :func:`lqedu.save`.

    Raises:
        UsageError: no such model, an incomplete folder, or a dtype that is not floating point.
        UnsupportedModelError: not a causal language model that transformers knows by itself, or quantized in a way that
            lqedu does not read.
        CheckpointError: weights that are damaged or do not belong to the configuration.
        MissingDependencyError: a Hub that cannot be reached, a device or a package this machine lacks.

    Only safetensors are read and no code from a repository is run.
    """
    name = str(name_or_path)
    device, dtype = check_device(device), check_dtype(dtype)
    check_source(name)
    if name == EMBEDDED:
        with _no_progress_bars():
            model, tokenizer = _load_dense(str(_embedded_folder()), dtype)
        model.name_or_path = model.config.name_or_path = EMBEDDED  # rather than a folder of this machine
    elif (Path(name) / "lqedu.json").is_file():
        from lqedu.checkpoint import load  # here, because checkpoints know models and not the other way round

        model, tokenizer = load(name)
        _cast_parameters(model, dtype)
    elif Path(name).is_dir() and _is_imported(name):
        model, tokenizer = _load_imported(Path(name), dtype)
    elif Path(name).is_dir():
        with _no_progress_bars():
            model, tokenizer = _load_dense(name, dtype)
        _check_dense(Path(name), model)
    elif _is_quantized_on_hub(name):  # downloads take long: their progress bars stay
        model, tokenizer = _load_imported(local_folder(name), dtype)
    else:
        model, tokenizer = _load_dense(name, dtype)
    model.lqedu_tokenizer = tokenizer  # travels with the model through quantize, so that save can write both
    return model.to(device).requires_grad_(False).eval(), tokenizer


def _is_imported(name: str) -> bool:
    from lqedu.checkpoint.importing import is_quantized

    return is_quantized(Path(name))


def _is_quantized_on_hub(name: str) -> bool:
    from transformers import AutoConfig

    with _explained(name, "config.json"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    return getattr(config, "quantization_config", None) is not None


def _load_imported(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, "PreTrainedTokenizerBase"]:
    from lqedu.checkpoint import import_model

    model, tokenizer = import_model(folder)
    _cast_parameters(model, dtype)
    return model, tokenizer


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Buffers are codes and scales: their dtype is part of the format."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def weights_sha256(model: nn.Module) -> str:
    """Digest of all tensors of the state dict, sorted by name: name, dtype, shape and bytes of each; in hex.

    It tells whether two runs started from the same weights; a saved and reloaded model keeps it, a cast one does not.
    """
    return tensors_sha256(sorted(model.state_dict().items()))


def tensors_sha256(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest of names and tensors, in their order; see :func:`weights_sha256`."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _embedded_folder() -> Path:
    """The embedded model as a folder in the Hub's layout; converted once.

    Parsing and dequantizing the GGUF takes half a minute on two cores, most of it spent on its vocabulary; reading the
    same float32 weights from safetensors takes a second. Tests assert that the bits are the same.
    """
    return cached_folder(f"{EMBEDDED}-{SMOLLM2[1][:12]}-fp32", lambda folder: _convert_gguf(smollm2_gguf(), folder))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the dense float32 model in ``gguf`` and its tokenizer to ``folder``."""
    try:
        import accelerate  # noqa: F401  (transformers needs both to read GGUF)
        import gguf as _  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"the embedded model is a GGUF file and package {error.name!r} is missing; pip install {error.name}"
        ) from error
    print(f"lqedu: converting {EMBEDDED} to float32 (once; half a minute)", file=sys.stderr, flush=True)
    with _no_progress_bars():
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
        quantized = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        # transformers marks what came from a GGUF as quantized and refuses to save or cast it, although its weights are
        # dense by now. A fresh model of the same class around the same tensors has no such marks.
        config = quantized.config
        del config.quantization_config
        config.name_or_path = EMBEDDED
        with torch.device("meta"):
            model = type(quantized)(config)
        model.load_state_dict(quantized.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)


def _load_dense(source: str, dtype: torch.dtype) -> tuple[nn.Module, "PreTrainedTokenizerBase"]:
    """A dense model and its tokenizer from a folder or the Hub, with transformers' many errors turned into ours."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    if (Path(source) / INDEX).is_file():
        Shards(source)  # transformers would follow an index out of the folder
    try:
        with _explained(source, "safetensors weights"):
            model, loading = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except SafetensorError as error:
        raise CheckpointError(f"the weights of {source} are damaged ({error}); fetch them again") from error
    # transformers fills what it does not find, or finds in another shape, with random numbers and only warns.
    if wrong := sorted([*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]):
        raise CheckpointError(
            f"the weights of {source} lack or misshape {len(wrong)} tensors of its configuration "
            f"(first: {wrong[0]}); fetch the model again"
        )
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        # some files hold a head of their own although their configuration says that it is tied
        model.config.tie_word_embeddings = False
    return model, read_tokenizer(source)


def _check_dense(folder: Path, model: nn.Module) -> None:
    """Refuse (CheckpointError) codes that transformers cast to the dtype asked for: their scales would be lost."""
    names = {name for name, _ in model.named_parameters()}
    for name, header in Shards(folder).items():
        if name in names and header.dtype not in _DTYPES:
            kind = str(header.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{folder} holds {name} in {kind}, which is no dense weight, and its config.json says of no "
                "quantization; fetch the model again"
            )


def read_config(source: str | Path) -> "PretrainedConfig":
    """The configuration of a dense model in a folder or on the Hub; errors as :func:`load_model`."""
    from transformers import AutoConfig

    source = str(source)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UsageError(f"{source} has no config.json, so it is no model folder; pass one that save_pretrained wrote")
    with _explained(source, "config.json"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedModelError(f"{source} is already quantized ({method}); load the dense model it was made from")
    return config


def read_tokenizer(source: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model in a folder or on the Hub; errors as :func:`load_model`."""
    from transformers import AutoTokenizer

    with _explained(str(source), "tokenizer"):
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)


def local_folder(name: str) -> Path:
    """The folder of a dense model that :func:`load_model` would read, downloaded where it is on the Hub; errors as there."""
    if name == EMBEDDED:
        return _embedded_folder()
    check_source(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with _explained(name, "files"):
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))


def empty_model(
    folder: Path, config: "PretrainedConfig", dtype: torch.dtype, *, name: str, device: torch.device
) -> nn.Module:
    """The modules of a model in evaluation mode, their parameters on the meta device and their buffers on ``device``.

    Args:
        folder: of the model, for its generation config.
        config: of the model.
        dtype: of the parameters.
        name: what the model calls itself.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    with _explained(str(folder), "config.json"), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if (folder / "generation_config.json").is_file():
        with _explained(str(folder), "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[key] = buffer.to(device)
    model.name_or_path = model.config.name_or_path = name
    return model.requires_grad_(False).eval()


@contextmanager
def _explained(source: str, part: str) -> Iterator[None]:
    """Turn what transformers and the Hub raise while they look for ``part`` of ``source`` into one sentence of ours."""
    from huggingface_hub import errors as hub

    try:
        yield
    except (hub.GatedRepoError, hub.RepositoryNotFoundError) as error:
        raise UsageError(_no_model(source)) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        causes = list(_chain(error))
        local = Path(source).is_dir()
        if any(isinstance(cause, hub.GatedRepoError | hub.RepositoryNotFoundError) for cause in causes):
            raise UsageError(_no_model(source)) from error
        if isinstance(error, ImportError):
            raise MissingDependencyError(f"{source} needs a package that is missing: {_first_line(error)}") from error
        if isinstance(error, OSError) and not local and not _reached_hub(causes):
            raise MissingDependencyError(
                f"cannot reach the Hub for {source!r} and its files are not in the local cache; "
                f"go online, or pass {EMBEDDED!r} or a local folder"
            ) from error
        if isinstance(error, OSError) or part == "tokenizer":
            raise UsageError(f"{source} has no {part} that can be read ({_first_line(error)})") from error
        raise UnsupportedModelError(
            f"{source} is not a causal language model that transformers knows by itself ({_first_line(error)})"
        ) from error


def check_source(name: str) -> None:
    """Refuse (UsageError) what is neither the embedded model, nor a folder, nor can be an id on the Hub."""
    path = Path(name)
    # Path("") would be the folder this process runs in
    if name and (name == EMBEDDED or path.is_dir() or (not path.exists() and _HUB_ID.fullmatch(name))):
        return
    what = "such folder" if name.startswith(("/", ".", "~")) and not path.exists() else "model"
    raise UsageError(f"no {what} {name!r}; pass {EMBEDDED!r}, a Hub id such as 'org/name', or a folder")


def _no_model(source: str) -> str:
    return f"no model {source!r} on the Hub that this account may read; check the id, or log in with 'hf auth login'"


def _reached_hub(causes: list[BaseException]) -> bool:
    """Whether the Hub answered: then a file is missing rather than the network."""
    from huggingface_hub import errors as hub

    answers = [cause for cause in causes if isinstance(cause, hub.EntryNotFoundError)]
    return any(not isinstance(answer, hub.LocalEntryNotFoundError) for answer in answers)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Refuse (UsageError) what is no dtype of a model's parameters."""
    if dtype not in _DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
    return dtype


def check_device(device: str | torch.device) -> torch.device:
    """Refuse a device that torch does not know (UsageError) or see (MissingDependencyError)."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}; pass 'cpu' or 'cuda'") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise MissingDependencyError(f"device '{device}' is not there: torch sees {count} CUDA GPUs; pass 'cpu'")
    return device


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers without its progress bars, which fill a notebook page; as it was before, afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
