"""Small floats: every code, every 16-bit input, against torch's and ml_dtypes' casts, and the published tables."""

import ml_dtypes
import numpy as np
import pytest
import torch

import lqedu
from lqedu.errors import UsageError
from lqedu.formats import fp8
from lqedu.formats.smallfloat import E2M1, E2M3, E3M2, E4M3, E4M3FNUZ, E5M2, E5M2FNUZ, E8M0, FORMATS, FloatFormat

TORCH = {
    "E4M3": torch.float8_e4m3fn,
    "E5M2": torch.float8_e5m2,
    "E4M3FNUZ": torch.float8_e4m3fnuz,
    "E5M2FNUZ": torch.float8_e5m2fnuz,
}

ML_DTYPES = {
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E8M0": ml_dtypes.float8_e8m0fnu,
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


def _theirs(x: torch.Tensor, name: str) -> torch.Tensor:
    """The codes that ml_dtypes casts to; all 16-bit values are exact in float32."""
    return torch.from_numpy(x.to(torch.float32).numpy().astype(ML_DTYPES[name]).view(np.uint8))


def _rounded_up(x: torch.Tensor) -> torch.Tensor:
    """Subnormals of float32 between 2^-127 and 1.5 times that: torch and ml_dtypes cast them to 2^-126, the farther one."""
    return (x.double() > 2.0**-127) & (x.double() < 1.5 * 2.0**-127)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_all_codes_decode_as_in_ml_dtypes(name):
    form = E8M0 if name == "E8M0" else FORMATS[name]
    codes = np.arange(1 << form.bits, dtype=np.uint8)
    assert _same(form.values(), torch.from_numpy(codes.view(ML_DTYPES[name]).astype(np.float32)))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("name", ML_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_sixteen_bit_inputs_have_the_codes_of_ml_dtypes(name, dtype):
    """Without saturation all codes are equal, overflow included; with it, after a clamp. Payloads of NaN aside."""
    x = _sixteen_bits(dtype)
    form = E8M0 if name == "E8M0" else FORMATS[name]
    top = torch.full((), form.max, dtype=torch.float64)
    clamped = form.encode(x.double().clamp(-top, top)) if form.bits == 8 else form.encode(x[~x.isnan()])
    known = ~x.isnan()
    if form.bits == 8:
        ours, theirs = form.encode(x, saturate=False), _theirs(x, name)
        same = known & ~_rounded_up(x) if name == "E8M0" else known
        assert torch.equal(ours[same], theirs[same])
        assert bool(form.decode(ours[x.isnan()]).isnan().all())
        assert torch.equal(clamped[known], form.encode(x)[known])
        clamped = clamped[known]
    if name != "E8M0":
        assert torch.equal(clamped, _theirs(x[known].double().clamp(-top, top), name))


def test_where_the_casts_of_others_differ():
    """Overflow of E4M3: up to 464, halfway to a 480 that is not there, all round to 448; beyond, only clamping is safe."""
    x = torch.tensor([448.0, 464.0, 464.01, 1000.0, torch.inf])
    assert E4M3.encode(x, saturate=False).tolist() == _theirs(x, "E4M3").tolist() == [126, 126, 127, 127, 127]
    assert E4M3.encode(x).tolist() == fp8.encode(x).tolist() == [126] * 5
    torchs = x.to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    assert torchs[:2] == [126, 126] and set(torchs[2:]) in ({126}, {127})  # newer versions saturate, older ones do not
    nan = torch.tensor([torch.nan])
    assert (E5M2.encode(nan).item(), _theirs(nan, "E5M2").item()) == (126, 126)
    assert nan.to(torch.float8_e5m2).view(torch.uint8).item() == 127  # another payload, NaN as well


def test_the_entry_is_the_definition():
    """fp8.encode takes torch's cast where it may: the same codes, and the definition itself for the rest."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randint(-(2**31), 2**31, (200_000,), generator=g).to(torch.int32).view(torch.float32)
    for form in FORMATS.values():
        inputs = [_sixteen_bits(torch.float16), _sixteen_bits(torch.bfloat16), wide, wide.double() * (1 + 2**-30)]
        for x in inputs:
            known = x[~x.isnan()]
            assert torch.equal(fp8.encode(known, form), form.encode(known))
            if form.specials != "none":
                assert bool(fp8.decode(fp8.encode(x[x.isnan()], form), form).isnan().all())
                assert torch.equal(fp8.encode(x, form, saturate=False), form.encode(x, saturate=False))
        assert _same(fp8.decode(torch.arange(1 << form.bits, dtype=torch.uint8), form), form.values())
    between = 1.0625 + 2**-40  # a tie in float32, not in float64
    assert fp8.decode(fp8.encode(torch.tensor([between], dtype=torch.float64))).item() == 1.125
    with pytest.raises(UsageError, match="floating-point"):
        fp8.encode(torch.tensor([1]))
    with pytest.raises(UsageError, match="uint8"):
        fp8.decode(torch.tensor([1]))


def test_the_entry_needs_no_import_of_its_own():
    assert lqedu.formats.fp8.encode is fp8.encode and lqedu.formats.fp8.decode is fp8.decode


def test_powers_of_two():
    """E8M0 has neither zero nor sign; ties go up, as torch and ml_dtypes have it."""
    x = _sixteen_bits(torch.bfloat16)
    positive = x > 0
    theirs = x.to(torch.float8_e8m0fnu).view(torch.uint8)
    same = positive & ~_rounded_up(x)
    assert torch.equal(E8M0.encode(x, saturate=False)[same], theirs[same])
    assert E8M0.encode(x[_rounded_up(x)]).unique().tolist() == [0] and theirs[_rounded_up(x)].unique().tolist() == [1]
    assert set(E8M0.encode(x[~positive]).tolist()) == {255}
    assert (E8M0.max, E8M0.smallest, E8M0.bits) == (2.0**127, 2.0**-127, 8)
    assert E8M0.encode(torch.tensor([torch.inf, 3e38, 1e-45])).tolist() == [254, 254, 0]
    exact = E8M0.values()[:255]
    assert torch.equal(E8M0.encode(exact), torch.arange(255, dtype=torch.uint8))
    assert torch.equal(exact.double(), 2.0 ** torch.arange(-127, 128, dtype=torch.float64))
    with pytest.raises(UsageError, match="floating-point"):
        E8M0.encode(torch.tensor([1]))
    with pytest.raises(UsageError, match="uint8"):
        E8M0.decode(torch.tensor([1]))


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


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ((0, 3, 7, "fn"), "exponent_bits"),
        ((4, 0, 7, "fn"), "mantissa_bits"),
        ((5, 3, 7, "fn"), "mantissa_bits is a whole number, from 1 to 2"),
        ((8, 7, 127, "ieee"), "exponent_bits"),
        ((4, 3, 7.0, "fn"), "bias"),
        ((4, 3, True, "fn"), "bias"),
        ((4, 3, 1000, "fn"), "bias"),
        ((4, 3, 7, "inf"), "specials"),
        ((4, 3, 7, None), "specials"),
    ],
)
def test_formats_that_make_no_sense_are_refused(fields, sentence):
    with pytest.raises(UsageError, match=sentence):
        FloatFormat("", *fields)


@pytest.mark.parametrize(("exponent", "mantissa", "bias"), [(1, 6, 144), (6, 1, -64), (1, 1, 0)])
def test_the_widest_formats_are_exact_in_float32(exponent, mantissa, bias):
    form = FloatFormat("", exponent, mantissa, bias, "none")
    codes = torch.arange(1 << form.bits, dtype=torch.uint8)
    assert torch.equal(form.decode(codes).double(), form.decode(codes, torch.float64))
    assert torch.equal(form.encode(form.values()), codes)


@pytest.mark.parametrize("wrong", [1.0, None, [1.0], torch.tensor([1]), torch.tensor([1.0]).to(torch.float8_e4m3fn)])
def test_what_is_no_floating_point_tensor_is_refused(wrong):
    for encode in (E4M3.encode, E8M0.encode, fp8.encode):
        with pytest.raises(UsageError, match="floating-point"):
            encode(wrong)
    for decode in (E4M3.decode, E8M0.decode, fp8.decode):
        with pytest.raises(UsageError, match="uint8"):
            decode(wrong)
    for function, x in ((fp8.encode, torch.ones(2)), (fp8.decode, torch.ones(2, dtype=torch.uint8))):
        with pytest.raises(UsageError, match="form is a format"):
            function(x, "E4M3")
