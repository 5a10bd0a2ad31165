"""The explorer of chapter 06 takes the steps of lqedu.rounding.hqq, and moves."""

import pytest
import torch

import lqedu.viz
from lqedu.formats import IntGrid, ScaleConvention
from lqedu.rounding.hqq import iterates
from tests import problems
from tests.viz.js import compute, explorer_page, move, picture

WEIGHTS = torch.randn(24, generator=problems.seeded(6), dtype=torch.float64) * 0.2
DATA = {"weights": WEIGHTS.tolist(), "bits": 2, "beta": 100, "p": 0.7, "steps": 8}


def test_numbers_equal_python():
    inputs = [
        {**DATA, "bits": bits, "beta": beta, "p": p} for bits in (2, 3, 4) for beta in (10, 100) for p in (0.5, 1)
    ]
    for one, got in zip(inputs, compute("hqq", inputs), strict=True):
        grid = IntGrid(one["bits"], zero_point="float", convention=ScaleConvention.MINMAX, scale_dtype=torch.float64)
        steps = list(iterates(WEIGHTS[None], grid, p=one["p"], beta=one["beta"], kappa=1.0, iterations=one["steps"]))
        assert got["zeros"] == pytest.approx([float(i.zero) for i in steps], rel=1e-9, abs=1e-12)
        assert got["errors"] == pytest.approx([float(i.error) for i in steps], rel=1e-9)
        assert got["codes"] == steps[-1].codes.flatten().tolist()
        assert got["best"] == min(range(len(steps)), key=lambda i: got["errors"][i])


@pytest.mark.parametrize("width", [320, 1280])
def test_controls_change_the_picture(width: int):
    explorer = lqedu.viz.explorer("hqq", DATA, title="A zero point", description="A group of weights on its grid.")
    with explorer_page(explorer, width=width) as page:
        seen = [picture(page)]
        for control in range(4):
            move(page, control)
            seen.append(picture(page))
        assert len(set(seen)) == 5
