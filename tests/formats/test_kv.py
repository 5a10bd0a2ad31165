"""Records of keys and values: exact bytes, a bound on the error, FP16 scales that the codes know of, and refusals."""

import pytest
import torch

from lqedu.errors import GridError
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.kv import Codes, KVFloat8, KVInt, KVStaticFloat8, kv_grid, kv_grid_from_dict
from lqedu.formats.packing import packed_width
from lqedu.formats.smallfloat import E4M3
from tests.problems import seeded

GRIDS = [KVInt(bits) for bits in range(2, 9)] + [KVInt(4, 0.9), KVInt(3, zero_point="integer"), KVFloat8()]
SHAPES = [(2, 3, 5, 64), (7, 13), (1, 1), (3, 4, 96)]


def _x(shape, seed=0, dtype=torch.float32):
    """Heads with an outlier channel, a token of zeros, one without negative values, and one of a single value."""
    x = torch.randn(shape, generator=seeded(seed))
    x[..., 0] *= 9
    x.view(-1, shape[-1])[0] = 0.0
    if x[..., 0].numel() > 2:
        x.view(-1, shape[-1])[1] = x.view(-1, shape[-1])[1].abs() + 5
        x.view(-1, shape[-1])[2] = -0.3
    return x.to(dtype)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_records_hold_what_was_quantized(grid, shape):
    x = _x(shape)
    found, records = grid.quantize(x), grid.encode(x)
    assert records.dtype == torch.uint8 and records.shape == (*shape[:-1], grid.record_bytes(shape[-1]))
    for got, want in zip(grid.decode(records, shape[-1]), found, strict=True):
        assert (got is None and want is None) or torch.equal(got, want)
    assert torch.equal(grid.round_trip(x), found.values())
    assert torch.equal(grid.decode(records, shape[-1]).values(), grid.round_trip(x))
    assert torch.equal(grid.round_trip(x[:1] * 0), torch.zeros_like(x[:1]))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_bytes_are_counted(grid):
    for size in (64, 128, 13):
        codes = packed_width(size, grid.bits) + 4 if isinstance(grid, KVInt) else size + 2
        assert grid.record_bytes(size) == codes == grid.encode(torch.ones(1, size)).shape[-1]


def test_the_layout_of_a_record():
    x = torch.tensor([[-1.0, 0.5, 2.0, 0.0]])  # s = 0.2 in FP16, z = 5, codes 0 8 15 5
    record = KVInt(4).encode(x)[0]
    assert record[:2].tolist() == [0x80, 0x5F]
    scale = float(torch.tensor(0.2).half())
    assert record[2:].view(torch.float16).tolist() == [scale, float(torch.tensor(1 / scale).half())]
    record = KVFloat8().encode(x)[0]
    assert torch.equal(record[:4], E4M3.encode(x[0].double() / float(torch.tensor(2 / 448).half())))
    assert record[4:].view(torch.float16).item() == float(torch.tensor(2 / 448).half())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero_point", ["float", "integer"])
def test_the_error_is_half_a_step_and_what_rounding_scale_and_zero_point_cuts_off(bits, zero_point):
    x = _x((200, 64))
    codes, top = KVInt(bits, zero_point=zero_point).quantize(x), 2**bits - 1
    error = (codes.values() - x).abs() / codes.scale  # in steps
    inside = (codes.codes > 0) & (codes.codes < top)
    # the ends move by a share of 2^-11 of the range through the scale, and by the rounding of the zero point
    cut = top * 2.0**-11 + (0.5 if zero_point == "integer" else top * 2.0**-11)
    assert bool((error <= 0.5 + 1e-4)[inside].all()) and bool((error <= 0.5 + cut + 1e-4).all())
    assert bool((codes.codes == codes.codes.round()).all()) and codes.codes.min() == 0 and codes.codes.max() == top
    assert bool((codes.zero == codes.zero.round()).all()) == (zero_point == "integer")
    assert codes.zero.min() == 0 and top - 1 < codes.zero.max() <= top
    for number in (codes.scale, codes.zero):
        assert torch.equal(number, number.half().float())


def test_an_integer_zero_point_represents_zero_and_a_float_one_the_ends():
    x = torch.randn(500, 64, generator=seeded(2))
    x[:, 0] = 0.0
    integer, exact = KVInt(4, zero_point="integer").round_trip(x), KVInt(4).round_trip(x)
    assert torch.equal(integer[:, 0], torch.zeros(500)) and not torch.equal(exact[:, 0], torch.zeros(500))
    for end in ("amin", "amax"):
        assert torch.allclose(getattr(exact, end)(-1), getattr(x, end)(-1), atol=0.01)
    assert (exact - x).square().mean() < 0.99 * (integer - x).square().mean()


