"""Rounding onto progressive grids: sequential elimination in fp64, INT8 always, and the schedule's invariants."""

import pytest
import torch
from torch import Tensor

from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.formats.progressive import ProgressiveGrid, ProgressiveTensor, progressive_quantize
from lqedu.linalg import damp
from lqedu.rounding.gptq import feedback_codes
from lqedu.rounding.progressive import affine_grid, progressive_gptq, progressive_nearest
from tests import problems
from tests.compare import assert_codes_equal

GRIDS = [ProgressiveGrid(16), ProgressiveGrid(32, "offset"), ProgressiveGrid(8, "code")]


def _column_codes(w: Tensor, grid: ProgressiveGrid, channel: Tensor, group: Tensor, zero: Tensor) -> Tensor:
    """Codes of one column ``[out]`` by the two steps of the reference: to channel units, cut, then to group codes."""
    w8 = (w / channel.to(w.dtype)).clamp(-grid.protective, grid.protective)
    s, z = group.to(w.dtype), zero.to(w.dtype)
    q = torch.round(w8 / s) + z if grid.zero == "code" else torch.round((w8 + z) / s)
    return q.clamp(0, 15)


def _sequential(w: Tensor, h: Tensor, grid: ProgressiveGrid, columns: list[int]) -> Tensor:
    """Round a column, move every column that is free to its best place, eliminate: no factor, no blocks, no affine view."""
    channel, group, zero = grid.fit(w)
    w, h_inv = w.clone(), torch.linalg.inv(h)
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    for i in columns:
        k = i // grid.group_size
        q = _column_codes(w[:, i], grid, channel[:, 0], group[:, k], zero[:, k])
        codes[:, i] = q.to(torch.uint8)
        s, z = group[:, k].double(), zero[:, k].double()
        w8 = (q - z) * s if grid.zero == "code" else q * s - z
        error = w[:, i] - w8 * channel[:, 0].double()
        w -= torch.outer(error, h_inv[i]) / h_inv[i, i]
        h_inv = h_inv - torch.outer(h_inv[:, i], h_inv[i]) / h_inv[i, i]
        h_inv[i, i] = 1.0
    return codes


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_equals_sequential_elimination_code_for_code(grid, order):
    w = problems.weight(24, 64, seed=1, dtype=torch.float64)
    h = problems.hessian(64, seed=2, dtype=torch.float64)
    damped = damp(h, 0.01)
    columns = (
        list(range(64)) if order == "natural" else damped.diagonal().argsort(descending=True, stable=True).tolist()
    )
    q, report = progressive_gptq(w, h, grid, block_size=32, order=order)
    assert_codes_equal(q.codes, _sequential(w, damped, grid, columns), group_size=grid.group_size)
    error = w - q.int8().double() * q.channel_scale.double()
    assert report.proxy_loss == pytest.approx(float(((error @ h) * error).sum()), rel=1e-9)
    assert 0 < report.flips < 1 and report.damping == 0.01


@pytest.mark.parametrize("grid", GRIDS)
def test_uncorrelated_inputs_leave_nothing_to_feed_back(grid):
    w = problems.weight(20, 96, seed=3)
    h = torch.diag(torch.rand(96, generator=problems.seeded(4)) + 0.5)
    q, report = progressive_gptq(w, h, grid)
    assert_codes_equal(q.codes, progressive_quantize(w, grid).codes)
    assert_codes_equal(progressive_nearest(w, grid)[0].codes, q.codes)
    assert report.flips == 0


def _at_the_ends(seed: int) -> Tensor:
    """Rows that reach both ends of their range in every group: step 16, and code 15 would mean 128."""
    w = torch.randn(16, 64, generator=problems.seeded(seed))
    w[:, ::16], w[:, 1::16] = 3.5, -3.5
    return w.clamp(-3.5, 3.5)


@pytest.mark.parametrize("zero", ["code", "offset"])
def test_channel_codes_fit_int8_whatever_the_feedback(zero):
    """Without the cut to the protective range the same sweep leaves int8; with it, it never does."""
    grid, wrapped = ProgressiveGrid(16, zero), 0
    for seed in range(10):
        w, h = _at_the_ends(seed), problems.hessian(64, seed=seed)
        q, _ = progressive_gptq(w, h, grid)
        w8 = q.int8().to(torch.int32)
        assert int(w8.abs().max()) <= 127
        channel, group, z = grid.fit(w)
        codes = feedback_codes(
            w, h, affine_grid(grid), *grid.affine(channel, group, z), damping=0.01, block_size=64, order="activation"
        )
        try:
            ProgressiveTensor(codes, channel, group, z, grid).int8()
        except GridError as error:
            wrapped += "outside int8" in str(error)
    assert wrapped == (10 if zero == "code" else 0)


def test_weights_beyond_the_grid_are_cut_too():
    """A grid that was fitted to smaller weights, as a clipped range is."""
    w, grid = _at_the_ends(0), ProgressiveGrid(16)
    fitted = grid.fit(w)
    q, _ = progressive_nearest(1.5 * w, grid, fitted=fitted)
    assert int(q.int8().abs().max()) <= 127
    assert torch.equal(progressive_nearest(w, grid, fitted=fitted)[0].codes, progressive_quantize(w, grid).codes)


def test_feedback_lowers_the_loss():
    ratios = []
    for seed in range(5):
        w, h = problems.weight(32, 128, seed=seed), problems.hessian(128, seed=10 + seed)
        grid = ProgressiveGrid(32)
        losses = [progressive_gptq(w, h, grid)[1].proxy_loss, progressive_nearest(w, grid, hessian=h)[1].proxy_loss]
        ratios.append(losses[0] / losses[1])
    assert max(ratios) < 0.9


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_block_size_changes_no_code_and_arguments_stay(order):
    w, h = problems.weight(12, 96, seed=5, dtype=torch.float64), problems.hessian(96, seed=6, dtype=torch.float64)
    before = w.clone(), h.clone()
    codes = [progressive_gptq(w, h, ProgressiveGrid(16), block_size=b, order=order)[0].codes for b in (1, 16, 96, 128)]
    assert all(torch.equal(c, codes[0]) for c in codes)
    assert torch.equal(w, before[0]) and torch.equal(h, before[1])


def test_given_scales_are_kept():
    w, h, grid = problems.weight(8, 64, seed=7), problems.hessian(64, seed=8), ProgressiveGrid(16)
    channel, group, zero = grid.fit(w)
    q, _ = progressive_gptq(w, h, grid, fitted=(channel, group + 1, zero))
    assert torch.equal(q.group_scale, group + 1) and torch.equal(q.channel_scale, channel) and torch.equal(q.zero, zero)


def test_what_does_not_fit_is_refused():
    w, h = problems.weight(8, 64, seed=7), problems.hessian(64, seed=8)
    with pytest.raises(GridError, match="does not divide"):
        progressive_gptq(w, h, ProgressiveGrid(48))
    with pytest.raises(GridError, match="block_size"):
        progressive_gptq(w, h, ProgressiveGrid(32), block_size=24)
    with pytest.raises(UsageError, match="order"):
        progressive_gptq(w, h, ProgressiveGrid(32), order="up")
    with pytest.raises(CalibrationError):
        progressive_gptq(w, h[:8, :8], ProgressiveGrid(32))
    with pytest.raises(GridError, match="NaN"):
        progressive_nearest(w * float("nan"), ProgressiveGrid(32))
