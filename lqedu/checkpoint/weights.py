"""Writing the safetensors of a model folder, and what to say of a folder that has none. Chapter ``21-serving``."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lqedu.checkpoint.unfinished import save_safetensors
from lqedu.errors import CheckpointError, UsageError
from lqedu.models.shards import INDEX, WEIGHTS, Shards, index_of

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def write_weights(tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Write tensors to a folder, with an index where they take more than one file.

    Args:
        tensors: contiguous, on the CPU, none of them twice.
        folder: exists; see :func:`lqedu.atomic.atomic_directory` for how it appears whole or not at all.
        max_shard_size: bytes, or a number with a unit, such as "5GB". A larger tensor has a file of its own.

    Raises:
        UsageError: a size that is none.
        OSError: a full disk, for instance.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"max_shard_size is bytes or a number with a unit, as '5GB', got {max_shard_size!r}"
        ) from error
    for name, keys in split.filename_to_tensors.items():
        save_safetensors({key: tensors[key] for key in keys}, folder / name, {"format": "pt"})
    if split.is_sharded:
        text = index_of(split.filename_to_tensors, split.metadata["total_size"])
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def open_weights(folder: Path) -> Shards:
    """The tensors of a folder, headers only.

    Raises:
        CheckpointError: as :class:`Shards`, and a folder of pickles, which run code when they are opened.
    """
    if not (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        files = sorted(path.name for path in folder.iterdir())
        others = [name for name in files if name.endswith(".safetensors")]
        if others:
            raise CheckpointError(
                f"{folder} has {', '.join(others[:3])}, but neither {WEIGHTS} nor {INDEX}; a single file has to be "
                f"called {WEIGHTS}, several need their index"
            )
        if pickles := [name for name in files if name.endswith(_PICKLES)]:
            raise CheckpointError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which could run code when it is opened; "
                "let a tool that you trust convert it to safetensors"
            )
        raise CheckpointError(f"{folder} has no {WEIGHTS}; fetch the model again")
    return Shards(folder)


def distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without repetition, contiguous and on the CPU, and which names were copies of which (tied embeddings)."""
    first: dict[tuple, str] = {}
    tensors, tied = {}, {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        if tensor.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().contiguous().cpu()
    return tensors, tied


def shorten(problems: Iterable[str], most: int = 8) -> str:
    """Problems as one sentence, the first ``most`` of them."""
    problems = list(problems)
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