@pytest.mark.parametrize("clip_ratio", [1.0, 0.95])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_it_is_the_asymmetric_grid_of_activations_with_a_scale_in_fp16(bits, clip_ratio):
    """The same range, rounding and integer zero point; codes differ where the last bits of the scale decide a tie."""
    x = torch.randn(500, 64, generator=seeded(1))
    grid = ActivationGrid(bits, symmetric=False, clip_ratio=clip_ratio)
    scale, zero = grid.fit(x)
    found = KVInt(bits, clip_ratio, "integer").quantize(x)
    assert bool(((found.scale / scale - 1).abs() <= 2.0**-11).all())
    assert (found.zero - (zero - grid.code_min)).abs().max() <= 1
    same = found.codes == grid.encode(x, scale, zero).float() - grid.code_min
    assert same.float().mean() > (0.999 if bits < 8 else 0.95)


def test_fp8_codes_are_those_of_the_format():
    x = _x((50, 64))
    codes = KVFloat8().quantize(x)
    assert torch.equal(codes.codes, E4M3.decode(E4M3.encode((x / codes.scale).double())))
    assert codes.zero is None and torch.equal(codes.scale, codes.scale.half().float())


@pytest.mark.parametrize("grid", [KVInt(4), KVInt(8), KVFloat8()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_quantized_in_float32_and_come_back(grid, dtype):
    x = _x((3, 64), dtype=dtype)
    assert torch.equal(grid.encode(x), grid.encode(x.float()))
    assert grid.round_trip(x).dtype == dtype
    assert torch.equal(grid.round_trip(x), grid.round_trip(x.float()).to(dtype))


@pytest.mark.parametrize("grid", [KVInt(4), KVFloat8()], ids=str)
def test_slices_of_records_are_read_as_well(grid):
    x = _x((2, 3, 6, 64))
    records = grid.encode(x)
    assert torch.equal(grid.decode(records[..., 1:4, :], 64).values(), grid.round_trip(x)[..., 1:4, :])
    assert torch.equal(grid.decode(records[:, :, ::2], 64).values(), grid.round_trip(x)[:, :, ::2])


def test_tiny_ranges_are_zeros_not_divisions_by_them():
    x = torch.full((1, 8), 1e-9)
    for grid in (KVInt(4), KVFloat8()):
        assert torch.equal(grid.round_trip(x), torch.zeros(1, 8)) or float(grid.round_trip(x).abs().max()) < 1e-8


@pytest.mark.parametrize("grid", [KVInt(4), KVFloat8()], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_what_an_fp16_scale_cannot_hold_is_refused(grid, bad):
    x = torch.zeros(2, 8)
    x[1, 3] = bad
    with pytest.raises(GridError, match="FP16"):
        grid.encode(x)


@pytest.mark.parametrize("grid", [KVInt(4), KVFloat8()], ids=str)
@pytest.mark.parametrize(
    "x", [[1.0, 2.0], torch.tensor(1.0), torch.ones(2, 0), torch.ones(2, 3, dtype=torch.complex64)]
)
def test_what_is_no_vector_of_floats_is_refused(grid, x):
    with pytest.raises(GridError, match=r"keys (or|and) values"):
        grid.encode(x)


def test_records_of_another_grid_are_refused():
    records = KVInt(4).encode(torch.ones(2, 64))
    for grid, size in ((KVInt(8), 64), (KVInt(4), 32), (KVFloat8(), 64)):
        with pytest.raises(GridError, match="records of"):
            grid.decode(records, size)
    with pytest.raises(GridError, match="float32"):
        KVInt(4).decode(records.float(), 64)


def test_words_and_data():
    assert [kv_grid(spec) for spec in (3, "fp8", 16, KVInt(4, 0.9))] == [KVInt(3), KVFloat8(), None, KVInt(4, 0.9)]
    for bad in (1, 9, 32, True, 4.5, "int4", None):
        with pytest.raises(GridError, match="keys and values take"):
            kv_grid(bad)
    assert kv_grid("fp8-static") == KVStaticFloat8() != KVFloat8()
    for grid in (KVInt(4, 0.95, "integer"), KVFloat8(), KVStaticFloat8()):
        assert kv_grid_from_dict(grid.to_dict()) == grid
    for bad in ({}, {"kind": "integer"}, {"kind": "e4m3", "bits": 8}, {"kind": "e5m2"}, None, 4):
        with pytest.raises(GridError, match="of a kind in"):
            kv_grid_from_dict(bad)
    for bad in (
        {"bits": 1},
        {"bits": 9},
        {"bits": 4.0},
        {"clip_ratio": 0},
        {"clip_ratio": 1.1},
        {"zero_point": "none"},
    ):
        with pytest.raises(GridError, match=next(iter(bad))):
            KVInt(**bad)


def test_codes_without_scale_are_values():
    assert torch.equal(Codes(torch.ones(2)).values(), torch.ones(2))


def test_a_record_without_a_scale_is_its_codes():
    x = torch.tensor([[3.3, -1000.0, 1e-9, 448.0]])
    record = KVStaticFloat8().encode(x)
    assert record.shape == (1, 4) and KVStaticFloat8().record_bytes(4) == 4
    assert torch.equal(record, x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    assert KVStaticFloat8().decode(record, 4).scale is None
    assert KVStaticFloat8().round_trip(x).tolist() == [[3.25, -448.0, 0.0, 448.0]]
    with pytest.raises(GridError, match="NaN or infinities"):
        KVStaticFloat8().encode(torch.tensor([[1.0, torch.nan]]))
