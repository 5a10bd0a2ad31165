"""Attention whose keys and values are stored in few bits: transform, round, attend; ``10-quarot``, ``15-kv-cache``.

transformers rotates q and k by position (RoPE), hands k and v to the cache, and what the cache returns to the attention
function. A Hadamard transform over each head comes after RoPE, which it does not commute with: of q here, of k where it
is stored, so that ``q k^T`` is unchanged and only the rounding sees a different k.

How keys and values are rounded belongs to the model (:class:`AttentionPath`). With any cache of transformers, or none, the
attention function rounds the floats it is handed. A :class:`lqedu.runtime.PackedCache` rounds each token once, when it
arrives, and hands over the bytes it keeps. The numbers are the same, the memory is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lqedu.errors import GridError, UsageError
from lqedu.formats.kv import Codes, KVGrid, KVStaticFloat8, kv_grid_from_dict
from lqedu.linalg.hadamard import fast_hadamard, hadamard_block
from lqedu.models.anatomy import block_list, head_dim

NAME = "lqedu"  # in config._attn_implementation
MEAN = "lqedu_key_mean"  # a buffer of each block's attention, as the two below
SCALES = ("lqedu_key_scale", "lqedu_value_scale")  # of keys and of values, see KVStaticFloat8


@dataclass(frozen=True)
class AttentionPath:
    """A frozen description of how keys and values are stored.

    Attributes:
        hadamard: transform q and k over each head, after RoPE.
        key, value: grids of one token of one head; ``None`` leaves it in floating point.
        centred: keys are stored less a constant vector of their head, which softmax cannot see: ``q · a`` is the same for
            all keys of a query. Each block keeps its own, see :func:`set_attention_path`.

    Raises:
        GridError: grids of another kind.
    """

    hadamard: bool = False
    key: KVGrid | None = None
    value: KVGrid | None = None
    centred: bool = False

    def __post_init__(self) -> None:
        for name in ("hadamard", "centred"):
            if not isinstance(getattr(self, name), bool):
                raise GridError(f"{name} is True or False, got {getattr(self, name)!r}")
        for grid in (self.key, self.value):
            if not isinstance(grid, KVGrid | None):
                raise GridError(f"keys and values need a scale for each token, as in lqedu.formats.kv, got {grid!r}")

    @property
    def static(self) -> tuple[bool, bool]:
        """Whether keys, and whether values, are divided by a constant of their block before they are rounded."""
        return isinstance(self.key, KVStaticFloat8), isinstance(self.value, KVStaticFloat8)

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What attention will read of keys and values ``[batch, kv_heads, tokens, head_dim]``."""
        key = fast_hadamard(key) if self.hadamard else key
        key = key if self.key is None else self.key.round_trip(key)
        return key, value if self.value is None else self.value.round_trip(value)

    def pack(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same as bytes: records, uint8 ``[batch, kv_heads, tokens, record bytes]``."""
        key = fast_hadamard(key) if self.hadamard else key
        return _pack(key, self.key), _pack(value, self.value)

    def unpack(self, key: Tensor, value: Tensor, like: Tensor) -> tuple[Codes, Codes]:
        """What records hold; ``like`` has the head size and the dtype of the keys.

        Raises:
            GridError: records that another path packed.
        """
        return _unpack(key, self.key, like), _unpack(value, self.value, like)

    def query(self, query: Tensor) -> Tensor:
        """The query ``[batch, heads, tokens, head_dim]`` in the basis of the stored keys."""
        return fast_hadamard(query) if self.hadamard else query

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        grids = {"key": self.key, "value": self.value}
        rounded = {k: None if g is None else g.to_dict() for k, g in grids.items()}
        return {"hadamard": self.hadamard, "centred": self.centred} | rounded

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "AttentionPath":
        """Inverse of :meth:`to_dict`.

        Raises:
            GridError: unknown or missing fields.
        """
        if set(d) != {"hadamard", "centred", "key", "value"}:
            raise GridError(f"an attention path has the fields hadamard, centred, key and value, got {sorted(d)}")
        grids = {k: None if d[k] is None else kv_grid_from_dict(d[k]) for k in ("key", "value")}
        return cls(d["hadamard"], **grids, centred=d["centred"])


def check_heads(model: nn.Module, path: AttentionPath) -> None:
    """Refuse a transform over heads of a size without a Hadamard matrix (UsageError)."""
    size = head_dim(model)
    if path.hadamard and hadamard_block(size) != size:
        raise UsageError(
            f"keys are transformed over each head, and no Hadamard matrix of order {size} is known; "
            "leave the keys as they are: hadamard=False, or kv_bits=None of a method"
        )


def set_attention_path(
    model: nn.Module,
    path: AttentionPath,
    means: Sequence[Tensor] | None = None,
    scales: Sequence[tuple[Tensor | None, Tensor | None]] | None = None,
) -> None:
    """Make every block of ``model`` attend through ``path``; changes the model (use a copy).

    Args:
        model: dense or quantized.
        path: how keys and values are stored.
        means: where ``path.centred``, what each block takes off its keys, ``[kv_heads, 1, head_dim]``; ``None`` is zeros
            of that shape, for a checkpoint to fill.
        scales: where a grid of ``path`` is a :class:`KVStaticFloat8`, what each block divides its keys and its values by,
            float32 ``[1]`` each; ``None`` is ones, for a checkpoint to fill.

    Raises:
        UsageError: as :func:`check_heads`.
    """
    check_heads(model, path)
    model.set_attn_implementation(NAME)
    model.lqedu_attention = path
    for index, block in enumerate(block_list(model)):
        attention = block.self_attn
        attention.lqedu_attention = path
        for name in (MEAN, *SCALES):
            attention._buffers.pop(name, None)
        if path.centred:
            width, size = attention.k_proj.out_features, head_dim(model)
            mean = torch.zeros(width // size, 1, size) if means is None else means[index]
            attention.register_buffer(MEAN, mean)
        for part, (name, static) in enumerate(zip(SCALES, path.static, strict=True)):
            if static:
                attention.register_buffer(name, torch.ones(1) if scales is None else scales[index][part])


class Constants(NamedTuple):
    """What a block does to keys and values before they are stored, beside the transform of its path.

    Attributes:
        mean: taken off each key, ``[kv_heads, 1, head_dim]``. Never added again: softmax cannot see it.
        key_scale, value_scale: what keys and values are divided by, ``[1]``. Who reads them multiplies again.
    """

    mean: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def apply(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, tokens, head_dim]`` as they are stored; divided in float32 or higher."""
        return _divided(centred(key, self.mean), self.key_scale), _divided(value, self.value_scale)

    def undo(self, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Stored keys and values times the scales, in ``dtype``."""
        scales = (self.key_scale, self.value_scale)
        return tuple((x if s is None else x * s).to(dtype) for x, s in zip((key, value), scales, strict=True))

    def scaled(self, key: Codes, value: Codes) -> tuple[Codes, Codes]:
        """Codes with the scales that stand for these tokens; the grids that need them have none of their own."""
        scales = (self.key_scale, self.value_scale)
        return tuple(
            c if s is None else c._replace(scale=s.float().expand(*c.codes.shape[:-1], 1))
            for c, s in zip((key, value), scales, strict=True)
        )

    def same(self, other: "Constants") -> bool:
        """Whether both store the same numbers."""
        return all(
            mine is yours or (mine is not None and yours is not None and torch.equal(mine, yours))
            for mine, yours in zip(self, other, strict=True)
        )


def constants_of(attention: nn.Module) -> Constants:
    """The constants of a block, from the buffers of its attention."""
    return Constants(*(attention._buffers.get(name) for name in (MEAN, *SCALES)))


def _divided(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x.to(torch.promote_types(x.dtype, torch.float32)) / scale


def centred(key: Tensor, mean: Tensor | None) -> Tensor:
    """Keys ``[batch, kv_heads, tokens, head_dim]`` as a block stores them: less its constant, if it has one."""
    return key if mean is None else (key - mean).to(key.dtype)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls under the name "lqedu"."""
    path, constants = module.lqedu_attention, constants_of(module)
    query = path.query(query)
    if key.dtype != torch.uint8:  # floats, from no cache of ours
        key, value = constants.undo(*path.store(*constants.apply(key, value)), dtype=query.dtype)
    else:
        _check_maker(key, path, constants)
        codes = constants.scaled(*path.unpack(key, value, query))
        rounded = path.key is not None or path.value is not None
        if rounded and 3 * (query.shape[1] // key.shape[1] * query.shape[2]) < 2 * query.shape[3]:  # see attend_codes
            output = attend_codes(query, *codes, attention_mask, scaling=kwargs.get("scaling"))
            return output.transpose(1, 2).contiguous(), None
        key, value = (x.values().to(query.dtype) for x in codes)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def attend_codes(
    query: Tensor, key: Codes, value: Codes, mask: Tensor | None = None, *, scaling: float | None = None
) -> Tensor:
    """Attention on codes: scales and zero points act on tokens, not on their elements.

    With keys ``s_k (c_k - z_k)`` and values ``s_v (c_v - z_v)``, for each query q and probabilities p,

        q · k = s_k (q · c_k - z_k Σ q)            Σ p v = Σ (p s_v) c_v - Σ p s_v z_v

    so a stored token costs six operations for each query that reads it beside its products with the codes, where
    dequantizing key and value costs four for each feature. That pays while fewer than ``2/3 head_dim`` queries share a
    key head, as when a text is continued.

    Args:
        query: ``[batch, heads, tokens, head_dim]``; ``heads`` is a multiple of the heads of ``key`` (grouped queries).
        key, value: ``[batch, kv_heads, stored tokens, head_dim]``.
        mask: which tokens a query reads, bool or additive, ``[batch or 1, 1 or heads, tokens, stored tokens]``; ``None`` is
            causal, the last query beside the last key. A query that may read nothing reads all.
        scaling: of the scores; ``None`` is ``head_dim ** -0.5``.

    Returns:
        ``[batch, heads, tokens, head_dim]`` in the dtype of ``query``; computed in float32 or higher.

    Raises:
        UsageError: shapes that do not fit each other.
    """
    batch, heads, tokens, size = query.shape
    kv_heads, stored = key.codes.shape[1:3]
    fits = all(tuple(codes.codes.shape) == (batch, kv_heads, stored, size) for codes in (key, value))
    if not fits or heads % kv_heads or (mask is None and stored < tokens):
        raise UsageError(
            f"queries {list(query.shape)} do not fit keys {list(key.codes.shape)} and values {list(value.codes.shape)}: "
            "batch, head size and stored tokens are equal, query heads a multiple of key heads"
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    key, value = (Codes(*(part if part is None else part.to(dtype) for part in codes)) for codes in (key, value))
    q = query.to(dtype).reshape(batch, kv_heads, -1, size)  # the queries that share a key head, as rows of one product
    scores = q @ key.codes.mT
    if key.zero is not None:
        scores = scores - q.sum(-1, keepdim=True) * key.zero.mT
    if key.scale is not None:
        scores = scores * key.scale.mT
    scores = scores.view(batch, heads, tokens, stored) * (size**-0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(tokens, stored, dtype=torch.bool, device=q.device).tril(stored - tokens)
    lowest = torch.finfo(dtype).min  # finite: a query that may read nothing must not become NaN
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    p = scores.softmax(-1).view(batch, kv_heads, -1, stored)
    p = p if value.scale is None else p * value.scale.mT
    output = p @ value.codes
    if value.zero is not None:
        output = output - p @ value.zero
    return output.reshape(query.shape).to(query.dtype)


def _check_maker(key: Tensor, path: AttentionPath, constants: Constants) -> None:
    """Refuse (GridError) records that another path, or one with other constants, has packed."""
    made, its_constants = getattr(key, "lqedu_stored_by", (None, Constants()))
    if made != path or not constants.same(its_constants):
        raise GridError(
            "these keys and values were packed for a model that stores them otherwise; "
            "use a cache that was made for this model: PackedCache(model)"
        )


def _pack(x: Tensor, grid: KVGrid | None) -> Tensor:
    return x.contiguous().view(torch.uint8) if grid is None else grid.encode(x)


def _unpack(records: Tensor, grid: KVGrid | None, like: Tensor) -> Codes:
    if grid is not None:
        return grid.decode(records, like.shape[-1])
    if records.shape[-1] != like.shape[-1] * like.element_size():
        raise GridError(
            f"{like.shape[-1]} floats take {like.shape[-1] * like.element_size()} bytes, got records of "
            f"{records.shape[-1]}; use a cache that was made for this model"
        )
    return Codes(records.view(like.dtype))


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without a mask function of that name transformers passes no mask
