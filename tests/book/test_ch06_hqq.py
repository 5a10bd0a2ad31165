"""The checkers of chapter 06-hqq pass the right answers and tell the usual wrong ones apart."""

import torch

from lqedu.rounding.hqq import shrink
from tests.book.answers import right_and_wrong


def _loop(w, scale, zero, grid, keep_best=True):
    best, least = zero, torch.full_like(zero, torch.inf)
    for _ in range(21):
        q = grid.nearest_code(w, scale, zero)
        error = w - scale * (q - zero)
        now = error.abs().mean(1, keepdim=True)
        best, least = torch.where(now < least, zero, best), torch.minimum(now, least)
        zero = (q - (w - shrink(error, 100.0, 0.7)) / scale).mean(1, keepdim=True)
    return best if keep_best else zero


RIGHT = {
    "06-hqq.1": lambda x, beta: x.sign() * (x.abs() - 1 / beta).clamp(min=0),
    "06-hqq.2": lambda x, q, s, e: (q - (x - e) / s).mean(1, keepdim=True),
    "06-hqq.3": _loop,
    "06-hqq.4": lambda bits, group: bits + 32 / group,
    "06-hqq.5": lambda beta, c, p: beta * c ** (p - 2),
}
WRONG = {
    "06-hqq.1": lambda x, beta: x.sign() * (x.abs() - 1 / beta),  # not cut off at zero
    "06-hqq.2": lambda x, q, s, e: (q - (x + e) / s).mean(1, keepdim=True),  # the sign of e
    "06-hqq.3": lambda *a: _loop(*a, keep_best=False),  # the last iterate
    "06-hqq.4": lambda bits, group: bits + (16 + bits) / group,  # as if the zero point were a code
    "06-hqq.5": lambda beta, c, p: beta / c,
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
