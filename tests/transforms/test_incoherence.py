"""Incoherence processing: an exact change of basis, the best diagonal, and lower μ where μ was high."""

import math

import pytest
import torch

from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.linalg import ldl_upper
from lqedu.rounding import proxy_loss
from lqedu.transforms.incoherence import (
    gaussian_range,
    hessian_incoherence,
    incoherent,
    rescaling,
    weight_incoherence,
)
from tests import problems
from tests.compare import relative_error

SHAPES = [(24, 48), (16, 96), (13, 31)]  # the last one: primes, so that the factors are 1 x n


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rescale", "rotate"), [(True, True), (True, False), (False, True), (False, False)])
def test_nothing_changes_before_rounding(shape: tuple[int, int], rescale: bool, rotate: bool) -> None:
    w, h = problems.weight(*shape, seed=1), problems.hessian(shape[1], seed=2)
    transforms, rotated, _ = incoherent(w, h, rescale=rescale, rotate=rotate)
    x = torch.randn(5, shape[1], generator=problems.seeded(3))
    y = transforms.output(transforms.input(x) @ rotated.T)
    assert relative_error(y, x @ w.T) <= 1e-5
    assert relative_error(transforms.undo(rotated), w) <= 1e-6
    u = torch.eye(shape[0]) if transforms.u is None else transforms.u.matrix()
    v = torch.eye(shape[1]) if transforms.v is None else transforms.v.matrix()
    d = torch.ones(shape[1]) if transforms.channel_scale is None else transforms.channel_scale.float()
    assert relative_error(rotated, u @ (w * d) @ v.T) <= 1e-5  # the definition, with dense matrices


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_the_same_in_both_bases(shape: tuple[int, int]) -> None:
    w, h = problems.weight(*shape, seed=4, dtype=torch.float64), problems.hessian(shape[1], seed=5, dtype=torch.float64)
    transforms, _, h_rotated = incoherent(w, h)
    error = torch.randn(shape, generator=problems.seeded(6), dtype=torch.float64)
    assert proxy_loss(error, h_rotated) == pytest.approx(proxy_loss(transforms.undo(error), h), rel=1e-6)
    assert torch.equal(h_rotated, h_rotated.T)
    tokens = torch.linalg.cholesky(h).T * math.sqrt(len(h))  # inputs whose Hessian is h
    x = transforms.input(tokens)
    assert relative_error(x.T @ x / len(h), h_rotated) <= 1e-6


