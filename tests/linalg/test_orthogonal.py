"""Random rotations: orthogonal, with determinant one, uniform; their Kronecker form equals its matrix."""

import math

import pytest
import torch

from lqedu.errors import UsageError
from lqedu.linalg import KroneckerRotation, kronecker_sizes, random_orthogonal
from tests import problems

SIZES = [1, 2, 7, 13, 48, 96, 576]


@pytest.mark.parametrize("n", SIZES)
def test_orthogonal_to_1e_6_with_determinant_one(n: int) -> None:
    for seed in range(3):
        q = random_orthogonal(n, problems.seeded(seed))
        assert q.dtype == torch.float32
        assert float((q.double() @ q.double().T - torch.eye(n)).abs().max()) <= 1e-6
        assert float(torch.linalg.det(q.double())) == pytest.approx(1, abs=1e-5)


def test_uniform_over_rotations() -> None:
    """Haar measure: a first column is uniform on the sphere, so E q² = 1/n and E q⁴ = 3 / (n (n + 2)); signs balance."""
    n, draws = 5, 3000
    g = problems.seeded(0)
    q = torch.stack([random_orthogonal(n, g) for _ in range(draws)]).double()
    assert float(q.mean(0).abs().max()) < 4 / math.sqrt(n * draws)
    assert torch.allclose(q.square().mean(0), torch.full((n, n), 1 / n).double(), atol=0.02)
    assert torch.allclose(q.pow(4).mean(0), torch.full((n, n), 3 / (n * (n + 2))).double(), atol=0.02)


@pytest.mark.parametrize("n", range(1, 200))
def test_factors_are_balanced(n: int) -> None:
    p, q = kronecker_sizes(n)
    assert p * q == n
    assert p <= q
    assert all(n % d or d <= p for d in range(1, math.isqrt(n) + 1))  # no divisor closer to the square root


@pytest.mark.parametrize("n", SIZES)
def test_apply_equals_the_matrix_and_undo_inverts_it(n: int) -> None:
    r = KroneckerRotation.random(n, problems.seeded(n))
    x = torch.randn(3, 4, n, generator=problems.seeded(1), dtype=torch.float64)
    permutation = torch.eye(n, dtype=torch.float64)[r.order.long()]
    dense = torch.kron(r.left.double(), r.right.double()) @ permutation  # the definition
    assert torch.allclose(r.apply(x), x @ dense.T, atol=1e-12)
    assert torch.allclose(r.matrix().double(), dense, atol=1e-6)
    assert torch.allclose(r.undo(r.apply(x)), x, atol=1e-5)
    assert torch.allclose(r.apply(r.undo(x)), x, atol=1e-5)
    assert torch.allclose(r.apply(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-6)
    assert r.apply(x.half()).dtype == torch.float16
    p, q = kronecker_sizes(n)
    assert (r.macs, r.nbytes) == (n * (p + q), 4 * (p * p + q * q) + 2 * n)


def test_seeds_repeat_and_differ() -> None:
    one, same, other = (KroneckerRotation.random(12, problems.seeded(s)) for s in (0, 0, 1))
    assert torch.equal(one.matrix(), same.matrix())
    assert not torch.allclose(one.matrix(), other.matrix())


def test_more_features_than_int16_can_number() -> None:
    r = KroneckerRotation.random(40000, problems.seeded(0))
    assert r.order.dtype == torch.int32
    assert torch.equal(r.order.long().sort().values, torch.arange(40000))


@pytest.mark.parametrize("bad", [0, -3, 2.0, True])
def test_sizes_are_checked(bad: object) -> None:
    for build in (random_orthogonal, kronecker_sizes, KroneckerRotation.random):
        with pytest.raises(UsageError, match="positive number of features"):
            build(bad)
