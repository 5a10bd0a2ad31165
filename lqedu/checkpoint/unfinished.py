"""An unfinished run on disk: one file for each block that is done, and what the run was, so that it can go on.

A block file holds packed codes, so a run that is killed and started again installs the same bits and computes the same
activations behind them: it ends with the bytes an uninterrupted run would have written. It holds every tensor of the block
under its final name, so that it can serve as a shard of the finished folder as it is.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lqedu import __version__
from lqedu.atomic import atomic_file
from lqedu.errors import CheckpointError, GridError
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

    def describe(self) -> dict[str, Any]:
        """All but the tensors, as JSON can store it: what ``lqedu.json`` says of a layer."""
        return describe(self.weight) | {"input": self.path.to_dict(), "report": asdict(self.report)}


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

    Args:
        folder: made if it is not there.
        identity: of the run, from :func:`run_identity`.
        writes: of several processes that work on one run, one writes. The others find what it wrote.

    Raises:
        CheckpointError: the folder holds a run with another model, method, data or build, or cannot be written.
    """

    def __init__(self, folder: Path | str, identity: dict[str, Any], *, writes: bool = True) -> None:
        self.folder, self._writes = Path(folder), writes
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
        if found is None and writes:
            with atomic_file(record) as temporary:
                temporary.write_text(json.dumps(identity, indent=1))
        elif found not in (None, identity):
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

    def finished(self, count: int) -> set[int]:
        """Which of the blocks 0 to ``count - 1`` are done."""
        return {index for index in range(count) if self.path(index).exists()}

    def read(self, index: int, prefix: str, device: torch.device | str = "cpu") -> "Block":
        """What became of block ``index``, whose tensors' names start with ``prefix``, on ``device``."""
        path = self.path(index)
        try:
            about = json.loads(path.with_suffix(".json").read_text())
            tensors = {key.removeprefix(prefix): t for key, t in load_file(path, device=str(device)).items()}
            layers, changed = about["layers"], {name: tensors[name] for name in about["changed"]}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove this file and repeat the command") from error
        result = {}
        for name, meta in layers.items():
            packed = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            scale, zero, _ = (packed.pop(key, None) for key in ("input_scale", "input_zero", "bias"))
            static = None if scale is None else (scale, zero)
            try:
                weight, inputs = rebuild(meta, packed), InputPath.from_dict(meta["input"])
            except GridError as error:
                raise CheckpointError(
                    f"{path} is damaged: {name}: {error}; remove this file and repeat the command"
                ) from error
            result[name] = Layer(weight, RoundingReport(**meta["report"]), inputs, static)
        return Block(result, changed)

    def write(self, index: int, prefix: str, block: "Block", state: Mapping[str, Tensor]) -> None:
        """Keep what became of block ``index``.

        Args:
            index: of the block.
            prefix: of its tensors' names.
            block: what became of it.
            state: all tensors of the quantized block, by name relative to it.
        """
        if not self._writes:
            return
        layers = {name: layer.describe() for name, layer in block.layers.items()}
        path = self.path(index)
        with atomic_file(path.with_suffix(".json")) as temporary:  # first: the block is done once its tensors are there
            temporary.write_text(json.dumps({"layers": layers, "changed": sorted(block.changed)}))
        self.write_tensors(path.name, {prefix + name: tensor for name, tensor in state.items()})

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors in a file ``name`` of the folder."""
        if self._writes:
            with atomic_file(self.folder / name) as temporary:
                stored = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
                save_safetensors(stored, temporary, {"format": "pt"})  # one entry: their order in the file is random

    def read_learned(self) -> dict[str, Tensor] | None:
        """What the method trained before its first block, or ``None`` where nothing was kept."""
        path = self.folder / "learned.safetensors"
        try:
            return load_file(path) if path.exists() else None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove this file and repeat the command") from error

    def write_learned(self, tensors: dict[str, Tensor]) -> None:
        """Keep what the method trained."""
        self.write_tensors("learned.safetensors", tensors)

    def path(self, index: int) -> Path:
        """The file of a block."""
        return self.folder / f"block-{index:04d}.safetensors"


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """``safetensors.torch.save_file`` that reports a full disk as the OSError it is; others may read the file."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # the Rust side wraps I/O errors in its own type
        raise OSError(str(error)) from error
    path.chmod(0o644)  # safetensors writes through a private temporary file: 0600 would stay


def run_identity(
    weights: str, method: "Method", calibration: Tensor | None, device: torch.device, processes: int = 1
) -> dict[str, Any]:
    """Everything the resulting bytes depend on.

    Args:
        weights: digest of the dense model, :func:`lqedu.models.weights_sha256`.
        method: what is done.
        calibration: token ids of all processes.
        device: where.
        processes: how many share the windows: their sums are added up in another order.
    """
    tokens = (
        None if calibration is None else hashlib.sha256(calibration.cpu().contiguous().numpy().tobytes()).hexdigest()
    )
    return {
        "lqedu": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processes": processes,
        "model": weights,
        "method": {"name": method.name, "options": method.options()},
        "calibration": tokens,
    }
