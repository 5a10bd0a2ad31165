"""Evaluation: what quantization cost."""

from lqedu.evaluation.accuracy import PairedAccuracy, TaskScore, paired_scores
from lqedu.evaluation.perplexity import PairedDifference, Perplexity, paired, perplexity
from lqedu.evaluation.tasks import Item, load_task
from lqedu.evaluation.zeroshot import score

__all__ = [
    "Item",
    "PairedAccuracy",
    "PairedDifference",
    "Perplexity",
    "TaskScore",
    "load_task",
    "paired",
    "paired_scores",
    "perplexity",
    "score",
]
