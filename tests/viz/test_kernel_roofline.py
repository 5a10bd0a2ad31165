"""The explorer of chapter 18 counts bytes, operations and shares of the floor, and moves."""

import itertools

import pytest

import lqedu.viz
from tests.viz.js import assert_every_control_matters, compute, explorer_page

DATA = {
    "kernels": {
        "FP16": {
            "bits": 16,
            "act": 2,
            "peak": 7e14,
            "measured": {"up": [[1, 37.0], [16, 38.0], [1024, 130.0]], "down": [[1, 38.0], [16, 40.0]]},
        },
        "W4A8": {"bits": 4.02, "act": 1, "peak": 1.3e15, "measured": {"up": [[1, 11.0], [16, 12.0], [1024, 75.0]]}},
    },
    "shapes": {"up": [11008, 4096], "down": [4096, 11008]},
    "bandwidth": 3e12,
}
START = {"kernel": "W4A8", "shape": "up", "exponent": 4}


def test_numbers_equal_python() -> None:
    inputs = [DATA | START | {"shape": s, "exponent": e} for s, e in itertools.product(DATA["shapes"], range(14))]
    bounds = set()
    for one, got in zip(inputs, compute("kernel_roofline", inputs), strict=True):
        m, (n, k) = 2 ** one["exponent"], DATA["shapes"][one["shape"]]
        for name, kernel in DATA["kernels"].items():
            moved = n * k * kernel["bits"] / 8 + m * k * kernel["act"] + m * n * 2
            memory, arithmetic = moved / 3e12, 2 * m * n * k / kernel["peak"]
            floor = max(memory, arithmetic)
            assert got[name]["floor"] == pytest.approx(floor, rel=1e-12)
            assert got[name]["intensity"] == pytest.approx(2 * m * n * k / moved, rel=1e-12)
            bounds.add(memory >= arithmetic)
            times = dict(kernel["measured"].get(one["shape"], []))
            if m in times:
                assert got[name]["here"]["share"] == pytest.approx(floor / (times[m] * 1e-6), rel=1e-12)
                assert got[name]["here"]["rate"] == pytest.approx(2 * m * n * k / (times[m] * 1e-6), rel=1e-12)
            else:
                assert got[name]["here"] is None
    assert bounds == {True, False}


@pytest.fixture(scope="module")
def example():
    return lqedu.viz.explorer(
        "kernel_roofline", DATA | START, title="Under the roof", description="Move the number of rows."
    )


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=range(3))


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("kernel_roofline", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    share = 100 * result["W4A8"]["here"]["share"]
    assert "M = 16" in words and "bound by memory" in words and f"{share:.0f} % of what is possible" in words
