"""The checkers of chapter 21-serving pass the right answers and tell the usual wrong ones apart."""

from tests.book.answers import right_and_wrong

HARMONIC = sum(1 / i for i in range(1, 17))


def _admit(lengths, free, page, *, extra=1, skip=False):
    joined = []
    for i, n in enumerate(lengths):
        room = -(-(n + extra) // page) * page
        if room > free:
            if skip:
                continue
            break
        joined.append(i)
        free -= room
    return joined


def _preempt(held, order, need, *, key=None):
    order = sorted(order, key=held.get) if key else list(order)
    out = []
    while need > 0:
        out.append(order.pop())
        need -= held[out[-1]]
    return out


RIGHT = {
    "21-serving.1": 1 / HARMONIC,
    "21-serving.2": lambda lengths, page: sum(-(-n // page) for n in lengths),
    "21-serving.3": _admit,
    "21-serving.4": lambda weights, token, context: weights / (token * context),
    "21-serving.5": _preempt,
}
WRONG = {
    "21-serving.1": [1 / 16, HARMONIC, 0.5, 0.36067],
    "21-serving.2": [
        lambda lengths, page: -(-sum(lengths) // page),
        lambda lengths, page: sum(n // page + 1 for n in lengths),
    ],
    "21-serving.3": [
        lambda *args: _admit(*args, extra=0),
        lambda *args: _admit(*args, skip=True),
    ],
    "21-serving.4": [lambda weights, token, context: weights / token],
    "21-serving.5": [lambda *args: _preempt(*args, key=True), lambda held, order, need: [order[0]]],
}

test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
