"""Checkers of chapter 23-published."""

import math
import statistics

from lqedu.book.exercises import exercise, expect_equal
from lqedu.book.published import WINDOWS_2048, published, select


@exercise("23-published.1", "tell two printed values apart")
def _digits(fn):
    for a, b, digits, want in (
        (5.6, 5.5, 1, False),
        (5.9, 6.1, 1, True),
        (5.61, 5.69, 2, True),
        (5.62, 5.61, 2, False),
        (11.3, 5.6, 1, True),
        (5.47, 5.474, 2, False),
    ):
        got = fn(a, b, digits)
        if bool(got) and not want and abs(a - b) > 0.5 * 10**-digits:
            raise AssertionError(
                f"{a:g} and {b:g} with {digits} decimals gave {got}: each may be off by half a last digit, and both towards the other"
            )
        expect_equal(bool(got), want, name=f"{a:g} and {b:g} with {digits} decimals")


@exercise("23-published.2", "count the tokens of a strided loop")
def _scored(fn):
    for tokens, window, stride in ((8, 4, 2), (10, 4, 4), (9, 4, 2), (5, 8, 4), (4096, 1024, 512)):
        got = [tuple(int(x) for x in part) for part in fn(tokens, window, stride)]
        want, done = [], 1
        for start in range(0, tokens, stride):
            end = min(start + window, tokens)
            want.append((start, end, end - done))
            done = end
            if end == tokens:
                break
        where = f"{tokens} tokens, windows of {window}, stride {stride}"
        if sum(part[2] for part in got) == tokens:
            raise AssertionError(f"{where}: {tokens} tokens count, but nothing predicts the first token of the text")
        if len(got) > len(want):
            raise AssertionError(f"{where}: {len(got)} windows; stop at the one that reaches the end of the text")
        if [part[:2] for part in got] == [part[:2] for part in want] and sum(part[2] for part in got) > tokens:
            raise AssertionError(f"{where}: a token counts once; leave out what an earlier window has counted")
        expect_equal(got, want, name=f"windows of {where}")


@exercise("23-published.3", "let equal values share the mean of their ranks")
def _ranks(fn):
    for values in ([0.3, 0.1, 0.2], [5.0, 5.0, 1.0, 9.0], [2.0, 2.0, 2.0]):
        got = [float(x) for x in fn(list(values))]
        want = [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
        if sorted(got) == [float(i) for i in range(1, len(values) + 1)] and got != want:
            raise AssertionError(f"{values} gave {got}: equal values have different ranks")
        if min(got) == 0:
            raise AssertionError("ranks begin at 1")
        expect_equal(got, want, name=f"ranks of {values}")


@exercise("23-published.4", "an added loss per word as one per token")
def _per_token(fn):
    for value, fp16, tokens in ((12.35, 12.23, 1.5), (7.4, 7.33, 1.25), (13.65, 12.23, 2.0)):
        got, want = float(fn(value, fp16, tokens)), math.log(value / fp16) / tokens
        if math.isclose(got, want * tokens, rel_tol=1e-6):
            raise AssertionError("that is the added loss per word; a word has several tokens")
        if math.isclose(got, want * tokens**2, rel_tol=1e-6):
            raise AssertionError("divide: the loss of a word is shared by its tokens")
        if math.isclose(got, (value - fp16) / tokens, rel_tol=1e-6):
            raise AssertionError("that divides a difference of perplexities; take the logarithm of their ratio")
        assert math.isclose(got, want, rel_tol=1e-6), (
            f"per_token({value}, {fp16}, {tokens}) is {got:g}, expected {want:g}"
        )


@exercise("23-published.5", "figures below zero once protocols are mixed")
def _below(answer):
    rows = [r for r in select(published(), model="Llama-3-8B", metric="wikitext2_ppl") if r.fp16 and r.bits]
    base = statistics.median_high(r.fp16 for r in rows if r.protocol == WINDOWS_2048)
    found = [r for r in rows if r.value < (r.fp16 if r.protocol == WINDOWS_2048 else base)]
    want = sum(r.bits.activations == 16 for r in found)
    if int(answer) == 0:
        raise AssertionError("0 without mixing; tick the box")
    assert int(answer) == want, f"{answer} is not it: read the sentence below the picture, with weights alone"
