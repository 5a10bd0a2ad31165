"""Greedy passes: the loss never rises, a fixed point cannot be improved by any single code; LDLQ on a finite grid."""

import itertools

import pytest
import torch
from torch import Tensor

from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.integer import ScaleConvention
from lqedu.linalg import ldl_upper
from lqedu.rounding import ldlq, nearest, proxy_loss, refine
from tests import problems
from tests.compare import assert_codes_equal, code_mismatch

RMS = IntGrid(2, granularity="tensor", zero_point="float", convention=ScaleConvention.RMS)
GRIDS = [RMS, IntGrid(3), IntGrid(4, symmetric=True), IntGrid(2, granularity="group", group_size=8)]


def loss(w: Tensor, h: Tensor, q: QTensor) -> float:
    return proxy_loss(w.double() - q.dequantize(torch.float64), h)


def descent(w: Tensor, h: Tensor, start: QTensor, passes: int) -> Tensor:
    """The definition, slowly: try every code of every weight in turn, and keep the best."""
    codes = start.codes.clone()
    for _ in range(passes):
        for k, row in itertools.product(range(w.shape[1]), range(w.shape[0])):
            trials = codes[row].repeat(start.grid.levels, 1)
            trials[:, k] = torch.arange(start.grid.code_min, start.grid.code_max + 1)
            full = codes.repeat(start.grid.levels, 1, 1)
            full[:, row] = trials
            losses = [loss(w, h, QTensor(one, start.scale, start.zero, start.grid)) for one in full]
            codes[row, k] = trials[int(torch.tensor(losses).argmin()), k]
    return codes


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("passes", [1, 3])
def test_equals_trying_every_code(grid: IntGrid, passes: int) -> None:
    w, h = problems.weight(3, 16, seed=1, dtype=torch.float64), problems.hessian(16, seed=2, dtype=torch.float64)
    start = nearest(w, grid)[0]
    assert_codes_equal(refine(w, h, start, passes=passes).codes, descent(w, h, start, passes))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_never_rises(grid: IntGrid, dtype: torch.dtype) -> None:
    for seed in range(4):
        w, h = problems.weight(12, 48, seed=seed, dtype=dtype), problems.hessian(48, seed=50 + seed, dtype=dtype)
        for rounding in (nearest, ldlq):
            q = rounding(w, grid)[0] if rounding is nearest else ldlq(w, h, grid)[0]
            losses = [loss(w, h, q)]
            for _ in range(4):
                q = refine(w, h, q)
                losses.append(loss(w, h, q))
            assert losses == sorted(losses, reverse=True)
            assert losses[-1] < losses[0]
    assert_codes_equal(refine(w, h, q, passes=0).codes, q.codes)


def test_a_fixed_point_has_no_better_single_code() -> None:
    w, h = problems.weight(4, 12, seed=3, dtype=torch.float64), problems.hessian(12, seed=4, dtype=torch.float64)
    q = refine(w, h, nearest(w, IntGrid(3))[0], passes=100)
    assert_codes_equal(refine(w, h, q).codes, q.codes)
    assert_codes_equal(descent(w, h, q, 1), q.codes)


def test_blocks_change_nothing() -> None:
    """More columns than a block holds: the same codes as one column at a time, up to float32 ties."""
    w, h = problems.weight(20, 300, seed=5, dtype=torch.float64), problems.hessian(300, seed=6, dtype=torch.float64)
    start = ldlq(w, h, RMS)[0]
    w_hat, codes = start.dequantize(torch.float64), start.codes.clone().double()
    s, z = float(start.scale), float(start.zero)
    for k in range(300):  # one column of the plain formula at a time
        best = w_hat[:, k] - ((w_hat - w) @ h[:, k]) / h[k, k]
        codes[:, k] = torch.clamp(torch.round(best / s + z), 0, 3)
        w_hat[:, k] = s * (codes[:, k] - z)
    assert_codes_equal(refine(w, h, start).codes, codes.to(torch.uint8))
    low = refine(w.float(), h.float(), start)
    assert code_mismatch(low.codes, refine(w, h, start).codes) < 0.05  # coordinate descent amplifies ties
    assert loss(w, h, low) == pytest.approx(loss(w, h, refine(w, h, start)), rel=1e-3)


def test_a_dead_column_keeps_its_codes() -> None:
    w, h = problems.weight(4, 8, seed=7), problems.hessian(8, seed=8)
    h[3], h[:, 3] = 0.0, 0.0
    start = nearest(w, IntGrid(2))[0]
    assert torch.equal(refine(w, h, start, passes=3).codes[:, 3], start.codes[:, 3])


