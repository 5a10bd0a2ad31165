"""Multiple-choice tasks by likelihood, as lm-evaluation-harness measures them; ``22-side-by-side``.

What a model finds how likely is found here, what follows from it in :mod:`lqedu.evaluation.accuracy`. Context and continuation
are encoded as in ``_encode_pair`` of lm-evaluation-harness 0.4 (``lm_eval/api/model.py``). No examples come before a question,
and no chat template around it.

Model cards measure otherwise. That of SmolLM2-135M-Instruct (HellaSwag, ARC, PIQA) comes from lighteval, zero-shot (tasks and
commands: huggingface/smollm, ``text/evaluation``). Its ``acc_norm_nospace`` is ``acc_norm`` here, for PIQA and for the average of
ARC's two parts as well, and the prompts of ARC and PIQA are the same. HellaSwag's context keeps a space at its end, so that two
stand before an ending; instruction-tuned models are run with their chat template; and weights are the original bfloat16 ones,
not the 4-bit blocks of the embedded file.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lqedu.errors import CalibrationError, UsageError
from lqedu.evaluation.accuracy import TaskScore, summary
from lqedu.evaluation.tasks import Item
from lqedu.models.modes import inference
from lqedu.options import check_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 512  # positions whose log-probabilities are held at once, as for perplexity


def score(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    items: Iterable[Item],
    *,
    tokens_per_batch: int = 4096,
    progress: bool = False,
) -> TaskScore:
    """Measure a causal language model on items; see :func:`lqedu.evaluation.load_task`.

    Args:
        model: a model of transformers, dense or quantized, on any device. Not changed.
        tokenizer: of that model.
        items: of one task.
        tokens_per_batch: run at once, padding included; sets the memory, not the result. (Activations quantized with one
            dynamic scale for a whole tensor are an exception: texts of a batch share that scale.)
        progress: show a progress bar on stderr.

    A text longer than the model's positions loses its beginning, as in the harness.

    Raises:
        UsageError: no items, a tokenizer that is none or not the model's, or a continuation longer than the model's
            positions.
        CalibrationError: a continuation without tokens of its own, or a likelihood that is not a number.
    """
    items = tuple(items)
    check_count("tokens_per_batch", tokens_per_batch, least=1)
    if not items:
        raise UsageError("there are no items to score; see lqedu.evaluation.load_task")
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    choices = [choice for item in items for choice in zip(item.contexts, item.continuations, strict=True)]
    encoded = _encode(tokenizer, choices)
    _check(encoded, choices, limit, model.get_input_embeddings().num_embeddings)
    texts: dict[tuple[int, ...], list[int]] = defaultdict(list)  # what is read, and the choices that it answers
    for index, (ids, _) in enumerate(encoded):
        texts[tuple(ids[-limit - 1 : -1])].append(index)
    found: dict[int, tuple[float, bool]] = {}
    with inference(model), tqdm(total=len(choices), desc="choices", disable=not progress, file=sys.stderr) as bar:
        for batch in _batches(sorted(texts, key=len, reverse=True), tokens_per_batch):
            asked = [(row, index) for row, text in enumerate(batch) for index in texts[text]]
            scored = _run(model, batch, [(row, encoded[index][0][-encoded[index][1] :]) for row, index in asked])
            found.update(zip((index for _, index in asked), scored, strict=True))
            bar.update(len(asked))
    return summary(items, [found[i] for i in range(len(choices))], sum(len(ids) > limit + 1 for ids, _ in encoded))


def _encode(tokenizer: "PreTrainedTokenizerBase", choices: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Ids of context and continuation, and how many are the continuation's: encoded as a whole, and cut where the context ends.

    Spaces that end a context belong to the continuation. Nothing to read before it is the token that begins a text.
    """
    if not callable(tokenizer):
        raise UsageError("score needs the model's tokenizer, the second of what lqedu.load_model returns")
    contexts = [context.rstrip() for context, _ in choices]
    wholes = tokenizer([f"{context} {continuation}" for context, continuation in choices])["input_ids"]
    prefix = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    encoded = []
    for whole, context in zip(wholes, tokenizer(contexts)["input_ids"], strict=True):
        if not context and prefix is None:
            raise UsageError(
                "the tokenizer has no token that begins or ends a text, which an empty context needs; write one"
            )
        if not context and whole[:1] != [prefix]:
            whole = [prefix, *whole]
        encoded.append((whole, len(whole) - max(1, len(context))))
    return encoded


def _check(encoded: list[tuple[list[int], int]], choices: list[tuple[str, str]], limit: int, vocabulary: int) -> None:
    for (ids, length), (_, continuation) in zip(encoded, choices, strict=True):
        if max(ids, default=0) >= vocabulary:
            raise UsageError(f"there are token ids outside the model's {vocabulary}; use the model's own tokenizer")
        if length < 1:
            raise CalibrationError(f"{continuation!r} has no token of its own after its context; leave the item out")
        if length > limit:
            raise UsageError(
                f"{continuation[:40]!r}… has {length} tokens, more than the model's {limit} positions; leave the item out"
            )


def _batches(texts: list[tuple[int, ...]], tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive texts, longest first, that padded to the first of them have at most so many tokens; at least one."""
    while texts:
        count = max(1, tokens // len(texts[0]))
        yield texts[:count]
        texts = texts[count:]


def _run(
    model: nn.Module, texts: list[tuple[int, ...]], wanted: list[tuple[int, list[int]]]
) -> list[tuple[float, bool]]:
    """Log-likelihood of each ``(row of texts, ids that follow its end less one)``, and whether they are the greedy ones."""
    device = model.get_input_embeddings().weight.device
    lengths = torch.tensor([len(text) for text in texts])
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)  # [texts, longest]
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    rows = torch.tensor([row for row, target in wanted for _ in target], device=device)
    places = torch.cat([lengths[row] - len(target) + torch.arange(len(target)) for row, target in wanted]).to(device)
    targets = torch.tensor([token for _, target in wanted for token in target], device=device)
    # The head reads the hidden states that predict a continuation, and no others: [1, positions, hidden].
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][rows, places][None],))
    try:
        logits = model(ids.to(device), attention_mask=mask.to(device), use_cache=False).logits[0]
    finally:
        hook.remove()
    log_p, greedy = [], logits.argmax(-1) == targets
    for part, target in zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True):
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        log_p.append(-cross_entropy(part, target, reduction="none").double())
    sizes = [len(target) for _, target in wanted]
    parts = zip(torch.cat(log_p).cpu().split(sizes), greedy.cpu().split(sizes), strict=True)
    return [(values.sum().item(), bool(same.all())) for values, same in parts]
