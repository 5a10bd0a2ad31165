"""What a model's blocks and layers see, one block at a time; ``04-gptq``.

A model is run as the sequence it is: everything before the first block once, then block after block, each with the
outputs of the one before. Only one block's activations are held at a time, and what happens to a block (its weights may
be replaced while it runs) is what the next one sees.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lqedu.calibration.distributed import all_sum, first_of_all
from lqedu.errors import CalibrationError, UnsupportedModelError
from lqedu.models.anatomy import block_list
from lqedu.models.modes import inference

Visitor = Callable[[Tensor], object]


class _FirstBlockReached(Exception):
    """A jump out of the model's forward, not an error."""


def block_inputs(model: nn.Module, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Run what comes before the first decoder block, on all windows at once.

    Args:
        model: a causal language model that :func:`lqedu.models.anatomy.describe` knows.
        windows: token ids, int64 ``[n, length]``, on any device.

    Returns:
        ``(hidden, kwargs)``: the first block's input ``[n, length, d]``, and everything else the model passes to its
        blocks (positions, mask; no KV cache), for :func:`run_block`. The first block itself does not run.

    Raises:
        UnsupportedModelError: an unknown type, or blocks that need different masks at this length.
    """
    _check_masks(model, windows.shape[1])
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        caught.append((args[0], kwargs))
        raise _FirstBlockReached

    hook = block_list(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with inference(model):
            model(windows.to(model.get_input_embeddings().weight.device), use_cache=False)
    except _FirstBlockReached:
        pass
    finally:
        hook.remove()
    return caught[0]


def run_block(
    block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], *, visit: Mapping[str, Visitor] | None = None
) -> Tensor:
    """One forward pass of a decoder block over all windows.

    Args:
        block: one of :func:`lqedu.models.anatomy.block_list`.
        hidden: its input ``[n, length, d]``; not changed.
        kwargs: from :func:`block_inputs`.
        visit: functions by the name of a submodule relative to the block. Each is called with the submodule's input
            (``[..., in]``) just before the submodule runs. It may replace the submodule's ``weight``: the pass goes on
            through the new one, so that a layer can be quantized on what it sees, and what follows sees the result.

    Returns:
        The block's output ``[n, length, d]``.
    """
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(_calling(function), with_kwargs=True)
        for name, function in (visit or {}).items()
    ]
    try:
        with inference(block):
            output = block(hidden, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return output[0] if isinstance(output, tuple) else output


def first_windows(hidden: Tensor, kwargs: Mapping[str, Any], tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """A block's inputs cut to whole windows of at least ``tokens`` tokens, or all where there are fewer.

    Where processes share the windows, each gets the first ones of all.

    Args:
        hidden, kwargs: from :func:`block_inputs`. Of the arguments, what has an entry for each window is cut.
        tokens: at least 1.
    """
    windows = len(hidden)
    count = min(int(all_sum(torch.tensor(windows))), -(-tokens // hidden.shape[1]))

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(part) for part in value)
        per_window = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == windows
        return first_of_all(value, count) if per_window else value

    return first_of_all(hidden, count), {name: cut(value) for name, value in kwargs.items()}


def _calling(function: Visitor) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        function(args[0] if args else next(iter(kwargs.values())))  # attention gets its input by name

    return hook


def _check_masks(model: nn.Module, length: int) -> None:
    """Refuse blocks that attend differently: they would all get the first block's mask."""
    window = getattr(model.config, "sliding_window", None)
    if len(set(getattr(model.config, "layer_types", None) or ())) > 1 and window is not None and length > window:
        raise UnsupportedModelError(
            f"some blocks of this model attend to the last {window} tokens only; use windows of at most {window} tokens"
        )


def check_windows(model: nn.Module, windows: Tensor) -> None:
    """Refuse (CalibrationError) what is no batch of token ids ``[windows, length]`` of the model's vocabulary."""
    if not isinstance(windows, Tensor) or windows.dtype != torch.int64 or windows.dim() != 2:
        raise CalibrationError(
            "calibration must be int64 token ids of shape [windows, length]; see lqedu.token_windows"
        )
    if windows.numel() == 0:
        raise CalibrationError("calibration holds no tokens; use more windows or a longer text")
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(windows.min()) < 0 or int(windows.max()) >= vocabulary:
        raise CalibrationError(
            f"calibration holds token ids outside the model's vocabulary of {vocabulary}; use the model's own tokenizer"
        )
