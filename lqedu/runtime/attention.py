"""Attention whose keys and values are stored in few bits: transform, round, then attend; chapter ``10-quarot``.

transformers rotates q and k by position (RoPE), hands k and v to the cache, and what the cache returns to the attention
function. A Hadamard transform over each head comes after RoPE, which it does not commute with: of q here, of k where it
is stored, so that ``q k^T`` is unchanged and only the rounding sees a different k. Without a cache of ours
(:class:`RoundedCache`) the attention function does the storing itself, for every key at every step.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lqedu.errors import GridError
from lqedu.formats.activation import ActivationGrid
from lqedu.linalg.hadamard import fast_hadamard
from lqedu.models.anatomy import block_list

NAME = "lqedu"  # in config._attn_implementation
_STORED = "lqedu_stored"  # marks keys and values that a cache has rounded already


@dataclass(frozen=True)
class AttentionPath:
    """A frozen description of how keys and values are stored.

    Attributes:
        hadamard: transform q and k over each head, after RoPE.
        key, value: grids of one token of one head; ``None`` leaves it in floating point.
    """

    hadamard: bool = False
    key: ActivationGrid | None = None
    value: ActivationGrid | None = None

    def __post_init__(self) -> None:
        for grid in (self.key, self.value):
            if grid is not None and grid.granularity != "token":
                raise GridError("a cache grows by tokens, so its grids have granularity='token'")

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What attention will read of keys and values ``[batch, heads, tokens, head_dim]``."""
        key = fast_hadamard(key) if self.hadamard else key
        key = key if self.key is None else self.key.round_trip(key)
        return key, value if self.value is None else self.value.round_trip(value)

    def query(self, query: Tensor) -> Tensor:
        """The query ``[batch, heads, tokens, head_dim]`` in the basis of the stored keys."""
        return fast_hadamard(query) if self.hadamard else query

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        grids = {"key": self.key, "value": self.value}
        return {"hadamard": self.hadamard} | {k: None if g is None else g.to_dict() for k, g in grids.items()}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "AttentionPath":
        """Inverse of :meth:`to_dict`.

        Raises:
            GridError: unknown or missing fields.
        """
        if set(d) != {"hadamard", "key", "value"}:
            raise GridError(f"an attention path has the fields hadamard, key and value, got {sorted(d)}")
        grids = {k: None if d[k] is None else ActivationGrid.from_dict(d[k]) for k in ("key", "value")}
        return cls(d["hadamard"], **grids)


def set_attention_path(model: nn.Module, path: AttentionPath) -> None:
    """Make every block of ``model`` attend through ``path``; changes the model (use a copy)."""
    model.set_attn_implementation(NAME)
    model.lqedu_attention = path
    for block in block_list(model):
        block.self_attn.lqedu_attention = path


class RoundedCache(DynamicCache):
    """A cache that transforms and rounds keys and values once, when they arrive; it holds the rounded values as floats.

    Pass it to the model as ``past_key_values``, for instance to ``generate``.
    """

    def __init__(self, path: AttentionPath) -> None:
        super().__init__()
        self.path = path

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values ``[batch, heads, tokens, head_dim]``; returns all of the layer's."""
        key, value = super().update(*self.path.store(key_states, value_states), layer_idx, *args, **kwargs)
        setattr(key, _STORED, True)
        return key, value


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls under the name "lqedu"."""
    path: AttentionPath = module.lqedu_attention
    if not getattr(key, _STORED, False):
        key, value = path.store(key, value)
    return sdpa_attention_forward(module, path.query(query), key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without a mask function of that name transformers passes no mask
