"""Progressive grids: the protective range by exhaustive search, kernel arithmetic modulo 256, bytes and round trips."""

import pytest
import torch

from lqedu.errors import GridError
from lqedu.formats.progressive import (
    PROTECTIVE,
    PROTECTIVE_ALL_CODES,
    ProgressiveGrid,
    ProgressiveTensor,
    progressive_quantize,
)


def _extremes(protective: int, zero: str) -> tuple[int, int]:
    """Smallest and largest decoded value over every group that a channel of ± protective can hold.

    Independent of the package: a group is its smallest and largest channel code, and the weights behind these lie up to
    half a channel step away.
    """
    values = torch.arange(-protective, protective + 1, dtype=torch.float64)
    lo, hi = torch.meshgrid(values, values, indexing="ij")
    within = (lo <= 0) & (hi >= 0)
    lo, hi = lo[within], hi[within]
    s = torch.round((hi - lo) / 15).clamp(min=1)
    decoded = []
    for w in (lo, hi):
        for error in (-0.499, 0.0, 0.499):
            if zero == "code":
                z = torch.round(-lo / s).clamp(0, 15)
                decoded.append(((torch.round((w + error) / s) + z).clamp(0, 15) - z) * s)
            else:
                decoded.append(torch.round((w + error - lo) / s).clamp(0, 15) * s + lo)
    all_values = torch.stack(decoded)
    return int(all_values.min()), int(all_values.max())


@pytest.mark.parametrize("zero", ["code", "offset"])
def test_the_protective_range_is_the_largest_that_is_safe(zero):
    lo, hi = _extremes(PROTECTIVE[zero], zero)
    assert lo >= -128 and hi <= 127
    lo, hi = _extremes(PROTECTIVE[zero] + 1, zero)
    assert lo < -128 or hi > 127
    assert (PROTECTIVE["code"], PROTECTIVE["offset"]) == (119, 120)  # the published figure, and the shipped variant


def _all_codes(protective: int, zero: str) -> tuple[int, int]:
    """Smallest and largest value of codes 0 and 15 over every group of ± protective, in plain Python."""
    ends = []
    for lo in range(-protective, 1):
        for hi in range(protective + 1):
            s = max(1, round((hi - lo) / 15))
            first = -min(15, round(-lo / s)) * s if zero == "code" else lo
            ends += [first, first + 15 * s]
    return min(ends), max(ends)


@pytest.mark.parametrize("zero", ["code", "offset"])
def test_the_range_in_which_all_codes_are_safe_is_the_largest(zero):
    lo, hi = _all_codes(PROTECTIVE_ALL_CODES[zero], zero)
    assert lo >= -128 and hi <= 127
    lo, hi = _all_codes(PROTECTIVE_ALL_CODES[zero] + 1, zero)
    assert lo < -128 or hi > 127


@pytest.mark.parametrize("zero", ["code", "offset"])
def test_whatever_is_encoded_fits_int8(zero):
    w, grid = _weight(64), ProgressiveGrid(32, zero)
    w[:, :32] = w[:, :32].abs().clamp(max=1).sign() * w.abs().amax(1, keepdim=True)  # groups that use the whole channel
    w[:, 0:32:2] *= -113 / 119
    fitted = grid.fit(w)
    pushed = w * 3  # as error feedback may push them
    assert int(grid.decode_int8(grid.encode(pushed, *fitted), *fitted[1:]).abs().max()) <= 128
    if zero == "code":  # without the limit, code 15 stands for 128 in some group
        scale, z = grid.affine(*fitted)
        free = (
            (torch.round(pushed.view(*scale.shape, -1) / scale[..., None]) + z[..., None]).clamp(0, 15).to(torch.uint8)
        )
        with pytest.raises(GridError, match="outside int8"):
            grid.decode_int8(free.view(w.shape), *fitted[1:])


@pytest.mark.parametrize("zero", ["code", "offset"])
@pytest.mark.parametrize("largest", [2e-5, 1e-5, 7.2e-6])
def test_rows_near_zero_have_scales_that_float16_hardly_holds(zero, largest):
    w = torch.linspace(-113 / 119, 1, 64).repeat(3, 1) * largest
    q = progressive_quantize(w, ProgressiveGrid(32, zero))  # float16 has steps of 6e-8 here, about the channel scale
    assert 0.4 * largest < float(q.dequantize().max()) < 1.4 * largest
    assert not progressive_quantize(w * 1e-2, ProgressiveGrid(32, zero)).dequantize().any()  # and no scale at all here


