"""The checkers of chapter 23-published pass the right answers and tell the usual wrong ones apart."""

import math
import statistics

from lqedu.book.published import WINDOWS_2048, published, select
from tests.book.answers import right_and_wrong


def _scored(tokens, window, stride, *, first=1, stop=True, once=True):
    found, done = [], first
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        found.append((start, end, end - (done if once else start)))
        done = end
        if stop and end == tokens:
            break
    return found


def _below():
    rows = [r for r in select(published(), model="Llama-3-8B", metric="wikitext2_ppl") if r.fp16 and r.bits]
    base = statistics.mode(r.fp16 for r in rows if r.protocol == WINDOWS_2048)
    strided = [r for r in rows if r.protocol != WINDOWS_2048 and r.bits.activations == 16]
    return sum(r.value < base for r in strided)


RIGHT = {
    "23-published.1": lambda a, b, digits: abs(a - b) > 10**-digits + 1e-9,
    "23-published.2": _scored,
    "23-published.3": lambda x: [sum(v < y for v in x) + (sum(v == y for v in x) + 1) / 2 for y in x],
    "23-published.4": lambda value, fp16, tokens: math.log(value / fp16) / tokens,
    "23-published.5": _below(),
}
WRONG = {
    "23-published.1": [lambda a, b, digits: abs(a - b) > 0.5 * 10**-digits, lambda a, b, digits: a != b],
    "23-published.2": [
        lambda *args: _scored(*args, first=0),
        lambda *args: _scored(*args, stop=False),
        lambda *args: _scored(*args, once=False),
    ],
    "23-published.3": [
        lambda x: [float(sorted(range(len(x)), key=x.__getitem__).index(i) + 1) for i in range(len(x))],
        lambda x: [float(sum(v < y for v in x)) for y in x],
    ],
    "23-published.4": [
        lambda value, fp16, tokens: math.log(value / fp16),
        lambda value, fp16, tokens: math.log(value / fp16) * tokens,
        lambda value, fp16, tokens: (value - fp16) / tokens,
    ],
    "23-published.5": [0, 1],
}

test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
