"""Triton kernels for the formats of *LLM Quantization, Step by Step*; usable without the ``lqedu`` package.

Nothing is compiled or autotuned at import.
"""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lqedu_kernels needs Triton 3.6 to 3.9, which is not installed here: pip install 'lqedu[gpu]' on a machine with an NVIDIA GPU."
    ) from error

__version__ = "0.1.0"
