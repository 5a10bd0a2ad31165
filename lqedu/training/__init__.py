"""Training in 8-bit floats: recipes, scales, and the layer that multiplies them (chapter ``17-fp8-training``)."""

from lqedu.training.linear import Fp8Linear, convert
from lqedu.training.loop import Training, byte_batches, evaluate, small_llama, train
from lqedu.training.scaling import Recipe, fp8_round, out_of_range, scale_of

__all__ = [
    "Fp8Linear", "Recipe", "Training", "byte_batches", "convert", "evaluate", "fp8_round", "out_of_range", "scale_of",
    "small_llama", "train",
]  # fmt: skip
