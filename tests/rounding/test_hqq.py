"""HQQ: closed forms of the two subproblems, descent, the best iterate, and what it refuses."""

import pytest
import torch

from lqedu.errors import GridError, UsageError
from lqedu.formats import IntGrid, ScaleConvention
from lqedu.methods import HQQ, RTN
from lqedu.rounding import hqq, nearest
from lqedu.rounding.hqq import iterates, shrink, step


def _weight(rows: int = 48, columns: int = 128, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(rows, columns, generator=g) * torch.exp(0.5 * torch.randn(rows, columns, generator=g))


def _grid(bits: int = 4, **fields: object) -> IntGrid:
    fields = {"granularity": "group", "group_size": 32} | fields
    return IntGrid(bits, zero_point="float", convention=ScaleConvention.MINMAX, **fields)


def _mean_error(w: torch.Tensor, grid: IntGrid, **options: object) -> torch.Tensor:
    return grid.grouped(w - hqq(w, grid, **options)[0].dequantize()).abs().mean(-1)


def test_for_p_1_shrinking_is_the_exact_proximal_step():
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    candidates = torch.linspace(-1.2, 1.2, 24001, dtype=torch.float64)
    for beta in (2.0, 10.0):
        cost = candidates.abs() + beta / 2 * (candidates - x[:, None]) ** 2
        assert torch.allclose(shrink(x, beta, 1.0), candidates[cost.argmin(1)], atol=1e-4)


def test_for_p_below_1_it_is_odd_never_grows_and_keeps_the_large():
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    y = shrink(x, 10.0, 0.7)
    assert torch.allclose(y, -y.flip(0))
    assert bool((y.abs() <= x.abs()).all()) and bool((y * x >= 0).all())
    threshold = 10 ** (-1 / 1.3)  # |x| = |x|^(p-1) / beta
    assert bool(((y == 0) == (x.abs() <= threshold)).all())
    assert float(x[-1] - y[-1]) == pytest.approx(5**-0.3 / 10)


def test_the_missing_factor_p_cuts_off_too_much():
    """The true minimiser of |e|^p + β/2 (e - x)², by search, keeps more of a large error than the shrinkage does."""
    x, beta, p = torch.tensor([0.5], dtype=torch.float64), 10.0, 0.7
    e = torch.linspace(0, 0.6, 600001, dtype=torch.float64)
    exact = e[(e**p + beta / 2 * (e - x) ** 2).argmin()]
    assert float(shrink(x, beta, p)) == pytest.approx(0.3769, abs=1e-4)
    assert float(exact) == pytest.approx(0.4084, abs=1e-3)


def test_the_next_zero_point_minimises_the_quadratic():
    w, grid = _weight().double(), _grid(3, scale_dtype=torch.float64)
    scale, zero = grid.fit(w)
    x, s, z = grid.grouped(w), scale[..., None], zero[..., None]
    q = grid.nearest_code(x, s, z)
    e = shrink(x - s * (q - z), 10.0, 0.7)
    _, after = step(x, s, z, 10.0, 0.7, grid)

    def cost(zero_point: torch.Tensor) -> torch.Tensor:
        return (x - e - s * (q - zero_point)).square().sum(-1)

    assert bool((cost(after) <= cost(z)).all())
    for nudge in (1e-3, -1e-3):
        assert bool((cost(after) < cost(after + nudge)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_no_group_is_worse_than_where_it_started(bits, axis):
    w, grid = _weight(64), _grid(bits, axis=axis)
    start, best = _mean_error(w, grid, iterations=0), _mean_error(w, grid)
    assert bool((best <= start * (1 + 1e-5)).all())
    assert float(best.mean()) < float(start.mean())
    every = torch.stack([i.error for i in iterates(w, grid)])
    assert torch.allclose(best, every.amin(0), rtol=1e-3, atol=1e-9)


def test_zero_steps_are_rounding_to_nearest():
    w, grid = _weight(), _grid()
    assert torch.equal(hqq(w, grid, iterations=0)[0].codes, nearest(w, grid)[0].codes)


def test_groups_do_not_see_each_other():
    w, grid = _weight(), _grid(3)
    changed = w.clone()
    changed[0, :32] *= 3
    a, b = hqq(w, grid)[0], hqq(changed, grid)[0]
    assert torch.equal(a.codes[1:], b.codes[1:]) and torch.equal(a.codes[0, 32:], b.codes[0, 32:])


def test_the_result_depends_on_the_size_of_the_weight_unless_beta_follows():
    w, grid = _weight().double(), _grid(2, scale_dtype=torch.float64)
    one = [i.zero for i in iterates(w, grid)][-1]
    same = [i.zero for i in iterates(1000 * w, grid, beta=10 * 1000 ** (0.7 - 2))][-1]
    other = [i.zero for i in iterates(1000 * w, grid)][-1]
    assert torch.allclose(one, same, atol=1e-8)
    assert not torch.allclose(one, other, atol=1e-3)


def test_constant_and_empty_groups_are_kept():
    w = _weight()
    w[0, :32], w[1, :32], w[2] = 0.25, 0.0, 0.01
    w_hat = hqq(w, _grid())[0].dequantize()
    assert torch.allclose(w_hat[0, :32], w[0, :32], rtol=1e-3)
    assert torch.equal(w_hat[1, :32], w[1, :32])
    assert torch.allclose(w_hat[2], w[2], rtol=1e-3)


def test_bits_count_sixteen_for_the_zero_point():
    q = hqq(_weight(), _grid(4, group_size=64))[0]
    assert q.bits_per_weight == 4 + 32 / 64
    assert sum(t.nbytes for t in q.packed().values()) == q.nbytes
    assert HQQ(bits=4).grid().bits_per_weight((128, 128)) == 4.5
    assert RTN(bits=4, group_size=64, zero_point="float").grid().bits_per_weight((128, 128)) == 4.5


def test_the_argument_is_not_changed():
    w = _weight()
    before = w.clone()
    hqq(w, _grid())
    assert torch.equal(w, before)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"p": 0.0}, "p is a finite number, above 0 and at most 1"),
        ({"p": 1.5}, "p is a finite number, above 0 and at most 1"),
        ({"beta": 0.0}, "beta is a finite number, above 0"),
        ({"kappa": 0.9}, "kappa is a finite number, at least 1"),
        ({"iterations": -1}, "at least 0"),
        ({"beta": float("inf")}, "finite"),
        ({"kappa": float("nan")}, "finite"),
    ],
)
def test_hyper_parameters_outside_their_range(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        hqq(_weight(), _grid(), **options)
    with pytest.raises(UsageError, match=sentence):
        HQQ(**options)  # before any work


@pytest.mark.parametrize(("option", "value"), [("p", "0.7"), ("beta", True), ("iterations", 2.0)])
def test_hyper_parameters_of_another_type(option, value):
    with pytest.raises(UsageError, match=option):
        hqq(_weight(), _grid(), **{option: value})


def test_grids_and_weights_that_do_not_fit():
    with pytest.raises(GridError, match="zero_point='float'"):
        hqq(_weight(), IntGrid(4))
    with pytest.raises(GridError, match="does not divide the 48 outputs"):
        hqq(_weight(), _grid(axis=0, group_size=64, bits=4))
    with pytest.raises(GridError, match="NaN"):
        hqq(_weight() * float("nan"), _grid())
