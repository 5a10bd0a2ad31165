"""Kernel arithmetic: bytes of two codes, operands 16 times as large, float16 steps of one; all against plain integers."""

import pytest
import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats import IntGrid, QTensor, ScaleConvention
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.requantized import RequantizedGrid, requantize
from lqedu.rounding import nearest
from lqedu.runtime.integer import int_matmul, integer_linear
from lqedu.runtime.nibbles import high_nibble_linear, high_nibbles, pack_signed, requantized_bytes
from tests import problems

CHANNEL = IntGrid(4, True, convention=ScaleConvention.MAX_CODE, scale_dtype=torch.float32)


def _all_pairs() -> Tensor:
    """Every two codes that can share a byte, int8 ``[256, 2]``."""
    codes = torch.arange(-8, 8, dtype=torch.int8)
    return torch.cartesian_prod(codes, codes)


def test_every_byte_holds_its_two_codes_times_sixteen() -> None:
    pairs = _all_pairs()
    packed = pack_signed(pairs)
    assert packed.dtype == torch.uint8 and len(packed.unique()) == 256
    for byte, (first, second) in zip(packed[:, 0].tolist(), pairs.tolist(), strict=True):
        assert (byte & 15, byte >> 4) == (first % 16, second % 16)  # two's complement, in plain Python
    operands = high_nibbles(packed)
    assert operands.dtype == torch.int8
    assert torch.equal(operands.to(torch.int64), 16 * pairs.to(torch.int64))  # int8 holds all of -128 to 112


def test_the_largest_sums_are_sixteen_times_the_plain_ones_and_stay_in_int32() -> None:
    """Worst case at the longest row that int_matmul takes: 2**17 - 1 products of -128 and -128."""
    n = (1 << 17) - 2
    x = torch.full((2, n), -128, dtype=torch.int8)
    x[1, ::2] = 127
    codes = torch.full((3, n), -8, dtype=torch.int8)
    codes[1], codes[2, ::3] = 7, -7
    plain = int_matmul(x, codes)
    sixteen = int_matmul(x, high_nibbles(pack_signed(codes)))
    exact = x.to(torch.int64) @ codes.to(torch.int64).T
    assert torch.equal(plain.to(torch.int64), exact)
    assert torch.equal(sixteen.to(torch.int64), 16 * exact)
    assert int(sixteen.max()) == 16 * 8 * 128 * n < 2**31


@pytest.mark.parametrize("shape", [(24, 48), (13, 96), (1, 6)])
def test_scale_over_sixteen_gives_the_same_bits(shape: tuple[int, int]) -> None:
    weight = nearest(problems.weight(*shape, seed=1), CHANNEL)[0]
    grid = ActivationGrid(8)
    x = torch.randn(2, 5, shape[1], generator=problems.seeded(2))
    scale, _ = grid.fit(x)
    codes = grid.encode(x, scale, None)
    assert torch.equal(high_nibble_linear(codes, scale, weight), integer_linear(codes, scale, None, weight))


def test_group_operands_equal_the_integers_wherever_these_fit() -> None:
    ratios = torch.cat([torch.linspace(0, 15.9, 4001), torch.linspace(0, 0.2, 1001)]).to(torch.float16)[:, None]
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(len(ratios), 1)
    assert torch.equal(requantized_bytes(codes, ratios), RequantizedGrid(16).decode_int8(codes, ratios))


def test_a_value_outside_int8_becomes_another_number() -> None:
    """Above 127 the byte wraps; below -128 the sum falls under 1024, where float16 steps are a half: neither is near."""
    codes = torch.tensor([[-8, 7]], dtype=torch.int8)
    for ratio, want in ((17.0, (112, 119)), (20.0, (64, -116))):
        assert requantized_bytes(codes, torch.tensor([[ratio]], dtype=torch.float16)).tolist() == [list(want)]
    w = -torch.linspace(1, 2, 64).repeat_interleave(2).view(64, 2)  # rows whose code is -7 or -8, by the last bit of s
    groups = nearest(w, RequantizedGrid(2).groups())[0]
    assert int(groups.codes.min()) == -8
    assert bool((requantized_bytes(groups.codes, requantize(groups).group_ratio) == -127).all())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(GridError, match="uint8"):
        high_nibbles(torch.ones(2, 4))
    for codes in (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 4)):
        with pytest.raises(GridError, match="pairs of int8"):
            pack_signed(codes)
    with pytest.raises(GridError, match="-8 to 7"):
        pack_signed(torch.tensor([8, 0], dtype=torch.int8))
    w, scale = problems.weight(4, 16, seed=1), torch.ones(3, 1)
    for grid in (IntGrid(4), IntGrid(8, True), IntGrid(4, True, "group", 8), IntGrid(4, True)):
        with pytest.raises(GridError, match="symmetric 4-bit codes per channel"):
            high_nibble_linear(torch.zeros(3, 16, dtype=torch.int8), scale, _rounded(w, grid))


def _rounded(w: Tensor, grid: IntGrid) -> QTensor:
    return nearest(w, grid)[0]
