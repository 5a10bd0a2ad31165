"""Checkers of chapter 12-progressive."""

import torch

from lqedu.book.exercises import exercise, expect_equal

_WORD = 1 << 32


def _fits(protective: int, steps: int, zero: str) -> bool:
    """Whether all groups of channel codes in ± protective decode into int8, with codes 0 to ``steps``."""
    values = torch.arange(-protective, protective + 1, dtype=torch.float64)
    lo, hi = torch.meshgrid(values[values <= 0], values[values >= 0], indexing="ij")
    s = torch.round((hi - lo) / steps).clamp(min=1)
    if zero == "code":
        z = torch.round(-lo / s).clamp(0, steps)
        ends = [((torch.round(w / s) + z).clamp(0, steps) - z) * s for w in (lo, hi)]
    else:
        ends = [torch.round((w - lo) / s).clamp(0, steps) * s + lo for w in (lo, hi)]
    return int(ends[0].min()) >= -128 and int(ends[1].max()) <= 127


def _range(steps: int, zero: str) -> int:
    return next(p for p in range(127, 0, -1) if _fits(p, steps, zero))


@exercise("12-progressive.1", "predict the protective ranges for groups of 3 bits")
def _three_bits(answer):
    got = tuple(int(value) for value in answer)
    assert len(got) == 2, f"two numbers are asked for, with a zero point and with an offset; got {len(got)}"
    hints = {
        "code": ("with a zero point before the scale", "half a step of the largest group scale must fit above it"),
        "offset": ("with an offset after the scale", "what 7 s can exceed the range of a group by must fit above it"),
    }
    for value, (zero, (name, why)) in zip(got, hints.items(), strict=True):
        want = _range(7, zero)
        assert value <= want, f"{value} {name} is too large, some group decodes outside int8: {why}"
        assert value == want, f"{value} {name} is safe, but a larger range is, too: {why}, and no more"


@exercise("12-progressive.2", "add two words byte by byte, without carries between bytes")
def _add_bytes(fn):
    a, b = (x.flatten() for x in torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij"))
    for places in (0x00000001, 0x01000000, 0x01010101, 0x00010100):
        left, right = a * places, b * places + 0x80008000 * (places == 1)
        got = torch.as_tensor(fn(left.clone(), right.clone())).to(torch.int64)
        assert int(got.min()) >= 0 and int(got.max()) < _WORD, "a word lies in [0, 2**32): a carry left the top byte"
        for i in range(4):
            want = (((left >> 8 * i) & 255) + ((right >> 8 * i) & 255)) % 256
            expect_equal((got >> 8 * i) & 255, want, name=f"byte {i} of the sums")


@exercise("12-progressive.3", "find the mistake in a decoder of four weights")
def _decoder(fn):
    codes = torch.cat((torch.arange(16).view(4, 4), torch.arange(16).flip(0).view(4, 4)))
    places = torch.tensor([1, 1 << 8, 1 << 16, 1 << 24])
    for s in range(1, 17):
        for z in range(16):
            want = (codes - z) * s
            if int(want.min()) < -128 or int(want.max()) > 127:
                continue  # no group of the protective range needs all codes of these
            got = torch.as_tensor(fn((codes * places).sum(1), s, z)).to(torch.int64)
            bytes_ = (got[:, None] >> (8 * torch.arange(4))) & 255
            expect_equal(torch.where(bytes_ > 127, bytes_ - 256, bytes_), want, name=f"weights with s = {s}, z = {z}")


@exercise("12-progressive.4", "decode four weights with a multiplication, an addition and an exclusive or")
def _exclusive_or(fn):
    codes = torch.cat((torch.arange(16).view(4, 4), torch.arange(16).flip(0).view(4, 4)))
    places = torch.tensor([1, 1 << 8, 1 << 16, 1 << 24])
    for lo in range(-120, 1, 8):
        for hi in range(0, 121, 8):
            s = max(1, round((hi - lo) / 15))
            got = torch.as_tensor(fn((codes * places).sum(1), s, lo)).to(torch.int64)
            assert int(got.min()) >= 0 and int(got.max()) < _WORD, "a word lies in [0, 2**32)"
            bytes_ = (got[:, None] >> (8 * torch.arange(4))) & 255
            name = f"weights of the group from {lo} to {hi}"
            expect_equal(torch.where(bytes_ > 127, bytes_ - 256, bytes_), codes * s + lo, name=name)


@exercise("12-progressive.5", "how many channel codes of a group of range r lie beyond its last point")
def _cut(fn):
    for r in range(241):
        s = max(1, round(r / 15))  # Python rounds ties to the even integer, too
        expect_equal(int(fn(r)), max(0, r - 15 * s), name=f"what a group of range {r} loses")
