"""Random rotations that are cheap to store and to apply: two small orthogonal factors and a permutation.

A dense rotation of n features holds n² numbers and costs n² multiplications a vector. Written as a Kronecker product
of factors of sizes p and q with p q = n it holds p² + q² and costs n (p + q); a random permutation in front makes up
for its regular structure.

Chee et al., 2023, arXiv:2307.13304, section 4. Chapter ``07-quip``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lqedu.errors import UsageError

_LARGEST_INT16 = 2**15


def random_orthogonal(n: int, generator: torch.Generator | None = None) -> Tensor:
    """A random rotation matrix, uniform over all of them: orthogonal, with determinant +1.

    The q factor of a Gaussian matrix is orthogonal, but its distribution depends on the sign conventions of the QR
    routine; fixing the signs of r's diagonal makes it uniform (Mezzadri, 2007, arXiv:math-ph/0609050).

    Args:
        n: size, at least 1.
        generator: a generator of the CPU.

    Returns:
        float32 ``[n, n]`` on the CPU, computed in float64: its products with its transpose are the identity to 1e-6.

    Raises:
        UsageError: a size that is not a positive integer.

    >>> q = random_orthogonal(5, torch.Generator().manual_seed(0))
    >>> bool((q @ q.T - torch.eye(5)).abs().max() < 1e-6), round(float(torch.linalg.det(q)), 5)
    (True, 1.0)
    """
    _check_size(n)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    if torch.linalg.det(q) < 0:
        q[:, 0] *= -1
    return q.to(torch.float32).contiguous()


def kronecker_sizes(n: int) -> tuple[int, int]:
    """``(p, q)`` with p q = n and p ≤ q as close together as the divisors of n allow; a prime n gives (1, n).

    >>> kronecker_sizes(576), kronecker_sizes(1536), kronecker_sizes(13)
    ((24, 24), (32, 48), (1, 13))
    """
    _check_size(n)
    p = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return p, n // p


@dataclass(frozen=True, eq=False)
class KroneckerRotation:
    """The orthogonal map ``x ↦ (left ⊗ right) x[order]`` of vectors with ``p q`` features.

    Attributes:
        left: ``[p, p]``, orthogonal, float32.
        right: ``[q, q]``, orthogonal, float32.
        order: permutation of the ``p q`` features, int16 (int32 beyond 32768 features); feature ``order[i]`` moves to i.

    >>> r = KroneckerRotation.random(12, torch.Generator().manual_seed(0))
    >>> x = torch.arange(24.0).reshape(2, 12)
    >>> bool((r.apply(x) - x @ r.matrix().T).abs().max() < 1e-5), bool((r.undo(r.apply(x)) - x).abs().max() < 1e-5)
    (True, True)
    >>> r.macs, r.nbytes                                     # 12 (3 + 4) instead of 144; 4 (9 + 16) + 2 · 12
    (84, 124)
    """

    left: Tensor
    right: Tensor
    order: Tensor

    @classmethod
    def random(cls, n: int, generator: torch.Generator | None = None) -> "KroneckerRotation":
        """A random rotation of ``n`` features with balanced factors, on the CPU."""
        p, q = kronecker_sizes(n)
        left, right = random_orthogonal(p, generator), random_orthogonal(q, generator)
        return cls(left, right, torch.randperm(n, generator=generator).to(order_dtype(n)))

    @property
    def size(self) -> int:
        """Number of features."""
        return len(self.order)

    @property
    def macs(self) -> int:
        """Multiplications and additions a vector: ``n (p + q)``."""
        return self.size * (len(self.left) + len(self.right))

    @property
    def nbytes(self) -> int:
        """Bytes of the two factors and the permutation."""
        return self.left.nbytes + self.right.nbytes + self.order.nbytes

    def apply(self, x: Tensor) -> Tensor:
        """Rotate the last axis of ``x [..., n]``, in the dtype of ``x``."""
        left, right = self.left.to(x.dtype), self.right.to(x.dtype)
        grid = x[..., self.order.long()].unflatten(-1, (len(left), len(right)))  # [..., p, q]
        return (left @ (grid @ right.T)).flatten(-2)

    def undo(self, x: Tensor) -> Tensor:
        """Rotate back: the inverse of :meth:`apply` up to the rounding of its dtype."""
        left, right = self.left.to(x.dtype), self.right.to(x.dtype)
        grid = left.T @ (x.unflatten(-1, (len(left), len(right))) @ right)
        return grid.flatten(-2)[..., self.order.long().argsort()]

    def matrix(self) -> Tensor:
        """The same map as a matrix ``[n, n]`` that multiplies column vectors, float32."""
        return self.apply(torch.eye(self.size, device=self.left.device)).T

    def to(self, device: torch.device | str) -> "KroneckerRotation":
        """The same rotation on another device."""
        return KroneckerRotation(self.left.to(device), self.right.to(device), self.order.to(device))


def order_dtype(n: int) -> torch.dtype:
    """The dtype that stores a permutation of ``n`` features."""
    return torch.int16 if n <= _LARGEST_INT16 else torch.int32


def _check_size(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UsageError(f"a rotation has a positive number of features, got {n!r}")
