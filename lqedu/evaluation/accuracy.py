"""Accuracies out of log-likelihoods, and differences of two models paired by item; ``22-side-by-side``.

A model answers with the continuation it finds most likely after the context. With ll_i = log p(continuation_i | context):

    acc       argmax_i ll_i            = gold
    acc_norm  argmax_i ll_i / length_i = gold,      length in characters, without the space before the continuation

as in lm-evaluation-harness 0.4 (Gao et al., 2024), ``process_results`` of ``lm_eval/api/task.py``.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

from lqedu._statistics import mean_and_error
from lqedu.errors import CalibrationError, UsageError
from lqedu.evaluation.tasks import Item


@dataclass(frozen=True)
class TaskScore:
    """What :func:`score` measured.

    Attributes:
        acc: share of items whose right continuation is the most likely one.
        acc_stderr: its standard error over items, that of the harness; NaN for one item.
        acc_norm: the same of log-likelihoods a character. The harness reports it for PIQA, ARC, HellaSwag and OpenBookQA.
        acc_norm_stderr: its standard error.
        gold_nll: mean -log p of the right continuations, in nats; for LAMBADA exp of it is the perplexity of the word.
        count: items.
        truncated: continuations whose context did not fit the model and lost its beginning.
        correct: of each item, what ``acc`` is the mean of.
        correct_norm: of each item, what ``acc_norm`` is the mean of.
        log_likelihoods: of each item's continuations.
        items_sha256: of the items; :func:`paired_scores` compares scores of the same ones only.
    """

    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    gold_nll: float
    count: int
    truncated: int
    correct: tuple[bool, ...] = field(repr=False)
    correct_norm: tuple[bool, ...] = field(repr=False)
    log_likelihoods: tuple[tuple[float, ...], ...] = field(repr=False)
    items_sha256: str = field(repr=False)


@dataclass(frozen=True)
class PairedAccuracy:
    """The difference of two models on the same items: of accuracies, and their standard errors over items."""

    delta_acc: float
    acc_stderr: float
    delta_acc_norm: float
    acc_norm_stderr: float
    count: int


def paired_scores(a: TaskScore, b: TaskScore) -> PairedAccuracy:
    """How much better ``a`` is than ``b``, by the differences of each item.

    Raises:
        UsageError: the two were measured on different items.
    """
    if a.items_sha256 != b.items_sha256:
        raise UsageError("the two scores were measured on different items; measure both on the same ones")
    acc, acc_norm = (
        mean_and_error([float(x) - y for x, y in zip(*pair, strict=True)])
        for pair in ((a.correct, b.correct), (a.correct_norm, b.correct_norm))
    )
    return PairedAccuracy(*acc, *acc_norm, a.count)


def summary(items: Sequence[Item], found: Sequence[tuple[float, bool]], truncated: int) -> TaskScore:
    """From the log-likelihood of each item's continuations in turn, and whether it is the greedy one (CalibrationError: not finite)."""
    if bad := sum(not math.isfinite(value) for value, _ in found):
        raise CalibrationError(
            f"the model gives no finite likelihood for {bad} of {len(found)} continuations; "
            "its weights or activations overflow: try dtype float32, or a gentler quantization"
        )
    rest = iter(found)
    answers = [list(islice(rest, len(item.continuations))) for item in items]
    values = tuple(tuple(value for value, _ in answer) for answer in answers)
    correct = tuple(_is_right(item, answer, [1] * len(answer)) for item, answer in zip(items, answers, strict=True))
    correct_norm = tuple(
        _is_right(item, answer, [len(text) for text in item.continuations])
        for item, answer in zip(items, answers, strict=True)
    )
    return TaskScore(
        *mean_and_error([float(right) for right in correct]),
        *mean_and_error([float(right) for right in correct_norm]),
        gold_nll=-statistics.fmean(value[item.gold] for item, value in zip(items, values, strict=True)),
        count=len(items),
        truncated=truncated,
        correct=correct,
        correct_norm=correct_norm,
        log_likelihoods=values,
        items_sha256=hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest(),
    )


def _is_right(item: Item, answer: Sequence[tuple[float, bool]], lengths: Sequence[int]) -> bool:
    """Whether the gold is the first of the most likely; with one continuation, whether it is the greedy one."""
    if len(answer) == 1:
        return answer[0][1]
    scaled = [value / length for (value, _), length in zip(answer, lengths, strict=True)]
    return scaled.index(max(scaled)) == item.gold
