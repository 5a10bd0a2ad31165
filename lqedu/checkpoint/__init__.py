"""Quantized models on disk: save, load, and resume a run that was interrupted (chapter ``04-gptq``)."""

from lqedu.checkpoint.folder import folder_bytes, load, save

__all__ = ["folder_bytes", "load", "save"]
