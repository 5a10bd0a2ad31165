"""The checkers of chapter 16-fp8 pass the right answers and tell the usual wrong ones apart."""

import math

import torch

from lqedu.formats.fp8 import decode
from tests.book.answers import right_and_wrong


def _round(x, exponent, mantissa, bias, *, away=False, flush=False, wrap=False, sign=True):
    top = 2.0 ** (2**exponent - 1 - bias) * (2 - 2.0**-mantissa)
    e = torch.floor(torch.log2(x.abs().clamp(min=1e-300))).clamp(min=1 - bias)
    step = torch.exp2(e - mantissa)
    q = x.abs() / step
    q = torch.floor(q + 0.5) if away else torch.round(q)
    y = q * step if wrap else (q * step).clamp(max=top)
    y = torch.where((x.abs() < 2.0 ** (1 - bias)) & flush, 0.0, y)
    return torch.copysign(y, x) if sign else y


def _blocks(codes, scale, *, divide=False, size=128):
    rows, columns = codes.shape
    wide = scale.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :columns]
    return decode(codes) / wide if divide else decode(codes) * wide


def _stretched(codes, scale):
    """The mistake of the page: blocks as wide as the weight divided by their number."""
    at = [torch.arange(n) * k // n for n, k in zip(codes.shape, scale.shape, strict=True)]
    return decode(codes) * scale[at[0]][:, at[1]]


def _crossover(bits, mantissa, n, *, exact=True):
    lost, top = 4.0**-mantissa / (32 * math.log(2)), 2 ** (bits - 1) - 1
    return math.sqrt(lost / (1 / (12 * top**2) + exact * lost / n))


RIGHT = {
    "16-fp8.1": _round,
    "16-fp8.2": [16, 20, 2 / 512, 0, 448, -448],
    "16-fp8.3": _blocks,
    "16-fp8.4": _crossover,
    "16-fp8.5": (2, 3),
}
WRONG = {
    "16-fp8.1": [
        lambda *args: _round(*args, away=True),
        lambda *args: _round(*args, flush=True),
        lambda *args: _round(*args, wrap=True),
        lambda *args: _round(*args, sign=False),
    ],
    "16-fp8.2": [
        [18, 20, 2 / 512, 0, 448, -448],
        [16, 18, 2 / 512, 0, 448, -448],
        [16, 20, 1 / 512, 0, 448, -448],
        [16, 20, 2 / 512, 2.0**-9, 448, -448],
        [16, 20, 2 / 512, 0, 464, -448],
        [16, 20, 2 / 512, 0, 448, -512],
        [16, 20],
    ],
    "16-fp8.3": [lambda codes, scale: _blocks(codes, scale, divide=True), _stretched],
    "16-fp8.4": [lambda *args: _crossover(*args, exact=False), lambda *args: _crossover(*args) ** 2, lambda *args: 4.0],
    "16-fp8.5": [(4, 4), (2, 4), (3, 3), (0, 1)],
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
