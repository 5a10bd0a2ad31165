"""Tensors in safetensors files, read one at a time: a single file, or shards and an index, as the Hub lays them out.

    model.safetensors                             everything, or
    model-00001-of-00003.safetensors ...          shards, and
    model.safetensors.index.json                  {"weight_map": {tensor: file}, "metadata": {"total_size": bytes}}

Opening reads headers only. Everything that a header can tell is checked before the first tensor is read: a missing or
truncated shard, a shard of another model, a file name that leads out of the folder. Chapter ``21-serving``.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lqedu.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {  # as headers name them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What is known of a tensor before it is read."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Shards(Mapping[str, Header]):
    """The tensors of a folder: a mapping from names to headers, and :meth:`read`.

    Raises:
        CheckpointError: no safetensors, an index that is damaged or points out of the folder, a shard that is missing,
            truncated or holds other tensors than the index says, or a dtype that torch does not have.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        files = _files(self.folder)
        self._headers: dict[str, Header] = {}
        for file in dict.fromkeys(files.values()) if files else (WEIGHTS,):
            found = read_headers(self.folder / file)
            if files:
                _check_listed(self.folder / file, set(found), {name for name, f in files.items() if f == file})
            self._headers |= found

    def __getitem__(self, name: str) -> Header:
        return self._headers[name]

    def __iter__(self) -> Any:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """One tensor in memory of its own, on ``device``, in ``dtype`` or its own.

        The file is mapped only while this runs: pages of tensors that were read before are not kept.

        Raises:
            CheckpointError: the file has changed since it was opened.
        """
        header = self._headers[name]
        try:
            with safe_open(header.path, framework="pt") as file:
                tensor = file.get_tensor(name).to(device=device, dtype=dtype or header.dtype, copy=True)
        except (OSError, SafetensorError) as error:
            raise _damaged(header.path, error) from error
        if tuple(tensor.shape) != header.shape:
            raise _damaged(header.path, f"{name} has changed since it was opened")
        return tensor

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor, on the CPU. Pages of the files stay mapped as long as tensors live that were read from them."""
        tensors: dict[str, Tensor] = {}
        for path in dict.fromkeys(header.path for header in self.values()):
            try:
                tensors |= load_file(path)
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from error
        return tensors


def shard_name(index: int, count: int) -> str:
    """File name of shard ``index``, from 1 to ``count``.

    >>> shard_name(2, 31)
    'model-00002-of-00031.safetensors'
    """
    return f"model-{index:05d}-of-{count:05d}.safetensors"


def index_of(shards: Mapping[str, Iterable[str]], total_bytes: int) -> str:
    """The text of an index.

    Args:
        shards: names of tensors, by file.
        total_bytes: of all tensors.
    """
    weight_map = {name: file for file, names in shards.items() for name in names}
    return json.dumps(
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}, indent=1
    )


def _files(folder: Path) -> dict[str, str]:
    """File names by tensor from the index, or nothing where there is no index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        sound = isinstance(files, dict) and files and all(isinstance(file, str) for file in files.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors ({error}); fetch it again") from error
    if not sound:
        raise CheckpointError(f"{path} names no file for its tensors; fetch it again")
    for file in dict.fromkeys(files.values()):
        if {PurePosixPath(file).name, PureWindowsPath(file).name} != {file} or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} names the file {file!r}, which is no safetensors file of this folder; do not use this model"
            )
    return files


def read_headers(path: Path) -> dict[str, Header]:
    """What one file says of its tensors (CheckpointError where it is missing, truncated or no safetensors file)."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    strange = sorted(f"{name} ({dtype})" for name, (_, dtype) in kinds.items() if dtype not in _DTYPES)
    if strange:
        raise CheckpointError(f"{path} holds tensors of a dtype that is not supported: {', '.join(strange[:3])}")
    return {name: Header(path, shape, _DTYPES[dtype]) for name, (shape, dtype) in kinds.items()}


def _check_listed(path: Path, found: set[str], listed: set[str]) -> None:
    if problems := [f"lacks {name}" for name in sorted(listed - found)] + [
        f"holds {name}, which the index does not" for name in sorted(found - listed)
    ]:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{path} is not the shard that the index describes: it {problems[0]}{more}; fetch it again"
        )


def _damaged(path: Path, error: object) -> CheckpointError:
    return CheckpointError(f"{path} is missing or damaged ({error}); fetch or write it again")
