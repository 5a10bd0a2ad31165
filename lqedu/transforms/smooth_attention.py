"""SmoothAttention: move the outlier channels of keys into the queries, which nobody rounds; chapter ``14-qoq``.

    q k^T = (q λ)(k / λ)^T         λ_i = max|k_i|^α

Keys are stored in 4 bits, one grid for a token of a head, and a few channels of a head are ten times as large as the
others: the step fits them and is too coarse for the rest. Dividing channel i of the keys by λ_i evens them out. Queries
take the factor; they are used once, in floating point, and not stored.

λ is folded into ``q_proj`` and ``k_proj`` offline, before RoPE. RoPE turns the plane of the channels i and i + d/2, so it
commutes with λ only if both have the same λ. Query heads that read one key head (grouped-query attention) take that head's
λ. Where norms of q and k follow the projections (Qwen3), λ goes into their gains, and all heads share one.

Lin et al., 2024, arXiv:2405.04532, section 4.2 (reference: mit-han-lab/deepcompressor, commit 69f3473).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lqedu.calibration.capture import run_block
from lqedu.errors import CalibrationError, UnsupportedModelError, UsageError
from lqedu.options import check_count, check_number
from lqedu.transforms.folding import replace_parameter


class KeyGrid(Protocol):
    """What rounds keys: one grid for each token of each head."""

    def round_trip(self, x: Tensor) -> Tensor:
        """The values that keys ``[..., head_dim]`` become once they are stored."""
        ...


_SMALLEST = 1e-5  # of a scale, as for the scales of smoothing


@dataclass(frozen=True)
class Heads:
    """What the heads of a block compute with, after RoPE: what a cache would store, and the queries.

    Attributes:
        query: ``[windows, heads, tokens, head_dim]``.
        key, value: ``[windows, kv_heads, tokens, head_dim]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor

    def key_max(self) -> Tensor:
        """Largest ``|k|`` of each channel, ``[kv_heads, head_dim]``."""
        return self.key.abs().amax((0, 2))

    def query_max(self) -> Tensor:
        """Largest ``|q|`` of each channel over the query heads that read one key head, ``[kv_heads, head_dim]``."""
        return self.query.abs().amax((0, 2)).view(self.key.shape[1], -1, self.key.shape[-1]).amax(1)


