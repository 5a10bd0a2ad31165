"""The checkers of chapter 20-hadamard-kv pass the right answers and tell the usual wrong ones apart."""

import torch

from tests.book.answers import right_and_wrong


def _transform(x, h_a, h_b, *, norm=True, transpose=True):
    y = h_a @ x.view(len(x), len(h_a), len(h_b)) @ (h_b.T if transpose else h_b)
    return y.flatten(1) / ((len(h_a) * len(h_b)) ** 0.5 if norm else 1)


def _swapped(x, h_a, h_b):
    return (h_b @ x.view(len(x), len(h_b), len(h_a)) @ h_a.T).flatten(1) / (len(h_a) * len(h_b)) ** 0.5


def _merge(m, l, o, *, maxima=True):  # noqa: E741
    alpha = (m - m.max()).exp() if maxima else torch.ones_like(m)
    return (alpha[:, None] * o).sum(0) / (alpha * l).sum()


def _fields(words, units=(2**24, 2**20, 2**24, 2**20)):
    w = words.to(torch.int32) & 0xFFFF
    parts = [w & 0x0F, w & 0xF0, (w >> 8) & 0x0F, (w >> 8) & 0xF0]
    return [p.to(torch.int16).view(torch.float16).double() * unit for p, unit in zip(parts, units, strict=True)]


RIGHT = {
    "20-hadamard-kv.1": lambda steps: (4 * (steps - 1) + 3) / 3,
    "20-hadamard-kv.2": _transform,
    "20-hadamard-kv.3": _merge,
    "20-hadamard-kv.4": _fields,
    "20-hadamard-kv.5": 132,
}
WRONG = {
    "20-hadamard-kv.1": [float, lambda steps: 4 * steps / 3, lambda steps: (4 * (steps - 1) + 3) / 4],
    "20-hadamard-kv.2": [lambda *args: _transform(*args, norm=False), _swapped],
    "20-hadamard-kv.3": [lambda *args: _merge(*args, maxima=False), lambda m, l, o: o.sum(0)],  # noqa: E741
    "20-hadamard-kv.4": [lambda words: _fields(words, (2**24,) * 4), lambda words: _fields(words)[:3]],
    "20-hadamard-kv.5": [17, 1056, 1024, 8, 128, 64],
}

test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
