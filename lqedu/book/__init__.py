"""What the notebooks of the book need besides mathematics: setup, glued numbers, tables, result files, exercises.

>>> import lqedu
>>> ctx = lqedu.book.setup()                                                        # doctest: +SKIP
lqedu 0.1.0 · torch 2.13.0 · cpu · 2 threads

Importing it loads neither torch nor matplotlib nor IPython. ``lqedu.book.results`` is the function and shares
its name with the module that defines it, which is why this package imports eagerly.
"""

from lqedu.book.checking import check
from lqedu.book.display import glue, provenance, table
from lqedu.book.notebook import Context, setup
from lqedu.book.results import results, write_result

__all__ = ["Context", "check", "glue", "provenance", "results", "setup", "table", "write_result"]
