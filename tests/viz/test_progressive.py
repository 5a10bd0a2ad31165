"""The explorer of chapter 12 fits, encodes and decodes as the package does, and moves."""

import itertools

import pytest
import torch

import lqedu.viz
from lqedu.errors import GridError
from lqedu.formats.progressive import ProgressiveGrid, progressive_quantize
from tests.viz.js import assert_every_control_matters, compute, explorer_page

CHOICES = [
    {"lo": lo, "hi": hi, "protective": p, "zero": zero}
    for lo, hi, p, zero in itertools.product(
        (-127, -120, -113, -97, -57, -7, 0),
        (0, 3, 8, 22, 64, 119, 120, 127),
        (100, 119, 120, 121, 127),
        ("code", "offset"),
    )
]


def _weight(lo: int, hi: int, protective: int) -> torch.Tensor:
    """A row whose channel scale is 1, and whose second group runs from lo to hi."""
    return torch.tensor([[float(protective), 0.0, float(lo), float(hi)]])


def test_numbers_equal_the_package() -> None:
    for one, got in zip(CHOICES, compute("progressive", CHOICES), strict=True):
        p = one["protective"]
        lo, hi = max(one["lo"], -p), min(one["hi"], p)
        grid = ProgressiveGrid(2, one["zero"], p)
        w = _weight(lo, hi, p)
        channel, group, zero = grid.fit(w)
        codes = grid.encode(w, channel, group, zero)
        assert float(channel) == 1
        assert (got["lo"], got["hi"], got["scale"], got["zero"]) == (lo, hi, int(group[0, 1]), int(zero[0, 1]))
        assert got["codes"] == codes[0, 2:].tolist()
        s, z, q = int(group[0, 1]), int(zero[0, 1]), torch.arange(16)
        points = (q - z) * s if one["zero"] == "code" else q * s - z
        assert got["points"] == points.tolist()
        assert got["ends"] == [got["points"][code] for code in got["codes"]]
        wrapped = points.to(torch.int8).tolist()
        assert got["wrapped"] == [wrapped[code] for code in got["codes"]]
        assert got["outside"] == int(((points < -128) | (points > 127)).sum())
        try:
            grid.decode_int8(codes[:, 2:], group[:, 1:], zero[:, 1:])
        except GridError:
            assert got["overflow"]
        else:
            assert not got["overflow"]


def test_nothing_overflows_in_the_protective_range() -> None:
    for one, got in zip(CHOICES, compute("progressive", CHOICES), strict=True):
        if one["protective"] <= ProgressiveGrid(2, one["zero"]).protective:
            assert not got["overflow"]
            assert one["zero"] == "code" or not got["outside"]


@pytest.fixture(scope="module")
def example():
    data = {"lo": -90, "hi": 100, "protective": 119, "zero": "code"}
    return lqedu.viz.explorer("progressive", data, title="A group in its channel", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=range(4))


def test_the_words_name_the_overflow() -> None:
    data = {"lo": -113, "hi": 127, "protective": 120, "zero": "code"}
    explorer = lqedu.viz.explorer("progressive", data, title="A group in its channel", description="Move the sliders.")
    with explorer_page(explorer, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert "128 is stored as -128" in words and "the group from -113 to 120 gets the scale 16" in words
    assert progressive_quantize(_weight(-113, 119, 119), ProgressiveGrid(2)).int8()[0, 3] == 105
