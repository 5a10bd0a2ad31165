"""Clipping: the objective never rises, equals its definition on tokens, and finds the best factor by brute force."""

import pytest
import torch

from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.formats import IntGrid, ScaleConvention
from lqedu.rounding import nearest
from lqedu.transforms.clipping import clip_weight

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
