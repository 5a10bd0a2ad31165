"""Reordering: put input channels of like salience into one group of a weight, at no cost while the model runs; ``14-qoq``.

A group of consecutive inputs shares a scale. Which inputs those are is an accident of numbering, and numbering may change:
with a permutation ``P``

    x w^T = (x P)(w P)^T

and what produced x absorbs ``P`` in its rows. Sorted by the largest ``|x|`` of calibration, the channels that matter most
share their groups with each other. Three permutations are free in a Llama-like block:

- inputs of ``down_proj``: rows of ``gate_proj`` and ``up_proj``;
- inputs of ``o_proj``: rows of ``v_proj``, within each head only, the same in all query heads that share a value head;
- the residual stream: one permutation for the whole model, in embeddings, norms, and everything that reads or writes it.

Lin et al., 2024, arXiv:2405.04532, section 4.3.3. Its code reorders the first two and leaves the residual stream alone.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lqedu.calibration.capture import block_inputs, run_block
from lqedu.errors import CalibrationError, UsageError
from lqedu.models.anatomy import Anatomy, Stage, block_list, describe
from lqedu.models.copying import copy_sharing_tensors
from lqedu.transforms.moves import Move

RESIDUAL = "residual"  # name of the permutation of the residual stream


def channel_order(salience: Tensor) -> Tensor:
    """Channels from the most to the least salient, along the last axis; equals keep their order.

    >>> channel_order(torch.tensor([0.5, 3.0, 1.0]))
    tensor([1, 2, 0])
    """
    if not bool(torch.isfinite(salience).all()):
        raise CalibrationError("the calibration activations hold NaN or infinite values")
    return salience.argsort(dim=-1, descending=True, stable=True)


def find_orders(
    model: nn.Module, windows: Tensor, *, residual: bool = False, blocks: Iterable[nn.Module] | None = None
) -> dict[str, Tensor]:
    """The permutations of a model by the largest ``|x|`` of each channel.

    Args:
        model: a dense causal language model. Not changed.
        windows: token ids ``[count, length]``; all of them pass the model once.
        residual: find one for the residual stream too. Its salience is the mean over all stages that read it, each relative
            to its own mean, so that no layer outvotes the others.
        blocks: the model's blocks, in order, where they come one at a time instead of being in ``model``.

    Returns:
        Orders for :func:`reorder_model`, int64: ``"INDEX.NAME"`` for the stage of block INDEX whose first linear is NAME,
        ``[in]``, or ``[kv_heads, head_dim]`` within heads, and perhaps ``"residual"``, ``[hidden]``.
    """
    orders: dict[str, Tensor] = {}
    votes: list[Tensor] = []
    hidden, kwargs = block_inputs(model, windows)
    stages = describe(model).stages
    for index, block in enumerate(block_list(model) if blocks is None else blocks):
        largest: dict[str, Tensor] = {}

        def visitor(name: str, largest: dict[str, Tensor] = largest):
            def visit(x: Tensor) -> None:
                largest[name] = x.reshape(-1, x.shape[-1]).abs().amax(0).float()

            return visit

        hidden = run_block(block, hidden, kwargs, visit={s.linears[0]: visitor(s.linears[0]) for s in stages})
        for stage in stages:
            name = stage.linears[0]
            if stage.behind_norm:
                votes.append(largest[name] / largest[name].mean().clamp(min=torch.finfo(torch.float32).tiny))
            elif stage.source is not None:
                orders[f"{index}.{name}"] = channel_order(_by_value_head(block, stage, largest[name]))
    if residual:
        orders[RESIDUAL] = channel_order(torch.stack(votes).mean(0))
    return orders


def reorder_model(model: nn.Module, orders: Mapping[str, Tensor]) -> nn.Module:
    """A model whose channels are permuted; it computes the same logits, up to the order of sums.

    Args:
        model: a dense causal language model. Not changed.
        orders: from :func:`find_orders`. Channel j of the result is channel ``order[j]`` of ``model``.

    Raises:
        UsageError: a name that is not in the model, or an order that is not a permutation of its channels.
    """
    moved = reorder_move(model, orders)(model)
    return copy_sharing_tensors(model) if moved is model else moved


def reorder_move(model: nn.Module, orders: Mapping[str, Tensor]) -> Move:
    """The same as a move that needs one part of the model in memory at a time; arguments and errors as :func:`reorder_model`.

    Of ``model`` only the shapes are read here. Orders of a block's channels are checked when the block is moved.
    """
    anatomy, count = describe(model), len(block_list(model))
    known = {f"{i}.{s.linears[0]}" for i in range(count) for s in anatomy.stages if _absorbs_order(s)}
    if unknown := sorted(set(orders) - known - {RESIDUAL}):
        raise UsageError(f"no channels to reorder by the names {', '.join(unknown)}; find_orders gives those there are")
    residual = orders.get(RESIDUAL)
    if residual is not None:
        _check_order(residual, (model.get_input_embeddings().embedding_dim,), RESIDUAL)

    def block(block: nn.Module, index: int) -> None:
        for stage in anatomy.stages:
            if (order := orders.get(f"{index}.{stage.linears[0]}")) is not None:
                _reorder_stage(block, stage, order)
        if residual is not None:
            _reorder_stream(block, anatomy.stages, residual)

    if residual is None:
        return Move(block=block)
    return Move(
        lambda m: _reorder_embeddings(m, anatomy, residual), block, lambda m: _reorder_head(m, anatomy, residual)
    )


def _absorbs_order(stage: Stage) -> bool:
    return stage.source is not None and not stage.behind_norm


def _by_value_head(block: nn.Module, stage: Stage, largest: Tensor) -> Tensor:
    """The salience as it may be ordered: ``[kv_heads, head_dim]`` for what attention puts out, largest over query heads."""
    if not stage.source.endswith("v_proj"):
        return largest
    attention = block.self_attn
    value_heads = attention.v_proj.out_features // attention.head_dim
    return largest.view(value_heads, -1, attention.head_dim).amax(1)


def _reorder_stage(block: nn.Module, stage: Stage, order: Tensor) -> None:
    """Permute the inputs of a stage and the rows of what produces them."""
    if stage.source.endswith("v_proj"):
        attention, size = block.self_attn, block.self_attn.head_dim
        value_heads = attention.v_proj.out_features // size
        repeats = block.get_submodule(stage.linears[0]).in_features // attention.v_proj.out_features
        _check_order(order, (value_heads, size), stage.linears[0])
        rows = _within_heads(order)
        columns = _within_heads(order.repeat_interleave(repeats, 0))
        sources = (stage.source,)
    else:
        rows = columns = order
        _check_order(order, (block.get_submodule(stage.linears[0]).in_features,), stage.linears[0])
        # an element-wise product of two linears: both must follow
        sources = ("mlp.gate_proj", "mlp.up_proj") if stage.source == "mlp.up_proj" else (stage.source,)
    for name in stage.linears:
        _take(block.get_submodule(name), "weight", columns, 1)
    for name in sources:
        _take_rows(block.get_submodule(name), rows)


def _within_heads(order: Tensor) -> Tensor:
    """Orders of each head ``[heads, head_dim]`` as one of all channels ``[heads * head_dim]``."""
    heads, size = order.shape
    return (order + size * torch.arange(heads, device=order.device)[:, None]).reshape(-1)


def _reorder_embeddings(model: nn.Module, anatomy: Anatomy, order: Tensor) -> None:
    """Permute what the embeddings write; a head that shares the weight goes on sharing it."""
    embedding, head = model.get_input_embeddings(), model.get_submodule(anatomy.head)
    tied = head.weight is embedding.weight
    for name in anatomy.embeddings:
        _take(model.get_submodule(name), "weight", order, 1)
    if tied:
        head.weight = embedding.weight


def _reorder_head(model: nn.Module, anatomy: Anatomy, order: Tensor) -> None:
    """Permute what the final norm passes on and what a head with a weight of its own reads."""
    head = model.get_submodule(anatomy.head)
    if head.weight is not model.get_input_embeddings().weight:
        _take(head, "weight", order, 1)
    _take_rows(model.get_submodule(anatomy.final_norm), order)


def _reorder_stream(block: nn.Module, stages: tuple[Stage, ...], order: Tensor) -> None:
    """Permute what writes the stream in a block (rows), what reads it (columns), and the norms between them."""
    for stage in stages:
        for name in stage.linears:
            if stage.behind_norm:
                _take(block.get_submodule(name), "weight", order, 1)
            else:
                _take_rows(block.get_submodule(name), order)
        if stage.behind_norm:
            _take_rows(block.get_submodule(stage.source), order)


def _take_rows(owner: nn.Module, order: Tensor) -> None:
    """Permute the outputs of a linear, or the elements of a norm: its weight and, where it has one, its bias."""
    _take(owner, "weight", order, 0)
    if getattr(owner, "bias", None) is not None:
        _take(owner, "bias", order, 0)


def _take(owner: nn.Module, name: str, order: Tensor, axis: int) -> None:
    old = getattr(owner, name)
    new = old.detach().index_select(axis, order.to(old.device))
    setattr(owner, name, nn.Parameter(new, requires_grad=False))


def _check_order(order: Tensor, shape: tuple[int, ...], name: str) -> None:
    channels = torch.arange(shape[-1], device=order.device)
    if tuple(order.shape) != shape or not torch.equal(order.sort(-1).values, channels.expand(shape)):
        raise UsageError(f"the order of {name} must permute {list(shape)} channels, got {list(order.shape)}")