def _weight(rows=40, columns=256, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) * torch.rand(rows, 1, generator=g) * 3


@pytest.mark.parametrize("zero", ["code", "offset"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_decoded_values_fit_int8_and_lie_near(zero, group_size):
    w = _weight()
    q = progressive_quantize(w, ProgressiveGrid(group_size, zero))
    assert int(q.codes.max()) <= 15
    assert q.int8().dtype == torch.int8
    step = (q.channel_scale.float() * q.group_scale.float()).repeat_interleave(group_size, 1)
    # half a step, and where the rounded range ends early another step at the clamped end
    assert float(((q.dequantize() - w).abs() / step).max()) <= 1.6
    assert float((q.dequantize() - w).norm() / w.norm()) < 0.13


@pytest.mark.parametrize("zero", ["code", "offset"])
def test_register_arithmetic_modulo_256_gives_the_same_bytes(zero):
    q = progressive_quantize(_weight(), ProgressiveGrid(64, zero))
    codes = q.codes.view(*q.group_scale.shape, -1).to(torch.int32)
    s, z = q.group_scale.to(torch.int32)[..., None], q.zero.to(torch.int32)[..., None]
    # what a kernel does to four bytes at a time: multiply, then add the negated offset, each byte wrapping
    offset = z * s if zero == "code" else z
    wrapped = ((codes * s) % 256 + (-offset) % 256) % 256
    signed = torch.where(wrapped > 127, wrapped - 256, wrapped).to(torch.int8)
    assert torch.equal(signed.view(q.shape), q.int8())
    assert int((codes * s).max()) < 256


def test_without_protection_a_kernel_would_wrap():
    found = False
    for seed in range(50):
        try:
            progressive_quantize(_weight(64, 256, seed), ProgressiveGrid(32, protective=127))
        except GridError as error:
            found = True
            assert "outside int8" in str(error) and "119" in str(error)
    assert found


@pytest.mark.parametrize("zero", ["code", "offset"])
def test_the_affine_view_is_the_same_grid(zero):
    grid, w = ProgressiveGrid(64, zero), _weight()
    q = progressive_quantize(w, grid)
    scale, z = grid.affine(q.channel_scale, q.group_scale, q.zero)
    decoded = scale[..., None] * (q.codes.float().view(*scale.shape, -1) - z[..., None])
    assert torch.allclose(decoded.view(q.shape), q.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero", ["code", "offset"])
def test_packed_bytes_are_as_counted_and_come_back(zero):
    q = progressive_quantize(_weight(), ProgressiveGrid(64, zero))
    packed = q.packed()
    assert sum(t.nbytes for t in packed.values()) == q.nbytes
    back = ProgressiveTensor.from_packed(packed, ProgressiveGrid.from_dict(q.grid.to_dict()), q.shape)
    assert torch.equal(back.dequantize(), q.dequantize())
    empty = ProgressiveTensor.empty(q.grid, q.shape).packed()
    assert {k: (v.shape, v.dtype) for k, v in empty.items()} == {k: (v.shape, v.dtype) for k, v in packed.items()}


def test_rows_and_groups_of_zeros():
    w = _weight()
    w[3], w[5, :64] = 0, 0
    q = progressive_quantize(w, ProgressiveGrid(64))
    assert bool((q.dequantize()[3] == 0).all()) and bool((q.dequantize()[5, :64] == 0).all())


def test_what_does_not_fit_is_refused():
    with pytest.raises(GridError, match=r"does not divide the 250.*use per-channel"):
        progressive_quantize(_weight(4, 250), ProgressiveGrid(64))
    with pytest.raises(GridError, match="NaN"):
        progressive_quantize(_weight() * float("nan"), ProgressiveGrid(64))
    for fields in ({"group_size": 0}, {"zero": "none"}, {"protective": 128}, {"protective": 119.5}):
        with pytest.raises(GridError):
            ProgressiveGrid(**fields)
    with pytest.raises(GridError, match="by a ProgressiveGrid"):
        progressive_quantize(_weight(), None)
    with pytest.raises(GridError, match="do not fit"):
        ProgressiveTensor.from_packed(
            progressive_quantize(_weight(), ProgressiveGrid(64)).packed(), ProgressiveGrid(32), (40, 256)
        )
