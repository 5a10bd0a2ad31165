"""Tokens a second, and bytes: a prompt read, a token added to every text, against what sizes predict; ``21-serving``.

Times are of whole steps of :class:`lqedu.runtime.engine.Engine`: on a GPU replays of a captured step, between two events of the
device; elsewhere references, by a clock, which say nothing of a format's speed. Pages hold random numbers, never zeros.
Memory is the peak that torch's allocator counted from before the cache was made until after the steps, weights included.
"""

import gc
import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lqedu.errors import UsageError
from lqedu.evaluation.memory import Predicted, largest_batch, predict, step_bytes
from lqedu.evaluation.random_models import FORMATS, Format, random_decoder
from lqedu.evaluation.roofline import ModelShape
from lqedu.options import check_count
from lqedu.runtime.decoder import Decoder
from lqedu.runtime.engine import Engine, side_stream
from lqedu.runtime.paged import PAGE, pages_of

TRANSFORMERS = "fp16-transformers"
WARM = 3  # steps before the clock starts
Row = dict[str, Any]


def measure_shape(
    shape: ModelShape,
    formats: Sequence[str],
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    device: torch.device | str,
    steps: int = 20,
    budget: float = 80e9,
    seed: int = 0,
) -> Iterator[Row]:
    """Rows of a model of this shape with random weights, format by format.

    Args:
        shape: of the model.
        formats: names of ``lqedu.evaluation.random_models.FORMATS``, or "fp16-transformers".
        batches, contexts: texts at once, and tokens of each; all pairs are measured whose memory is predicted to fit.
        device: where it runs.
        steps: samples of a decode row.
        budget: bytes that a card has, for the largest batch; on a GPU what is measured must fit the one at hand too.
        seed: of weights, pages and prompts.

    Yields:
        ``name`` "prefill", "decode", "memory" (the largest batch that fits ``budget``, predicted) or "too large";
        ``format``, ``batch``, ``context``; ``samples`` in seconds; ``predicted_bytes`` and ``measured_bytes`` (``None`` without
        a GPU).

    Raises:
        UsageError: an unknown format, or numbers out of range.
    """
    check_formats(formats)
    for name, values in (("batches", batches), ("contexts", contexts)):
        for value in values:
            check_count(name, value, least=1)
    check_count("steps", steps, least=1)
    room = min(budget, _free(device))
    for name in formats:
        form = FORMATS.get(name, Format())
        positions = max(contexts) + steps + WARM + PAGE
        for context in contexts:
            most = largest_batch(shape, form, tokens=context, budget=budget)
            yield {
                "name": "memory",
                "format": name,
                "context": context,
                "largest_batch": most,
                "budget_bytes": int(budget),
            }
        make = (lambda: _Static(shape, device, seed)) if name == TRANSFORMERS else (
            lambda form=form, positions=positions: random_decoder(shape, form, device=device, positions=positions, seed=seed)
        )  # fmt: skip
        model = make()
        for context in contexts:
            if isinstance(model, Decoder):
                yield {"format": name, **prefill_row(model, context, seed=seed)}
            for batch in batches:
                memory = predict(shape, form, batch=batch, tokens=context + steps + WARM + 1, positions=positions)
                row: Row = {"name": "decode", "format": name, "batch": batch, "context": context}
                if memory.total > room:
                    yield row | {"name": "too large", "predicted_bytes": memory.total, "room_bytes": int(room)}
                    continue
                if isinstance(model, Decoder):  # transformers takes what it takes
                    row["predicted_bytes"] = memory.total
                run = _decode if isinstance(model, Decoder) else model.decode
                yield row | _guarded(run, model, batch, context, steps, seed)
        del model
        _collect()


def measure_model(
    decoder: Decoder,
    shape: ModelShape,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int = 20,
    seed: int = 0,
) -> Iterator[Row]:
    """The rows "prefill" and "decode" of :func:`measure_shape` of one model as it is."""
    for context in contexts:
        if context + steps + WARM + 1 > len(decoder.cos):
            raise UsageError(
                f"a context of {context} and {steps + WARM + 1} more tokens pass the model's {len(decoder.cos)} positions; "
                "use shorter contexts or fewer steps"
            )
        yield {"format": "model", **prefill_row(decoder, context, seed=seed)}
        for batch in batches:
            pages = batch * pages_of(context + steps + WARM + 1) * decoder_page_bytes(decoder)
            memory = Predicted(decoder.nbytes, pages, step_bytes(shape, batch))
            row = {
                "name": "decode",
                "format": "model",
                "batch": batch,
                "context": context,
                "predicted_bytes": memory.total,
            }
            yield row | _guarded(_decode, decoder, batch, context, steps, seed)


