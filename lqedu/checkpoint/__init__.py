"""Quantized models on disk: save, load, resume an interrupted run (``04-gptq``); export and import (``21-serving``)."""

from lqedu.checkpoint.exporting import export
from lqedu.checkpoint.folder import folder_bytes, load, save
from lqedu.checkpoint.importing import import_model, open_quantized

__all__ = ["export", "folder_bytes", "import_model", "load", "open_quantized", "save"]
