"""Checkers of chapter 24-choose."""

import math

import numpy as np

from lqedu.book.exercises import exercise, expect_equal


@exercise("24-choose.1", "where half of the gain of few bits is gone")
def _half(answer):
    from lqedu.evaluation.memory import page_bytes, weight_bytes
    from lqedu.evaluation.random_models import FORMATS, SHAPES

    got, shape = float(answer), SHAPES["llama-3-8b"]
    full, few = (weight_bytes(shape, FORMATS[name]) - 2 * shape.embedding_weights for name in ("fp16", "w4a16"))
    token = page_bytes(shape, FORMATS["fp16"]) / 64
    want = (full - 2 * few) / (1024 * token)
    for wrong, hint in (
        (want * 1024, "that many tokens; divide by the 1,024 of each text"),
        (full / (1024 * token), "there the cache weighs as much as the FP16 weights; set W4A16 plus cache to half of FP16 plus cache"),
        (few / (1024 * token), "there the cache weighs as much as the 4-bit weights; the FP16 step grows by the cache too"),
        ((full / 2 - few) / (1024 * token), "half of FP16's step is half of its weights and half of its cache"),
    ):  # fmt: skip
        assert abs(got - wrong) > 0.05 * wrong, f"{got:g} is not it: {hint}"
    assert abs(got - want) < 0.15 * want, f"{got:g} is not it: W4 + b n k = (W16 + b n k) / 2, with k bytes a token"


@exercise("24-choose.2", "those nobody dominates")
def _frontier(fn):
    generator = np.random.default_rng(0)
    cases = [
        [(3.0, 0.1, 5.0), (3.0, 0.1, 5.0), (1.0, 0.0, 16.0)],
        [(2.0, 0.10, 6.0), (2.0, 0.12, 6.0), (1.0, 0.20, 3.0)],
        [tuple(row) for row in generator.integers(0, 5, (12, 3)).astype(float).tolist()],
    ]
    for points in cases:
        got = sorted(int(i) for i in fn(list(points)))
        keys = [(-s, loss, size) for s, loss, size in points]
        beaten = [any(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for a in keys) for b in keys]
        want = [i for i, out in enumerate(beaten) if not out]
        if points == cases[0] and got == [2]:
            raise AssertionError("two equal options do not beat each other: one must be better in something")
        if points == cases[1] and got == [0, 1, 2]:
            raise AssertionError(
                "the second is as fast and as large as the first and loses more: equal is enough there"
            )
        lower = [(s, loss, size) for s, loss, size in points]
        mirrored = [any(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for a in lower) for b in lower]
        if got != want and got == [i for i, out in enumerate(mirrored) if not out]:
            raise AssertionError("a higher speed is better, a lower loss and size are")
        expect_equal(got, want, name=f"frontier of {len(points)} options")


@exercise("24-choose.3", "the fastest that is known to keep the budget")
def _choose(fn):
    rows = [("a", 4.0, 0.098, 0.002), ("b", 3.0, 0.020, 0.001), ("c", 9.0, 0.300, 0.003), ("d", 1.0, 0.0, 0.0)]
    for budget, want in ((0.1, "b"), (0.11, "a"), (1.0, "c"), (0.01, "d")):
        got = fn(list(rows), budget)
        if got == "a" and budget == 0.1:
            raise AssertionError("0.098 with a standard error of 0.002 is not known to be below 0.1: add two of them")
        if got == "d" and want != "d":
            raise AssertionError("the smallest loss always wins so; the budget is a limit, and speed decides within it")
        expect_equal(got, want, name=f"choice with a budget of {budget}")


@exercise("24-choose.4", "prompts from which a format pays")
def _even(fn):
    for fixed, each, base in ((0.111, 4.1e-6, 2.9e-5), (0.0365, 2.3e-5, 2.9e-5), (0.01, 1e-5, 3e-5)):
        got = float(fn(fixed, each, base))
        want = fixed / (base - each)
        assert not math.isclose(got, fixed / base, rel_tol=1e-6), "the format's own time a token counts as well"
        assert not math.isclose(got, -want, rel_tol=1e-6), "a number of tokens is positive: FP16 takes longer a token"
        assert math.isclose(got, want, rel_tol=1e-6), f"{got:g} is not it: fixed + n each = n base"


@exercise("24-choose.5", "the budget that buys a 4-bit cache")
def _budget(answer):
    from lqedu.book.choosing import Situation, recommend

    got = float(answer)
    best = recommend(Situation(batch=64, context=1024, loss=got)).best.option.name
    assert best == "QoQ W4A8KV4", f"with {got:g} nats the answer is {best}: allow more"
    less = recommend(Situation(batch=64, context=1024, loss=0.7 * got)).best.option.name
    assert less != best, f"{got:g} nats buy it, and so do {0.7 * got:g}: look for the smallest budget of the explorer"
