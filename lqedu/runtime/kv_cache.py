"""A cache of transformers that keeps keys and values as packed codes; chapter ``15-kv-cache``.

    model = lqedu.runtime.quantize_kv(model, 4, hadamard=True)         # says how keys and values are stored
    cache = lqedu.runtime.PackedCache(model)                           # stores them so
    model.generate(**prompt, past_key_values=cache)

A model that a method quantized with ``kv_bits`` says so already. A layer's keys are one tensor of bytes, a record for each
token of each head (``lqedu.formats.kv``), and so are its values. Cutting, repeating, choosing and reordering them, and the masks
that go with a cache, are those of transformers.
"""

from typing import Any

from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from lqedu.errors import UsageError
from lqedu.formats.kv import KVGrid, kv_grid
from lqedu.models.anatomy import block_list
from lqedu.models.copying import copy_sharing_tensors
from lqedu.runtime.attention import AttentionPath, set_attention_path


def quantize_kv(
    model: nn.Module, key: int | str | KVGrid = 4, value: int | str | KVGrid | None = None, *, hadamard: bool = False
) -> nn.Module:
    """A model that stores its keys and values on a grid, one scale for each token of each head.

    Args:
        model: dense, or quantized by any method; not changed.
        key: 2 to 8 (bits of integer codes), "fp8" (E4M3), 16 (as they come), or a grid of ``lqedu.formats.kv``.
        value: the same for values; ``None`` is what ``key`` says.
        hadamard: transform queries and keys over each head, after RoPE, so that no channel of a key sticks out.

    Returns:
        A new model that shares all tensors with ``model``. It computes the same with a :class:`PackedCache` as with any
        other cache or none; only the first keeps fewer bytes.

    Raises:
        GridError: a grid that is none of these.
        UnsupportedModelError: a model whose blocks are not known.
    """
    path = AttentionPath(hadamard, kv_grid(key), kv_grid(key if value is None else value))
    block_list(model)  # refuses what it does not know
    result = copy_sharing_tensors(model)
    set_attention_path(result, path)
    return result


class PackedCache(Cache):
    """Keys and values of one batch of texts as packed codes. Pass it to one model as ``past_key_values``.

    Works with everything ``generate`` does with a cache that grows: greedy search, sampling, beams, padding, and going on
    where an earlier call ended.

    Args:
        model: whose keys and values it will hold: from :func:`quantize_kv`, or quantized by a method with ``kv_bits``.

    Raises:
        UsageError: a model that does not say how keys and values are stored.
    """

    def __init__(self, model: nn.Module) -> None:
        path = getattr(model, "lqedu_attention", None)
        if path is None:
            raise UsageError(
                "the model does not say how keys and values are stored; "
                "take lqedu.runtime.quantize_kv(model, 4), or a method with kv_bits"
            )
        super().__init__(layers=[PackedLayer(path) for _ in block_list(model)])

    @property
    def nbytes(self) -> int:
        """Bytes of all codes, scales and zero points that are stored now."""
        stored = [layer for layer in self.layers if layer.get_seq_length()]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in stored)


class PackedLayer(DynamicLayer):
    """One block's keys and values: records, uint8 ``[batch, kv_heads, tokens, record bytes]``."""

    def __init__(self, path: AttentionPath) -> None:
        super().__init__()
        self.path = path

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[batch, kv_heads, tokens, head_dim]``; returns the records of all tokens."""
        return super().update(*self.path.pack(key_states, value_states), *args, **kwargs)
