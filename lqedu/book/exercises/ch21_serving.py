"""Checkers of chapter 21-serving."""

import math

import numpy as np
import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal


@exercise("21-serving.1", "the share of slots that work")
def _used(answer):
    got = float(answer)
    want = 1 / sum(1 / i for i in range(1, 17))
    for wrong, hint in (
        (1 / 16, "the longest of 16 is not 16 times the mean; its mean is the 16th harmonic number of means"),
        (sum(1 / i for i in range(1, 17)), "that is the longest over the mean; the share that works is its inverse"),
        (0.5, "half would be right for lengths spread evenly; exponential ones have a longer tail"),
        (1 / math.log(16), "the harmonic number is close to ln 16 + 0.577, not to ln 16"),
    ):
        assert abs(got - wrong) > 1e-3, f"{got:g} is not it: {hint}"
    assert abs(got - want) < 2e-3, f"{got:g} is not it: batch by batch, all wait for the longest of 16"


@exercise("21-serving.2", "the memory that a batch holds")
def _pages(fn):
    generator = np.random.default_rng(0)
    for page in (1, 16, 64):
        lengths = [int(n) for n in generator.integers(1, 300, 9)] + [64, 128]
        got, want = int(fn(list(lengths), page)), sum(-(-n // page) for n in lengths)
        if page > 1 and got == -(-sum(lengths) // page):
            raise AssertionError("a page belongs to one sequence: round each length up, then add")
        if page > 1 and got == sum(n // page + 1 for n in lengths):
            raise AssertionError("a sequence that ends with its page needs no further one (64 tokens, pages of 64)")
        expect_equal(got, want, name=f"pages of {page} tokens")


@exercise("21-serving.3", "admit what fits")
def _admit(fn):
    for lengths, free, page in (
        ([60, 60, 60], 128, 64),
        ([64, 10], 128, 64),
        ([100, 10], 64, 64),
        ([5, 70, 5], 256, 64),
    ):
        got = list(fn(list(lengths), free, page))
        want, left = [], free
        for i, n in enumerate(lengths):
            if (room := -(-(n + 1) // page) * page) > left:
                break
            want.append(i)
            left -= room
        if got != want and lengths == [64, 10]:
            raise AssertionError(
                f"prompts {lengths} into {free} tokens gave {got}: the first step adds a token, so 64 tokens need two pages"
            )
        if got != want and lengths == [100, 10]:
            raise AssertionError(
                f"prompts {lengths} into {free} tokens gave {got}: nobody overtakes the first in the queue"
            )
        expect_equal(got, want, name=f"who of {lengths} joins with {free} tokens free")


@exercise("21-serving.4", "where the cache weighs as much as the weights")
def _even(fn):
    for weights, token, context in ((16e9, 131072.0, 1024), (4.5e9, 34816.0, 8192), (1e6, 10.0, 100)):
        got = float(fn(weights, token, context))
        assert abs(got - weights / token) > 1e-6 * got or context == 1, (
            "that many tokens; divide by the tokens of a sequence"
        )
        expect_close(torch.tensor(got), torch.tensor(weights / (token * context)), name="sequences", atol=1e-3)


@exercise("21-serving.5", "push out the last to come")
def _preempt(fn):
    for held, order, need in (({0: 64, 1: 64, 2: 32}, [0, 1, 2], 16), ({3: 16, 1: 64}, [3, 1], 40), ({5: 64}, [5], 0)):
        got = list(fn(dict(held), list(order), need))
        want, freed, left = [], 0, list(order)
        while freed < need:
            want.append(left.pop())
            freed += held[want[-1]]
        if got == sorted(order, key=held.get, reverse=True)[: len(got)] and got != want:
            raise AssertionError("not the largest: the last to come, so that the first in line always get on")
        expect_equal(got, want, name=f"who of {order} gives way for {need} tokens")
