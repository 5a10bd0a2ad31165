"""A decoder on kernels: prompts in, then one token of every text at a time; chapter ``21-serving``.

    engine = Engine(decoder_of(qmodel), capacities=[40, 25])          # two texts that may grow to 40 and 25 tokens
    logits = engine.prefill([first, second])                          # [2, vocabulary], of the next token of each
    logits = engine.step()                                            # of the one behind the likeliest

A step of one layer is: norm, residual and quantization in one launch; q, k and v in one product; RoPE; append to the pages;
attention over them; o; the same again for the MLP, with SiLU. On a GPU a step is captured once as a CUDA graph, because a
hundred launches cost more than what they do; everywhere else the same code runs the kernels' references.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, scaled_dot_product_attention

from lqedu.errors import UsageError
from lqedu.runtime.attention import centred
from lqedu.runtime.backend import kernel_function
from lqedu.runtime.codes import transform_inputs
from lqedu.runtime.decoder import Decoder, Layer
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.paged import PagedCache
from lqedu.runtime.projection import norm

PREFILL_TOKENS = 8192  # read at once: sets the memory of a prompt, not the result


class Engine:
    """One batch of texts, its cache, and a step for all of them.

    Args:
        decoder: from :func:`lqedu.runtime.decoder.decoder_of`.
        capacities: tokens that each text may reach, prompt included.
        graph: capture a step as a CUDA graph; ``None`` does so on a GPU if all layers run on kernels.

    Attributes:
        tokens: int64 ``[texts]``, what the next step reads. A step leaves the likeliest next tokens here; write others in
            place to sample.
        cache: pages and lengths.

    Raises:
        UsageError: no text, or more tokens than the model has positions.
    """

    def __init__(self, decoder: Decoder, capacities: Sequence[int], *, graph: bool | None = None) -> None:
        if not capacities or min(capacities) < 1 or max(capacities) > len(decoder.cos):
            raise UsageError(
                f"texts may reach 1 to {len(decoder.cos)} tokens, which this model has positions for, got {list(capacities)}"
            )
        self.decoder = decoder
        shape = len(decoder.layers), decoder.kv_heads, decoder.head_dim
        self.cache = PagedCache(*shape, capacities, decoder.path, decoder.dtype, decoder.device)
        self.tokens = torch.zeros(len(capacities), dtype=torch.int64, device=decoder.device)
        self._wants_graph = decoder.device.type == "cuda" and (not decoder.notes if graph is None else graph)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._used = [0] * len(capacities)  # lengths, where Python can look without waiting for the device

    def reset(self) -> None:
        """Forget all texts; the cache and the captured step stay."""
        self.cache.lengths.zero_()
        self._used = [0] * len(self._used)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Read a prompt of each text, from its first token.

        This is not captured, because each length would be a graph of its own: launches of a short prompt wait for Python.

        Args:
            prompts: token ids, int64 ``[length]`` each, at least one token and at most the text's capacity.

        Returns:
            Logits of the next token, ``[texts, vocabulary]``; the likeliest ones are in :attr:`tokens`.

        Raises:
            UsageError: another number of prompts than texts, an empty or too long one, or texts that were begun before.
        """
        _check_prompts(prompts, self.cache.capacities)
        if any(self._used):
            raise UsageError("the engine's texts have begun; call reset() before other prompts")
        logits = self.tokens.new_empty(len(prompts), len(self.decoder.head), dtype=self.decoder.dtype)
        with _on(self.decoder.device):
            for rows in _rectangles([len(prompt) for prompt in prompts]):
                ids = torch.stack([prompts[row] for row in rows]).to(self.decoder.device)
                logits[rows] = self._read(ids, rows)
        self._used = [len(prompt) for prompt in prompts]
        self.cache.lengths.copy_(torch.tensor(self._used))
        self.tokens.copy_(logits.argmax(-1))
        return logits

    def take_pages_as_read(self, lengths: Sequence[int]) -> None:
        """Count what is in the pages as texts of these lengths, whatever it is: for measurements, which fill them at random.

        Raises:
            UsageError: another number of texts, or lengths that do not fit.
        """
        fits = len(lengths) == len(self._used) and all(
            1 <= n <= full for n, full in zip(lengths, self.cache.capacities, strict=False)
        )
        if not fits:
            raise UsageError(f"texts of {list(lengths)} tokens do not fit {list(self.cache.capacities)}")
        self._used = list(lengths)
        self.cache.lengths.copy_(torch.tensor(self._used))

    @torch.no_grad()
    def step(self) -> Tensor:
        """Append :attr:`tokens` to their texts.

        Returns:
            Logits of the next token of each, ``[texts, vocabulary]``, overwritten by the next step.

        Raises:
            UsageError: a text is full, or was not begun.
        """
        if any(used >= full for used, full in zip(self._used, self.cache.capacities, strict=True)) or not all(
            self._used
        ):
            raise UsageError(
                f"a step appends a token to texts of {self._used} tokens that may reach {list(self.cache.capacities)}; "
                "begin them with prefill, or give them room"
            )
        with _on(self.decoder.device):
            if self._wants_graph and self._graph is None:
                self._capture()
            if self._graph is None:
                self._logits = self._decode()
            else:
                self._graph.replay()
        self._used = [used + 1 for used in self._used]
        return self._logits

    def _capture(self) -> None:
        """Record a step. Steps before it compile kernels; what they write lies behind the texts and is overwritten."""
        lengths, tokens = self.cache.lengths.clone(), self.tokens.clone()
        stream = side_stream(self.decoder.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._decode()
                self.cache.lengths.copy_(lengths)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._logits = self._decode()
        self.cache.lengths.copy_(lengths)
        self.tokens.copy_(tokens)
        self._graph = graph

    def _decode(self) -> Tensor:
        d, cache = self.decoder, self.cache
        cache.lengths.add_(1)
        positions = cache.lengths - 1
        x, residual = embedding(self.tokens, d.embedding), None
        for index, layer in enumerate(d.layers):
            qkv, residual = layer.qkv.after_norm(x, layer.input_norm, d.eps, residual)
            mixed = cache.attend(index, self._store(index, qkv, positions), d.scaling)
            x, residual = self._rest(layer, mixed.reshape(len(x), -1), residual)
        logits = linear(norm(x, d.norm, d.eps, residual)[0], d.head)
        self.tokens.copy_(logits.argmax(-1))
        return logits

    def _read(self, ids: Tensor, rows: list[int]) -> Tensor:
        """Prompts of equal length ``[texts, length]`` of the texts ``rows``; logits behind the last token."""
        d, cache, (texts, length) = self.decoder, self.cache, ids.shape
        table = cache.table[rows].contiguous()
        lengths = torch.full((texts,), length, dtype=torch.int32, device=ids.device)
        positions = torch.arange(length, dtype=torch.int32, device=ids.device).repeat(texts)
        x, residual = embedding(ids.flatten(), d.embedding), None
        for index, layer in enumerate(d.layers):
            qkv, residual = layer.qkv.after_norm(x, layer.input_norm, d.eps, residual)
            heads = self._heads(layer, qkv, positions)
            query, key, value = (t.unflatten(0, (texts, length)).transpose(1, 2) for t in heads)
            key, value = key.contiguous(), value.contiguous()
            cache.append(index, key, value, table, lengths)
            key, value = _as_read(d, key, value)
            mixed = scaled_dot_product_attention(
                query, key, value, is_causal=length > 1, scale=d.scaling, enable_gqa=d.heads != d.kv_heads
            )
            x, residual = self._rest(layer, mixed.transpose(1, 2).reshape(texts * length, -1), residual)
        last = torch.arange(texts, device=ids.device) * length + length - 1
        return linear(norm(x[last], d.norm, d.eps, residual[last])[0], d.head)

    def _store(self, index: int, qkv: Tensor, positions: Tensor) -> Tensor:
        """Append keys and values of the new tokens to the pages of a layer; their queries ``[texts, heads, head_dim]``."""
        d, cache, layer = self.decoder, self.cache, self.decoder.layers[index]
        if d.path is None:  # nothing to round or to transform: straight to the pages
            run = kernel_function("steps16", "rope_append", "rope_append_reference", qkv)
            return run(
                qkv, d.cos, d.sin, *cache.layers[index], cache.table, cache.lengths,
                heads=d.heads, kv_heads=d.kv_heads, norms=layer.head_norms, eps=d.eps,
            )  # fmt: skip
        query, key, value = self._heads(layer, qkv, positions)
        cache.append(index, key[:, :, None], value[:, :, None], cache.table, cache.lengths)
        return query

    def _heads(self, layer: Layer, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[tokens, heads, head_dim]`` in the basis in which they are stored."""
        d = self.decoder
        rope = kernel_function("steps16", "rope", "rope_reference", qkv)
        query, key, value = rope(
            qkv, d.cos, d.sin, positions, heads=d.heads, kv_heads=d.kv_heads, norms=layer.head_norms, eps=d.eps
        )
        if layer.key_mean is not None:
            key = centred(key, layer.key_mean[:, 0])
        if d.path is not None and d.path.hadamard:
            query, key = (_transformed(t) for t in (query, key))
        return query, key, value

    def _rest(self, layer: Layer, mixed: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """A layer behind its attention."""
        both, residual = layer.gate_up.after_norm(layer.o(mixed), layer.post_norm, self.decoder.eps, residual)
        return layer.down.after_silu(*both.chunk(2, 1)), residual


def _as_read(decoder: Decoder, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as later steps will read them: rounded, where they are stored in few bits."""
    path = decoder.path
    if path is None:
        return key, value
    pairs = ((path.key, key), (path.value, value))
    return tuple(x if grid is None else grid.round_trip(x) for grid, x in pairs)


def _transformed(heads: Tensor) -> Tensor:
    """A Hadamard transform of each head ``[tokens, heads, head_dim]``."""
    size = heads.shape[-1]
    return transform_inputs(heads.reshape(-1, size), InputPath(hadamard=size)).view(heads.shape)


def _rectangles(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Texts of equal length, as many at once as :data:`PREFILL_TOKENS` allows, at least one.

    >>> list(_rectangles([5000, 3, 4000, 3, 4000, 4000]))
    [[0], [1, 3], [2, 4], [5]]
    """
    for length in dict.fromkeys(lengths):
        rows = [row for row, other in enumerate(lengths) if other == length]
        count = max(1, PREFILL_TOKENS // length)
        for first in range(0, len(rows), count):
            yield rows[first : first + count]


def _check_prompts(prompts: Sequence[Tensor], capacities: Sequence[int]) -> None:
    if len(prompts) != len(capacities):
        raise UsageError(f"the engine was made for {len(capacities)} texts and is given {len(prompts)} prompts")
    for index, (prompt, full) in enumerate(zip(prompts, capacities, strict=True)):
        if not isinstance(prompt, Tensor) or prompt.dtype != torch.int64 or prompt.dim() != 1:
            raise UsageError(f"prompt {index} is not a row of token ids, int64 [length]")
        if not 1 <= len(prompt) <= full:
            raise UsageError(f"prompt {index} has {len(prompt)} tokens, and its text has room for 1 to {full}")


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines of a device: the library of matrix products keeps 32 MB for each stream it ever ran on."""
    return torch.cuda.Stream(device)


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
