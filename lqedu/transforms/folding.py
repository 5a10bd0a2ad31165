"""Folding a scale: divide a linear's input by s, multiply its weight by s, and let the operation before absorb the rest.

    y = x w^T = (x / s) (w · s)^T

The weight takes its half offline. The other half, ``1 / s`` per channel of ``x``, goes into whatever produced ``x``
linearly, the stage's *source* (``lqedu.models.anatomy``): a norm's gain, the rows of ``v_proj`` or ``up_proj``, the first
layer of an MLP with ReLU. Nothing remains to be done while the model runs. Chapters ``05-awq`` and ``08-smoothquant``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lqedu.errors import UsageError
from lqedu.models.anatomy import Stage


def fold_scale(block: nn.Module, stage: Stage, scale: Tensor) -> dict[str, Tensor]:
    """Divide the input of a stage by ``scale`` and multiply its weights by it: the block's function stays.

    Args:
        block: a dense decoder block. Its parameters are replaced by new ones; the old tensors are left alone.
        stage: the linears that share the input.
        scale: ``[in]``, positive. For a stage fed by ``v_proj`` under grouped-query attention, equal in all query heads
            that share a value head: see :func:`tie_heads`.

    Returns:
        The replaced parameters by name relative to the block, weights of linear layers left out: those are on their way
        to be rounded, the others must be kept.

    Raises:
        UsageError: a stage without a source, a scale of the wrong shape, one that is not finite and positive in the
            dtype of the parameters, or one that carries a parameter out of that dtype.
    """
    if stage.source is None:
        raise UsageError(f"nothing before {', '.join(stage.linears)} can absorb a scale")
    first, source = block.get_submodule(stage.linears[0]), block.get_submodule(stage.source)
    _check(scale, first)
    rows = scale
    if stage.source.endswith("v_proj"):
        scale, rows = _tied(block, source, scale)
    for name in stage.linears:
        linear = block.get_submodule(name)
        replace_parameter(linear, "weight", linear.weight * scale.to(linear.weight.dtype))
    if isinstance(source, nn.Linear):
        replace_parameter(source, "weight", source.weight / rows.to(source.weight.dtype)[:, None])
        changed = {}
    else:
        replace_parameter(source, "weight", source.weight / rows.to(source.weight.dtype))
        changed = {f"{stage.source}.weight": source.weight.detach()}
    if getattr(source, "bias", None) is not None:
        replace_parameter(source, "bias", source.bias / rows.to(source.bias.dtype))
        changed[f"{stage.source}.bias"] = source.bias.detach()
    return changed


def tie_heads(block: nn.Module, statistic: Tensor, reduce: Callable[..., Tensor] = torch.mean) -> Tensor:
    """Make a statistic of ``o_proj``'s input channels equal in the query heads that share a value head.

    A scale computed from the result can be folded into ``v_proj``. Without grouped-query attention nothing changes.

    Args:
        block: a decoder block.
        statistic: ``[heads * head_dim]``.
        reduce: over those heads, e.g. ``torch.mean`` or ``torch.amax``.
    """
    size = block.self_attn.head_dim
    repeats = len(statistic) // block.self_attn.v_proj.out_features
    shared = reduce(statistic.view(-1, repeats, size), 1, keepdim=True)
    return shared.expand(-1, repeats, -1).reshape(-1)


def _tied(block: nn.Module, v_proj: nn.Linear, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of ``o_proj``'s inputs, equal to the last bit in all heads of a group, and that of ``v_proj``'s rows.

    A power of equal numbers may differ in its last bit with the place in a vector register; such a scale is tied all the
    same, and the first head's value stands for its group.
    """
    repeats = len(scale) // v_proj.out_features
    if repeats == 1:
        return scale, scale
    groups = scale.view(-1, repeats, block.self_attn.head_dim)
    first = groups[:, :1]
    if not torch.allclose(groups, first.expand_as(groups), rtol=1e-5, atol=0):
        raise UsageError(
            f"{repeats} query heads share a value head, so a scale of o_proj's inputs must be equal in all of them"
        )
    return first.expand_as(groups).reshape(-1), first.reshape(-1)


def _check(scale: Tensor, linear: nn.Module) -> None:
    if tuple(scale.shape) != (linear.in_features,):
        raise UsageError(f"a scale of {linear.in_features} inputs has that shape, got {list(scale.shape)}")
    stored = scale.to(linear.weight.dtype)
    if not bool((torch.isfinite(stored) & (stored > 0) & torch.isfinite(1 / stored)).all()):
        raise UsageError(f"a scale must be finite and positive in {linear.weight.dtype}; bound it before folding")


def replace_parameter(owner: nn.Module, name: str, value: Tensor) -> None:
    """Give a module a new parameter without a gradient (UsageError where the value is not finite)."""
    if not bool(torch.isfinite(value).all()):
        raise UsageError(
            f"the scale carries a {name} {list(value.shape)} out of {value.dtype}; bound it before folding"
        )
    setattr(owner, name, nn.Parameter(value.detach(), requires_grad=False))
