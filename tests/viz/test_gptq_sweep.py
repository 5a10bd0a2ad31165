"""The explorer of chapter 04 sweeps exactly as lqedu.rounding.gptq does in float64, and moves."""

import itertools

import pytest
import torch

import lqedu.viz
from lqedu.formats import IntGrid
from lqedu.rounding import gptq, nearest
from tests import problems
from tests.viz.js import compute, explorer_page, move, picture

W = problems.weight(5, 8, seed=0, dtype=torch.float64)
POWER = [1.0, 0.4, 2.5, 0.8, 1.6, 0.3, 1.1, 3.0]


def _hessian(correlation: float) -> torch.Tensor:
    power = torch.tensor(POWER, dtype=torch.float64)
    mixed = correlation * torch.outer(power.sqrt(), power.sqrt())
    return mixed.fill_diagonal_(0) + torch.diag(power)


def test_numbers_equal_python():
    cases = list(itertools.product((2, 3, 5), (0.0, 0.4, 0.95), (0, 3, 8)))
    inputs = [{"w": W.tolist(), "power": POWER, "bits": b, "correlation": c, "step": step} for b, c, step in cases]
    for one, got in zip(inputs, compute("gptq_sweep", inputs), strict=True):
        h = _hessian(one["correlation"])
        grid = IntGrid(one["bits"], scale_dtype=torch.float64)
        damped = h + 0.01 * h.diagonal().mean() * torch.eye(8)
        want, report = gptq(W, damped, grid, damping=0.0)
        near, near_report = nearest(W, grid, hessian=damped)
        assert got["final"] == want.codes.tolist()
        assert got["nearest"] == near.codes.tolist()
        assert got["loss"] == pytest.approx(report.proxy_loss, rel=1e-9)
        assert got["nearest_loss"] == pytest.approx(near_report.proxy_loss, rel=1e-9)
        shown = [[None if i >= one["step"] else q for i, q in enumerate(row)] for row in want.codes.tolist()]
        assert got["codes"] == shown


@pytest.mark.parametrize("width", [320, 1280])
def test_controls_change_the_picture(width: int):
    data = {"w": W.tolist(), "power": POWER, "bits": 3, "correlation": 0.8, "step": 3}
    explorer = lqedu.viz.explorer("gptq_sweep", data, title="A sweep", description="GPTQ on a small weight.")
    with explorer_page(explorer, width=width) as page:
        seen = [picture(page)]
        for control in range(3):
            move(page, control)
            seen.append(picture(page))
        assert len(set(seen)) == 4
