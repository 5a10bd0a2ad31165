"""The checkers of chapter 09-invariance pass the right answers and tell the usual wrong ones apart."""

import torch

from lqedu.book import check
from lqedu.linalg import hadamard_matrix
from tests.book.answers import right_and_wrong


def _values(w_v, w_o, r2, back):
    size = len(r2)
    w_v = (r2.T @ w_v.view(-1, size, w_v.shape[1])).reshape(w_v.shape)
    return w_v, (w_o.view(len(w_o), -1, size) @ back).reshape(w_o.shape)


def _transform(x, spoilt=False):
    n, half = x.shape[-1], 1
    y = x.clone()
    while half < n:
        pairs = y.view(*x.shape[:-1], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        if not spoilt:
            a, b = a.clone(), b.clone()
        pairs[..., 0, :] = a + b  # spoilt: a is a view, and has changed when the difference is taken
        pairs[..., 1, :] = a - b
        half *= 2
    return y * n**-0.5


RIGHT = {
    "09-invariance.1": 14336 * (27 + 9),
    "09-invariance.2": lambda w_read, gain, w_write, r: (w_read * gain @ r, r.T @ w_write),
    "09-invariance.3": lambda w_v, w_o, r2: _values(w_v, w_o, r2, r2),
    "09-invariance.4": _transform,
    "09-invariance.5": lambda w, b: (w - w.mean(0), b - b.mean()),
    "09-invariance.6": lambda signs: signs * hadamard_matrix(len(signs))[3],
}
WRONG = {
    "09-invariance.1": 14336 * 14335,  # a product with all signs
    "09-invariance.2": lambda w_read, gain, w_write, r: (
        w_read @ r * gain,
        r.T @ w_write,
    ),  # the gain behind the rotation
    "09-invariance.3": lambda w_v, w_o, r2: _values(w_v, w_o, r2, r2.T),
    "09-invariance.4": lambda x: _transform(x, spoilt=True),
    "09-invariance.5": lambda w, b: (w - w.mean(1, keepdim=True), b - b.mean()),  # over inputs
    "09-invariance.6": lambda signs: hadamard_matrix(len(signs))[3].double(),  # the signs forgotten
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)


def test_a_spike_may_not_be_there_from_the_start() -> None:
    assert not check("09-invariance.6", lambda signs: torch.eye(len(signs))[0])
