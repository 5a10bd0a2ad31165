"""Checkers of chapter 18-roofline."""

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal


@exercise("18-roofline.1", "derive from how many rows on 4-bit weights do not pay")
def _rows(fn):
    for bits, beta, pi in ((4.25, 3e12, 7e14), (8.0, 3e12, 7e14), (3.0, 1e12, 3e14)):
        got = float(fn(bits, beta, pi))
        for wrong, hint in (
            (
                pi * bits / 16 / beta,
                "there the quantized weights reach their limit; FP16 weights still wait for memory",
            ),
            (pi / (2 * beta), "a multiplication and an addition are two operations, and 16 bits are two bytes"),
            (2 * pi / beta, "a 16-bit weight is two bytes, and it is used in two operations a row"),
        ):
            assert abs(got - wrong) > 1e-6 * wrong, f"{got:g} rows at {bits:g} bits: {hint}"
        expect_close(torch.tensor(got), torch.tensor(pi / beta), name=f"the number of rows at {bits:g} bits", atol=1e-3)


@exercise("18-roofline.2", "unpack codes under the exponent of 1024")
def _unpack(fn):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
    for i in range(4):
        got = torch.as_tensor(fn(every.clone(), i))
        assert got.dtype == torch.float16, f"the codes are float16, got {got.dtype}"
        expect_equal(list(got.shape), [256, 256], name="the shape")
        want = ((every.to(torch.int32) >> 4 * i) & 0xF).half()
        if i == 3 and not torch.equal(got, want) and torch.equal(got[128:], want[128:]):
            raise AssertionError("words below zero come out wrong: >> copies the sign, so mask after the shift")
        if torch.equal(got, want + 1024):
            raise AssertionError("1024 is still in there: subtract it")
        expect_equal(bool(torch.equal(got, want)), True, name=f"code {i} of every word")


@exercise("18-roofline.3", "find the program of a block")
def _program(fn):
    for blocks, programs in ((12, 5), (5504, 264), (7, 7), (100, 3), (264, 264)):
        starts = [p * (blocks // programs) + min(p, blocks % programs) for p in range(programs + 1)]
        for s in {0, 1, blocks // 2, blocks - 1, *starts[:-1], *(x - 1 for x in starts[1:])}:
            if s >= blocks:
                continue
            want = next(p for p in range(programs) if starts[p] <= s < starts[p + 1])
            got = int(fn(s, blocks, programs))
            assert got == want, f"block {s} of {blocks} belongs to program {want} of {programs}, got {got}" + (
                ": the first runs are one block longer"
                if got == min(s // max(blocks // programs, 1), programs - 1)
                else ""
            )


@exercise("18-roofline.4", "share all blocks out")
def _runs(fn):
    for blocks, programs in ((12, 4), (13, 4), (5504, 264), (3, 5)):
        got = [tuple(int(v) for v in run) for run in fn(blocks, programs)]
        expect_equal(len(got), programs, name=f"the number of runs of {blocks} blocks and {programs} programs")
        covered = [s for begin, end in got for s in range(begin, end)]
        assert covered == list(range(blocks)), (
            f"{blocks} blocks and {programs} programs: {blocks - len(set(covered))} blocks are walked by nobody"
            if len(set(covered)) < blocks
            else f"{blocks} blocks and {programs} programs: some blocks are walked twice, or not in order"
        )
        lengths = [end - begin for begin, end in got]
        assert max(lengths) - min(lengths) <= 1, (
            f"{blocks} blocks and {programs} programs: runs differ by more than one block"
        )


@exercise("18-roofline.5", "budget the instructions of a decoder")
def _budget(fn):
    for beta, iota in ((3e12, 28.7e12), (1e12, 10e12)):
        got = float(fn(beta, iota))
        want = 0.75 * iota * 3 / (8 * beta)
        for wrong, hint in (
            (want / 0.75, "a quarter of the slots goes to other work"),
            (want / 3, "other work takes a quarter, not three"),
            (0.75 * iota * 8 / (3 * beta), "memory delivers 8 beta / 3 weights a second: divide by them"),
            (0.75 * iota / beta, "a weight is 3 bits, not a byte"),
        ):
            assert abs(got - wrong) > 1e-6 * wrong, f"{got:g} instructions: {hint}"
        expect_close(torch.tensor(got), torch.tensor(want), name="the instructions a weight", atol=1e-4)
