"""The checkers of chapter 03-bench pass the right answers and tell the usual wrong ones apart."""

import math

from tests.book.answers import right_and_wrong


def _standard_error(delta):
    return float(delta.mean()), float(delta.std() / math.sqrt(len(delta)))


RIGHT = {
    "03-bench.1": lambda ids, length: ids[: len(ids) // length * length].view(-1, length),
    "03-bench.2": lambda losses: math.exp(float(losses.mean())),
    "03-bench.3": lambda worse, base: _standard_error(worse - base),
    "03-bench.4": lambda difference, spread: math.ceil(round((2 * spread / difference) ** 2, 6)),
}
WRONG = {
    "03-bench.1": lambda ids, length: ids.unfold(0, length, 1),  # overlapping
    "03-bench.2": lambda losses: float(losses.exp().mean()),  # the mean of the perplexities
    "03-bench.3": lambda worse, base: (  # as if the two models had read different windows
        float((worse - base).mean()),
        float(((worse.var() + base.var()) / len(base)).sqrt()),
    ),
    "03-bench.4": lambda difference, spread: math.ceil((spread / difference) ** 2),  # one standard error
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