def prefill_row(decoder: Decoder, tokens: int, *, seed: int = 0, repeats: int = 3) -> Row:
    """One text of random tokens, read ``repeats`` times after a first time."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, len(decoder.embedding), (tokens,), generator=generator)
    engine = Engine(decoder, [tokens])

    def once() -> None:
        engine.reset()
        engine.prefill([ids])

    samples = timed(once, repeats, decoder.device, warm=1)
    rate = tokens / sorted(samples)[len(samples) // 2]
    return {"name": "prefill", "batch": 1, "context": tokens, "samples": samples, "unit": "s", "tokens_per_s": rate}


def decoder_page_bytes(decoder: Decoder) -> int:
    """Bytes of a page of one text in all layers of a decoder, as :func:`lqedu.evaluation.memory.page_bytes`."""
    path = decoder.path
    if path is None or path.key is None:
        token = 2 * decoder.head_dim * decoder.dtype.itemsize
    else:
        token = sum(
            decoder.head_dim * (4 if getattr(g, "bits", 8) == 4 else 8) // 8 + 4 for g in (path.key, path.value)
        )
    return len(decoder.layers) * decoder.kv_heads * PAGE * token


def fill_pages(engine: Engine, seed: int = 0) -> None:
    """Random numbers in all pages: normal keys and values, or random codes with scales and zero points of such."""
    generator = torch.Generator(engine.decoder.device).manual_seed(seed)
    for pair in engine.cache.layers:
        for pages in pair:
            if isinstance(pages, Tensor):
                pages.normal_(generator=generator)
                continue
            pages.codes.random_(-(2**15), 2**15, generator=generator)
            if pages.kind == "fp8":  # no exponent of all ones: that would be NaN
                pages.codes.bitwise_and_(0xBFBF - 2**16)
            top = {"kv4": 15, "kv8": 255, "fp8": 448}[pages.kind]
            pages.numbers[..., 0].uniform_(4 / top, 6 / top, generator=generator)
            pages.numbers[..., 1] = 0 if pages.kind == "fp8" else top / 2


def timed(run: Callable[[], object], count: int, device: torch.device, *, warm: int = WARM) -> list[float]:
    """Seconds of each of ``count`` calls, by events of the GPU, or by a clock."""
    for _ in range(warm):
        run()
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(count):
            run()
            times.append(time.perf_counter())
        return [b - a for a, b in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def check_formats(names: Sequence[str]) -> None:
    """Refuse (UsageError) names that are no formats; the sentence lists those there are."""
    known = (TRANSFORMERS, *FORMATS)
    if not names or (unknown := [name for name in names if name not in known]):
        raise UsageError(f"formats are {', '.join(known)}, got {', '.join(map(repr, unknown)) if names else 'none'}")


def _decode(decoder: Decoder, batch: int, context: int, steps: int, seed: int) -> Row:
    with _peak(decoder.device) as peak:
        engine = Engine(decoder, [context + steps + WARM + 1] * batch)
        fill_pages(engine, seed)
        engine.take_pages_as_read([context] * batch)
        engine.tokens.random_(0, len(decoder.embedding))
        samples = timed(engine.step, steps, decoder.device)
    del engine
    return _decode_row(samples, batch, peak)


def _decode_row(samples: list[float], batch: int, peak: dict[str, int | None]) -> Row:
    rate = batch / sorted(samples)[len(samples) // 2]
    return {"samples": samples, "unit": "s", "tokens_per_s": rate, "measured_bytes": peak["bytes"]}


def _guarded(run: Callable[..., Row], *args: Any) -> Row:
    """A row, or what was in the way: memory that ran out says so, and the others are still measured."""
    try:
        return run(*args)
    except torch.cuda.OutOfMemoryError:
        return {"name": "out of memory"}
    finally:
        _collect()


@contextmanager
def _peak(device: torch.device) -> Iterator[dict[str, int | None]]:
    """The largest number of bytes that were allocated on a GPU inside; ``None`` elsewhere."""
    found: dict[str, int | None] = {"bytes": None}
    if device.type == "cuda":
        _collect()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["bytes"] = torch.cuda.max_memory_allocated(device)


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free(device: torch.device | str) -> float:
    """Bytes that are free on a device now, as far as it says."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return math.inf


class _Static:
    """A Llama of transformers with a static cache, its step captured as a CUDA graph: what a careful user has without kernels."""

    def __init__(self, shape: ModelShape, device: torch.device | str, seed: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, tie_word_embeddings=shape.tied, max_position_embeddings=32768,
        )  # fmt: skip
        self.device, self.config = torch.device(device), config
        with torch.device(device):
            self.model = LlamaForCausalLM._from_config(config, dtype=torch.float16, attn_implementation="sdpa").eval()
        generator = torch.Generator(device).manual_seed(seed)
        for parameter in self.model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.data.normal_(mean=1, std=0.1, generator=generator)

    @torch.no_grad()
    def decode(self, _: object, batch: int, context: int, steps: int, seed: int) -> Row:
        """Samples of a step, see :func:`_decode`."""
        from transformers import StaticCache

        room = -(-(context + steps + WARM + 4) // PAGE) * PAGE
        with _peak(self.device) as peak:
            cache = StaticCache(config=self.config, max_cache_len=room)
            kv_heads, size = self.config.num_key_value_heads, self.config.head_dim
            cache.early_initialization(batch, kv_heads, size, torch.float16, self.device)
            for layer in cache.layers:
                layer.keys.normal_()
                layer.values.normal_()
            tokens = torch.randint(0, self.config.vocab_size, (batch, 1), device=self.device)
            position = torch.full((1,), context, device=self.device)
            step = self._step(cache, tokens, position, room)
            samples = timed(step, steps, self.device)
        return _decode_row(samples, batch, peak)

    def _step(self, cache: Any, tokens: Tensor, position: Tensor, room: int) -> Callable[[], object]:
        """One token for every text; captured where there is a GPU."""
        places = torch.arange(room, device=self.device)
        takes = inspect.signature(self.model.model.forward).parameters
        extra = {"cache_position": position} if "cache_position" in takes else {}
        counted = [layer.cumulative_length for layer in cache.layers if hasattr(layer, "cumulative_length")]

        def once() -> None:
            for length in counted:
                length.copy_(position[0])
            mask = (places <= position).expand(
                len(tokens), 1, 1, room
            )  # given, so that nothing asks the device for lengths
            out = self.model(
                tokens, position_ids=position.expand(len(tokens), 1), attention_mask=mask, past_key_values=cache,
                use_cache=True, **extra,
            )  # fmt: skip
            tokens.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
            position.add_(1)

        if self.device.type != "cuda":
            return once
        start = position.clone()
        stream = side_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                once()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            once()
        position.copy_(start)
        return graph.replay
