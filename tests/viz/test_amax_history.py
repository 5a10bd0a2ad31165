"""The explorer of chapter 17 scales as the package does, and moves."""

import itertools

import pytest
import torch

import lqedu.viz
from lqedu.formats.smallfloat import E4M3, E5M2
from lqedu.training import Recipe, out_of_range, scale_of
from lqedu.training.scaling import DelayedScaling
from tests.viz.js import assert_every_control_matters, compute, explorer_page

STEPS, AT = 64, 24
GENERATOR = torch.Generator().manual_seed(0)
NOISE = (0.4 * torch.randn(STEPS, generator=GENERATOR, dtype=torch.float64)).tolist()
LEVELS = torch.randn(200, generator=GENERATOR, dtype=torch.float64).mul(3).abs().neg()
LEVELS = (LEVELS - LEVELS.max()).tolist()
DATA = {"noise": NOISE, "levels": LEVELS}
START = {"format": "E4M3", "scaling": "delayed", "reach": 3, "margin": 0, "jump": 5, "lasting": False}


def test_numbers_equal_the_package() -> None:
    choices = itertools.product(("E4M3", "E5M2"), ("delayed", "current"), (0, 3, 6), (0, 2), (-9, 5, 12), (False, True))
    some = list(choices)[
        ::5
    ]  # 5 divides no count of choices, so that every value and every pair of values is among them
    inputs = [DATA | dict(zip(START, choice, strict=True)) for choice in some]
    for one, steps in zip(inputs, compute("amax_history", inputs), strict=True):
        fmt = {"E4M3": E4M3, "E5M2": E5M2}[one["format"]]
        delayed = DelayedScaling(fmt, Recipe(history=2 ** one["reach"], margin=one["margin"]))
        delayed.record(torch.tensor(2.0 ** NOISE[0]))  # the explorer begins with the first step's scale
        delayed.amax.zero_()
        for t, got in enumerate(steps):
            jump = one["jump"] if (t >= AT if one["lasting"] else t == AT) else 0
            x = torch.exp2(torch.tensor(LEVELS) + NOISE[t] + jump)
            scale = delayed(x.float()) if one["scaling"] == "delayed" else scale_of(x.max(), fmt, one["margin"])
            assert got["amax"] == pytest.approx(NOISE[t] + jump, abs=1e-9)
            assert got["scale"] == pytest.approx(float(scale.double().log2()), abs=1e-5)
            lost, saturated = out_of_range(x.float(), scale * (1 + 1e-6), fmt)  # the amax itself may lie on the edge
            assert got["lost"] == pytest.approx(lost, abs=1e-6)
            assert got["saturated"] == pytest.approx(saturated, abs=1e-6)


@pytest.fixture(scope="module")
def example():
    return lqedu.viz.explorer("amax_history", DATA | START, title="An amax that jumps", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=(0, 2, 3, 4, 5, 1))


def test_the_words_say_what_compute_says(example) -> None:
    (steps,) = compute("amax_history", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert f"{100 * steps[AT]['saturated']:.1f} % of the values saturate at that step" in words
    assert f"At most {100 * max(step['lost'] for step in steps):.1f} % of the values become zero" in words
