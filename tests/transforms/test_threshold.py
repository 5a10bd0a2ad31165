"""Adaptive smoothing: the formula, the search against a slow restatement, and what a threshold cannot change."""

import pytest
import torch
from torch import Tensor

from lqedu.errors import CalibrationError, UsageError
from lqedu.formats import IntGrid, ScaleConvention
from lqedu.formats.activation import ActivationGrid
from lqedu.transforms.threshold import search_threshold, threshold_scales
from tests import problems

GRID = IntGrid(4, True, convention=ScaleConvention.MAX_CODE)
A8 = ActivationGrid(8)


def _problem(loud: float = 40.0) -> tuple[Tensor, Tensor]:
    g = problems.seeded(3)
    x = torch.randn(64, 32, generator=g) * torch.rand(32, generator=g).add(0.2)
    x[:, 5] *= loud
    x[:, 9] *= loud / 3
    return problems.weight(24, 32, seed=4), x


def _oracle(w: Tensor, x: Tensor, t: float) -> float:
    """The loss of one threshold in float64, with loops over rows and tokens and no code of the package."""
    w, x = w.double(), x.double()
    s = [max(1.0, float(x[:, j].max()) / t, float(-x[:, j].min()) / t) for j in range(x.shape[1])]
    scale = torch.tensor(s, dtype=torch.float64)
    w_hat = torch.stack([torch.round(r / (r.abs().max() / 7)) * (r.abs().max() / 7) for r in w * scale])
    x_hat = torch.stack([torch.round(r / (r.abs().max() / 127)) * (r.abs().max() / 127) for r in x / scale])
    return float((x_hat @ w_hat.T - x @ w.T).square().sum(1).mean())


def test_only_channels_above_the_threshold_change_and_end_on_it() -> None:
    largest = torch.tensor([0.0, 0.5, 2.0, 3.0, 80.0])
    scale = threshold_scales(largest, 2.0)
    assert torch.equal(scale, torch.tensor([1.0, 1.0, 1.0, 1.5, 40.0]))
    assert float((largest / scale).max()) == 2.0


def test_the_search_is_the_argmin_of_an_independent_loss() -> None:
    w, x = _problem()
    found = search_threshold(w, x, x.abs().amax(0), GRID, A8, count=24)
    losses = [_oracle(w, x, t) for t in found.thresholds]
    # scales of a weight are stored in float16 here and in float64 there: a few codes at ties differ
    assert torch.allclose(torch.tensor(found.losses), torch.tensor(losses), rtol=0.05)
    assert min(found.losses) == found.losses[found.thresholds.index(found.threshold)]
    assert _oracle(w, x, found.threshold) <= 1.02 * min(losses)
    assert torch.equal(found.scale, threshold_scales(x.abs().amax(0), found.threshold))


def test_loud_channels_are_smoothed_and_quiet_problems_are_left_alone() -> None:
    w, x = _problem()
    found = search_threshold(w, x, x.abs().amax(0), GRID, A8)
    assert found.losses[found.thresholds.index(found.threshold)] < 0.8 * found.losses[0]
    smoothed = (found.scale > 1).nonzero().flatten().tolist()
    assert {5, 9} <= set(smoothed) and len(smoothed) < 20
    assert search_threshold(w, x, x.abs().amax(0), GRID, None).threshold > 0  # weights alone can be searched too


def test_the_range_of_thresholds_runs_from_no_smoothing_to_equal_channels() -> None:
    w, x = _problem()
    largest = x.abs().amax(0)
    found = search_threshold(w, x, largest, GRID, A8, count=10)
    assert found.thresholds[0] == float(largest.max()) and torch.equal(
        threshold_scales(largest, found.thresholds[0]), torch.ones(32)
    )
    equal = largest / threshold_scales(largest, found.thresholds[-1])
    assert torch.allclose(equal, equal[:1].expand(32), rtol=1e-5)
    # below the quietest channel all scales grow by one factor, which neither grid can see
    again = search_threshold(w, x / 4, largest / 4, GRID, A8, count=10)
    assert torch.allclose(torch.tensor(again.losses) * 16, torch.tensor(found.losses), rtol=1e-2)


def test_nothing_active_nothing_changed() -> None:
    found = search_threshold(torch.ones(2, 4), torch.zeros(3, 4), torch.zeros(4), GRID, A8)
    assert torch.equal(found.scale, torch.ones(4)) and found.losses == []
    x = torch.zeros(3, 4)
    x[:, 1] = 2.0
    assert torch.equal(search_threshold(torch.ones(2, 4), x, x.amax(0), GRID, A8).scale, torch.ones(4))


def test_what_does_not_fit_is_refused() -> None:
    w, x = _problem()
    with pytest.raises(UsageError, match="count"):
        search_threshold(w, x, x.abs().amax(0), GRID, A8, count=1)
    with pytest.raises(UsageError, match="a search needs"):
        search_threshold(w, x[:, 1:], x.abs().amax(0), GRID, A8)
    with pytest.raises(CalibrationError, match="NaN"):
        search_threshold(w, x / 0 * 0, x.abs().amax(0), GRID, A8)
    with pytest.raises(UsageError, match="threshold"):
        threshold_scales(torch.ones(3), 0)
