"""The explorer of chapter 16 has the values of the package's formats, rounds as they do, and moves."""

import itertools

import pytest
import torch

import lqedu.viz
from lqedu.formats.smallfloat import FORMATS, FloatFormat
from tests.viz.js import assert_every_control_matters, compute, explorer_page

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "normal": torch.randn(150, generator=GENERATOR, dtype=torch.float64).abs(),
    "wide": torch.randn(150, generator=GENERATOR, dtype=torch.float64).mul(4).exp(),
}
TENSORS = {name: (x / x.max()).sort().values.tolist() for name, x in TENSORS.items()}
TENSORS["ties"] = [i / 128 for i in range(129)]
START = {"tensor": "wide", "exponent": 4, "mantissa": 3, "bias": 0, "special": "fn", "shift": 0, "axis": "log"}


def _format(one: dict) -> FloatFormat:
    bias = 2 ** (one["exponent"] - 1) - 1 + (one["special"] == "fnuz") + one["bias"]
    return FloatFormat("", one["exponent"], one["mantissa"], bias, one["special"])


def test_numbers_equal_the_package() -> None:
    sizes = [
        (e, m) for e, m in itertools.product((2, 3, 4, 5), (1, 2, 3, 5)) if e + m <= 7
    ]  # codes of the package fill a byte
    choices = itertools.product(TENSORS, sizes, (0, -2), ("ieee", "fn", "fnuz", "none"), (0, -3, 7, 16))
    inputs = [
        {
            "tensors": TENSORS,
            "tensor": t,
            "exponent": e,
            "mantissa": m,
            "bias": b,
            "special": s,
            "shift": shift,
            "axis": "log",
        }
        for t, (e, m), b, s, shift in choices
    ]
    for one, got in zip(inputs, compute("number_line", inputs), strict=True):
        form = _format(one)
        known = form.decode(torch.arange(form.top_code + 1, dtype=torch.uint8), torch.float64)
        assert got["all"] == known.tolist()
        assert (got["top"], got["normal"], got["tiny"]) == (form.max, form.smallest_normal, form.smallest_subnormal)
        x = torch.tensor(TENSORS[one["tensor"]], dtype=torch.float64) / (2.0 ** one["shift"] / form.max)
        levels = 2 ** (one["exponent"] + one["mantissa"]) - 1
        step = form.max / levels
        rounded = {
            "float": form.decode(form.encode(x), torch.float64),
            "integer": torch.round(x / step).clamp(max=levels) * step,
        }
        for name, x_hat in rounded.items():
            error = float((x_hat - x).square().sum() / x.square().sum())
            assert got[name]["error"] == pytest.approx(error, rel=1e-9, abs=1e-15)
            assert got[name]["zeros"] == pytest.approx(float(((x_hat == 0) & (x > 0)).double().mean()))
        assert got["saturated"] == pytest.approx(float((x > form.max * (1 + 1e-12)).double().mean()))


def test_the_known_formats_are_among_them() -> None:
    for name in ("E4M3", "E5M2", "E4M3FNUZ", "E5M2FNUZ", "E2M1", "E3M2", "E2M3"):
        form = FORMATS[name]
        one = START | {"tensors": TENSORS, "exponent": form.exponent_bits, "mantissa": form.mantissa_bits}
        (got,) = compute("number_line", [one | {"special": form.specials}])
        assert (got["top"], got["tiny"], len(got["all"])) == (form.max, form.smallest_subnormal, form.top_code + 1)


@pytest.fixture(scope="module")
def example():
    data = {"tensors": TENSORS} | START
    return lqedu.viz.explorer("number_line", data, title="Small floats on a line", description="Choose the bits.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=range(7))


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("number_line", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert "E4M3, bias 7, one NaN: 126 positive values" in words and "to 448" in words
    assert f"error {100 * result['float']['error']:.2g} % of the energy" in words.replace("0.070", "0.07")
