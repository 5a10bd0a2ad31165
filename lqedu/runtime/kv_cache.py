"""A cache of transformers that keeps keys and values as packed codes; chapter ``15-kv-cache``.

    model = lqedu.runtime.quantize_kv(model, 4, hadamard=True)         # says how keys and values are stored
    cache = lqedu.runtime.PackedCache(model)                           # stores them so
    model.generate(**prompt, past_key_values=cache)

A model that a method quantized with ``kv_bits`` says so already. A layer's keys are one tensor of bytes, a record for each
token of each head (``lqedu.formats.kv``), and so are its values. Cutting, repeating, choosing and reordering them, and the masks
that go with a cache, are those of transformers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from lqedu.calibration.capture import check_windows
from lqedu.errors import CalibrationError, UsageError
from lqedu.formats.kv import KVGrid, kv_grid
from lqedu.formats.smallfloat import E4M3
from lqedu.linalg.hadamard import fast_hadamard
from lqedu.models.anatomy import block_list
from lqedu.models.copying import copy_sharing_tensors
from lqedu.runtime.attention import AttentionPath, Constants, constants_of, set_attention_path


def quantize_kv(
    model: nn.Module,
    key: int | str | KVGrid = 4,
    value: int | str | KVGrid | None = None,
    *,
    hadamard: bool = False,
    centre: Tensor | None = None,
    calibration: Tensor | None = None,
) -> nn.Module:
    """A model that stores its keys and values on a grid, one scale for each token of each head, or for all of a block.

    What the model said of keys and values before (a method's ``kv_bits``, a Hadamard basis, means) is replaced as a whole.
    :func:`lqedu.save` keeps it; ``save_pretrained`` of transformers does not.

    Args:
        model: dense, or quantized by any method; not changed.
        key: 2 to 8 (bits of integer codes), "fp8" (E4M3), "fp8-static" (E4M3 with a constant scale for all keys of a block,
            which is what serving engines read), 16 (as they come), or a grid of ``lqedu.formats.kv``.
        value: the same for values; ``None`` is what ``key`` says.
        hadamard: transform queries and keys over each head, after RoPE, so that no channel of a key sticks out.
        centre: token windows ``[windows, length]`` whose mean key is taken off every key before it is rounded
            (:func:`key_means`). Softmax cannot see it, and the codes have less to cover.
        calibration: token windows whose largest key and value of a block become 448, the largest code of E4M3, where a scale
            is constant (:func:`key_value_scales`). A larger one that comes later is cut off there.

    Returns:
        A new model that shares all tensors with ``model``. It computes the same with a :class:`PackedCache` as with any
        other cache or none; only the first keeps fewer bytes.

    Raises:
        GridError: a grid that is none of these.
        UnsupportedModelError: a model whose blocks are not known.
        UsageError: heads without a Hadamard matrix.
        CalibrationError: ``centre`` or ``calibration`` that is not a batch of the model's token ids, keys or values of it that
            are not finite, or constant scales without ``calibration``.
    """
    path = AttentionPath(hadamard, kv_grid(key), kv_grid(key if value is None else value), centre is not None)
    block_list(model)  # refuses what it does not know
    if any(path.static) and calibration is None:
        raise CalibrationError("constant scales of keys and values are fitted to a text; pass calibration=windows")
    means = None if centre is None else key_means(model, centre)
    scales = key_value_scales(model, calibration, path, means) if any(path.static) else None
    result = copy_sharing_tensors(model)
    set_attention_path(result, path, means, scales)
    return result


def key_means(model: nn.Module, windows: Tensor) -> list[Tensor]:
    """The mean key of each channel of each head, behind RoPE, over all tokens of a text.

    Args:
        model: dense or quantized; not changed.
        windows: token ids ``[windows, length]``.

    Returns:
        One float32 tensor ``[kv_heads, 1, head_dim]`` a block.

    Raises:
        CalibrationError: windows that are not a batch of the model's token ids, or keys that are not finite.
    """
    watched = _watch(model, windows, AttentionPath(), None)
    means = [(seen.total / windows.numel()).to(torch.float32) for seen in watched]
    if not all(bool(torch.isfinite(mean).all()) for mean in means):
        raise CalibrationError("the mean key is not finite: the model holds NaN or infinities; load it again")
    return means


def key_value_scales(
    model: nn.Module, windows: Tensor, path: AttentionPath, means: list[Tensor] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Constants that take the largest key and the largest value of each block, over all tokens of a text, to 448.

    Args:
        model: dense or quantized; not changed.
        windows: token ids ``[windows, length]``.
        path: whether keys are transformed before they are stored.
        means: what is taken off them, as from :func:`key_means`.

    Returns:
        For each block two float32 tensors ``[1]``, of keys and of values. They are FP16 numbers, so that ``model.half()`` keeps
        them, rounded up, so that nothing of the text is cut off; 1 where there are only zeros.

    Raises:
        CalibrationError: windows that are not a batch of the model's token ids, or keys or values that are not finite or
            whose scale is beyond FP16.
    """
    watched = _watch(model, windows, AttentionPath(path.hadamard, centred=means is not None), means)
    return [(_constant(seen.largest[0]), _constant(seen.largest[1])) for seen in watched]


def _constant(largest: Tensor) -> Tensor:
    scale = (largest / E4M3.max).to(torch.float32)
    half = scale.to(torch.float16)
    half = torch.where(half < scale, torch.nextafter(half, torch.full_like(half, torch.inf)), half)
    if not bool(torch.isfinite(half)):
        raise CalibrationError("the largest key or value is not finite, or beyond an FP16 scale; load the model again")
    return torch.where(half == 0, torch.ones_like(half), half).to(torch.float32).reshape(1)


def _watch(model: nn.Module, windows: Tensor, path: AttentionPath, means: list[Tensor] | None) -> "list[_Watching]":
    """What each block sees of a text (CalibrationError for windows that are none)."""
    check_windows(model, windows)
    watched = copy_sharing_tensors(model)
    set_attention_path(watched, path, means)
    seen = [_Watching(path.hadamard) for _ in block_list(watched)]
    for block, one in zip(block_list(watched), seen, strict=True):
        block.self_attn.lqedu_attention = one
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        for window in windows.to(device):
            watched(window[None], use_cache=False)
    return seen


class _Watching:
    """An attention path that changes nothing, sums the keys that pass and keeps the largest magnitudes."""

    def __init__(self, hadamard: bool) -> None:
        self.hadamard = hadamard
        self.total: Tensor | float = 0.0
        self.largest: list[Tensor] = [torch.zeros(()), torch.zeros(())]

    def query(self, query: Tensor) -> Tensor:
        return query

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.total = self.total + key.to(torch.float64).sum((0, 2))[:, None]
        stored = (fast_hadamard(key) if self.hadamard else key, value)
        self.largest = [
            torch.maximum(m.to(x.device), x.abs().amax().float()) for m, x in zip(self.largest, stored, strict=True)
        ]
        return key, value


class PackedCache(Cache):
    """Keys and values of one batch of texts as packed codes. Pass it to one model as ``past_key_values``.

    Works with everything ``generate`` does with a cache that grows: greedy search, sampling, beams, padding, and going on
    where an earlier call ended. Only a model that stores keys and values in the same way can read it; a dense one cannot.

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
        super().__init__(layers=[PackedLayer(path, constants_of(block.self_attn)) for block in block_list(model)])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple:
        """Append keys and values of a layer, see :class:`PackedLayer` (UsageError for a layer the cache does not have)."""
        if layer_idx >= len(self.layers):
            raise UsageError(f"the cache was made for {len(self.layers)} layers; use PackedCache(model) of this model")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of all codes, scales and zero points that are stored now."""
        stored = [layer for layer in self.layers if layer.get_seq_length()]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in stored)


class PackedLayer(DynamicLayer):
    """One block's keys and values: records, uint8 ``[batch, kv_heads, tokens, record bytes]``."""

    def __init__(self, path: AttentionPath, constants: Constants = Constants()) -> None:  # noqa: B008  (immutable)
        super().__init__()
        self.path, self.constants = path, constants

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[batch, kv_heads, tokens, head_dim]``; returns the records of all tokens.

        Raises:
            UsageError: another number of texts than before.
        """
        if self.get_seq_length() and len(self.keys) != len(key_states):
            raise UsageError(
                f"the cache holds {len(self.keys)} texts and is given {len(key_states)}; use a new PackedCache(model)"
            )
        packed = self.path.pack(*self.constants.apply(key_states, value_states))
        keys, values = super().update(*packed, *args, **kwargs)
        keys.lqedu_stored_by = (self.path, self.constants)  # for the model that reads them
        return keys, values
