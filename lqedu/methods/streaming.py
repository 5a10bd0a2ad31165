"""Quantizing a model that does not fit in memory: one decoder block at a time, from shards to shards; ``21-serving``.

    embeddings -> hidden states of all windows -> block 0 -> ... -> block n - 1 -> final norm and head

Each part is read from the shards, changed by the same code that changes a model in memory
(``lqedu.methods.pipeline``), written, and freed. What stays is one hidden state for each calibration token, and the
tensors that a method's move of the whole model needs. The bits are those that :func:`lqedu.quantize` and
:func:`lqedu.save` give.
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lqedu.atomic import atomic_directory
from lqedu.calibration.capture import block_inputs
from lqedu.calibration.distributed import from_first, my_windows, processes
from lqedu.checkpoint.folder import write_about
from lqedu.checkpoint.unfinished import UnfinishedRun
from lqedu.errors import CheckpointError, UsageError
from lqedu.methods.base import Method
from lqedu.methods.pipeline import (
    describe_result,
    learn_once,
    open_run,
    quantize_blocks,
    set_attention,
)
from lqedu.methods.request import check_finite, check_shapes
from lqedu.models.anatomy import describe, linears
from lqedu.models.copying import copy_sharing_tensors
from lqedu.models.shards import INDEX, index_of, read_headers, shard_name
from lqedu.models.streamed import StreamedModel
from lqedu.runtime.linear import quantized_linears

if TYPE_CHECKING:
    from lqedu.checkpoint.card import Facts


def quantize_folder(
    source: "str | Path | StreamedModel",
    method: Method,
    calibration: Tensor | None,
    out: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: bool = False,
    resume_dir: Path | str | None = None,
    facts: "Facts | None" = None,
) -> Path:
    """Quantize a model on disk into a new folder, with one decoder block in memory at a time.

    Args:
        source: as for :func:`lqedu.load_model`, a dense model; or one that was opened before.
        method: what to do. Any method whose ``learns_from_blocks`` is true.
        calibration: token ids ``[windows, length]``, int64; required where ``method.uses_calibration``, else unused.
        out: must not exist yet.
        dtype, device: of the parts in memory, as for :func:`lqedu.load_model`; those of ``source`` where it is open.
        progress: show a progress bar on stderr.
        resume_dir: keeps each finished block until ``out`` is whole; ``OUT.unfinished`` by default. A run that finds it there
            goes on behind the last block and ends with the same bytes. Removed at the end.
        facts: for the model card, see :func:`lqedu.save`.

    Returns:
        ``out``: what :func:`lqedu.save` would have written, one shard for each part, for :func:`lqedu.load_model`.

    Raises:
        UsageError: a method that needs the whole model, and what :func:`lqedu.quantize` and :func:`lqedu.load_model` refuse.
        GridError, CalibrationError, UnsupportedModelError, MissingDependencyError: as these two.
        CheckpointError: ``out`` exists or cannot be written, too little space on its disk, damaged or foreign weights, or
            ``resume_dir`` belongs to another run. What can be known before the work starts is refused before, and ``out``
            never is there in part.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another folder or remove it")
    check_streamable(method)
    dense = source if isinstance(source, StreamedModel) else StreamedModel(source, dtype=dtype, device=device)
    model = copy_sharing_tensors(dense.model)
    check_shapes(model, method, calibration)
    _check_space(model, method, out)
    folder = resume_dir or out.with_name(out.name + ".unfinished")
    sha256 = dense.sha256(check_finite)
    unfinished = open_run(folder, sha256, method, calibration, dense.device)
    if facts is not None and facts.base_sha256 is None:
        facts = replace(facts, base_sha256=sha256)

    dense.fill_embeddings(model)
    notes = method.notes(model)
    learned = learn_once(
        unfinished,
        lambda: method.learn(model, calibration, progress=progress, blocks=dense.blocks(copy_sharing_tensors(model))),
    )
    describe_result(model, method, learned, notes)
    move = method.model_move(model, learned)
    move.embeddings(model)
    inputs = block_inputs(model, my_windows(calibration)) if method.uses_calibration else (None, {})
    first = _write(unfinished, "embeddings.safetensors", model, describe(model).embeddings)
    dense.release_embeddings(model)

    layers: dict[str, dict] = {}
    blocks = move.each(dense.blocks(model))
    for _, done in quantize_blocks(model, blocks, method, inputs, unfinished, progress=progress):
        layers |= {name: layer.describe() for name, layer in done.items()}
        del done  # codes of a block, before the next one is read
    del inputs

    dense.fill_head(model)
    move.head(model)
    anatomy = describe(model)
    last = _write(
        unfinished, "head.safetensors", model,
        (anatomy.final_norm,) if dense.shares(model) else (anatomy.final_norm, anatomy.head),
    )  # fmt: skip
    dense.release_head(model)
    set_attention(model, method)
    tied = {f"{anatomy.head}.weight": f"{anatomy.embeddings[0]}.weight"} if dense.shares(model) else {}
    layers = {name: layers[name] for name in quantized_linears(model)}  # as the modules stand, not as they run
    parts = [first, *(unfinished.path(index) for index in range(model.config.num_hidden_layers)), last]
    if processes().rank == 0:
        with atomic_directory(out) as temporary:
            write_about(model, temporary, dense.tokenizer, layers, tied, facts)
            _gather(parts, temporary)
        shutil.rmtree(unfinished.folder)
    return from_first(out)  # once the folder is there


