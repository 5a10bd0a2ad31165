"""The explorer of chapter 05 computes the losses of lqedu.methods.awq in float64, and moves."""

import itertools

import pytest
import torch

import lqedu.viz
from lqedu.formats import IntGrid, ScaleConvention
from lqedu.methods.awq import channel_scale, scaled_rounding, weight_magnitude
from lqedu.rounding import nearest, proxy_loss
from tests import problems
from tests.viz.js import compute, explorer_page, move, picture

W = problems.weight(6, 32, seed=0, dtype=torch.float64)
H = problems.hessian(32, seed=1, dtype=torch.float64)
ACTIVATION = 0.8 * H.diagonal().sqrt()
STRONGEST = int(ACTIVATION.argmax())
DATA = {"w": W.tolist(), "h": H.tolist(), "activation": ACTIVATION.tolist(), "strongest": STRONGEST}
START = {"bits": 3, "group": 32, "gain": 1, "alpha": 0.5, "path": "awq"}


def _grid(one: dict) -> IntGrid:
    return IntGrid(
        one["bits"],
        granularity="group",
        group_size=one["group"],
        convention=ScaleConvention.MINMAX,
        scale_dtype=torch.float64,
    )


def _scale(a: torch.Tensor, m: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """The package's formula with both exponents, in float64."""
    s = (a**alpha / (m**beta + 1e-4)).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def test_numbers_equal_python():
    cases = itertools.product((2, 4), (32, 8), (1, 6), ("awq", "duo"))
    inputs = [DATA | {"bits": b, "group": g, "gain": k, "path": p, "alpha": 0.35} for b, g, k, p in cases]
    for one, got in zip(inputs, compute("awq_search", inputs), strict=True):
        gain = torch.ones(32, dtype=torch.float64)
        gain[STRONGEST] = one["gain"]
        h, a, grid = H * torch.outer(gain, gain), ACTIVATION * gain, _grid(one)
        m = weight_magnitude([W], one["group"]).double()
        none = proxy_loss(W - nearest(W, grid)[0].dequantize(torch.float64), h)
        assert got["none"] == pytest.approx(none, rel=1e-9)

        def loss(s: torch.Tensor, h: torch.Tensor = h, grid: IntGrid = grid, none: float = none) -> float:
            return proxy_loss(W - scaled_rounding(W, s, grid), h) / none

        awq = [loss(_scale(a, m, i / 20, 0.0)) for i in range(20)]
        assert got["landscape"][0] == got["curves"]["awq"]
        assert got["curves"]["awq"] == pytest.approx(awq, rel=1e-6)
        assert got["best"]["awq"] == awq.index(min(awq))
        assert got["scale"] == pytest.approx(
            channel_scale(a, 0.35, m if one["path"] == "duo" else None).tolist(), rel=1e-4
        )
        # m is float32 in the package: a code near a tie may differ, and moves the loss by a little
        assert got["curves"]["duo"] == pytest.approx(
            [loss(_scale(a, m, i / 20, 1 - i / 20)) for i in range(20)], rel=0.02
        )
        assert got["landscape"][2] == pytest.approx([loss(_scale(a, m, i / 20, 0.5)) for i in range(20)], rel=0.02)


@pytest.mark.parametrize("width", [320, 1280])
def test_controls_change_the_picture(width: int):
    explorer = lqedu.viz.explorer("awq_search", DATA | START, title="A search", description="Losses over α.")
    with explorer_page(explorer, width=width) as page:
        seen = [picture(page)]
        for control in range(3):
            move(page, control)
            seen.append(picture(page))
        assert len(set(seen)) == 4
