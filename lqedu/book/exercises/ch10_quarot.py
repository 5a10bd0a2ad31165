"""Checkers of chapter 10-quarot."""

import math

import torch

from lqedu.book.exercises import exercise, expect_close
from lqedu.linalg import fast_hadamard, hadamard_matrix, hadamard_operations


@exercise("10-quarot.1", "transform vectors of a power of two in log2(n) steps")
def _butterfly(fn):
    for shape, seed in (((3, 8), 0), ((1, 1), 1), ((2, 3, 64), 2)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expect_close(fn(x.clone()), fast_hadamard(x), name=f"the transform of {shape[-1]} features", atol=1e-9)


@exercise("10-quarot.2", "a Hadamard matrix of order q + 1 from the squares modulo a prime q")
def _paley(fn):
    for q in (3, 7, 11, 19, 43):
        h = torch.as_tensor(fn(q)).long()
        assert h.shape == (q + 1, q + 1), f"q = {q} gives order {q + 1}, got {list(h.shape)}"
        assert set(h.unique().tolist()) == {-1, 1}, "every entry is 1 or -1"
        want = (q + 1) * torch.eye(q + 1, dtype=torch.long)
        expect_close(h @ h.T, want, name=f"H H^T for q = {q}", atol=0.0)


@exercise("10-quarot.3", "find the mistake on the weight's side of an online transform")
def _weight_side(fn):
    for n, outs, seed in ((8, 5, 3), (12, 7, 4), (28, 3, 5)):  # powers of two forgive it
        g = torch.Generator().manual_seed(seed)
        x, w = torch.randn(6, n, generator=g).double(), torch.randn(outs, n, generator=g).double()
        expect_close(
            fast_hadamard(x) @ fn(w, hadamard_matrix(n).double()).T, x @ w.T, name=f"the layer of {n} inputs", atol=1e-9
        )


@exercise("10-quarot.4", "predict the additions of a transform of 13,824 features")
def _operations(answer):
    want = hadamard_operations(13824)
    assert float(answer) == want, (
        f"{float(answer):,.0f} is not it: 13824 = 108 · 128; the factor 108 costs 107 additions a feature, "
        "and each step of the butterfly one"
    )


@exercise("10-quarot.5", "where a symmetric grid should end for Gaussian values")
def _clip(fn):
    for bits in (3, 4, 6, 8):
        lo, hi = 0.0, 12.0  # the slope of D rises through its one zero
        for _ in range(200):
            a = (lo + hi) / 2
            tail, density = math.erfc(a / math.sqrt(2)) / 2, math.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
            slope = a / (6 * (2 ** (bits - 1) - 1) ** 2) - 4 * (density - a * tail)
            lo, hi = (a, hi) if slope < 0 else (lo, a)
        expect_close(torch.tensor(float(fn(bits))), torch.tensor(a), name=f"a at {bits} bits", atol=2e-3)
