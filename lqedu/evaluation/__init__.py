"""Evaluation: what quantization cost."""

from lqedu.evaluation.perplexity import PairedDifference, Perplexity, paired, perplexity

__all__ = ["PairedDifference", "Perplexity", "paired", "perplexity"]
