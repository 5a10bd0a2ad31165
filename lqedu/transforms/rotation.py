"""Rotating a model without changing it: norms folded, residual stream and values rotated; chapter ``09-invariance``.

The residual stream of a Llama-like model is only ever read through an RMSNorm without a mean and a linear layer, and
only ever written by an embedding or a linear layer. ``‖h R‖ = ‖h‖`` for an orthogonal ``R``, so once the norms' gains
live in the linears behind them, every writer may rotate and every reader may rotate back:

    E ← E R     W_read ← W diag(γ) R     W_write ← R^T W       h ← h R

A head's values can be rotated too, because attention mixes positions and not features: ``W_v ← R_2^T W_v`` and
``W_o ← W_o R_2`` head by head. Everything is computed in float64 and cast once, at the end.

Ashkboos et al., 2024, arXiv:2404.00456, section 4; SliceGPT, arXiv:2401.15024, section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lqedu.errors import UnsupportedModelError, UsageError
from lqedu.models.anatomy import Anatomy, Stage, block_list, describe, head_dim
from lqedu.transforms.moves import Move


def rotate_model(model: nn.Module, residual: Tensor | None = None, values: Sequence[Tensor] | None = None) -> nn.Module:
    """A model that computes the same logits with folded norms and, where given, rotated activations.

    Args:
        model: a dense Llama-like causal language model. Not changed.
        residual: orthogonal ``R`` ``[hidden, hidden]``: the residual stream of the result is ``h R``.
        values: one orthogonal ``R_2`` ``[head_dim, head_dim]`` a block: each value head of the result is ``v R_2``.

    Returns:
        A new model. The gains of its norms are one, and its head no longer shares the embedding's weight.

    Raises:
        UnsupportedModelError: norms that subtract a mean or add a bias (OPT), which no rotation passes.
        UsageError: a matrix of the wrong shape, not floating point, or not orthogonal to 1e-4.
    """
    return rotation_move(model, residual, values)(model)


def rotation_move(model: nn.Module, residual: Tensor | None = None, values: Sequence[Tensor] | None = None) -> Move:
    """The same as a move that needs one part of the model in memory at a time; arguments and errors as :func:`rotate_model`.

    Of ``model`` only the shapes are read here, and the device of its embedding.
    """
    anatomy = describe(model)
    _check_norms(model, anatomy)
    count, hidden = len(block_list(model)), model.get_input_embeddings().embedding_dim
    if residual is not None:
        _check_orthogonal(residual, hidden, "residual")
    if values is not None and len(values) != count:
        raise UsageError(f"values needs one rotation for each of {count} blocks, got {len(values)}")
    for index, rotation in enumerate(values or ()):
        _check_orthogonal(rotation, head_dim(model), f"values[{index}]")

    device = model.get_input_embeddings().weight.device
    r = None if residual is None else residual.to(device, torch.float64)

    def block(block: nn.Module, index: int) -> None:
        r2 = None if values is None else values[index].to(device, torch.float64)
        for stage in anatomy.stages:
            _rotate_stage(block, stage, r, r2)
        for stage in anatomy.stages:
            if stage.behind_norm:
                _reset_gain(block.get_submodule(stage.source))

    return Move(lambda m: _rotate_embeddings(m, anatomy, r), block, lambda m: _rotate_head(m, anatomy, r))


def _rotate_embeddings(model: nn.Module, anatomy: Anatomy, r: Tensor | None) -> None:
    """The embedding writes the stream. Its new weight is no longer that of a head that shared the old one."""
    for name in anatomy.embeddings:
        embedding = model.get_submodule(name)
        _replace(embedding, "weight", _right(embedding.weight.double(), r))
    model.config.tie_word_embeddings = False


def _rotate_head(model: nn.Module, anatomy: Anatomy, r: Tensor | None) -> None:
    """The final norm and the head read the stream; the head gets a weight of its own."""
    head, norm = model.get_submodule(anatomy.head), model.get_submodule(anatomy.final_norm)
    _replace(head, "weight", _right(head.weight.double() * norm.weight.double(), r))
    _reset_gain(norm)


def _rotate_stage(block: nn.Module, stage: Stage, r: Tensor | None, r2: Tensor | None) -> None:
    """New weights for the linears of a stage, each from its old one by one float64 expression."""
    for name in stage.linears:
        linear = block.get_submodule(name)
        w, bias = linear.weight.double(), None if linear.bias is None else linear.bias.double()[:, None]
        if stage.behind_norm:
            w = _right(w * block.get_submodule(stage.source).weight.double(), r)
        else:
            w, bias = _left(w, r), _left(bias, r)
        if r2 is not None and name.endswith("v_proj"):
            w, bias = _rotate_heads(w, r2), _rotate_heads(bias, r2)
        if r2 is not None and stage.source is not None and stage.source.endswith("v_proj"):
            w = (w.view(len(w), -1, len(r2)) @ r2).reshape(w.shape)
        _replace(linear, "weight", w)
        if bias is not None:
            _replace(linear, "bias", bias[:, 0])


def _right(w: Tensor, r: Tensor | None) -> Tensor:
    return w if r is None else w @ r


def _left(w: Tensor | None, r: Tensor | None) -> Tensor | None:
    return w if w is None or r is None else r.T @ w


def _rotate_heads(w: Tensor | None, r2: Tensor) -> Tensor | None:
    """``r2^T`` applied to the rows of each head of ``w`` ``[heads * head_dim, n]``."""
    return None if w is None else (r2.T @ w.view(-1, len(r2), w.shape[1])).reshape(w.shape)


def _reset_gain(norm: nn.Module) -> None:
    _replace(norm, "weight", torch.ones_like(norm.weight))


def _replace(owner: nn.Module, name: str, value: Tensor) -> None:
    """A new parameter in the old one's dtype; the old tensor may belong to the caller's model."""
    setattr(owner, name, nn.Parameter(value.to(getattr(owner, name).dtype), requires_grad=False))


def _check_norms(model: nn.Module, anatomy: Anatomy) -> None:
    norm = model.get_submodule(anatomy.final_norm)
    if isinstance(norm, nn.LayerNorm):
        raise UnsupportedModelError(
            f"model type {anatomy.model_type!r} has norms that subtract a mean and add a bias, which no rotation "
            "passes; rotations need RMSNorm, as in llama, mistral, qwen2 and qwen3"
        )


def _check_orthogonal(rotation: Tensor, size: int, name: str) -> None:
    if not rotation.is_floating_point() or tuple(rotation.shape) != (size, size):
        raise UsageError(f"{name} must be a floating-point matrix [{size}, {size}], got {list(rotation.shape)}")
    r = rotation.to(torch.float64)
    defect = float((r.T @ r - torch.eye(size, dtype=r.dtype, device=r.device)).abs().max())
    if not defect < 1e-4:
        raise UsageError(f"{name} must be orthogonal, but an entry of R^T R - I is {defect:.2g}")
