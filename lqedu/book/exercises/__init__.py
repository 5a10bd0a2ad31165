"""Checkers of the exercises: one module a chapter, named ``ch`` and the chapter's id with ``_`` for ``-``.

    # lqedu/book/exercises/ch02_grids.py
    import torch
    from lqedu.book.exercises import exercise, expect_close

    @exercise("02-grids.1", "round weights to the nearest multiple of s")
    def _nearest(fn):
        w = torch.tensor([[0.1, -0.4], [0.26, 0.9]])
        expect_close(fn(w, 0.25), torch.tensor([[0.0, -0.5], [0.25, 1.0]]), name="w_hat")

A checker calls the reader's function and raises ``AssertionError`` with a helpful message, or returns. It uses several
inputs, one of which breaks the usual mistake, its own seeded generator, and no model.
"""

from lqedu.book.checking import exercise, expect_close, expect_equal

__all__ = ["exercise", "expect_close", "expect_equal"]
