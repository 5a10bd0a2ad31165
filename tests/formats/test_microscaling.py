"""Microscaling: the OCP rule written out in exact fractions, NVFP4 by a loop, bytes, and what is refused."""

from fractions import Fraction

import pytest
import torch

from lqedu.errors import GridError
from lqedu.formats.microscaling import MXFP4, MXFP8, NVFP4, block_quantize, block_round_trip
from lqedu.formats.smallfloat import E4M3
from tests import problems

#: The non-negative values, from the text of the specifications.
E2M1_VALUES = [Fraction(v) for v in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
E4M3_VALUES = [Fraction(m, 512) for m in range(8)]
E4M3_VALUES += [Fraction(8 + m, 8) * Fraction(2) ** e for e in range(-6, 9) for m in range(8)][:-1]


def _nearest(x: Fraction, values: list[Fraction]) -> Fraction:
    """Round half to even (the index of a value is its code), saturating."""
    if abs(x) >= values[-1]:
        return values[-1] * (1 if x > 0 else -1)
    above = next(i for i, v in enumerate(values) if v >= abs(x))
    low, high = values[max(above - 1, 0)], values[above]
    down, up = abs(x) - low, high - abs(x)
    even = above if above % 2 == 0 else above - 1
    found = values[even] if down == up and above else low if down < up else high
    return found if x >= 0 else -found


def _by_ocp(block: list[float], values: list[Fraction], emax: int) -> list[Fraction]:
    """X = 2^(floor(log2 max|x|) - emax), elements rounded to nearest and saturated."""
    largest = max(abs(Fraction(x)) for x in block)
    if largest == 0:
        return [Fraction(0)] * len(block)
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= largest:
        exponent += 1
    while Fraction(2) ** exponent > largest:
        exponent -= 1
    scale = Fraction(2) ** max(exponent - emax, -127)
    return [_nearest(Fraction(x) / scale, values) * scale for x in block]


@pytest.mark.parametrize(("form", "values", "emax"), [(MXFP8, E4M3_VALUES, 8), (MXFP4, E2M1_VALUES, 2)])
def test_equals_the_ocp_rule(form, values, emax):
    assert form.top_exponent == emax
    x = problems.weight(6, 96, seed=0)
    x[1] *= 2.0**-100
    x[2] *= 2.0**90
    x[3, :32] = 0
    x[4, 0] = 8.0  # a power of two is the largest
    x[5] = torch.arange(96) / 8  # ties
    got = block_round_trip(x, form).double()
    for row, result in zip(x, got, strict=True):
        want = [v for start in range(0, 96, 32) for v in _by_ocp(row[start : start + 32].tolist(), values, emax)]
        assert result.tolist() == [float(v) for v in want]


def test_what_saturates_under_a_power_of_two():
    """The top octave of E4M3 ends at 448 of 512, that of E2M1 at 6 of 8: the largest element loses up to 1/8 and 1/4."""
    x = torch.zeros(1, 32)
    for form, top, left in ((MXFP8, 511.0, 448 / 511), (MXFP4, 7.99, 6 / 7.99)):
        x[0, 3] = top
        assert float(block_round_trip(x, form)[0, 3] / top) == pytest.approx(left)


def test_nvfp4_by_a_loop():
    x = problems.weight(4, 48, seed=1)
    x[0, :16] *= 1e-6  # a block whose scale underflows E4M3
    got = block_quantize(x, NVFP4)
    whole = (x.abs().max() / (448 * 6)).item()
    assert got.tensor_scale.item() == pytest.approx(whole, rel=1e-6)
    table = torch.tensor([float(v) for v in E2M1_VALUES])
    for i in range(4):
        for start in range(0, 48, 16):
            block = x[i, start : start + 16]
            ratio = block.abs().max().item() / 6 / whole
            scale = min(E4M3_VALUES, key=lambda v: abs(float(v) - ratio))
            assert float(E4M3.decode(got.scale[i, start // 16])) == scale
            step = float(scale) * whole
            if step == 0:
                assert torch.equal(got.dequantize()[i, start : start + 16], torch.zeros(16))
                continue
            nearest = table[((block.abs() / step)[:, None] - table).abs().argmin(1)] * step * block.sign()
            assert torch.allclose(got.dequantize()[i, start : start + 16], nearest, rtol=1e-6)


def test_the_largest_of_a_tensor_is_nearly_exact_in_nvfp4_and_not_in_mxfp4():
    x = torch.full((1, 32), 7.0)
    assert torch.allclose(block_round_trip(x, NVFP4), x)
    assert torch.equal(block_round_trip(x, MXFP4), torch.full((1, 32), 6.0))


@pytest.mark.parametrize(("form", "beside"), [(MXFP8, 0), (MXFP4, 0), (NVFP4, 4)])
def test_bytes_and_shapes(form, beside):
    x = problems.weight(6, 96, seed=2).view(2, 3, 96)
    stored = block_quantize(x, form)
    assert stored.nbytes == x.numel() * form.bits_per_element / 8 + beside
    assert stored.codes.shape == x.shape and stored.scale.shape == (2, 3, 96 // form.block_size)
    assert int(stored.codes.max()) < 1 << form.element.bits
    assert torch.equal(stored.dequantize(), block_round_trip(x, form))
    assert block_round_trip(x.bfloat16(), form).dtype == torch.bfloat16
    assert torch.equal(block_round_trip(torch.zeros(2, 32), form), torch.zeros(2, 32))


def test_scaling_by_a_power_of_two_changes_nothing_in_mx():
    x = problems.weight(4, 64, seed=3)
    for form in (MXFP8, MXFP4):
        assert torch.equal(block_round_trip(x * 2**10, form), block_round_trip(x, form) * 2**10)


def test_tiny_blocks():
    x = torch.full((1, 32), 2.0**-140)
    for form in (MXFP8, MXFP4, NVFP4):
        assert bool(torch.isfinite(block_round_trip(x, form)).all())
    assert torch.equal(block_round_trip(x, MXFP8), torch.zeros(1, 32))  # below the subnormals of the smallest scale


def test_nvfp4_loses_blocks_that_are_tiny_beside_the_largest():
    """Their scale rounds to zero from half the smallest subnormal on: 2^-10 / 448 of the largest. MX keeps them."""
    edge = 2.0**-10 / 448
    for ratio, kept in ((1e-6, False), (0.99 * edge, False), (1.01 * edge, True)):
        x = torch.cat([torch.ones(1, 32), torch.full((1, 32), ratio)], 1)
        assert bool(block_round_trip(x, NVFP4)[:, 32:].any()) is kept
        assert bool(block_round_trip(x, MXFP4)[:, 32:].all())


def test_what_saturates_loses_up_to_an_eighth_or_a_quarter():
    for form, loss in ((MXFP8, 1 / 8), (MXFP4, 1 / 4)):
        x = torch.full((1, 32), 8 * (1 - 2.0**-20))
        assert float(1 - (block_round_trip(x, form) / x)[0, 0]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("form", [MXFP8, MXFP4, NVFP4])
def test_bad_input_is_refused(form):
    for wrong in ([1.0] * 32, torch.ones(2, 32).to(torch.float8_e4m3fn), None):
        with pytest.raises(GridError, match="floating-point"):
            block_quantize(wrong, form)
    with pytest.raises(GridError, match="block format"):
        block_quantize(torch.ones(2, 32), form.name)
    with pytest.raises(GridError, match="do not divide"):
        block_quantize(torch.zeros(2, 40), form)
    with pytest.raises(GridError, match="floating-point"):
        block_quantize(torch.zeros(2, 32, dtype=torch.int8), form)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 32)
        x[1, 5] = bad
        with pytest.raises(GridError, match="NaN or infinite"):
            block_quantize(x, form)