def attention_heads(block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Heads:
    """Run a block and keep its queries, keys and values.

    Args:
        block: a dense decoder block with rotary positions.
        hidden, kwargs: its inputs, see :func:`lqedu.calibration.capture.run_block`.

    Raises:
        UnsupportedModelError: positions that are not rotary (OPT).
    """
    attention = block.self_attn
    if "position_embeddings" not in kwargs:
        raise UnsupportedModelError(
            f"{type(attention).__name__} has no rotary positions; SmoothAttention knows llama, mistral, qwen2 and qwen3"
        )
    normed = has_head_norms(block)
    sources = {"query": "q_norm" if normed else "q_proj", "key": "k_norm" if normed else "k_proj", "value": "v_proj"}
    seen: dict[str, Tensor] = {}

    def keep(part: str):
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            seen[part] = output.reshape(*hidden.shape[:-1], -1, attention.head_dim).transpose(1, 2)

        return hook

    hooks = [getattr(attention, name).register_forward_hook(keep(part)) for part, name in sources.items()]
    try:
        run_block(block, hidden, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    cos, sin = kwargs["position_embeddings"]
    return Heads(apply_rope(seen["query"], cos, sin), apply_rope(seen["key"], cos, sin), seen["value"])


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of ``x [windows, heads, tokens, head_dim]``: channel i turns with channel i + head_dim / 2.

    Args:
        x: queries or keys.
        cos, sin: ``[windows or 1, tokens, head_dim]``, as transformers passes them to its blocks.
    """
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def has_head_norms(block: nn.Module) -> bool:
    """Whether norms of q and k stand between the projections and RoPE, one gain for all heads (Qwen3)."""
    return getattr(block.self_attn, "k_norm", None) is not None


def attention_scales(
    key_max: Tensor, alpha: float = 0.5, *, query_max: Tensor | None = None, beta: float = 0.0, shared: bool = False
) -> Tensor:
    """``λ = max|k|^α / max|q|^β``, the same for both channels of a RoPE pair.

    Args:
        key_max: largest ``|k|`` after RoPE, ``[kv_heads, head_dim]``: :meth:`Heads.key_max`.
        alpha: 0 leaves the keys alone, 1 gives every channel pair of them the range 1. The paper takes 0.5.
        query_max: of the same shape, only read for ``beta`` > 0: :meth:`Heads.query_max`.
        beta: keeps large query channels from growing; 0 in the paper, ``1 - alpha`` is a candidate of the reference.
        shared: one λ for all heads, from their largest values; what gains of head norms can absorb.

    Returns:
        ``[kv_heads, head_dim]`` in float32, positive; 1 for channels that were never active.

    Raises:
        UsageError: shapes that differ or have no pairs, exponents outside 0 to 1, or ``beta`` without queries.
        CalibrationError: keys or queries that are not finite.

    >>> attention_scales(torch.tensor([[16.0, 1.0, 4.0, 9.0]]))   # the pairs are (0, 2) and (1, 3)
    tensor([[4., 3., 4., 3.]])
    """
    if key_max.dim() != 2 or key_max.shape[1] % 2:
        raise UsageError(f"key_max is [kv_heads, head_dim] with an even head_dim, got {list(key_max.shape)}")
    check_number("alpha", alpha, least=0, most=1)
    check_number("beta", beta, least=0, most=1)
    if beta > 0 and (query_max is None or query_max.shape != key_max.shape):
        raise UsageError(f"beta > 0 needs query_max of shape {list(key_max.shape)}")
    k = _pairs(key_max, shared)
    scale = k.pow(alpha)
    alive = k > 0
    if beta > 0:
        q = _pairs(query_max, shared)
        scale, alive = scale / q.pow(beta).clamp(min=_SMALLEST), alive & (q > 0)
    if not bool(torch.isfinite(scale).all()):
        raise CalibrationError("the calibration keys or queries hold NaN or infinite values")
    scale = torch.where(alive, scale.clamp(min=_SMALLEST), torch.ones_like(scale))
    return scale.repeat(1, 2)  # repeated last: a vectorized power may give equal numbers different last bits


def fold_attention(block: nn.Module, scale: Tensor) -> dict[str, Tensor]:
    """Divide the keys of a block by λ and multiply its queries by it: ``q k^T`` stays.

    Every row of ``k_proj`` and ``q_proj`` is multiplied by one number. A grid with a scale for each row (or for each
    group inside a row) follows it, so the rounding of these weights does not change.

    Args:
        block: a dense decoder block. Its parameters are replaced by new ones; the old tensors are left alone.
        scale: λ, ``[kv_heads, head_dim]``, equal in the channels i and i + head_dim / 2.

    Returns:
        The replaced parameters by name relative to the block, weights of linear layers left out.

    Raises:
        UsageError: a scale of the wrong shape, one that differs within a RoPE pair, one that is not finite and positive in
            the dtype of the parameters, or, where head norms follow the projections, one that differs between heads.
    """
    attention = block.self_attn
    size = attention.head_dim
    _check(scale, (attention.k_proj.out_features // size, size), attention.k_proj.weight.dtype)
    changed: dict[str, Tensor] = {}
    if has_head_norms(block):
        if not torch.equal(scale, scale[:1].expand_as(scale)):
            raise UsageError("the heads share the gains of q_norm and k_norm, so they share λ; use shared=True")
        for name, factor in (("k_norm", 1 / scale[0]), ("q_norm", scale[0])):
            norm = getattr(attention, name)
            replace_parameter(norm, "weight", norm.weight * factor.to(norm.weight.dtype))
            changed[f"self_attn.{name}.weight"] = norm.weight.detach()
        return changed
    repeats = attention.q_proj.out_features // attention.k_proj.out_features
    for name, rows in (("k_proj", 1 / scale), ("q_proj", scale.repeat_interleave(repeats, 0))):
        linear = getattr(attention, name)
        factor = rows.reshape(-1).to(linear.weight.dtype)
        replace_parameter(linear, "weight", linear.weight * factor[:, None])
        if linear.bias is not None:
            replace_parameter(linear, "bias", linear.bias * factor)
            changed[f"self_attn.{name}.bias"] = linear.bias.detach()
    return changed


@dataclass(frozen=True)
class AttentionSearch:
    """What a search over exponents found.

    Attributes:
        scale: λ with the least loss, ``[kv_heads, head_dim]``.
        alpha, beta: its exponents; (0, 0) is λ = 1.
        losses: the loss of each pair of exponents, in the order tried.
    """

    scale: Tensor
    alpha: float
    beta: float
    losses: dict[tuple[float, float], float]


def search_attention(
    heads: Heads, grid: KeyGrid, *, points: int = 20, shared: bool = False, mask: Tensor | None = None
) -> AttentionSearch:
    """The λ whose rounded keys disturb the output of attention least.

    Candidates, as in the reference: λ = 1, and for ``α = 1/points, …, 1`` both β = 0 and β = 1 - α.

    Args:
        heads: of the search tokens.
        grid: of the keys, one token of one head at a time.
        points: exponents tried.
        shared: one λ for all heads.
        mask: as transformers passes it to its blocks; ``None`` is causal.

    Raises:
        UsageError: ``points`` below 1.
        CalibrationError: keys or queries that are not finite.
    """
    check_count("points", points, least=1)
    key_max, query_max = heads.key_max(), heads.query_max()
    exponents = [(i / points, beta) for i in range(1, points + 1) for beta in dict.fromkeys((0.0, 1 - i / points))]
    wanted = attend(heads.query, heads.key, heads.value, mask)
    losses: dict[tuple[float, float], float] = {}
    scales: dict[tuple[float, float], Tensor] = {}
    for alpha, beta in [(0.0, 0.0), *exponents]:
        scale = attention_scales(key_max, alpha, query_max=query_max, beta=beta, shared=shared)
        scales[alpha, beta] = scale
        losses[alpha, beta] = float((attend(*_rounded(heads, scale, grid), mask) - wanted).float().square().mean())
    best = min(losses, key=losses.__getitem__)
    return AttentionSearch(scales[best], *best, losses)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention (or that of ``mask``) with grouped heads, ``[windows, heads, tokens, head_dim]``."""
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def _rounded(heads: Heads, scale: Tensor, grid: KeyGrid) -> Sequence[Tensor]:
    """Queries, keys and values with λ applied and the keys rounded."""
    factor = scale.to(heads.key.dtype)[:, None]  # [kv_heads, 1, head_dim]
    repeats = heads.query.shape[1] // heads.key.shape[1]
    return heads.query * factor.repeat_interleave(repeats, 0), grid.round_trip(heads.key / factor), heads.value


def _pairs(largest: Tensor, shared: bool) -> Tensor:
    """The larger of the two channels of each RoPE pair, ``[kv_heads, head_dim / 2]`` in float32; with ``shared`` the
    largest of all heads."""
    x = largest.float().unflatten(1, (2, -1)).amax(1)
    return x.amax(0, keepdim=True).expand_as(x) if shared else x


def _check(scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tuple(scale.shape) != shape:
        raise UsageError(f"λ has one entry for each channel of the keys, {list(shape)}, got {list(scale.shape)}")
    stored = scale.to(dtype)
    if not bool((torch.isfinite(stored) & (stored > 0) & torch.isfinite(1 / stored)).all()):
        raise UsageError(f"λ must be finite and positive in {dtype}; bound it before folding")
    first, second = scale.chunk(2, 1)
    if not torch.equal(first, second):
        raise UsageError("RoPE turns channel i with channel i + head_dim / 2, so λ must be equal in both")
