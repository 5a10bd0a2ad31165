"""Checkers of chapter 02-grids."""

import math

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.formats import pack


@exercise("02-grids.1", "find the smallest group size that fits a budget of bits per weight")
def _group_size(fn):
    for (bits, budget, symmetric), want in {
        (4, 4.25, True): 64,
        (4, 4.25, False): 128,
        (4, 4.5, True): 32,
        (3, 3.3, False): 64,
        (2, 2.05, True): 512,
        (8, 9.5, False): 16,
    }.items():
        got = fn(bits, budget, symmetric)
        expect_equal(got, want, name=f"group size for bits={bits}, budget={budget}, symmetric={symmetric}")


@exercise("02-grids.2", "round rows with the signed extreme over -8 as their scale")
def _signed_extreme(fn):
    # The step is 1 in each row: the extreme is exact on either side, the other side ends at 7 steps.
    rows = torch.tensor([[8.0, 2.4, -7.9, 0.5], [-8.0, 7.9, 1.5, -0.5], [0.0, 0.0, 0.0, 0.0]])
    want = torch.tensor([[8.0, 2.0, -7.0, 0.0], [-8.0, 7.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expect_close(fn(rows), want, name="w_hat")
    rows = torch.randn(5, 13, generator=torch.Generator().manual_seed(0))
    got = fn(rows)
    at = rows.abs().argmax(1, keepdim=True)
    expect_close(got.gather(1, at), rows.gather(1, at), name="the largest weight of each row")
    step = rows.gather(1, at).abs() / 8
    want = torch.round(rows / -rows.gather(1, at) * 8).clamp(-8, 7) * -rows.gather(1, at).sign() * step
    expect_close(got, want, name="w_hat", atol=1e-5)


@exercise("02-grids.3", "find the three mistakes of a quantizer")
def _repair(fn):
    g = torch.Generator().manual_seed(1)
    cases = [torch.tensor([[1.0, 1.3, 2.5], [-2.5, -1.3, -1.0]]), torch.randn(4, 33, generator=g)]
    for rows, bits in [(cases[0], 4), (cases[1], 4), (cases[1] * 0.037, 8)]:
        lo, hi = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
        s = ((hi - lo) / (2**bits - 1)).to(torch.float16)
        z = torch.round(-lo / s.float()).clamp(0, 2**bits - 1)
        codes, scale, zero = fn(rows, bits)
        assert getattr(scale, "dtype", None) == torch.float16, "the scale is stored in FP16"
        expect_equal(scale, s, name="s")
        expect_equal(zero, z, name="z")
        expect_equal(codes, (torch.round(rows / s.float()) + z).clamp(0, 2**bits - 1), name="q")


@exercise("02-grids.4", "signal over noise of uniform weights on a grid of b bits, in decibels")
def _decibels(fn):
    for bits in (2, 3, 4, 8):
        steps = 2**bits - 1
        # E w^2 = (2a)^2 / 12 and E e^2 = (2a / steps)^2 / 12, with a = 1
        want = 10 * math.log10((4 / 12) / ((2 / steps) ** 2 / 12))
        expect_close(fn(bits), want, name=f"dB at {bits} bits", atol=1e-6)


@exercise("02-grids.5", "read codes back from a stream of bits")
def _unpack(fn):
    g = torch.Generator().manual_seed(2)
    for bits in range(1, 9):
        for shape in ((3, 8), (2, 13), (5,)):
            codes = torch.randint(2**bits, shape, generator=g)
            expect_equal(fn(pack(codes, bits), bits, shape[-1]), codes, name=f"{bits}-bit codes")
