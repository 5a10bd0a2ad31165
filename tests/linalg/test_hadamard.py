"""Hadamard matrices: orthogonal in exact arithmetic, and a fast transform equal to the product with them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lqedu.errors import UsageError
from lqedu.linalg.hadamard import (
    _characters,
    fast_hadamard,
    hadamard_factors,
    hadamard_matrix,
    hadamard_operations,
    randomized_hadamard,
)

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 52, 60, 64, 76, 108, 140, 148, 156, 172, 192, 576]
MODELS = {  # widths of real models and the factors that kernels are compiled for
    576: (36, 16),
    1536: (12, 128),
    11008: (172, 64),
    14336: (28, 512),
    13824: (108, 128),
    5120: (20, 256),
    18944: (148, 128),
    8192: (1, 8192),
    28672: (28, 1024),
    3072: (12, 256),
    896: (28, 32),
    4864: (76, 64),
    8960: (140, 64),
    9984: (156, 64),
}


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal(n):
    h = hadamard_matrix(n).to(torch.int64)
    assert set(h.unique().tolist()) <= {-1, 1}
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.int64))
    assert torch.equal(h.T @ h, n * torch.eye(n, dtype=torch.int64))


@pytest.mark.parametrize(("n", "factors"), MODELS.items())
def test_one_rule_factors_the_widths_of_real_models(n, factors):
    assert hadamard_factors(n) == factors


@pytest.mark.parametrize("n", [n for n in ORDERS if n > 1] + [1536])
def test_the_fast_transform_is_the_product(n):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    h = hadamard_matrix(n).double() / n**0.5
    assert torch.allclose(fast_hadamard(x), x @ h.T, rtol=0, atol=1e-12)
    assert torch.allclose(fast_hadamard(x, inverse=True), x @ h, rtol=0, atol=1e-12)
    assert torch.allclose(fast_hadamard(fast_hadamard(x), inverse=True), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", MODELS)
def test_lengths_are_kept_at_the_widths_of_real_models(n):
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    y = fast_hadamard(x)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    spike = torch.zeros(n, dtype=torch.float64)
    spike[n // 3] = 1
    assert torch.allclose(fast_hadamard(spike).abs(), torch.full((n,), n**-0.5, dtype=torch.float64), atol=1e-15)


@given(st.sampled_from([4, 12, 20, 36, 48]), st.lists(st.integers(1, 3), max_size=3))
@settings(max_examples=30)
def test_any_leading_shape(n, shape):
    x = torch.randn(*shape, n, generator=torch.Generator().manual_seed(1))
    y = fast_hadamard(x)
    assert y.shape == x.shape
    assert torch.allclose(y, x @ hadamard_matrix(n).float().T / n**0.5, atol=1e-5)


def test_half_precision_is_computed_in_float32_and_gradients_pass():
    x = torch.randn(5, 576, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert fast_hadamard(x).dtype == torch.bfloat16
    assert torch.equal(fast_hadamard(x), fast_hadamard(x.float()).to(torch.bfloat16))
    z = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fast_hadamard, z)


@pytest.mark.parametrize("q", [3, 5, 7, 9, 25, 27, 81])
def test_quadratic_characters(q):
    chi = _characters(q).to(torch.int64)
    # Jacobsthal: Q Q^T = q I - J, rows sum to zero, symmetric exactly where -1 is a square
    assert torch.equal(chi @ chi.T, q * torch.eye(q, dtype=torch.int64) - 1)
    assert bool((chi.sum(1) == 0).all())
    assert torch.equal(chi.T, chi if q % 4 == 1 else -chi)


def test_operations_are_counted():
    assert hadamard_operations(8) == 24
    assert hadamard_operations(576) == 576 * 35 + 576 * 4


def test_randomized_transform_is_orthogonal_and_seeded():
    r = randomized_hadamard(36, torch.Generator().manual_seed(3))
    assert torch.allclose(r @ r.T, torch.eye(36, dtype=torch.float64), atol=1e-12)
    assert torch.equal(r, randomized_hadamard(36, torch.Generator().manual_seed(3)))
    assert not torch.equal(r, randomized_hadamard(36, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(("n", "block"), [(3, 1), (18, 2), (116, 4)])
def test_orders_without_a_construction_name_a_block_size(n, block):
    with pytest.raises(UsageError, match=f"order {n} .*blocks of {block} instead"):
        hadamard_matrix(n)


def test_bad_arguments():
    for n in (0, -4, True, 2.0):
        with pytest.raises(UsageError, match="positive number"):
            hadamard_factors(n)
    with pytest.raises(UsageError, match="floating-point"):
        fast_hadamard(torch.ones(4, dtype=torch.int64))
