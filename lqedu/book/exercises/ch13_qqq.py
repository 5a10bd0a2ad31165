"""Checkers of chapter 13-qqq."""

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.formats import QTensor
from lqedu.formats.requantized import RequantizedGrid, requantize
from lqedu.rounding import nearest
from lqedu.runtime.nibbles import pack_signed

_INT32 = 2**31 - 1


@exercise("13-qqq.1", "the dot product of packed 4-bit codes, decoded by one shift and one AND")
def _packed_dot(fn):
    for rows, columns, seed in ((3, 64, 0), (1, 2, 1), (5, 38, 2)):
        g = torch.Generator().manual_seed(seed)
        codes = torch.randint(-8, 8, (rows, columns), generator=g).to(torch.int8)
        x = torch.randint(-128, 128, (columns,), generator=g).to(torch.int8)
        want = codes.to(torch.int64) @ x.to(torch.int64)
        got = torch.as_tensor(fn(pack_signed(codes), x)).to(torch.int64)
        if got.shape == want.shape:
            assert not torch.equal(got, 16 * want), (
                "that is 16 times the sum: the factor of the upper nibble is still in it"
            )
            swapped = pack_signed(codes.view(rows, -1, 2).flip(-1).reshape(rows, columns)).to(torch.int64)
            assert columns == 2 or not torch.equal(got, _sum(swapped, x)), (
                "the first code of a byte is its lower nibble"
            )
        expect_equal(got, want, name=f"the sums of {rows} rows of {columns} inputs")


def _sum(packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return torch.where(nibbles > 7, nibbles - 16, nibbles) @ x.to(torch.int64)


@exercise("13-qqq.2", "predict how long a row may be before an accumulator of high nibbles can overflow")
def _row_length(answer):
    got, want = float(answer), _INT32 // (128 * 16 * 7)
    hints = {
        _INT32 // (128 * 128): "codes end at -7 here, so an operand is at most 16 · 7 = 112 in magnitude",
        _INT32 // (127 * 16 * 7): "an activation code may be -128",
        _INT32 // (128 * 7): "the operands are 16 times the codes",
        _INT32 // (127 * 127): "the operands are 16 times codes of at most 7, the activations go down to -128",
    }
    hint = next(
        (text for wrong, text in hints.items() if abs(got - wrong) <= 1), "divide 2**31 - 1 by the largest product"
    )
    assert got == want, f"{got:,.0f} is not it: {hint}"


@exercise("13-qqq.3", "find the mistake in a second level that wraps on some rows")
def _second_level(fn):
    grid = RequantizedGrid(8)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        w = 0.05 * torch.randn(16, 32, generator=g)
        groups = nearest(w, grid.groups())[0]
        codes = groups.codes.clone()
        codes[:, ::11] = -8  # what error feedback may choose, whatever the range was
        codes[1, 8:16] = 0
        want = requantize(QTensor(codes, groups.scale, None, groups.grid))
        w8, s_c = fn(w, codes, groups.scale)
        w8, s_c = torch.as_tensor(w8).double(), torch.as_tensor(s_c).double()
        largest = float(w8.abs().max())
        assert largest <= 127, f"a second code reaches {largest:.0f}: which weight does the kernel's row really hold?"
        assert w8.shape == want.shape and s_c.numel() == 16, "return w8 [out, in] and the channel scale [out, 1]"
        expect_close(s_c.reshape(-1, 1), want.channel_scale, name="the channel scale", atol=1e-7)
        off = float((w8 - want.int8().double()).abs().max())
        assert off <= 1, f"w8 is off by {off:.0f}"  # the ratio in float16 or in float32 may round a tie the other way


@exercise("13-qqq.4", "from which ratio on do all 16 codes of a group stay apart?")
def _ratio(answer):
    got = float(answer)
    hints = {
        1.0: "at a ratio a little below 1 the steps fall short by 1 - r each, and rounding forgives less than a half in all",
        0.5: "at 0.5 the codes 1 and 0 meet, since a half goes to the even integer",
        1 / 16: "that is where the whole group vanishes",
        14 / 15: "the codes go down to -8, one further than up",
        13 / 14: "the codes go down to -8, one further than up",
    }
    hint = next(
        (text for wrong, text in hints.items() if abs(got - wrong) < 1e-3),
        "try round(q r) for q = -8 … 7 at a few ratios",
    )
    assert abs(got - 15 / 16) < 1e-6, f"{got:g} is not it: {hint}"


@exercise("13-qqq.5", "the expected output error of a smoothed layer, without rounding anything")
def _expected_error(fn):
    for tokens, columns, outs, seed in ((7, 16, 5, 0), (3, 33, 4, 1), (1, 8, 1, 2)):
        g = torch.Generator().manual_seed(seed)
        x, w = torch.randn(tokens, columns, generator=g).double(), torch.randn(outs, columns, generator=g).double()
        s = 1 + 3 * torch.rand(columns, generator=g).double()
        z, v = x / s, w * s
        parts = (
            float((z.abs().amax(1) / 127).square().sum() * v.square().sum() / 12),
            float((v.abs().amax(1) / 7).square().sum() * z.square().sum() / 12),
        )
        got = float(fn(x, w, s))
        for part, name in zip(parts, ("activations", "weights"), strict=True):
            assert abs(got / part - 1) > 1e-4, f"that is the part of the {name} alone"
        assert abs(got / (12 * sum(parts)) - 1) > 1e-4, (
            "a uniform error of one step has the variance of a twelfth of its square"
        )
        expect_close(
            torch.tensor(got / sum(parts)), torch.tensor(1.0), name="your error over the expected one", atol=1e-4
        )
