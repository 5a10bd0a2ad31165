"""Small floats: every code, every 16-bit input, against torch's casts, and the published tables."""

import pytest
import torch

from lqedu.errors import UsageError
from lqedu.formats.smallfloat import E2M1, E2M3, E3M2, E4M3, E4M3FNUZ, E5M2, E5M2FNUZ, FORMATS

TORCH = {
    "E4M3": torch.float8_e4m3fn,
    "E5M2": torch.float8_e5m2,
    "E4M3FNUZ": torch.float8_e4m3fnuz,
    "E5M2FNUZ": torch.float8_e5m2fnuz,
}


def _same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal bit for bit in float64: minus zero is not zero, any NaN is NaN."""
    nan = torch.isnan(got) & torch.isnan(want)
    bits = got.double().view(torch.int64) == want.double().view(torch.int64)
    return bool((nan | bits).all())


def _sixteen_bits(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("name", TORCH)
def test_all_codes_decode_as_in_torch(name):
    codes = torch.arange(256, dtype=torch.uint8)
    assert _same(FORMATS[name].decode(codes), codes.view(TORCH[name]).to(torch.float32))


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_sixteen_bit_inputs_encode_as_in_torch(name, dtype):
    """Where overflow conventions part ways (torch's E4M3 has changed its mind between versions), only inside the range."""
    form, x = FORMATS[name], _sixteen_bits(dtype)
    inside = torch.isnan(x) | (x.double().abs() <= form.max)
    ours = form.decode(form.encode(x, saturate=False))
    theirs = x.to(TORCH[name]).to(torch.float32)
    assert _same(ours[inside], theirs[inside])
    kept = form.encode(x[~inside])
    assert _same(form.decode(kept), torch.where(x[~inside] > 0, form.max, -form.max))
    lost = form.decode(form.encode(x[~inside], saturate=False))
    if name == "E5M2":  # IEEE: values that round to the maximum are kept, others become infinite
        assert _same(lost, theirs[~inside])
    else:
        assert bool((torch.isnan(lost) | (lost.abs() == form.max)).all())
        assert bool(torch.isnan(lost[torch.isinf(x[~inside])]).all())


@pytest.mark.parametrize(
    ("form", "largest", "normal", "subnormal", "finite"),
    [
        (E4M3, 448, 2**-6, 2**-9, 253),
        (E5M2, 57344, 2**-14, 2**-16, 247),
        (E4M3FNUZ, 240, 2**-7, 2**-10, 255),
        (E5M2FNUZ, 57344, 2**-15, 2**-17, 255),
        (E2M1, 6, 1, 0.5, 15),
        (E3M2, 28, 0.25, 0.0625, 63),
        (E2M3, 7.5, 1, 0.125, 63),
    ],
)
def test_the_published_tables(form, largest, normal, subnormal, finite):
    assert (form.max, form.smallest_normal, form.smallest_subnormal) == (largest, normal, subnormal)
    values = form.values()
    assert len(set(values[torch.isfinite(values)].tolist())) == finite


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_codes_survive_a_round_trip(form):
    codes = torch.arange(1 << form.bits, dtype=torch.uint8)
    values = form.decode(codes)
    known = torch.isfinite(values)
    assert torch.equal(form.encode(values[known]), codes[known])
    assert torch.equal(form.encode(values[known].double()), codes[known])


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_nearest_with_ties_to_even_by_brute_force(form):
    grid = torch.unique(form.values()[torch.isfinite(form.values())]).double()
    middle = (grid[1:] + grid[:-1]) / 2
    got = form.decode(form.encode(middle), torch.float64)
    low, high = form.encode(grid[:-1]), form.encode(grid[1:])
    even = torch.where(low % 2 == 0, grid[:-1], grid[1:])
    assert bool(((low % 2 == 0) != (high % 2 == 0)).all())
    assert torch.equal(got.abs(), even.abs())
    x = (
        torch.empty(2000, dtype=torch.float64).uniform_(-1.2, 1.2, generator=torch.Generator().manual_seed(0))
        * form.max
    )
    nearest = grid[(x[:, None] - grid).abs().argmin(1)]
    assert torch.equal(form.decode(form.encode(x), torch.float64), nearest)


def test_signs_of_zero():
    zeros = torch.tensor([0.0, -0.0])
    assert E4M3.encode(zeros).tolist() == [0, 128]
    assert E4M3FNUZ.encode(zeros).tolist() == [0, 0]
    assert E4M3FNUZ.encode(torch.tensor([-1e-9])).tolist() == [0]
    assert E4M3.encode(torch.tensor([-1e-9])).tolist() == [128]


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="floating-point"):
        E4M3.encode(torch.tensor([1]))
    with pytest.raises(UsageError, match="uint8"):
        E4M3.decode(torch.tensor([1]))
    for x, saturate in ((torch.tensor([float("nan")]), True), (torch.tensor([1.0]), False)):
        with pytest.raises(UsageError, match="E2M1 has no code"):
            E2M1.encode(x, saturate=saturate)
