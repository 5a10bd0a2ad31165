"""Checkers of chapter 25-end-to-end."""

import math

from lqedu.book.exercises import exercise, expect_equal


@exercise("25-end-to-end.1", "megabytes of linear layers and of the rest")
def _megabytes(fn):
    for linear, bits, other, rest in ((8_000_000, 4.0, 2_000_000, 16), (106_168_320, 4.3177, 28_346_688, 8.5)):
        got, want = float(fn(linear, bits, other, rest)), (linear * bits + other * rest) / 8e6
        for wrong, hint in (
            (8e6 * want, "that is bits; eight make a byte, and a million bytes a megabyte"),
            (1e6 * want, "that is bytes; a megabyte has a million of them"),
            (want * 1e6 / 2**20, "that is MiB, of 2^20 bytes; the page counts MB, of 10^6"),
            ((linear + other) * bits / 8e6, "the rest has its own number of bits: it is not quantized"),
            (linear * bits / 8e6, "the rest is missing: embedding and norms are stored too"),
        ):
            assert not math.isclose(got, wrong, rel_tol=1e-9), f"{got:.6g} MB is not it: {hint}"
        assert math.isclose(got, want, rel_tol=1e-9), f"{got:.6g} MB is not it, expected {want:.6g}"


@exercise("25-end-to-end.2", "accept a candidate only with two standard errors to spare")
def _accept(fn):
    base = [3.0, 3.4, 2.8, 3.2]
    for lost, budget, want, hint in (
        ([0.10, 0.14, 0.12, 0.12], 0.16, True, "it loses 0.12 with an error of 0.008, well within the budget"),
        ([0.30, 0.31, 0.29, 0.30], 0.16, False, "it loses 0.30, far over the budget"),
        ([0.10, 0.20, 0.12, 0.18], 0.16, False, "its mean of 0.15 is below, but its error is 0.024: add two of them"),
        (
            [0.14, 0.16, 0.14, 0.15],
            0.16,
            True,
            "pair the windows: the differences spread by 0.01, the texts by far more",
        ),
        ([0.137, 0.149, 0.138, 0.148], 0.16, True, "two standard errors of the mean, not of one window: divide by √n"),
        ([0.15, 0.16, 0.145, 0.155], 0.158, False, "two standard errors on top, not one"),
    ):
        got = fn([b + d for b, d in zip(base, lost, strict=True)], list(base), budget)
        assert bool(got) is want, f"losses {lost} and a budget of {budget} gave {bool(got)}: {hint}"


@exercise("25-end-to-end.3", "windows until the rule can accept")
def _windows(fn):
    for loss, sigma, budget in ((0.10, 0.03, 0.16), (0.15, 0.03, 0.16), (0.128, 0.029, 0.13), (0.0, 0.02, 0.16)):
        got = float(fn(loss, sigma, budget))
        want = max(1, math.ceil(round((2 * sigma / (budget - loss)) ** 2, 6)))
        where = f"for a loss of {loss}, a spread of {sigma} and a budget of {budget}"
        if got == max(1, math.ceil(round((sigma / (budget - loss)) ** 2, 6))) != want:
            raise AssertionError(f"{got:g} windows {where}: that puts one standard error on top, the rule puts two")
        if loss and got == max(1, math.ceil(round((2 * sigma / loss) ** 2, 6))) != want:
            raise AssertionError(
                f"{got:g} windows {where}: that is when the loss stands above zero; what counts is the room to the budget"
            )
        assert got == math.floor(got), f"{got:g} windows {where}: windows are whole, round up"
        expect_equal(got, want, name=f"windows {where}")
    for loss in (0.16, 0.2):
        got = float(fn(loss, 0.03, 0.16))
        assert got == math.inf, f"{got:g} windows for a loss of {loss} and a budget of 0.16: no number is enough"


@exercise("25-end-to-end.4", "how much faster a step is when it reads less")
def _gain(fn):
    for before, after, bandwidth, fixed in (
        (16e9, 5e9, 3e12, 1e-3),
        (269e6, 114e6, 3e12, 8e-4),
        (269e6, 114e6, 3e12, 0.0),
    ):
        a, b = before / bandwidth, after / bandwidth
        got, want = float(fn(before, after, bandwidth, fixed)), (a + fixed) / (b + fixed)
        if fixed:
            for wrong, hint in (
                (before / after, "that is the promise of the bytes; the fixed time is in both steps"),
                (a / (b + fixed), "the slower step has the fixed time too"),
                ((a + fixed) / b, "the faster step has the fixed time too"),
                (1 / want, "that is the time that is left; the gain is before over after"),
            ):
                assert not math.isclose(got, wrong, rel_tol=1e-9), f"{got:.4g} is not it: {hint}"
        assert math.isclose(got, want, rel_tol=1e-9), f"{got:.4g} is not it, expected {want:.4g}"
