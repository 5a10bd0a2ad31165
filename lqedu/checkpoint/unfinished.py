"""An unfinished run on disk: one file for each block that is done, and what the run was, so that it can go on.

A block file holds packed codes, so a run that is killed and started again installs the same bits and computes the same
activations behind them: it ends with the bytes an uninterrupted run would have written.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lqedu import __version__
from lqedu.atomic import atomic_file
from lqedu.errors import CheckpointError, GridError
from lqedu.models.load import weights_sha256
from lqedu.rounding import RoundingReport
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.kinds import describe, rebuild

if TYPE_CHECKING:
    from lqedu.methods.base import Method


@dataclass(frozen=True)
class Layer:
    """What became of one linear layer: everything its quantized module is made of, and a report.

    Attributes:
        weight: a stored weight, see ``lqedu.runtime.kinds``.
        report: what the rounding did.
        path: what happens to the input before the product.
        static: scale and zero point of the input's grid where they come from calibration.
    """

    weight: Any
    report: RoundingReport
    path: InputPath
    static: tuple[Tensor, Tensor | None] | None = None


@dataclass(frozen=True)
class Block:
    """What became of one decoder block.

    Attributes:
        layers: each linear, by name relative to the block.
        changed: other tensors of the block that the method replaced (a norm that absorbed a scale), by name.
    """

    layers: dict[str, Layer]
    changed: dict[str, Tensor]


class UnfinishedRun:
    """The folder of a run in progress.

    Raises:
        CheckpointError: the folder holds a run with another model, method, data or build, or cannot be written.
    """

    def __init__(self, folder: Path | str, model: nn.Module, method: "Method", calibration: Tensor | None) -> None:
        self.folder = Path(folder)
        identity = _identity(model, method, calibration)
        record = self.folder / "run.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = json.loads(record.read_text()) if record.exists() else None
            strange = found is None and any(self.folder.iterdir())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot use {self.folder} for an unfinished run: {error}; remove it") from error
        if strange:
            raise CheckpointError(
                f"{self.folder} holds files that are not of an unfinished run; move them or choose another folder"
            )
        if found is None:
            with atomic_file(record) as temporary:
                temporary.write_text(json.dumps(identity, indent=1))
        elif found != identity:
            differs = sorted(key for key in identity if found.get(key) != identity[key]) or ["its fields"]
            threads = ""
            if "threads" in differs:
                threads = (
                    f" (it ran on {found.get('threads')} threads, this runs on {identity['threads']}: OMP_NUM_THREADS)"
                )
            raise CheckpointError(
                f"{self.folder} holds an unfinished run that differs in: {', '.join(differs)}{threads}; "
                "remove it to start afresh, or repeat the command that began it"
            )

    def read(self, index: int) -> "Block | None":
        """What became of block ``index``, or ``None`` where the block is not done."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                layers = json.loads(file.metadata()["layers"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove this file and repeat the command") from error
        result = {}
        for name, meta in layers.items():
            packed = {key.removeprefix(name + ":"): t for key, t in tensors.items() if key.startswith(name + ":")}
            scale, zero = packed.pop("input_scale", None), packed.pop("input_zero", None)
            static = None if scale is None else (scale, zero)
            try:
                weight, inputs = rebuild(meta, packed), InputPath.from_dict(meta["input"])
            except GridError as error:
                raise CheckpointError(
                    f"{path} is damaged: {name}: {error}; remove this file and repeat the command"
                ) from error
            result[name] = Layer(weight, RoundingReport(**meta["report"]), inputs, static)
        return Block(result, {key: tensor for key, tensor in tensors.items() if ":" not in key})

    def write(self, index: int, block: "Block") -> None:
        """Keep what became of block ``index``."""
        tensors, meta = {name: tensor.cpu().contiguous() for name, tensor in block.changed.items()}, {}
        for name, layer in block.layers.items():
            stored = layer.weight.packed() | dict(zip(("input_scale", "input_zero"), layer.static or (), strict=False))
            tensors |= {f"{name}:{key}": tensor.cpu() for key, tensor in stored.items() if tensor is not None}
            meta[name] = describe(layer.weight) | {"input": layer.path.to_dict(), "report": asdict(layer.report)}
        with atomic_file(self._path(index)) as temporary:
            save_safetensors(tensors, temporary, {"layers": json.dumps(meta)})

    def read_learned(self) -> dict[str, Tensor] | None:
        """What the method trained before its first block, or ``None`` where nothing was kept."""
        path = self.folder / "learned.safetensors"
        try:
            return load_file(path) if path.exists() else None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove this file and repeat the command") from error

    def write_learned(self, tensors: dict[str, Tensor]) -> None:
        """Keep what the method trained."""
        with atomic_file(self.folder / "learned.safetensors") as temporary:
            save_safetensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, {})

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """``safetensors.torch.save_file`` that reports a full disk as the OSError it is; others may read the file."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # the Rust side wraps I/O errors in its own type
        raise OSError(str(error)) from error
    path.chmod(0o644)  # safetensors writes through a private temporary file: 0600 would stay


def _identity(model: nn.Module, method: "Method", calibration: Tensor | None) -> dict:
    """Everything the resulting bytes depend on."""
    tokens = (
        None if calibration is None else hashlib.sha256(calibration.cpu().contiguous().numpy().tobytes()).hexdigest()
    )
    return {
        "lqedu": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": weights_sha256(model),
        "method": {"name": method.name, "options": method.options()},
        "calibration": tokens,
    }
