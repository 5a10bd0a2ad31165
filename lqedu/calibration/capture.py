"""Run a model one decoder block at a time, and look at what each of its sub-modules receives.

Only one block and the hidden states of the calibration tokens need to be at hand, whatever the depth of the model.
Chapter ``04-gptq``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lqedu.models.anatomy import block_list

Visitor = Callable[[Tensor], None]


class _Arrived(Exception):  # noqa: N818  (a signal, not an error)
    """Carries the first block's arguments out of the model's forward."""


@torch.no_grad()
def block_inputs(model: nn.Module, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the first decoder block receives: everything before it runs, the block itself does not.

    Args:
        model: a model that :func:`lqedu.models.anatomy.describe` knows.
        windows: int64 ``[n, length]``.

    Returns:
        ``(hidden, kwargs)``: hidden states ``[n, length, d]``, and the keyword arguments (mask, positions) that every
        block receives alike.
    """

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Arrived(args, kwargs)

    handle = block_list(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(windows.to(model.device), use_cache=False)
    except _Arrived as arrived:
        args, kwargs = arrived.args
    finally:
        handle.remove()
    if args:
        return args[0], kwargs
    return kwargs.pop("hidden_states"), kwargs


@torch.no_grad()
def run_block(
    block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], *, visit: Mapping[str, Visitor] | None = None
) -> Tensor:
    """One forward pass of a block over all windows at once.

    Args:
        block: a decoder block.
        hidden: ``[n, length, d]``, not changed.
        kwargs: as :func:`block_inputs` returned them.
        visit: functions by sub-module name (relative to the block); each gets the sub-module's input just before the
            sub-module runs. A visitor may replace the sub-module's weight: the new one is what runs.

    Returns:
        The block's output, ``[n, length, d]``.
    """
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda module, args, f=function: f(args[0]))
        for name, function in (visit or {}).items()
    ]
    try:
        output = block(hidden, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return output[0] if isinstance(output, tuple) else output
