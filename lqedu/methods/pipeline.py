"""From a method and a model to a quantized model, one decoder block at a time.

A block's forward pass runs once over all calibration tokens. Just before a linear layer runs, its input is at hand: the
Hessian is built from it, the layer is quantized on the spot, and the pass goes on through the quantized weight. So
every layer is calibrated on what it will really see, each sub-module of a block runs once, and memory holds one block
and its activations. Chapter ``04-gptq``.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lqedu.calibration.capture import block_inputs, run_block
from lqedu.calibration.distributed import (
    all_extremes,
    all_sum,
    check_agreement,
    from_first,
    my_windows,
    processes,
)
from lqedu.checkpoint.unfinished import Block, Layer, UnfinishedRun, run_identity
from lqedu.errors import NotPositiveDefiniteError, UsageError
from lqedu.linalg.hessian import HessianAccumulator
from lqedu.methods.base import Method
from lqedu.methods.request import check_request, quantized_stages, with_context
from lqedu.models.anatomy import Stage, block_list, describe, linears
from lqedu.models.copying import copy_sharing_tensors
from lqedu.models.load import weights_sha256
from lqedu.rounding import RoundingReport
from lqedu.runtime.inputs import input_path
from lqedu.runtime.kinds import layer_of

MAX_ATTEMPTS = 3  # the damping asked for, and twice ten times more


def quantize(
    model: nn.Module,
    method: Method,
    calibration: Tensor | None = None,
    *,
    progress: bool = False,
    resume_dir: Path | str | None = None,
) -> nn.Module:
    """Quantize the linear layers of every decoder block.

    Args:
        model: a dense causal language model that :func:`lqedu.models.anatomy.describe` knows. Not changed.
        method: what to do, e.g. ``GPTQ(bits=4, group_size=64)``.
        calibration: token ids ``[windows, length]``, int64; required where ``method.uses_calibration``, else unused.
        progress: show a progress bar on stderr.
        resume_dir: folder that keeps each finished block; a run that finds it there goes on behind the last one and
            ends with the same bytes. The caller deletes it.

    Returns:
        A new model that shares every untouched tensor with ``model``. Its attributes ``lqedu_reports`` (a
        :class:`RoundingReport` for each layer), ``lqedu_method`` (name and options) and ``lqedu_notes`` (a sentence for
        each thing the method did otherwise than its name says) tell what was done; ``lqedu_learned`` holds what
        :meth:`Method.learn` found.

    Raises:
        GridError, CalibrationError, UnsupportedModelError, UsageError: refused before work starts, naming the layer.
        CheckpointError: ``resume_dir`` belongs to another run or cannot be written.
    """
    check_request(model, method, calibration)
    unfinished = None
    if resume_dir is not None:
        device = model.get_input_embeddings().weight.device
        unfinished = open_run(resume_dir, weights_sha256(model), method, calibration, device)
    learned = learn_once(unfinished, lambda: method.learn(model, calibration, progress=progress))
    result = method.prepare_model(copy_sharing_tensors(model), learned)
    describe_result(result, method, learned, notes=method.notes(model))
    inputs = block_inputs(result, my_windows(calibration)) if method.uses_calibration else (None, {})
    for _, layers in quantize_blocks(result, block_list(result), method, inputs, unfinished, progress=progress):
        result.lqedu_reports |= {name: layer.report for name, layer in layers.items()}
    set_attention(result, method)
    return result


def quantize_blocks(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    method: Method,
    inputs: tuple[Tensor | None, dict],
    unfinished: UnfinishedRun | None = None,
    *,
    progress: bool = False,
) -> Iterator[tuple[nn.Module, dict[str, Layer]]]:
    """The one loop over decoder blocks: whether they are all in memory or come one at a time makes no difference to it.

    Args:
        model: whose blocks they are, behind :meth:`Method.model_move`. Only its shapes are read.
        blocks: dense, in order. Changed: their linears become layers that keep packed codes.
        method: what to do.
        inputs: what :func:`lqedu.calibration.capture.block_inputs` returned, or ``(None, {})`` where nothing is calibrated.
        unfinished: keeps each block that is done and knows those that were done before.
        progress: show a progress bar on stderr.

    Yields:
        Each block when it is done, and its quantized layers by their names in the model.
    """
    anatomy, count = describe(model), len(block_list(model))
    stages = quantized_stages(anatomy.stages, method)
    finished = from_first(unfinished.finished(count)) if unfinished else set()
    hidden, kwargs = inputs
    total = sum(len(stage.linears) for stage in stages) * count
    with tqdm(total=total, desc=method.title, unit="layer", disable=not progress) as bar:
        for index, block in enumerate(blocks):
            prefix = f"{anatomy.blocks}.{index}."
            dense_output = run_block(block, hidden, kwargs) if method.calibrates_on == "dense" else None
            if index not in finished:
                done, output = _quantize_block(block, stages, method, hidden, kwargs, prefix, bar.update)
                _install(block, done)
                check_agreement(_digest(block), prefix.rstrip("."))
                if unfinished:
                    unfinished.write(index, prefix, done, block.state_dict())
            else:
                done = unfinished.read(index, prefix, next(block.parameters()).device)
                _round(block, done)
                follows = method.calibrates_on == "quantized" and hidden is not None
                output = run_block(block, hidden, kwargs) if follows else None
                _install(block, done)
                bar.update(len(done.layers))
            hidden = output if dense_output is None else dense_output
            del output, dense_output
            yield block, {prefix + name: layer for name, layer in done.layers.items()}
            del done  # before the next block is asked for, which may have to be read into memory


def open_run(
    folder: Path | str, weights: str, method: Method, calibration: Tensor | None, device: torch.device
) -> UnfinishedRun:
    """The folder of an unfinished run; of several processes the first one makes it before the others look."""
    own = processes()
    identity = run_identity(weights, method, calibration, device, own.count)
    run = UnfinishedRun(folder, identity) if own.rank == 0 else None
    from_first(None)
    return run or UnfinishedRun(folder, identity, writes=False)


def learn_once(unfinished: UnfinishedRun | None, learn: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What :meth:`Method.learn` finds, or found before the run was interrupted."""
    learned = unfinished.read_learned() if unfinished else None
    if learned is None:
        learned = learn()
        if unfinished and learned:
            unfinished.write_learned(learned)
    return learned


