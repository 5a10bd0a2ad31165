"""The checkers of chapter 07-quip pass the right answers and tell the usual wrong ones apart."""

import torch

from tests.book.answers import right_and_wrong


def _rotation(x, left, right, order, transposed=False):
    grid = x[..., order].unflatten(-1, (len(left), len(right)))
    return (left @ grid @ (right if transposed else right.T)).flatten(-2)


def _greedy(w, h, codes, s, z, bits, forgets=False):
    codes = codes.clone()
    g = (s * (codes - z) - w) @ h
    for k in range(w.shape[1]):
        old = s * (codes[:, k] - z)
        codes[:, k] = torch.round((old - g[:, k] / h[k, k]) / s + z).clamp(0, 2**bits - 1)
        move = s * (codes[:, k] - z) - old
        if forgets:
            g[:, k] += move * h[k, k]
        else:
            g += torch.outer(move, h[k])
    return codes


def _d8(x):
    point = x.round()
    odd = point.sum(1) % 2 == 1
    worst = (x - point).abs().argmax(1)
    other = torch.where(x > point, point + 1, point - 1)
    rows = torch.arange(len(x))
    point[rows[odd], worst[odd]] = other[rows[odd], worst[odd]]
    return point


def _e8(x):
    even, half = _d8(x), _d8(x - 0.5) + 0.5
    closer = (x - even).square().sum(1) <= (x - half).square().sum(1)
    return torch.where(closer[:, None], even, half)


SIDE = 4 * (64**2 + 128**2) + 2 * 8192
RIGHT = {
    "07-quip.1": _rotation,
    "07-quip.2": lambda w, h: 3 * (h.diagonal() / w.square().sum(0)) ** 0.25,
    "07-quip.3": _greedy,
    "07-quip.4": 2 + 8 * (2 * SIDE + 4) / 8192**2,
    "07-quip.5": _e8,
}
WRONG = {
    "07-quip.1": lambda *a: _rotation(*a, transposed=True),  # one factor the other way round
    "07-quip.2": lambda w, h: (h.diagonal() / w.square().sum(0)) ** 0.5,  # the square of it
    "07-quip.3": lambda *a: _greedy(*a, forgets=True),
    "07-quip.4": 2 + 8 * (SIDE + 4) / 8192**2,  # one rotation only
    "07-quip.5": [_d8, torch.round],  # half of the lattice; any integer vector
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
