"""Evaluation: what did quantization cost? (chapter ``03-bench``)"""

from lqedu.evaluation.perplexity import PairedDifference, Perplexity, paired, perplexity

__all__ = ["PairedDifference", "Perplexity", "paired", "perplexity"]
