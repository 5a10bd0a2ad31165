"""Text from a model, dense or quantized, through the engine; chapter ``21-serving``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lqedu.errors import UsageError
from lqedu.options import check_count, check_number
from lqedu.runtime.decoder import Decoder, decoder_of
from lqedu.runtime.engine import Engine

Prompts = str | Sequence[str] | Tensor | Sequence[Tensor]


def generate(
    model: nn.Module | Decoder,
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    eos: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> str | list[str] | Tensor | list[Tensor]:
    """Continue texts, all of them at once and each to its own length.

    Args:
        model: Llama-like, dense or quantized by any method, from :func:`lqedu.load_model` or :func:`lqedu.quantize`; not changed.
            On a GPU linears, keys and values run on kernels, elsewhere on their references, which are slow. Many calls are
            faster with what :func:`lqedu.runtime.decoder.decoder_of` makes of it.
        prompts: a text, several, or their token ids: int64 ``[length]`` or ``[texts, length]``, or a list of rows.
        tokenizer: of the texts; by default the one that came with the model.
        max_new_tokens: of each text.
        eos: ids that end a text, which is cut before them; ``None`` is what the model's generation settings say, ``()`` none.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from ``softmax(logits / temperature)``.
        top_p: draw from the likeliest tokens whose probabilities reach this sum.
        seed: of the draws. A text's draws depend on its place in the batch too.
        dtype: of activations, see :func:`lqedu.runtime.decoder.decoder_of`.

    Returns:
        The continuations alone, as the prompts were given: one text or several; new ids ``[new]`` for one row, a list of such
        rows for more (their lengths differ).

    Raises:
        UsageError: prompts that are none, or longer with their continuation than the model has positions for; options out of
            range; texts without a tokenizer.
        UnsupportedModelError, GridError: a model that the engine does not run.
    """
    check_count("max_new_tokens", max_new_tokens, least=1)
    check_number("temperature", temperature, least=0)
    check_number("top_p", top_p, above=0, most=1)
    check_count("seed", seed, most=2**63 - 1)
    if not isinstance(model, nn.Module | Decoder):
        raise UsageError(f"pass a model, as lqedu.load_model returns it, got {model!r}")
    stops = _stops(model, eos)
    if _is_text(prompts):
        tokenizer = tokenizer or getattr(model, "lqedu_tokenizer", None)
        if tokenizer is None:
            raise UsageError(
                "texts need a tokenizer, and the model carries none; pass tokenizer=, or token ids as prompts"
            )
    decoder = model if isinstance(model, Decoder) else decoder_of(model, dtype)
    rows = _rows(prompts, tokenizer, len(decoder.embedding))
    longest = max(len(row) for row in rows) + max_new_tokens
    if longest > len(decoder.cos) + 1:  # the last token is not read
        raise UsageError(
            f"the longest prompt and {max_new_tokens} new tokens make {longest}, and the model has {len(decoder.cos)} "
            "positions; use a shorter prompt or fewer max_new_tokens"
        )
    engine = Engine(decoder, [min(len(row) + max_new_tokens, len(decoder.cos)) for row in rows])
    found = _continue(engine, rows, max_new_tokens, stops, temperature, top_p, seed)
    if _is_text(prompts):
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in found]
        return texts[0] if isinstance(prompts, str) else texts
    return found[0] if isinstance(prompts, Tensor) and prompts.dim() == 1 else found


def _continue(
    engine: Engine,
    rows: list[Tensor],
    count: int,
    stops: Tensor,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[Tensor]:
    """New tokens of each text, cut before the first that ends it."""
    device = engine.decoder.device
    generator = torch.Generator(device).manual_seed(seed)
    stops, new = stops.to(device), []
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    logits = engine.prefill(rows)
    while True:
        if temperature:
            engine.tokens.copy_(draw(logits, temperature, top_p, generator))
        new.append(engine.tokens.clone())
        ended |= torch.isin(engine.tokens, stops)
        if len(new) == count or (len(stops) and bool(ended.all())):
            break
        logits = engine.step()
    tokens = torch.stack(new, 1).cpu()
    return [row[: _end(row, stops.cpu())] for row in tokens]


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token of each row, from the likeliest ones whose probabilities reach ``top_p``.

    Args:
        logits: ``[texts, vocabulary]``.
        temperature: above 0.
        top_p: in (0, 1]; the token that reaches the sum is one of them.
        generator: of the draws, on the device of the logits.

    Returns:
        int64 ``[texts]``.
    """
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


def _end(row: Tensor, stops: Tensor) -> int:
    found = torch.isin(row, stops).nonzero()
    return int(found[0]) if len(found) else len(row)


def _stops(model: nn.Module | Decoder, eos: int | Sequence[int] | None) -> Tensor:
    if eos is None:
        eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        eos = () if eos is None else eos
    ids = [eos] if isinstance(eos, int) else list(eos)
    for token in ids:
        check_count("eos", token)
    return torch.tensor(ids, dtype=torch.int64)


def _is_text(prompts: Prompts) -> bool:
    return isinstance(prompts, str) or (
        isinstance(prompts, list | tuple) and len(prompts) > 0 and all(isinstance(prompt, str) for prompt in prompts)
    )


def _rows(prompts: Prompts, tokenizer: Any, vocabulary: int) -> list[Tensor]:
    if _is_text(prompts):
        texts = [prompts] if isinstance(prompts, str) else prompts
        rows = [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64) for text in texts]
    elif isinstance(prompts, Tensor):
        rows = list(prompts[None] if prompts.dim() == 1 else prompts)
    else:
        rows = list(prompts) if isinstance(prompts, list | tuple) else []
    good = rows and all(isinstance(row, Tensor) and row.dtype == torch.int64 and row.dim() == 1 for row in rows)
    if not good:
        raise UsageError(
            "prompts are a text, a list of texts, int64 token ids [length] or [texts, length], or a list of rows"
        )
    for index, row in enumerate(rows):
        if not len(row):
            raise UsageError(f"prompt {index} is empty; a text starts with a token at least")
        if int(row.min()) < 0 or int(row.max()) >= vocabulary:
            raise UsageError(
                f"prompt {index} holds token ids outside the model's {vocabulary}; use the model's own tokenizer"
            )
    return rows
