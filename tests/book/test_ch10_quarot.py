"""The checkers of chapter 10-quarot pass the right answers and tell the usual wrong ones apart."""

import math

import torch

from tests.book.answers import right_and_wrong


def _butterfly(x, normalised=True):
    n, half = x.shape[-1], 1
    while half < n:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return x / math.sqrt(n) if normalised else x


def _paley(q, diagonal=1):
    squares = {a * a % q for a in range(1, q)}
    c = torch.tensor([[0 if a == b else 1 if (a - b) % q in squares else -1 for b in range(q)] for a in range(q)])
    border = torch.zeros(q + 1, q + 1, dtype=torch.long)
    border[0, 1:], border[1:, 0], border[1:, 1:] = 1, -1, c
    return border + diagonal * torch.eye(q + 1, dtype=torch.long)


def _range(bits):
    return min((i / 4000 for i in range(1, 48_000)), key=lambda a: _loss(a, bits))


def _loss(a, bits):
    tail = math.erfc(a / math.sqrt(2)) / 2
    inside = a**2 / 12 / (2 ** (bits - 1) - 1) ** 2
    return inside + 2 * ((1 + a**2) * tail - a * math.exp(-(a**2) / 2) / math.sqrt(2 * math.pi))


RIGHT = {
    "10-quarot.1": _butterfly,
    "10-quarot.2": _paley,
    "10-quarot.3": lambda w, h: w @ h.T / math.sqrt(len(h)),
    "10-quarot.4": 13824 * (107 + 7),
    "10-quarot.5": _range,
}
WRONG = {
    "10-quarot.1": [lambda x: _butterfly(x, normalised=False), lambda x: _butterfly(x.flip(-1))],
    "10-quarot.2": [lambda q: _paley(q, diagonal=0), lambda q: _paley(q)[1:, 1:]],  # zeros; the border forgotten
    "10-quarot.3": [lambda w, h: w @ h / math.sqrt(len(h)), lambda w, h: w],
    "10-quarot.4": [13824 * (108 + 7), 13824 * 14],
    "10-quarot.5": [lambda bits: 3.3, lambda bits: 2.513],  # the largest of many values; 16 values instead of 15
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
