"""Clipping: the objective never rises, equals its definition on tokens, and finds the best factor by brute force."""

import pytest
import torch

from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.formats import IntGrid, ScaleConvention
from lqedu.formats.progressive import ProgressiveGrid
from lqedu.rounding import gptq, nearest, proxy_loss
from lqedu.rounding.progressive import progressive_nearest
from lqedu.transforms.clipping import clip_weight, fit_clipped

GRID = IntGrid(3, granularity="group", group_size=16, convention=ScaleConvention.MINMAX)


def _problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(12, 32, generator=g) * torch.exp(torch.randn(12, 32, generator=g))
    x = torch.randn(200, 32, generator=g) @ torch.randn(32, 32, generator=g)
    return w, x


def _group_losses(w: torch.Tensor, w_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Squared output error of each row and group on tokens, ``[out, groups]``: the reference's definition."""
    groups = x.view(len(x), -1, 16)
    delta = (w - w_hat).view(len(w), -1, 16)
    return torch.einsum("tgi,ogi->tog", groups, delta).square().sum(0)


def test_each_group_takes_the_best_factor_by_brute_force():
    w, x = _problem()
    clipped, factor = clip_weight(w, x.T @ x / len(x), GRID)
    limit = w.view(12, 2, 16).abs().amax(-1, keepdim=True)
    losses = []
    for i in range(10):
        candidate = w.view(12, 2, 16).clamp(-(1 - i / 20) * limit, (1 - i / 20) * limit).view(w.shape)
        losses.append(_group_losses(w, nearest(candidate, GRID)[0].dequantize(), x))
    want = 1 - torch.stack(losses).argmin(0) / 20
    assert torch.allclose(factor, want)
    got = _group_losses(w, nearest(clipped, GRID)[0].dequantize(), x)
    assert torch.allclose(got, torch.stack(losses).amin(0), rtol=1e-4)
    assert bool((got <= losses[0] * (1 + 1e-5)).all())
    assert bool((factor < 1).any())


def test_one_point_clips_nothing_and_the_argument_stays():
    w, x = _problem()
    before = w.clone()
    clipped, factor = clip_weight(w, x.T @ x, GRID, points=1)
    assert torch.equal(clipped, w) and torch.equal(w, before) and bool((factor == 1).all())


def test_bad_arguments():
    w, x = _problem()
    h = x.T @ x
    with pytest.raises(CalibrationError, match=r"\[32, 32\]"):
        clip_weight(w, h[:8, :8], GRID)
    with pytest.raises(GridError, match="NaN"):
        clip_weight(w * float("nan"), h, GRID)
    with pytest.raises(UsageError, match="points"):
        clip_weight(w, h, GRID, points=0)
    with pytest.raises(UsageError, match="points"):
        clip_weight(w, h, GRID, points=2.5)
    with pytest.raises(GridError, match="does not divide"):
        clip_weight(w, h, IntGrid(3, granularity="group", group_size=24))
    with pytest.raises(UsageError, match="most"):
        clip_weight(w, h, GRID, most=1.0)


@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("grid", ["integer", "progressive"])
def test_a_fitted_grid_is_the_best_of_its_candidates(grid, group_size):
    """Every group's own loss on tokens, computed here for each factor; the weight that is rounded is not clamped."""
    w, x = _problem(1)
    progressive = grid == "progressive"
    grid = ProgressiveGrid(group_size) if progressive else IntGrid(4, granularity="group", group_size=group_size)
    grouped = w.view(12, -1, group_size)
    limit = grouped.abs().amax(-1, keepdim=True)
    channel = grid.fit(w)[0] if progressive else None

    def rounded(fitted):
        if progressive:
            return progressive_nearest(w, grid, fitted=fitted)[0].dequantize()
        return nearest(w, grid, fitted=fitted)[0].dequantize()

    def losses(w_hat):
        delta = (w - w_hat).view(12, -1, group_size)
        return torch.einsum("tgi,ogi->tog", x.view(len(x), -1, group_size), delta).square().sum(0)

    candidates = []
    for i in range(10):
        clamped = grouped.clamp(-(1 - i / 20) * limit, (1 - i / 20) * limit).view(w.shape)
        candidates.append(losses(rounded(grid.fit(clamped, channel) if progressive else grid.fit(clamped))))
    got = losses(rounded(fit_clipped(w, x.T @ x / len(x), grid)))
    assert torch.allclose(got, torch.stack(candidates).amin(0), rtol=1e-4)
    assert float((got < 0.99 * candidates[0]).float().mean()) > 0.2  # the others lose nothing


def test_a_fitted_grid_per_channel_sees_the_whole_hessian():
    w, x = _problem(2)
    h, grid = x.T @ x / len(x), IntGrid(4)
    plain, clipped = (nearest(w, grid, hessian=h, fitted=f)[1].proxy_loss for f in (None, fit_clipped(w, h, grid)))
    assert clipped < 0.9 * plain


def test_error_feedback_makes_up_for_what_a_range_cuts_off():
    """GPTQ rounds the weight itself on the clipped grid: less loss than rounding the clamped weight."""
    w, x = _problem(3)
    h, grid = x.T @ x / len(x), IntGrid(3)
    q, report = gptq(w, h, grid, fitted=fit_clipped(w, h, grid))
    clamped = gptq(clip_weight(w, h, grid)[0], h, grid)[0]
    assert report.proxy_loss < proxy_loss(w - clamped.dequantize(), h)
    assert torch.equal(q.scale, fit_clipped(w, h, grid)[0])


def test_one_point_fits_as_usual_and_bad_arguments_are_refused():
    w, x = _problem()
    h = x.T @ x
    for grid in (GRID, ProgressiveGrid(16)):
        got, want = fit_clipped(w, h, grid, points=1), grid.fit(w)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        for options in ({"points": 0}, {"most": 1.0}):
            with pytest.raises(UsageError):
                fit_clipped(w, h, grid, **options)
    with pytest.raises(GridError, match="does not divide"):
        fit_clipped(w, h, ProgressiveGrid(24))
    with pytest.raises(GridError, match="axis=1"):
        fit_clipped(w, h, IntGrid(4, granularity="group", group_size=4, axis=0))