def describe_result(result: nn.Module, method: Method, learned: dict[str, Tensor], notes: tuple[str, ...]) -> None:
    """Give a model the attributes that tell what was done to it, its reports still empty; see :func:`quantize`."""
    result.lqedu_method = {"name": method.name, "options": method.options()}
    result.lqedu_learned, result.lqedu_notes, result.lqedu_reports = learned, notes, {}


def set_attention(result: nn.Module, method: Method) -> None:
    """Make a model attend as the method says."""
    if (path := method.attention_path()) is not None:
        from lqedu.runtime.attention import set_attention_path

        set_attention_path(result, path)


def auto_group_size(model: nn.Module) -> int:
    """The largest of 128, 64 and 32 that divides the inputs of every linear layer of the blocks.

    Raises:
        UsageError: none of them does.
    """
    widths = {linear.in_features for linear in linears(model).values()}
    for size in (128, 64, 32):
        if all(width % size == 0 for width in widths):
            return size
    raise UsageError(f"none of 128, 64 and 32 divides all layer widths {sorted(widths)}; use per-channel scales")


def _quantize_block(
    block: nn.Module,
    stages: tuple[Stage, ...],
    method: Method,
    hidden: Tensor | None,
    kwargs: dict,
    prefix: str,
    tick: Callable[[int], object],
) -> tuple[Block, Tensor | None]:
    """Quantize the linears of one block; returns them and, where calibration needs it, the quantized block's output."""
    layers: dict[str, Layer] = {}
    activation = method.activation_grid()
    static = activation is not None and activation.static

    def quantize_stage(stage: Stage, seen: _Seen) -> None:
        for name in stage.linears:
            linear = block.get_submodule(name)
            with with_context(prefix + name, linear.weight, method):
                weight, report = _with_retries(method, linear.weight.detach(), seen.hessian)
            path = dataclasses.replace(input_path(linear), activation=activation)
            own = None if seen.static is None else tuple(None if t is None else t.clone() for t in seen.static)
            layers[name] = Layer(weight, report, path, own)  # files hold no tensor twice
            w_hat = weight.dequantize(linear.weight.dtype)
            linear.weight = nn.Parameter(w_hat, requires_grad=False)  # of our copy: the caller's tensor stays
            tick(1)

    def look(stage: Stage, x: Tensor) -> _Seen:
        """What the weights of a stage will be multiplied with, summed up."""
        z = input_path(block.get_submodule(stage.linears[0])).transform(x)
        return _Seen(
            hessian=_hessian(z) if method.needs_hessian else None,
            static=activation.fit(all_extremes(z)) if static else None,
        )

    changed = {} if hidden is None else method.prepare_block(block, stages, hidden, kwargs)
    if not method.needs_hessian and not static:
        for stage in stages:
            quantize_stage(stage, _Seen())
        wanted = hidden is not None and method.calibrates_on == "quantized"
        return Block(layers, changed), run_block(block, hidden, kwargs) if wanted else None

    if getattr(method, "true_sequential", True):
        # Quantize each stage inside the one forward pass, just before its first linear runs.
        def visitor(stage: Stage) -> Callable[[Tensor], None]:
            def visit(x: Tensor) -> None:
                if stage.linears[0] not in layers:
                    quantize_stage(stage, look(stage, x))

            return visit

        visit = {name: visitor(stage) for stage in stages for name in stage.linears}
        hidden = run_block(block, hidden, kwargs, visit=visit)
        return Block({name: layers[name] for stage in stages for name in stage.linears}, changed), hidden

    # Otherwise one pass through the dense block for all Hessians, and one behind the quantized weights.
    seen: dict[Stage, _Seen] = {}
    collect = {stage.linears[0]: (lambda x, stage=stage: seen.update({stage: look(stage, x)})) for stage in stages}
    run_block(block, hidden, kwargs, visit=collect)
    for stage in stages:
        quantize_stage(stage, seen[stage])
    return Block(layers, changed), run_block(block, hidden, kwargs)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What calibration says of a stage's input: each part only where somebody asks for it."""

    hessian: Tensor | None = None
    static: tuple[Tensor, Tensor | None] | None = None


