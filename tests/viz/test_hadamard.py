"""The explorer of chapter 10 transforms and rounds as the package does, and moves."""

import itertools

import pytest
import torch

import lqedu.viz
from lqedu.formats.activation import ActivationGrid
from lqedu.linalg import fast_hadamard
from tests.viz.js import assert_every_control_matters, compute, explorer_page

NOISE = torch.randn(64, generator=torch.Generator().manual_seed(0))
COINS = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(1)) * 2 - 1
DATA = {"noise": NOISE.tolist(), "coins": COINS.tolist()}


def _numbers(x: torch.Tensor, bits: int) -> tuple[float, float]:
    """Peak and lost energy in float64."""
    energy, code = x.square().sum(), 2 ** (bits - 1) - 1
    if not energy:
        return 0.0, 0.0
    scale = x.abs().max() / code
    x_hat = scale * torch.round(x / scale).clamp(-code - 1, code)
    return float(x.abs().max() / (energy / len(x)).sqrt()), float((x_hat - x).square().sum() / energy)


def test_numbers_equal_python() -> None:
    choices = list(itertools.product((8, 16, 64), ("noise", "ones"), (0, 20), (0, 5, 63), (False, True), (2, 4, 8)))
    keys = ("n", "background", "outlier", "place", "signs", "bits")
    inputs = [DATA | dict(zip(keys, choice, strict=True)) for choice in choices]
    for one, got in zip(inputs, compute("hadamard", inputs), strict=True):
        n = one["n"]
        x = torch.ones(n).double() if one["background"] == "ones" else torch.tensor(one["noise"][:n]).double()
        x[one["place"] % n] += one["outlier"]
        x = x * COINS[:n] if one["signs"] else x
        assert len(got["stages"]) == n.bit_length()
        assert got["bound"] == pytest.approx(float(x.abs().sum() / x.norm()), rel=1e-9)
        for step, stage in enumerate(got["stages"]):
            want = fast_hadamard(x.view(-1, 2**step)).flatten()  # the steps so far transform runs of 2^step features
            values = torch.tensor(stage["values"], dtype=torch.float64)
            assert torch.allclose(values, want, atol=1e-12)
            peak, error = _numbers(values, one["bits"])
            assert stage["peak"] == pytest.approx(peak, rel=1e-9)
            assert stage["error"] == pytest.approx(error, rel=1e-9, abs=1e-15)
        assert got["stages"][-1]["peak"] <= got["bound"] + 1e-9


def test_it_rounds_as_the_package() -> None:
    (got,) = compute(
        "hadamard", [DATA | {"n": 64, "background": "noise", "outlier": 9, "place": 3, "signs": True, "bits": 4}]
    )
    for stage in got["stages"]:
        x = torch.tensor(stage["values"])
        lost = (ActivationGrid(4).round_trip(x) - x).square().sum() / x.square().sum()
        assert stage["error"] == pytest.approx(float(lost), rel=1e-4)


def test_zeros_are_no_error() -> None:
    zeros = {"noise": [0.0] * 64, "coins": COINS.tolist()}
    (got,) = compute(
        "hadamard", [zeros | {"n": 16, "background": "noise", "outlier": 0, "place": 0, "signs": False, "bits": 4}]
    )
    assert got["bound"] == got["stages"][-1]["peak"] == got["stages"][-1]["error"] == 0


@pytest.fixture(scope="module")
def example():
    data = DATA | {"n": 32, "background": "noise", "outlier": 20, "place": 5, "signs": False, "bits": 4, "step": 5}
    return lqedu.viz.explorer("hadamard", data, title="Fast Hadamard transform", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=range(7))


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("hadamard", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    first, last = result["stages"][0], result["stages"][-1]
    assert f"the peak is {first['peak']:.2f} at first" in words and f"{last['peak']:.2f} at the end" in words
