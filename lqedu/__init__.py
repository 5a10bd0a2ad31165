"""lqedu: LLM quantization, step by step. Every method of the book, as code to import.

>>> import lqedu
>>> sorted(lqedu.methods.available())[:2]
['awq', 'fp8']

Nothing heavy is imported until it is used: ``import lqedu`` loads neither torch nor transformers nor Triton.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "load_model": "lqedu.models",
    "load_corpus": "lqedu.calibration",
    "token_windows": "lqedu.calibration",
    "quantize": "lqedu.methods.pipeline",
    "quantize_folder": "lqedu.methods.streaming",
    "perplexity": "lqedu.evaluation",
    "generate": "lqedu.runtime.generation",
    "save": "lqedu.checkpoint",
    "load": "lqedu.checkpoint",
}
_SUBPACKAGES = (
    "assets", "book", "calibration", "checkpoint", "errors", "evaluation", "formats", "integrations", "linalg", "methods",
    "models", "rounding", "runtime", "training", "transforms", "viz",
)  # fmt: skip

__all__ = [*_HOME, *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _SUBPACKAGES:
        return import_module(f"lqedu.{name}")
    raise AttributeError(f"module 'lqedu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
