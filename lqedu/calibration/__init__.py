"""Calibration: what a model sees while it is quantized, and what its layers see then."""

from lqedu.calibration.capture import block_inputs, run_block
from lqedu.calibration.corpus import load_corpus, token_windows
from lqedu.calibration.distributed import data_parallel

__all__ = ["block_inputs", "data_parallel", "load_corpus", "run_block", "token_windows"]
