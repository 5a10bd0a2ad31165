"""The checkers of chapter 04-gptq pass the right answers and tell the usual wrong ones apart."""

import torch

from lqedu.linalg import inverse_factor
from lqedu.rounding import gptq
from tests.book.answers import right_and_wrong


def _update(w, p, i, q_i):
    return w - (w[i] - q_i) / p[i, i] * p[i]


def _sweep(w, u, grid, power=1):
    s, z = (t.to(w.dtype)[:, 0] for t in grid.fit(w))
    w, codes = w.clone(), torch.empty_like(w)
    for i in range(w.shape[1]):
        codes[:, i] = grid.nearest_code(w[:, i], s, z)
        error = (w[:, i] - s * (codes[:, i] - z)) / u[i, i] ** power
        w[:, i:] -= torch.outer(error, u[i, i:])
    return codes


def _ordered(w, h, grid, descending=True):
    columns = h.diagonal().argsort(descending=descending, stable=True)
    return gptq(w[:, columns], h[columns][:, columns], grid)[0].codes[:, columns.argsort()]


RIGHT = {
    "04-gptq.1": _update,
    "04-gptq.2": lambda p, i: p - torch.outer(p[:, i], p[i]) / p[i, i],
    "04-gptq.3": _sweep,
    "04-gptq.4": lambda h, i, e: float((e / inverse_factor(h)[i, i]) ** 2),
    "04-gptq.5": (0.0, 0.0),
    "04-gptq.6": _ordered,
}
WRONG = {
    "04-gptq.1": lambda w, p, i, q_i: w + (w[i] - q_i) / p[i, i] * p[i],  # the sign
    "04-gptq.2": lambda p, i: p,  # the inverse of the old problem
    "04-gptq.3": lambda w, u, grid: _sweep(w, u, grid, power=2),  # divided twice
    "04-gptq.4": lambda h, i, e: float(e**2 * h[i, i]),  # as if nobody helped
    "04-gptq.5": (0.0, 0.5),
    "04-gptq.6": lambda w, h, grid: _ordered(w, h, grid, descending=False),
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
