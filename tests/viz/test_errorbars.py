"""The explorer of chapter 03 has the means and standard errors of lqedu.evaluation, and moves."""

import math

import pytest
import torch

import lqedu.viz
from lqedu.evaluation import Perplexity, paired
from tests import problems
from tests.viz.js import compute, explorer_page, move, picture

BASE = (3 + 0.2 * torch.randn(32, generator=problems.seeded(1), dtype=torch.float64)).tolist()
WORSE = [x + 0.02 + 0.01 * math.sin(i) for i, x in enumerate(BASE)]
DATA = {"losses": {"fp32": BASE, "rounded": WORSE}, "other": "rounded", "count": 16, "scale": 1}


def _perplexity(losses: list[float]) -> Perplexity:
    x = torch.tensor(losses, dtype=torch.float64)
    return Perplexity(0.0, float(x.mean()), float(x.std() / len(losses) ** 0.5), 0, tuple(losses), "same")


def test_numbers_equal_python():
    inputs = [{**DATA, "count": count, "scale": scale} for count in (4, 17, 32) for scale in (0.1, 1)]
    for one, got in zip(inputs, compute("errorbars", inputs), strict=True):
        a = BASE[: one["count"]]
        b = [x + one["scale"] * (y - x) for x, y in zip(a, WORSE, strict=False)]
        want = paired(_perplexity(b), _perplexity(a))
        assert got["paired"]["mean"] == pytest.approx(want.delta_nll, rel=1e-9)
        assert got["paired"]["stderr"] == pytest.approx(want.stderr, rel=1e-6)
        assert got["a"]["stderr"] == pytest.approx(_perplexity(a).stderr, rel=1e-9)
        alone = math.hypot(_perplexity(a).stderr, _perplexity(b).stderr)
        assert got["unpaired"]["stderr"] == pytest.approx(alone, rel=1e-9)
        assert got["paired_seen"] == (abs(want.delta_nll) > 2 * want.stderr)


@pytest.mark.parametrize("width", [320, 1280])
def test_controls_change_the_picture(width: int):
    losses = {"fp32": BASE, "rounded": WORSE, "other": [x + 0.3 for x in WORSE]}
    explorer = lqedu.viz.explorer(
        "errorbars", DATA | {"losses": losses}, title="Error bars", description="Two intervals."
    )
    with explorer_page(explorer, width=width) as page:
        seen = [picture(page)]
        for control in range(3):
            move(page, control)
            seen.append(picture(page))
        assert len(set(seen)) == 4
