"""The checkers of chapter 17-fp8-training pass the right answers and tell the usual wrong ones apart."""

import math

import torch

from lqedu.formats.smallfloat import E4M3, E5M2
from lqedu.training import fp8_round
from tests.book.answers import right_and_wrong


def _loss_scale(amaxes, fmt, of=max, floor=math.floor, plus=0):
    return 2.0 ** (floor(math.log2(fmt.max / float(of(amaxes.tolist()))) + 1e-12) + plus)


def _backward(q_x, s_x, q_w, s_w, q_y, s_y, dx=None, dw=None):
    one = (q_y @ q_w) * (s_y * s_w if dx is None else dx(s_x, s_w, s_y))
    return one, (q_y.T @ q_x) * (s_y * s_x if dw is None else dw(s_x, s_w, s_y))


def _stochastic(x, u, fmt, lowest=True):
    exponent = (torch.frexp(x.double()).exponent - 1).double()
    if lowest:
        exponent = exponent.clamp(min=math.log2(fmt.smallest_normal))
    step = torch.exp2(exponent - fmt.mantissa_bits)
    return (torch.floor(x.double() / step + u.double()) * step).to(x.dtype)


RIGHT = {
    "17-fp8-training.1": [math.log2(f.max) - math.log2(f.smallest_subnormal / 2) for f in (E4M3, E5M2)],
    "17-fp8-training.2": _loss_scale,
    "17-fp8-training.3": _backward,
    "17-fp8-training.4": lambda k: (1, k),
    "17-fp8-training.5": _stochastic,
}
WRONG = {
    "17-fp8-training.1": [(17.8, 31.8), (14.8, 29.8), (18.8, 31.8), (10, 17)],
    "17-fp8-training.2": [
        lambda a, f: _loss_scale(a, f, plus=1),
        lambda a, f: _loss_scale(a, f, plus=-1),
        lambda a, f: f.max / float(a.max()),
        lambda a, f: _loss_scale(a, f, of=lambda values: min(v for v in values if v)),
    ],
    "17-fp8-training.3": [
        lambda *a: _backward(*a, dw=lambda s_x, s_w, s_y: s_y * s_w),
        lambda *a: _backward(*a, dx=lambda s_x, s_w, s_y: s_y * s_x),
        lambda *a: _backward(*a)[::-1],
    ],
    "17-fp8-training.4": [lambda k: (1, k - 1), lambda k: (k, k), lambda k: (1, 1024), lambda k: (0, k)],
    "17-fp8-training.5": [
        lambda x, u, f: fp8_round(x, torch.ones(()), f),
        lambda x, u, f: _stochastic(x, u, f, lowest=False),
        lambda x, u, f: _stochastic(x, 1 - u.sqrt(), f),
    ],
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
