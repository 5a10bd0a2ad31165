"""Cayley steps: orthogonal, downhill, and equal to the exact transform where the theory says so."""

import itertools

import pytest
import torch

from lqedu.errors import UsageError
from lqedu.transforms.cayley import (
    cayley_exact,
    cayley_iterate,
    cayley_step,
    skew_gradient,
    step_size,
)


def _start(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0].to(dtype)


def _defect(rotation: torch.Tensor) -> float:
    r = rotation.double()
    return float((r.T @ r - torch.eye(len(r), dtype=r.dtype)).abs().max())


def _gradient(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_direction_is_skew_and_steepest():
    r, g = _start(12), _gradient(12, 1)
    a = skew_gradient(r, g)
    assert torch.equal(a, -a.T)
    # L = <G, R> has the constant gradient G; its slope along the exact curve is -||A||_F^2
    eps = 1e-6
    slope = float((g * (cayley_exact(r, a, eps) - cayley_exact(r, a, -eps))).sum() / (2 * eps))
    assert slope == pytest.approx(-float(a.square().sum()), rel=1e-6)


@pytest.mark.parametrize("n", [2, 5, 64, 200])
def test_the_exact_transform_is_orthogonal_at_any_step(n):
    r = _start(n)
    a = skew_gradient(r, _gradient(n, 2))
    for tau in (0.01, 1.0, 100.0):
        assert _defect(cayley_exact(r, a, tau)) < 1e-10


@pytest.mark.parametrize("n", [64, 192, 576])
def test_five_iterations_are_enough_for_dense_gradients(n):
    r = _start(n)
    a = skew_gradient(r, _gradient(n, 3))
    tau = step_size(a, 1e9)
    assert float((cayley_iterate(r, a, tau) - cayley_exact(r, a, tau)).abs().max()) < 1e-4


def test_the_worst_case_is_a_single_pair_and_stays_within_its_bound():
    n = 64
    r = torch.eye(n, dtype=torch.float64)
    a = torch.zeros(n, n, dtype=torch.float64)
    a[0, 1], a[1, 0] = 3.0, -3.0
    tau = step_size(a, 1e9)
    assert tau * float(torch.linalg.matrix_norm(a, 2)) == pytest.approx(1, abs=1e-6)  # the bound is reached
    previous = None
    for iterations in range(1, 12):
        error = float(torch.linalg.matrix_norm(cayley_iterate(r, a, tau, iterations) - cayley_exact(r, a, tau), 2))
        assert error <= 0.5 ** (iterations + 1) + 1e-12
        if previous is not None:
            assert error == pytest.approx(previous / 2, rel=1e-3)
        previous = error
    assert error > 1e-5  # far from machine precision: here five iterations are not exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_thousand_steps_stay_orthogonal_and_go_down(dtype):
    n = 32
    target = _start(n, 7, dtype)
    if torch.linalg.det(target.double()) < 0:
        target[0] = -target[0]  # the curve cannot leave the component it starts in
    r = torch.eye(n, dtype=dtype)
    losses = []
    for _ in range(1000):
        losses.append(float((r - target).square().sum()))
        r = cayley_step(r, 2 * (r - target), 0.1)
        assert _defect(r) < 1e-5
    assert losses[-1] < 1e-3 * losses[0]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_thousand_steps_of_the_worst_case_stay_orthogonal(dtype):
    n, g = 32, torch.Generator().manual_seed(8)
    r = _start(n, 9, dtype)
    for _ in range(1000):
        i, j = torch.randperm(n, generator=g)[:2].tolist()
        pair = torch.zeros(n, n, dtype=dtype)
        pair[i, j] = 1.0
        r = cayley_step(r, pair @ r, 1e9)  # skew_gradient is (pair - pair^T) / 2: the bound is reached at every step
        assert _defect(r) < 2e-6


def test_bad_arguments():
    r = _start(4)
    with pytest.raises(UsageError, match=r"\[n, n\]"):
        cayley_step(r, r[:3], 0.1)
    with pytest.raises(UsageError, match="float32"):
        cayley_step(r, r.float(), 0.1)
    with pytest.raises(UsageError, match="NaN"):
        cayley_step(r, r * float("nan"), 0.1)
    for rate in (0, -1.0, float("nan"), "1"):
        with pytest.raises(UsageError, match="learning_rate"):
            cayley_step(r, r, rate)
    with pytest.raises(UsageError, match="iterations"):
        cayley_step(r, r, 0.1, iterations=-1)
