"""The checkers of chapter 15-kv-cache pass the right answers and tell the usual wrong ones apart."""

import math

import torch

from tests.book.answers import right_and_wrong


def _attend(q, key, value, *, zero=True, inside=True):
    (c, s, z), (d, t, y) = key, value
    scores = (q @ c.T - q.sum(-1, keepdim=True) * z.T * zero) * s.T / math.sqrt(q.shape[-1])
    p = scores.softmax(-1) * t.T
    return p @ d - (p @ y if inside else y.sum())


def _grid(x, bits, *, early=True, float_zero=True):
    lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    s = (hi - lo) / (2**bits - 1)
    s = s.half().float() if early else s
    z = -lo / s
    z = z.half().float() if float_zero else z.round()
    return (torch.round(x / s + z).clamp(0, 2**bits - 1), s.half().float(), z.half().float())


BYTES = 2 * 32 * 8 * 68 * 16 * 8192
RIGHT = {
    "15-kv-cache.1": _attend,
    "15-kv-cache.2": BYTES,
    "15-kv-cache.3": _grid,
    "15-kv-cache.4": lambda k: k - (k.amax(0) + k.amin(0)) / 2,
    "15-kv-cache.5": lambda dim, bits, group: dim * bits / 8 + 4 * dim / group,
}
WRONG = {
    "15-kv-cache.1": [lambda q, k, v: _attend(q, k, v, zero=False), lambda q, k, v: _attend(q, k, v, inside=False)],
    "15-kv-cache.2": [BYTES // 2, BYTES * 4, BYTES * 64 // 68, BYTES // 16, 1e9],
    "15-kv-cache.3": [lambda x, bits: _grid(x, bits, early=False), lambda x, bits: _grid(x, bits, float_zero=False)],
    "15-kv-cache.4": [lambda k: k - k.mean(1, keepdim=True), lambda k: k, lambda k: k - k.mean(0)],
    "15-kv-cache.5": [lambda dim, bits, group: dim * bits / 8 + 4, lambda dim, bits, group: dim * bits / 8 + 4 / group],
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