def test_ldl_identity() -> None:
    for n in (1, 5, 64, 130):
        h = problems.hessian(n, seed=n, dtype=torch.float64)
        factor, d = ldl_upper(h)
        assert float((factor * d @ factor.T - h).abs().max() / h.abs().max()) <= 1e-12
        assert torch.equal(factor, factor.triu())
        assert torch.equal(factor.diagonal(), torch.ones(n, dtype=torch.float64))


def test_feedback_loss_is_the_trace_of_d() -> None:
    """Uniform rounding errors: E loss = out · s²/12 · tr(D) for LDLQ and out · s²/12 · tr(H) for nearest."""
    h = problems.hessian(24, seed=11, dtype=torch.float64)
    w = 100 * torch.rand(4000, 24, generator=problems.seeded(12), dtype=torch.float64)
    w[0, 0], w[0, 1] = -100.0, 200.0  # no clamping: the grid is far wider than the weights
    grid = IntGrid(8, granularity="tensor", scale_dtype=torch.float64)
    unit = len(w) * float(grid.fit(w)[0]) ** 2 / 12
    measured = {
        "ldlq": ldlq(w, h, grid, damping=0.0)[1].proxy_loss,
        "nearest": nearest(w, grid, hessian=h)[1].proxy_loss,
    }
    assert measured["ldlq"] == pytest.approx(unit * float(ldl_upper(h)[1].sum()), rel=0.05)
    assert measured["nearest"] == pytest.approx(unit * float(h.trace()), rel=0.05)


def test_ldlq_can_lose_to_nearest_on_a_finite_grid() -> None:
    """Feedback asks the last column for 4.4, the grid ends at 3: the second column was spoilt for nothing.

    By hand, with Δ of LDLQ (-0.2, 0.6, 0) and of nearest (-0.2, -0.4, 0): ‖Δ l‖² = 2.16 and 0.76.
    """
    factor = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, -2.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    w, h = torch.tensor([[0.2, 1.4, 3.0]], dtype=torch.float64), factor @ factor.T
    grid = IntGrid(2, granularity="tensor", scale_dtype=torch.float64)  # codes 0 to 3
    unit = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.uint8)
    q, report = ldlq(w, h, grid, damping=0.0, fitted=unit)
    assert q.codes.tolist() == [[0, 2, 3]]
    assert report.proxy_loss == pytest.approx(2.16)
    near = QTensor(grid.encode(w, *unit), *unit, grid)
    assert near.codes.tolist() == [[0, 1, 3]]
    assert loss(w, h, near) == pytest.approx(0.76)
    repaired = refine(w, h, q)  # a greedy pass looks back
    assert repaired.codes.tolist() == [[0, 1, 2]]
    assert loss(w, h, repaired) == pytest.approx(0.56)
    wide = IntGrid(4, granularity="tensor", scale_dtype=torch.float64)
    assert ldlq(w, h, wide, damping=0.0, fitted=unit)[1].proxy_loss < 0.76  # with room above 3, feedback wins


def test_a_parameter_is_rounded_without_gradients() -> None:
    w, h = torch.nn.Parameter(problems.weight(4, 8, seed=1)), problems.hessian(8, seed=2)
    q = refine(w, h, ldlq(w, h, RMS)[0])
    assert not q.scale.requires_grad
    assert_codes_equal(q.codes, refine(w.detach(), h, ldlq(w.detach(), h, RMS)[0]).codes)


def test_errors() -> None:
    w, h = problems.weight(4, 8, seed=1), problems.hessian(8, seed=2)
    q = nearest(w, IntGrid(2))[0]
    with pytest.raises(UsageError, match="passes"):
        refine(w, h, q, passes=-1)
    with pytest.raises(UsageError, match="QTensor"):
        refine(w, h, w)
    with pytest.raises(GridError, match=r"have shape \(1, 1\), got \[2, 2\]"):
        ldlq(w, h, RMS, fitted=(torch.ones(2, 2), torch.ones(2, 2)))
    with pytest.raises(CalibrationError, match="codes"):
        refine(w[:2], h, q)
    with pytest.raises(CalibrationError, match="Hessian"):
        refine(w, h[:3, :3], q)
    with pytest.raises(GridError, match="NaN"):
        refine(torch.full_like(w, torch.nan), h, q)
