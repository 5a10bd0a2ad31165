"""The checkers of chapter 14-qoq pass the right answers and tell the usual wrong ones apart."""

import math

import torch

from tests.book.answers import right_and_wrong


def _scales(key, alpha, tied=True, power=True):
    top = key.abs().amax((0, 2))
    top = top.unflatten(1, (2, -1)).amax(1).repeat(1, 2) if tied else top
    return torch.where(top > 0, top**alpha if power else top, 1.0)


def _fold(w_q, b_q, w_k, b_k, scale, biases=True, interleave=True, inverse=False):
    repeats = len(w_q) // len(w_k)
    by_q = (scale.repeat_interleave(repeats, 0) if interleave else scale.repeat(repeats, 1)).reshape(-1)
    by_k = scale.reshape(-1)
    if inverse:
        by_q, by_k = 1 / by_q, 1 / by_k
    if biases:
        b_q, b_k = b_q * by_q, b_k / by_k
    return w_q * by_q[:, None], b_q, w_k / by_k[:, None], b_k


def _reorder(gate, up, down, x, gate_too=True, descending=True):
    inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    order = inner.abs().amax(0).argsort(descending=descending)
    return gate[order] if gate_too else gate, up[order], down[:, order]


RIGHT = {
    "14-qoq.1": _scales,
    "14-qoq.2": _fold,
    "14-qoq.3": 128,
    "14-qoq.4": _reorder,
    "14-qoq.5": lambda loud, target: 1 - math.log(target) / math.log(loud),
}
WRONG = {
    "14-qoq.1": [
        lambda key, alpha: _scales(key, alpha, tied=False),
        lambda key, alpha: _scales(key, alpha, power=False),
        lambda key, alpha: (
            key.abs().amax((0, 2)).unflatten(1, (2, -1)).amax(1).repeat(1, 2) ** alpha
        ),  # zero for a dead pair
        lambda key, alpha: _scales(key, alpha).amax(0),  # one for all heads
    ],
    "14-qoq.2": [
        lambda *a: _fold(*a, biases=False),
        lambda *a: _fold(*a, interleave=False),
        lambda *a: _fold(*a, inverse=True),
        lambda w_q, b_q, w_k, b_k, scale: (w_q, b_q, w_k, b_k),
    ],
    "14-qoq.3": [119, 127, 120, 112],
    "14-qoq.4": [
        lambda *a: _reorder(*a, gate_too=False),
        lambda *a: _reorder(*a, descending=False),
        lambda gate, up, down, x: (gate, up, down),
    ],
    "14-qoq.5": [lambda loud, target: math.log(target) / math.log(loud), lambda loud, target: 0.5],
}

test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
