"""Grids: which values can be stored, and how they are packed (chapter ``02-grids``)."""

from lqedu.formats import fp8 as fp8  # lqedu.formats.fp8.encode and decode need no import of their own
from lqedu.formats.integer import IntGrid, ScaleConvention
from lqedu.formats.packing import WORD_LAYOUTS, pack, pack_words, packed_width, unpack, unpack_words
from lqedu.formats.qtensor import QTensor

__all__ = [
    "WORD_LAYOUTS", "IntGrid", "QTensor", "ScaleConvention", "pack", "pack_words", "packed_width", "unpack",
    "unpack_words",
]  # fmt: skip
