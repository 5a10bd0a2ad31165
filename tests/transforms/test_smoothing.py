"""Smoothing scales: ranges after the migration by their closed forms, dead channels, and refusals."""

import pytest
import torch

from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.transforms.smoothing import channel_max, smoothing_scales


def _ranges(n: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.exp(2 * torch.randn(n, generator=g)), torch.exp(torch.randn(n, generator=g))


def test_half_gives_both_the_geometric_mean():
    x, w = _ranges()
    s = smoothing_scales(x, w)
    assert torch.allclose(x / s, (x * w).sqrt(), rtol=1e-6)
    assert torch.allclose(w * s, (x * w).sqrt(), rtol=1e-6)


def test_the_ends_give_one_of_them_unit_ranges():
    x, w = _ranges()
    assert torch.allclose(x / smoothing_scales(x, w, 1.0), torch.ones(50))
    assert torch.allclose(w * smoothing_scales(x, w, 0.0), torch.ones(50))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.85])
def test_the_range_that_is_moved_follows_alpha(alpha):
    """log(x / s) = (1 - α)(log x + log w) and log(w s) = α (log x + log w)."""
    x, w = _ranges()
    s, both = smoothing_scales(x, w, alpha), x.log() + w.log()
    assert torch.allclose((x / s).log(), (1 - alpha) * both, atol=1e-5)
    assert torch.allclose((w * s).log(), alpha * both, atol=1e-5)


def test_a_channel_that_was_never_active_keeps_its_scale():
    s = smoothing_scales(torch.tensor([0.0, 4.0]), torch.tensor([3.0, 0.0]))
    assert float(s[0]) == 1.0
    assert bool(torch.isfinite(s).all()) and bool((s > 0).all())


def test_channel_max_is_over_rows_and_linears():
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(rows, 7, generator=g) for rows in (3, 11)]
    assert torch.equal(channel_max(weights), torch.cat(weights).abs().max(0).values)
    with pytest.raises(UsageError, match="at least one weight"):
        channel_max([])


@pytest.mark.parametrize(
    ("x", "w", "alpha", "error", "match"),
    [
        (torch.ones(3), torch.ones(4), 0.5, UsageError, r"\[in\]"),
        (torch.ones(3), torch.ones(3), 1.5, UsageError, "alpha"),
        (torch.tensor([1.0, torch.inf]), torch.ones(2), 0.5, CalibrationError, "NaN or infinite"),
        (torch.tensor([1.0, torch.nan]), torch.ones(2), 0.5, CalibrationError, "NaN or infinite"),
        (torch.ones(2), torch.tensor([1.0, torch.inf]), 0.5, GridError, "NaN or infinite"),
        (torch.tensor([1.0, -1.0]), torch.ones(2), 0.5, UsageError, "negative"),
        (torch.ones(2), torch.tensor([1.0, -1.0]), 0.5, UsageError, "negative"),
    ],
)
def test_refusals(x, w, alpha, error, match):
    with pytest.raises(error, match=match):
        smoothing_scales(x, w, alpha)
