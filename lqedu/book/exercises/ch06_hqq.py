"""Checkers of chapter 06-hqq."""

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.formats import IntGrid, ScaleConvention
from lqedu.rounding import hqq
from lqedu.rounding.hqq import shrink


def _group(rows: int, columns: int, seed: int) -> torch.Tensor:
    return 0.2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@exercise("06-hqq.1", "the exact minimiser of |e| + β/2 (e - x)²")
def _soft(fn):
    for x, beta in ((torch.linspace(-1, 1, 11, dtype=torch.float64), 4.0), (_group(3, 5, 0), 30.0)):
        expect_close(fn(x, beta), shrink(x, beta, 1.0), name=f"e for β={beta}", atol=1e-9)


@exercise("06-hqq.2", "the zero point that minimises the quadratic, codes and e held fixed")
def _mean(fn):
    for rows, columns, seed in ((2, 8, 1), (5, 33, 2)):
        x, s = _group(rows, columns, seed), torch.full((rows, 1), 0.07, dtype=torch.float64)
        q, e = torch.round(x / s + 3.3).clamp(0, 7), 0.01 * _group(rows, columns, seed + 10)
        want = (q - (x - e) / s).mean(1, keepdim=True)
        expect_close(fn(x, q, s, e), want, name="z", atol=1e-9)


@exercise("06-hqq.3", "find the mistake in a loop that ends worse than it began")
def _repair(fn):
    for bits, seed in ((2, 3), (3, 4)):
        w = _group(6, 64, seed)
        grid = IntGrid(bits, zero_point="float", convention=ScaleConvention.MINMAX, scale_dtype=torch.float64)
        scale, zero = grid.fit(w)
        got = fn(w, scale, zero, grid)
        error = (w - scale * (grid.nearest_code(w, scale, got) - got)).abs().mean(1)
        want = (w - hqq(w, grid, beta=100.0, kappa=1.0)[0].dequantize(torch.float64)).abs().mean(1)
        expect_close(error, want, name="mean error of each row", atol=1e-6)


@exercise("06-hqq.4", "bits per weight of a grid with FP16 scales and FP16 zero points")
def _bits(fn):
    for bits, group in ((4, 64), (3, 64), (2, 16)):
        grid = IntGrid(bits, granularity="group", group_size=group, zero_point="float")
        expect_close(
            fn(bits, group), grid.bits_per_weight((128, 128)), name=f"{bits} bits, groups of {group}", atol=1e-9
        )


@exercise("06-hqq.5", "the β that makes HQQ treat c·w as it treats w")
def _invariant(fn):
    w = _group(4, 32, 5)
    grid = IntGrid(2, zero_point="float", convention=ScaleConvention.MINMAX, scale_dtype=torch.float64)
    for c, beta, p in ((10.0, 100.0, 0.7), (0.05, 30.0, 0.5)):
        want = hqq(w, grid, beta=beta, p=p)[0].codes
        got = hqq(c * w, grid, beta=float(fn(beta, c, p)), p=p)[0].codes
        expect_equal(got.long(), want.long(), name=f"codes of {c}·w with your β")
