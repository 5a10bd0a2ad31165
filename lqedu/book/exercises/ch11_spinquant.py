"""Checkers of chapter 11-spinquant."""

import math

import torch
from torch import Tensor

from lqedu.book.exercises import exercise, expect_close
from lqedu.formats.activation import ActivationGrid
from lqedu.transforms.cayley import cayley_iterate, skew_gradient, step_size


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rotation(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(_normal(n, n, seed=seed + 100))[0]


@exercise("11-spinquant.1", "the straight-through direction from rounding errors alone")
def _direction(fn):
    for tokens, n, seed in ((6, 4, 0), (20, 9, 1)):
        x, slope, r = _normal(tokens, n, seed=seed), _normal(tokens, n, seed=seed + 50), _rotation(n, seed)
        leaf = r.clone().requires_grad_()
        u = x @ leaf
        rounded = ActivationGrid(4).round_trip(u.detach())
        y = (u + (rounded - u.detach())) @ leaf.T
        (gradient,) = torch.autograd.grad((y * slope).sum(), leaf)
        got = fn(x, r, rounded, slope)
        expect_close(got, skew_gradient(r, gradient), name="A", atol=1e-9)
        nothing = fn(x, r, x @ r, slope)
        expect_close(nothing, torch.zeros(n, n, dtype=torch.float64), name="A where nothing is rounded", atol=1e-9)


@exercise("11-spinquant.2", "the Cayley transform by fixed-point iteration")
def _iterate(fn):
    for n, tau, iterations, seed in ((3, 0.3, 0, 2), (7, 0.05, 5, 3), (16, 0.02, 2, 4)):
        r = _rotation(n, seed)
        a = skew_gradient(r, _normal(n, n, seed=seed + 50))
        expect_close(fn(r, a, tau, iterations), cayley_iterate(r, a, tau, iterations), name="Y", atol=1e-10)


@exercise("11-spinquant.3", "find the mistake in a step bound under which the iteration diverges")
def _bound(fn):
    for n, lr, seed in ((2, 1e9, 5), (64, 1e9, 6), (64, 1e-4, 7)):
        a = skew_gradient(_rotation(n, seed), _normal(n, n, seed=seed + 50))
        tau = fn(a, lr)
        contraction = float(tau) / 2 * float(torch.linalg.matrix_norm(a, 2))
        assert contraction <= 0.5 + 1e-9, (
            f"for a dense skew-symmetric matrix of order {n} each iteration multiplies the error by up to {contraction:.2f}; "
            "the bound must keep it at one half or below"
        )
        assert math.isclose(float(tau), step_size(a, lr), rel_tol=1e-6), (
            "a safe step, but shorter than the bound allows"
        )


@exercise("11-spinquant.4", "predict the error of ten iterations in the worst case")
def _worst(answer):
    a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    exact = torch.linalg.solve(eye + a / 2, eye - a / 2)
    want = float(torch.linalg.matrix_norm(cayley_iterate(eye, a, 1.0, 10) - exact, 2))
    assert abs(float(answer) - want) < 5e-7, (
        f"{float(answer):.3g} is not it: the start is off by τ/2 A (Y - R), whose norm the angle of the rotation gives, "
        "and each iteration halves what is left"
    )


@exercise("11-spinquant.5", "the slope of the loss along gradient steps that QR makes orthogonal again")
def _qr_slope(fn):
    for n, seed in ((2, 8), (3, 9), (8, 10)):
        r, g = _rotation(n, seed), _normal(n, n, seed=seed + 50)

        def along(eta: float, r: Tensor = r, g: Tensor = g) -> Tensor:
            q, upper = torch.linalg.qr(r - eta * g)
            return q * upper.diagonal().sign()

        eps = 1e-5
        want = float((g * (along(eps) - along(-eps))).sum() / (2 * eps))
        assert abs(float(fn(r, g)) - want) < 1e-6 * max(1.0, abs(want)), (
            f"for n = {n} the slope is {want:.4f}, got {float(fn(r, g)):.4f}: write R - ηG = R (I - ηM), split I - ηM into a "
            "rotation and an upper triangular matrix to first order in η"
        )
