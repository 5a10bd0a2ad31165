"""The checkers of chapter 13-qqq pass the right answers and tell the usual wrong ones apart."""

import torch

from tests.book.answers import right_and_wrong


def _packed_dot(packed, x, factor=16, swap=False):
    pair = torch.stack([packed << 4, packed & 0xF0], -1)
    operands = (pair.flip(-1) if swap else pair).view(torch.int8).flatten(-2)
    return (operands.long() @ x.long()) // factor


def _second_level(w, q, s, of=None):
    w_hat = (q.view(*s.shape, -1) * s[..., None]).flatten(1)
    s_c = (w_hat if of is None else of(w, w_hat)).abs().amax(1, keepdim=True) / 127
    return torch.round(q.view(*s.shape, -1) * (s / s_c)[..., None]).flatten(1), s_c


def _expected(x, w, s, activations=1.0, weights=1.0):
    z, v = x / s, w * s
    a = (z.abs().amax(1) / 127).square().sum() * v.square().sum()
    b = (v.abs().amax(1) / 7).square().sum() * z.square().sum()
    return float(activations * a + weights * b) / 12


RIGHT = {
    "13-qqq.1": _packed_dot,
    "13-qqq.2": (2**31 - 1) // 14336,
    "13-qqq.3": _second_level,
    "13-qqq.4": 15 / 16,
    "13-qqq.5": _expected,
}
WRONG = {
    "13-qqq.1": [
        lambda packed, x: _packed_dot(packed, x, factor=1),
        lambda packed, x: _packed_dot(packed, x, swap=True),
        lambda packed, x: torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long() @ x.long(),  # unsigned
    ],
    "13-qqq.2": [131071, 150980, 2**17, 133144, 2396745],
    "13-qqq.3": [
        lambda w, q, s: _second_level(w, q, s, of=lambda w, w_hat: w),
        lambda w, q, s: (_second_level(w, q, s)[0].clamp(-120, 120), _second_level(w, q, s)[1]),
    ],
    "13-qqq.4": [1.0, 0.5, 1 / 16, 14 / 15, 0.9],
    "13-qqq.5": [
        lambda x, w, s: _expected(x, w, s, weights=0),
        lambda x, w, s: _expected(x, w, s, activations=0),
        lambda x, w, s: 12 * _expected(x, w, s),
        lambda x, w, s: _expected(x, w, torch.ones_like(s)),
    ],
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
