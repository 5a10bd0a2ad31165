"""The checkers of chapter 25-end-to-end pass the right answers and tell the usual wrong ones apart."""

import math

from tests.book.answers import right_and_wrong


def _accept(candidate, base, budget, *, errors=2.0, of_mean=True, paired=True):
    n = len(base)
    mean = sum(candidate) / n - sum(base) / n

    def variance(x):
        m = sum(x) / n
        return sum((v - m) ** 2 for v in x) / (n - 1)

    differences = [a - b for a, b in zip(candidate, base, strict=True)]
    spread = variance(differences) if paired else variance(candidate) + variance(base)
    return mean + errors * math.sqrt(spread / (n if of_mean else 1)) <= budget


def _windows(loss, sigma, budget, *, errors=2, whole=True, never=math.inf):
    if loss >= budget:
        return never
    exact = (errors * sigma / (budget - loss)) ** 2
    return max(1, math.ceil(round(exact, 6))) if whole else exact


def _gain(before, after, bandwidth, fixed):
    return (before / bandwidth + fixed) / (after / bandwidth + fixed)


RIGHT = {
    "25-end-to-end.1": lambda linear, bits, other, rest: (linear * bits + other * rest) / 8e6,
    "25-end-to-end.2": _accept,
    "25-end-to-end.3": _windows,
    "25-end-to-end.4": _gain,
}
WRONG = {
    "25-end-to-end.1": [
        lambda linear, bits, other, rest: linear * bits + other * rest,
        lambda linear, bits, other, rest: (linear * bits + other * rest) / 8,
        lambda linear, bits, other, rest: (linear * bits + other * rest) / 8 / 2**20,
        lambda linear, bits, other, rest: (linear + other) * bits / 8e6,
        lambda linear, bits, other, rest: linear * bits / 8e6,
    ],
    "25-end-to-end.2": [
        lambda *args: _accept(*args, errors=0),
        lambda *args: _accept(*args, errors=1),
        lambda *args: _accept(*args, of_mean=False),
        lambda *args: _accept(*args, paired=False),
        lambda *args: True,
        lambda *args: False,
    ],
    "25-end-to-end.3": [
        lambda *args: _windows(*args, errors=1),
        lambda *args: _windows(*args, whole=False),
        lambda *args: _windows(*args, never=0),
        lambda loss, sigma, budget: max(1, math.ceil((2 * sigma / max(loss, 1e-3)) ** 2)),
    ],
    "25-end-to-end.4": [
        lambda before, after, bandwidth, fixed: before / after,
        lambda before, after, bandwidth, fixed: 1 / _gain(before, after, bandwidth, fixed),
        lambda before, after, bandwidth, fixed: before / bandwidth / (after / bandwidth + fixed),
    ],
}

test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
