"""Checkers of chapter 00-setup."""

import math

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.formats import IntGrid


@exercise("00-setup.1", "bytes of codes, scales and zero points of a grouped weight")
def _bytes(fn):
    for out, inputs, bits, g in ((8, 128, 4, 64), (576, 1536, 4, 64), (16, 1024, 2, 128), (3, 64, 8, 32)):
        want = IntGrid(bits, granularity="group", group_size=g).nbytes((out, inputs))
        expect_equal(fn(out, inputs, bits, g), want, name=f"bytes(out={out}, inputs={inputs}, bits={bits}, g={g})")


@exercise("00-setup.2", "factor by which perplexity grows when each token costs delta nats more")
def _factor(fn):
    for delta in (0.0, 0.01, 0.23, -0.1, 1.0):
        expect_close(fn(delta), math.exp(delta), name=f"factor({delta})", atol=1e-9)
