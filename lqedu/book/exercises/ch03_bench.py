"""Checkers of chapter 03-bench."""

import math

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal


def _losses(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    base = 3 + 0.2 * torch.randn(count, generator=g, dtype=torch.float64)
    return base, base + 0.02 + 0.01 * torch.randn(count, generator=g, dtype=torch.float64)


@exercise("03-bench.1", "cut tokens into non-overlapping windows and drop the tail")
def _windows(fn):
    for n, length in ((10, 3), (12, 4), (5, 8), (7, 7)):
        ids = torch.arange(n)
        want = ids[: n // length * length].view(-1, length)
        expect_equal(fn(ids, length), want, name=f"windows of {length} from {n} tokens")


@exercise("03-bench.2", "perplexity from the loss of every window")
def _perplexity(fn):
    for losses in ([1.0, 2.0, 3.0], [0.0], [2.5, 2.5]):
        want = math.exp(sum(losses) / len(losses))
        expect_close(fn(torch.tensor(losses)), want, name=f"perplexity of {losses}", atol=1e-4)


@exercise("03-bench.3", "find the mistake in a standard error that is far too large")
def _paired(fn):
    for count, seed in ((16, 0), (40, 1)):
        base, worse = _losses(count, seed)
        delta = worse - base
        got = fn(worse, base)
        expect_close(got[0], float(delta.mean()), name="difference", atol=1e-9)
        expect_close(got[1], float(delta.std() / math.sqrt(count)), name="standard error", atol=1e-9)


@exercise("03-bench.4", "how many windows until a difference stands two standard errors above zero")
def _needed(fn):
    for difference, spread, want in ((0.01, 0.04, 64), (0.02, 0.02, 4), (0.003, 0.045, 900)):
        expect_equal(fn(difference, spread), want, name=f"windows(difference={difference}, spread={spread})")