def check_streamable(method: Method | type[Method]) -> None:
    """Refuse (UsageError) a method that needs the whole model in memory."""
    if not isinstance(method, Method) and not (isinstance(method, type) and issubclass(method, Method)):
        raise UsageError(f"method is an instance such as lqedu.methods.GPTQ(bits=4), got {method!r}")
    if not method.learns_from_blocks:
        raise UsageError(
            f"{method.title} trains with gradients through the whole model, so it cannot be streamed; quantize it in memory, "
            "or choose a method that goes block by block, such as quarot"
        )


def _write(unfinished: UnfinishedRun, name: str, model: nn.Module, parts: Iterable[str]) -> Path:
    """Keep all tensors of some parts of a model in one file."""
    tensors = {f"{part}.{key}": t for part in parts for key, t in model.get_submodule(part).state_dict().items()}
    unfinished.write_tensors(name, tensors)
    return unfinished.folder / name


def _gather(parts: list[Path], folder: Path) -> None:
    """Give files their names as shards of a folder, and write its index. Nothing is copied where the disk has links."""
    shards: dict[str, Iterable[str]] = {}
    total = 0
    for index, part in enumerate(parts, start=1):
        name = shard_name(index, len(parts))
        _link(part, folder / name)
        shards[name] = headers = read_headers(part)
        total += sum(header.nbytes for header in headers.values())
    (folder / INDEX).write_text(index_of(shards, total), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)


def _check_space(model: nn.Module, method: Method, out: Path) -> None:
    """Refuse (CheckpointError) a disk that cannot hold the result."""
    folder = next(above for above in (out.absolute().parent, *out.absolute().parents) if above.exists())
    free, needed = shutil.disk_usage(folder).free, predicted_bytes(model, method)
    if free < needed:
        raise CheckpointError(
            f"{out} will take {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left; free space or choose another folder"
        )


def predicted_bytes(model: nn.Module, method: Method) -> int:
    """Bytes of the quantized tensors: what the method's grid says of its linears, everything else as it is.

    Not exact: transforms that a method stores are left out, and linears of a method that names no grid.
    """
    quantized = {f"{name}.weight": linear for name, linear in linears(model).items() if not method.keeps(name)}
    dense = sum(t.nbytes for name, t in model.named_parameters() if name not in quantized)
    if not hasattr(method, "grid"):
        return dense
    return dense + sum(method.grid().nbytes(tuple(linear.weight.shape)) for linear in quantized.values())