def _digest(block: nn.Module) -> bytes:
    """Of a quantized block's tensors, where another process holds the same block."""
    return bytes.fromhex(weights_sha256(block)) if processes().count > 1 else b""


def _hessian(x: Tensor) -> Tensor:
    accumulator = HessianAccumulator(x.shape[-1])
    accumulator.add(x)
    return accumulator.result(all_sum)


def _with_retries(method: Method, weight: Tensor, hessian: Tensor | None) -> tuple[Any, RoundingReport]:
    """Raise the damping tenfold, at most twice, where a Hessian cannot be factored; the report says so."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            stored, report = method.quantize_linear(weight, hessian)
            return stored, dataclasses.replace(report, attempts=attempt)
        except NotPositiveDefiniteError:
            if attempt == MAX_ATTEMPTS:
                raise
            method = dataclasses.replace(method, damping=10 * method.damping)
    raise AssertionError("unreachable")


def _round(block: nn.Module, done: Block) -> None:
    """Give a dense block its rounded weights, as they were while it was calibrated.

    A packed layer may sum in another order (rotations that run online), and a resumed run must find the same bits.
    """
    _replace(block, done.changed)
    for name, layer in done.layers.items():
        linear = block.get_submodule(name)
        linear.weight = nn.Parameter(layer.weight.dequantize(linear.weight.dtype), requires_grad=False)


def _install(block: nn.Module, done: Block) -> None:
    """Replace the linears of a block by layers that keep packed codes, and the other tensors that were changed."""
    _replace(block, done.changed)
    for name, layer in done.layers.items():
        linear = block.get_submodule(name)
        block.set_submodule(name, layer_of(layer.weight, linear.bias, layer.path, layer.static))


def _replace(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
