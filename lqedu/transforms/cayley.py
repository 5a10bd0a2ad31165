"""Gradient descent on orthogonal matrices by the Cayley transform; chapter ``11-spinquant``.

A step along the gradient leaves the set of orthogonal matrices. A step along a *skew-symmetric* ``A`` does not: for any
``τ`` the Cayley transform ``(I + τ/2 A)^-1 (I - τ/2 A)`` is orthogonal, so that

    R(τ) = (I + τ/2 A)^-1 (I - τ/2 A) R,     A = ½ (G R^T - R G^T),     G = ∂L/∂R

is a curve of orthogonal matrices that starts at ``R`` in the direction of steepest descent: ``dL/dτ = -‖A‖²_F`` at 0.
The inverse is avoided by solving ``Y = R - τ/2 A (R + Y)`` by fixed-point iteration, which contracts by ``τ ‖A‖₂ / 2``.

Li, Li & Todorovic, 2020, arXiv:2002.01113, Algorithm 1; used by SpinQuant, Liu et al., 2024, arXiv:2405.16406.
"""

import torch
from torch import Tensor

from lqedu.errors import UsageError
from lqedu.options import check_count

ITERATIONS = 5


def skew_gradient(rotation: Tensor, gradient: Tensor) -> Tensor:
    """``A = ½ (G R^T - R G^T)``, the direction of steepest descent as a skew-symmetric matrix.

    Args:
        rotation: orthogonal ``R`` ``[n, n]``.
        gradient: ``G = ∂L/∂R`` ``[n, n]``.
    """
    w = gradient @ rotation.T
    return (w - w.T) / 2


def step_size(skew: Tensor, learning_rate: float) -> float:
    """``τ = min(lr, 1 / ‖A‖₁)``, ``‖A‖₁`` the largest column sum of magnitudes: the published bound.

    ``‖A‖₂ ≤ ‖A‖₁``, so the fixed-point iteration contracts at least by one half; the bound is reached where ``A`` has a
    single pair of entries.
    """
    return min(learning_rate, 1.0 / (float(skew.abs().sum(0).max()) + 1e-8))


def cayley_exact(rotation: Tensor, skew: Tensor, tau: float) -> Tensor:
    """``(I + τ/2 A)^-1 (I - τ/2 A) R`` by a linear solve: the oracle of :func:`cayley_iterate`, O(n³) but slower."""
    eye = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    half = tau / 2 * skew
    return torch.linalg.solve(eye + half, (eye - half) @ rotation)


def cayley_iterate(rotation: Tensor, skew: Tensor, tau: float, iterations: int = ITERATIONS) -> Tensor:
    """The Cayley transform by fixed-point iteration: ``iterations`` matrix products, no inverse.

    The start ``R - τ A R`` is off by ``τ/2 A (Y - R)`` and each iteration multiplies the error by ``-τ/2 A``, so the
    result is off by at most ``(τ ‖A‖₂ / 2)**(iterations + 1) · τ ‖A‖₂`` in the spectral norm.
    """
    y = rotation - tau * skew @ rotation
    for _ in range(iterations):
        y = rotation - tau / 2 * skew @ (rotation + y)
    return y


def cayley_step(rotation: Tensor, gradient: Tensor, learning_rate: float, *, iterations: int = ITERATIONS) -> Tensor:
    """One step of gradient descent on the orthogonal matrices.

    What the unfinished iteration leaves of non-orthogonality is removed by two Newton-Schulz steps,
    ``Y ← Y (3 I - Y^T Y) / 2``, each of which squares the defect. One is enough for dense gradients; five iterations on a
    single pair of entries need both. (SpinQuant's code normalises rows instead and orthogonalises by QR once in about a
    hundred steps, at random.)

    Args:
        rotation: orthogonal ``R`` ``[n, n]``, float32 or float64; not checked, see :func:`lqedu.transforms.rotation.rotate_model`.
        gradient: ``∂L/∂R`` of the same shape and dtype.
        learning_rate: upper bound of the step, see :func:`step_size`.
        iterations: of the fixed point.

    Returns:
        The next rotation, ``[n, n]``.

    Raises:
        UsageError: shapes or dtypes that do not match, a gradient that is not finite, or a learning rate that is not
            positive (infinity leaves the bound alone).
    """
    if not isinstance(learning_rate, int | float) or not learning_rate > 0:
        raise UsageError(f"learning_rate is a positive number, got {learning_rate!r}")
    check_count("iterations", iterations)
    if rotation.dim() != 2 or rotation.shape[0] != rotation.shape[1] or rotation.shape != gradient.shape:
        raise UsageError(f"rotation and gradient are [n, n], got {list(rotation.shape)} and {list(gradient.shape)}")
    if rotation.dtype not in (torch.float32, torch.float64) or rotation.dtype != gradient.dtype:
        raise UsageError(f"rotation and gradient are float32 or float64, got {rotation.dtype} and {gradient.dtype}")
    if not bool(torch.isfinite(gradient).all()):
        raise UsageError("the gradient of the rotation holds NaN or infinite values; lower the learning rate")
    skew = skew_gradient(rotation, gradient)
    y = cayley_iterate(rotation, skew, step_size(skew, learning_rate), iterations)
    for _ in range(2):
        y = (3 * y - y @ (y.T @ y)) / 2
    return y
