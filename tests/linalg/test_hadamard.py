"""Hadamard matrices: orthogonal in exact arithmetic, and a fast transform equal to the product with them."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lqedu.errors import UsageError
from lqedu.linalg.hadamard import (
    _CACHED,
    _characters,
    _powers_of_a_generator,
    fast_hadamard,
    hadamard_block,
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
    2944: (92, 32),
    3712: (116, 32),
    10944: (684, 16),
    29568: (924, 32),
}


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal(n):
    h = hadamard_matrix(n).to(torch.int64)
    assert set(h.unique().tolist()) <= {-1, 1}
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.int64))
    assert torch.equal(h.T @ h, n * torch.eye(n, dtype=torch.int64))


def test_all_multiples_of_four_up_to_256_but_two():
    missing = []
    for n in range(4, 257, 4):
        try:
            h = hadamard_matrix(n).to(torch.int64)
        except UsageError:
            missing.append(n)
        else:
            assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.int64)), n
    assert missing == [188, 236]


@pytest.mark.parametrize("m", sorted({m for m, _ in MODELS.values()} - {8192}))
def test_every_factor_of_a_real_model_is_orthogonal(m):
    h = hadamard_matrix(m).double()  # exact: sums of at most 1024 units
    assert torch.equal(h @ h.T, m * torch.eye(m, dtype=torch.float64))


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


@pytest.mark.parametrize("inverse", [False, True])
def test_a_large_input_is_transformed_in_parts(inverse):
    x = torch.randn(2, 501, 576, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert x.numel() > _CACHED
    whole = fast_hadamard(x, inverse=inverse)
    assert torch.equal(whole[1, 7:9], fast_hadamard(x[1, 7:9], inverse=inverse))
    (gradient,) = torch.autograd.grad(whole[0, 3, 5], x)
    assert int((gradient != 0).any(-1).sum()) == 1 and bool((gradient[0, 3] != 0).all())


def test_a_single_vector_may_be_longer_than_a_part():
    n = 1 << 19
    assert n > _CACHED
    spike = torch.zeros(2, n)
    spike[:, 7] = 1.0
    assert torch.allclose(fast_hadamard(spike).abs(), torch.full((2, n), n**-0.5))


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


@pytest.mark.parametrize("q", [3, 11, 13, 37])
def test_characters_of_prime_fields_follow_euler(q):
    criterion = [0, *(1 if pow(a, (q - 1) // 2, q) == 1 else -1 for a in range(1, q))]
    assert _characters(q)[:, 0].tolist() == criterion


@pytest.mark.parametrize(("p", "k"), [(7, 1), (3, 2), (3, 3), (2, 4), (5, 3)])
def test_powers_of_a_generator_multiply_as_a_field(p, k):
    """They are all elements but zero, and multiplication (adding exponents) distributes over addition."""
    powers = [tuple(e.tolist()) for e in _powers_of_a_generator(p, k)]
    log = {e: i for i, e in enumerate(powers)}
    assert len(log) == p**k - 1 and (0,) * k not in log and powers[0] == (1,) + (0,) * (k - 1)

    def times(a, b):
        return (0,) * k if (0,) * k in (a, b) else powers[(log[a] + log[b]) % (p**k - 1)]

    def plus(a, b):
        return tuple((x + y) % p for x, y in zip(a, b, strict=True))

    g = random.Random(0)
    for a, b, c in ([g.choice(powers) for _ in range(3)] for _ in range(200)):
        assert times(a, plus(b, c)) == plus(times(a, b), times(a, c))


def test_gradients_pass_after_a_call_in_inference_mode():
    with torch.inference_mode():
        fast_hadamard(torch.ones(2, 44, dtype=torch.float64))
    x = torch.ones(2, 44, dtype=torch.float64, requires_grad=True)
    fast_hadamard(x)[:, 0].sum().backward()
    assert torch.allclose(x.grad, hadamard_matrix(44)[0].double() / 44**0.5)


def test_operations_are_counted():
    assert hadamard_operations(8) == 24
    assert hadamard_operations(576) == 576 * 35 + 576 * 4


def test_randomized_transform_is_orthogonal_and_seeded():
    r = randomized_hadamard(36, torch.Generator().manual_seed(3))
    assert torch.allclose(r @ r.T, torch.eye(36, dtype=torch.float64), atol=1e-12)
    assert torch.equal(r, randomized_hadamard(36, torch.Generator().manual_seed(3)))
    assert not torch.equal(r, randomized_hadamard(36, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(("n", "block"), [(3, 1), (18, 2), (188, 4), (13696, 128), (1692, 564)])
def test_orders_without_a_construction_name_a_block_size(n, block):
    with pytest.raises(UsageError, match=f"order {n} .*blocks of {block} instead"):
        hadamard_matrix(n)
    assert hadamard_block(n) == block and hadamard_block(block) == block


def test_bad_arguments():
    for n in (0, -4, True, 2.0):
        with pytest.raises(UsageError, match="positive number"):
            hadamard_factors(n)
        with pytest.raises(UsageError, match="positive number"):
            hadamard_block(n)
    with pytest.raises(UsageError, match="floating-point"):
        fast_hadamard(torch.ones(4, dtype=torch.int64))
    for x in (torch.tensor(1.0), [1.0, 2.0]):
        with pytest.raises(UsageError, match="one dimension or more"):
            fast_hadamard(x)
    with pytest.raises(UsageError, match="positive number"):
        fast_hadamard(torch.ones(3, 0))
