"""``AutoModelForCausalLM.from_pretrained`` for folders that :func:`lqedu.save` wrote; chapter ``21-serving``.

::

    import lqedu.integrations.transformers                     # registers the quantization method "lqedu"
    model = AutoModelForCausalLM.from_pretrained(folder)       # a folder, or its copy on the Hub

The model is the one that :func:`lqedu.load_model` returns: packed layers, quantized keys and values, online transforms. It
is written again by :func:`lqedu.save`.

Without that import transformers only warns of an unknown method and fills what it does not find with random weights. The
import stays explicit all the same: ``import lqedu`` imports no other program, and what a program does must not depend on
the order of its imports.

No code of a repository is run and nothing is unpickled: the record is JSON, weights are safetensors, and names, shapes and
dtypes are checked before the first tensor is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from lqedu.checkpoint.folder import FORMAT_VERSION, RECORD, check_tensors, check_values, install_frames, read_record
from lqedu.errors import CheckpointError, UsageError
from lqedu.models.shards import Shards
from lqedu.runtime.attention import NAME as ATTENTION

METHOD = "lqedu"
_PLAIN_ATTENTION = (None, "sdpa", ATTENTION)  # "sdpa" is what transformers takes where nobody asks


class LqeduConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of config.json: that the folder is ours; ``lqedu.json`` holds the rest.

    Raises:
        CheckpointError: another version of the format.
    """

    def __init__(self, format_version: int = FORMAT_VERSION, quant_method: str = METHOD) -> None:
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"the model has format version {format_version!r}, this lqedu reads {FORMAT_VERSION}; update lqedu"
            )
        self.quant_method, self.format_version = quant_method, format_version


class LqeduQuantizer(HfQuantizer):
    """What transformers calls while it loads a folder of ours: frames before the tensors, checks before and after."""

    def __init__(self, quantization_config: LqeduConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise UsageError(
                "transformers cannot quantize a model by lqedu while it loads it; "
                "load it dense, then call lqedu.quantize(model, method, calibration)"
            )
        self._folder: Path | None = None
        self._tied: dict[str, str] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse (UsageError) a device map that leaves weights on a disk or splits them between CPU and GPUs."""
        if isinstance(device_map, dict):
            _check_devices(device_map.values())

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``save_pretrained`` writes no record of the layers (UsageError)."""
        raise UsageError("save_pretrained does not write a quantized model; call lqedu.save(model, folder, tokenizer)")

    @property
    def is_trainable(self) -> bool:
        """Codes are not trained."""
        return False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise CheckpointError("the folder has no safetensors; only those are read. Save the model with lqedu.save")
        self._folder = _record_of(model, files[0])
        record = read_record(self._folder)
        _check_request(model, record)
        found = _headers(files)
        with torch.device("cpu"), _default_dtype(torch.float32):  # transformers sets its own while it builds a model
            install_frames(model, record, self._folder)
        self._tied = {name: original for name, original in record["tied"].items() if original in found}
        check_tensors(self._folder, model, found | {name: found[original] for name, original in self._tied.items()})

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        _check_devices(getattr(model, "hf_device_map", {}).values())
        for name, original in self._tied.items():
            if model.get_parameter(name) is not model.get_parameter(original):
                model.get_parameter(name).data = model.get_parameter(original).data
        check_values(model, self._folder)
        return model.requires_grad_(False)


def register() -> None:
    """Make transformers know the method; again does nothing."""
    from transformers.quantizers import auto

    if auto.AUTO_QUANTIZER_MAPPING.get(METHOD) is None:
        register_quantization_config(METHOD)(LqeduConfig)
        register_quantizer(METHOD)(LqeduQuantizer)


def _record_of(model: nn.Module, weights: Path) -> Path:
    """The folder with the record: that of the weights; of a model on the Hub it is fetched beside them."""
    folder, config = weights.parent, model.config
    if not (folder / RECORD).is_file() and not Path(str(config.name_or_path)).is_dir():
        found = cached_file(config.name_or_path, RECORD, _commit_hash=getattr(config, "_commit_hash", None))
        folder = Path(found).parent
    return folder


def _check_request(model: nn.Module, record: dict) -> None:
    """Refuse (UsageError) what was asked of ``from_pretrained`` and cannot be done with this model."""
    asked = getattr(model.config, "_attn_implementation", None)
    if record["attention"] is not None and asked not in _PLAIN_ATTENTION:
        raise UsageError(
            f"the model stores its keys and values in few bits, which attn_implementation={asked!r} would undo; "
            "leave the argument out"
        )
    if getattr(model.config, "distributed_config", None) is not None or getattr(model, "_tp_size", None):
        raise UsageError("packed layers are not split over processes; leave tp_plan and distributed_config out")


def _headers(files: list[Path]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor; no tensor is read."""
    shards = Shards(files[0].parent)
    if {header.path.name for header in shards.values()} != {file.name for file in files}:
        raise UsageError(
            f"{files[0].name} is not what lqedu wrote; leave out variant= and subfolder= of from_pretrained"
        )
    return {name: (header.shape, header.dtype) for name, header in shards.items()}


def _check_devices(devices: Any) -> None:
    kinds = {str(device).partition(":")[0] if isinstance(device, str | torch.device) else "cuda" for device in devices}
    if "disk" in kinds or ("cpu" in kinds and len(kinds) > 1):
        raise UsageError(
            "a quantized model is not offloaded: its codes stay where they are computed with. "
            "Use device_map='cpu', or a map of GPUs that hold all of it"
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


register()