def test_what_incoherence_means() -> None:
    assert weight_incoherence(torch.eye(6)) == pytest.approx(math.sqrt(6))
    assert weight_incoherence(-torch.ones(3, 5)) == pytest.approx(1)
    assert weight_incoherence(torch.zeros(3, 5)) == 0
    assert hessian_incoherence(torch.diag(torch.arange(1.0, 10.0))) == pytest.approx(3)
    fourier = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert hessian_incoherence(fourier @ torch.diag(torch.tensor([4.0, 3, 2, 1])) @ fourier.T) == pytest.approx(1)
    with pytest.raises(CalibrationError, match="square"):
        hessian_incoherence(torch.ones(2, 3))
    with pytest.raises(CalibrationError, match="symmetric"):
        hessian_incoherence(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(CalibrationError, match="NaN"):
        hessian_incoherence(torch.full((2, 2), torch.nan))
    with pytest.raises(GridError, match="NaN"):
        weight_incoherence(torch.full((2, 2), torch.nan))
    with pytest.raises(GridError, match="shape"):
        weight_incoherence(torch.ones(0, 2))


def test_a_spike_and_a_diagonal_become_incoherent() -> None:
    """The two extremes: one large weight, and inputs that do not mix."""
    w, h = torch.zeros(96, 96), torch.diag(torch.arange(1.0, 97.0))
    w[3, 5] = 1.0
    _, rotated, h_rotated = incoherent(w, h, rescale=False)
    assert weight_incoherence(w) == pytest.approx(96)
    assert weight_incoherence(rotated) < 96 / 4
    assert hessian_incoherence(h_rotated) < 0.75 * hessian_incoherence(h)
    for seed in range(5):
        _, rotated, _ = incoherent(problems.weight(96, 192, seed=seed), problems.hessian(192, seed=9), rescale=False)
        assert weight_incoherence(rotated) < 6  # Gaussian entries: sqrt(2 ln 18432) = 4.4


def test_rescaling_minimises_the_product() -> None:
    """Cauchy-Schwarz: the minimum over all diagonals is (Σ_i |w_i| sqrt(h_ii))²; nudged scales are worse."""
    w, h = problems.weight(20, 30, seed=7, dtype=torch.float64), problems.hessian(30, seed=8, dtype=torch.float64)
    d = rescaling(w, h).double()

    def product(scale: torch.Tensor) -> float:
        return float((w * scale).square().sum() * (h.diagonal() / scale.square()).sum())

    best = float((w.norm(dim=0) * h.diagonal().sqrt()).sum()) ** 2
    assert product(d) == pytest.approx(best, rel=1e-5)  # float16 scales: second order in their rounding
    for seed in range(10):
        assert product(d * torch.exp(0.2 * torch.randn(30, generator=problems.seeded(seed)))) > product(d)


def test_rescaling_survives_dead_and_extreme_channels() -> None:
    w, h = problems.weight(6, 8, seed=9), torch.eye(8)
    h[1, 1], h[2, 2], h[3, 3], w[:, 4] = 0.0, 1e30, 1e-30, 0.0
    d = rescaling(w, h)
    assert d.dtype == torch.float16
    assert bool((torch.isfinite(d) & (d > 0)).all())
    assert float(d[1]) == float(d[4]) == 1.0
    assert torch.equal(rescaling(torch.zeros(2, 3), torch.zeros(3, 3)), torch.ones(3).half())
    transforms, rotated, h_rotated = incoherent(w, h)
    assert bool(torch.isfinite(rotated).all() and torch.isfinite(h_rotated).all())
    assert relative_error(transforms.undo(rotated), w) < 1e-2  # float32 behind scales 2^20 apart


def test_the_bound_on_the_feedback_loss() -> None:
    """tr(D) ≤ (μ²/n) tr(√H)² ≤ (μ² rank / n) tr(H), the reason for making H incoherent; and tr(D) ≤ tr(H) always."""
    for seed in range(10):
        n = 24
        h = problems.hessian(n, seed=seed, tokens=8 if seed % 2 else 96, dtype=torch.float64)
        h = h + 1e-9 * h.trace() * torch.eye(n)
        d = ldl_upper(h)[1].sum()
        root = torch.linalg.eigvalsh(h).clamp(min=0).sqrt().sum()
        assert float(d) <= float(h.trace())
        assert float(d) <= hessian_incoherence(h) ** 2 / n * float(root) ** 2


@pytest.mark.parametrize(("bits", "step"), [(2, 0.9957), (3, 0.5860), (4, 0.3352)])
def test_gaussian_range_is_the_published_optimum(bits: int, step: float) -> None:
    """Max, 1960, "Quantizing for minimum distortion", table II: optimum uniform quantizers of a Gaussian."""
    assert gaussian_range(bits) == pytest.approx(step * (2**bits - 1) / 2, abs=2e-3)


def test_problems_are_refused() -> None:
    w, h = problems.weight(4, 6, seed=1), problems.hessian(6, seed=2)
    with pytest.raises(CalibrationError, match=r"Hessian \[6, 6\]"):
        incoherent(w, h[:5, :5])
    for seed in (-1, 1.5, 2**62):
        with pytest.raises(UsageError, match="seed"):
            incoherent(w, h, seed=seed)
    with pytest.raises(GridError, match="1 NaN"):
        incoherent(torch.where(w == w.max(), torch.nan, w), h)
