"""Checkers of chapter 19-integer-gemm."""

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal


@exercise("19-integer-gemm.1", "correct an integer product for the weight's zero point")
def _corrected(fn):
    generator = torch.Generator().manual_seed(0)
    for tokens, outs, features in ((3, 5, 17), (1, 4, 64), (6, 1, 3)):
        x = torch.randint(-128, 128, (tokens, features), generator=generator)
        w = torch.randint(0, 16, (outs, features), generator=generator)
        z = torch.randint(0, 16, (outs,), generator=generator)
        total = x @ w.T
        got = torch.as_tensor(fn(total.clone(), x.sum(1), z.clone()))
        expect_equal(list(got.shape), [tokens, outs], name="the shape")
        if torch.equal(got, total + x.sum(1)[:, None] * z) and not torch.equal(got, x @ (w - z[:, None]).T):
            raise AssertionError("the zero point is subtracted from the codes, so its term leaves the sum")
        expect_equal(got.tolist(), (x @ (w - z[:, None]).T).tolist(), name="the corrected sums")


@exercise("19-integer-gemm.2", "add a byte to four bytes at once")
def _add_bytes(fn):
    words = torch.randint(0, 2**32, (500,), generator=torch.Generator().manual_seed(1), dtype=torch.int64)
    words = torch.cat([words, torch.tensor([0, 2**32 - 1, 0x80808080, 0x7F7F7F7F])])
    for b in (0, 1, 127, 128, 202, 255):
        bytes_ = (words[:, None] >> torch.tensor([0, 8, 16, 24])) & 255
        want = (((bytes_ + b) & 255) << torch.tensor([0, 8, 16, 24])).sum(1)
        got = torch.as_tensor(fn(words.clone(), b))
        if torch.equal(got, (words + b * 0x01010101) % 2**32) and not torch.equal(got, want):
            raise AssertionError(f"b = {b}: carries run from one byte into the next; add the lower seven bits only")
        expect_equal(got.tolist(), want.tolist(), name=f"the words with {b} added")


@exercise("19-integer-gemm.3", "make the byte of the flip")
def _offset(fn):
    for s in range(1, 18):
        for z in range(16):
            w8 = [(q - z) * s for q in range(16)]
            if min(w8) < -128 or max(w8) > 127:
                continue
            a = int(fn(s, z))
            got = [((q * s + a) % 256) ^ 128 for q in range(16)]
            got = [v - 256 if v > 127 else v for v in got]
            if got == [v - 1 for v in w8]:
                raise AssertionError(f"s = {s}, z = {z}: every weight comes out one too small")
            expect_equal(got, w8, name=f"the weights of a group with scale {s} and zero point {z}")


@exercise("19-integer-gemm.4", "find the rows that hide the decoding")
def _rows(fn):
    for i in (0.375, 0.875, 2.125):
        got = float(fn(i))
        for wrong, hint in (
            (4096 * i, "a multiprocessor executes 128 instructions a clock, not one"),
            (i / 32, "decoding is paid once for all rows of a tile: more rows make it cheaper"),
            (16 * i, "4096 counts multiply-adds already; they are not halved again"),
            (64 * i, "4096 counts multiply-adds already; they are not doubled again"),
        ):
            assert abs(got - wrong) > 1e-6, f"{got:g} rows for {i:g} instructions: {hint}"
        expect_close(torch.tensor(got), torch.tensor(32.0 * i), name=f"the rows for {i:g} instructions", atol=1e-4)


@exercise("19-integer-gemm.5", "the largest scale of 3-bit codes")
def _scale(answer):
    got = int(answer)
    hints = {
        17: "that is the largest scale of 4-bit codes, 15 · 17 = 255",
        31: "the largest code is 7, not 8",
        85: "3 bits reach 7, not 3",
        18: "a byte holds 255, not 127, before the flip",
    }
    assert got == 36, f"{got} is not it: " + hints.get(got, "the largest code times the scale must fit a byte")
