"""The E8P codebook: 65,536 points of a shifted E8, an exact nearest search, and what it is worth on a Gaussian."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lqedu.errors import GridError, UsageError
from lqedu.formats.e8p import GAUSSIAN_SCALE, codebook, decode, encode, patterns
from tests import problems


@pytest.fixture(scope="module")
def book():
    return codebook()


def test_patterns_are_all_short_ones_and_29_more():
    every = torch.tensor(list(itertools.product((0.5, 1.5, 2.5, 3.5), repeat=8)))
    short = {tuple(s.tolist()) for s in every[every.square().sum(1) <= 10]}
    ours, norms = patterns(), patterns().square().sum(1)
    assert len(short) == 227
    assert {tuple(s.tolist()) for s in ours[:227]} == short
    assert ours.unique(dim=0).shape == (256, 8)
    assert bool((norms[227:] == 12).all()) and bool((norms[1:] >= norms[:-1]).all())


def test_codewords_are_distinct_points_of_the_shifted_lattice(book):
    assert book.shape == (65536, 8) and book.dtype == torch.float32
    assert book.unique(dim=0).shape == (65536, 8)
    point = book.double() - 0.25
    whole = (point == point.round()).all(1)  # D8, or else D8 + 1/2
    half = ((point - 0.5) == (point - 0.5).round()).all(1)
    assert bool((whole ^ half).all()) and int(whole.sum()) == 32768
    assert bool((point.sum(1) % 2 == 0).all())  # Σ ½ over eight values is even itself


def test_codes_say_pattern_signs_and_shift(book):
    codes = torch.tensor([0, 1, 2, 0b1010_1010, 0xFF << 8], dtype=torch.int32)
    a, b, c, d, e = book[codes.long()]
    assert a.tolist() == [0.25] * 8 and b.tolist() == [0.75] * 8  # eight halves have an even sum
    assert c.tolist() == [-0.75, *[0.25] * 6, -0.75]  # a sign turned, and the eighth with it
    assert (d + 0.25 < 0).tolist() == [bool(0b1010_1010 >> i & 1) for i in range(1, 8)] + [False]
    assert torch.equal((e + 0.25).abs(), patterns()[255])


def test_every_codeword_encodes_to_its_code(book):
    assert torch.equal(encode(book), torch.arange(65536, dtype=torch.int32))


@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])
def test_the_search_is_exact(book, spread):
    """Against all 65,536 distances, inside the codebook's ball and far outside it."""
    x = spread * torch.randn(200, 8, generator=problems.seeded(1), dtype=torch.float64)
    nearest = torch.cdist(x, book.double()).amin(1)
    ours = (x - decode(encode(x), torch.float64)).norm(dim=1)
    assert torch.allclose(ours, nearest, rtol=0, atol=1e-12)


def test_ties_and_exact_zeros_find_a_nearest_codeword(book):
    x = torch.randint(-4, 5, (300, 8), generator=problems.seeded(2)).double() / 2
    x[0] = 0
    nearest = torch.cdist(x, book.double()).amin(1)
    assert torch.allclose((x - decode(encode(x), torch.float64)).norm(dim=1), nearest, rtol=0, atol=1e-12)


@given(st.lists(st.integers(0, 3), max_size=3))
@settings(max_examples=20, deadline=None)
def test_any_leading_shape(shape):
    x = torch.randn(*shape, 8, generator=problems.seeded(3))
    before, codes = x.clone(), encode(x)
    assert codes.shape == x.shape[:-1] and codes.dtype == torch.int32
    assert decode(codes).shape == x.shape and torch.equal(x, before)


def test_chunks_do_not_matter():
    x = torch.randn(2500, 8, generator=problems.seeded(4))
    assert torch.equal(encode(x), torch.cat([encode(row) for row in x.split(7)]))


def test_dtypes(book):
    x = torch.randn(50, 8, generator=problems.seeded(5)).to(torch.bfloat16)
    assert torch.equal(encode(x), encode(x.float()))
    codes = encode(x)
    for dtype in (torch.uint16, torch.int64):
        assert torch.equal(decode(codes.to(dtype)), decode(codes))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(decode(codes, dtype).float(), decode(codes))


def test_error_of_a_gaussian():
    """Two bits a weight: 0.0914 of the variance, where the best four levels leave 0.1175 and evenly spaced ones 0.1188."""
    x = torch.randn(8000, 8, generator=problems.seeded(6))

    def error(scale):
        return float((x - scale * decode(encode(x / scale))).square().mean())

    step = 0.9957  # of the best uniform grid, Max 1960
    uniform = float((x - step * ((x / step + 1.5).round().clamp(0, 3) - 1.5)).square().mean())
    threshold, inner, outer = 0.9816, 0.4528, 1.510  # of the best four levels
    lloyd = float((x.abs() - torch.where(x.abs() < threshold, inner, outer)).square().mean())
    assert uniform == pytest.approx(0.1188, abs=0.002) and lloyd == pytest.approx(0.1175, abs=0.002)
    best = error(GAUSSIAN_SCALE)
    assert best == pytest.approx(0.0914, abs=0.001)
    assert best < 0.79 * lloyd
    assert min(error(GAUSSIAN_SCALE - 0.05), error(GAUSSIAN_SCALE + 0.05)) > best


def test_refusals():
    for x in (torch.ones(3, 7), torch.tensor(1.0), torch.ones(3, 8, dtype=torch.int64), [1.0] * 8):
        with pytest.raises(UsageError, match="vectors of 8 values"):
            encode(x)
    with pytest.raises(GridError, match="NaN"):
        encode(torch.tensor([[1.0] * 7 + [float("nan")]]))
    with pytest.raises(UsageError, match="integer codes"):
        decode(torch.ones(3))
    with pytest.raises(UsageError, match="integer codes"):
        decode([3])
    for code in (-1, 65536):
        with pytest.raises(UsageError, match="16 bits"):
            decode(torch.tensor([code]))
