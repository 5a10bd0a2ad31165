"""GPTQ against its definition (sequential elimination, fp64), LDLQ, nearest rounding, and its own invariants."""

import itertools

import pytest
import torch
from torch import Tensor

from lqedu.errors import CalibrationError, GridError, NotPositiveDefiniteError, UsageError
from lqedu.formats import IntGrid
from lqedu.linalg import damp, inverse_factor, ldl_upper
from lqedu.rounding import gptq, hqq, ldlq, nearest, proxy_loss
from tests import problems, tolerances
from tests.compare import assert_codes_equal, code_mismatch

SHAPES = [(16, 32), (5, 96), (33, 130)]


def obq(w: Tensor, h: Tensor, grid: IntGrid, columns: list[int]) -> Tensor:
    """Optimal Brain Quantization on a fixed grid, straight from the formulas: round a weight, move every weight that is
    still free to its best place, downdate the inverse Hessian by Gaussian elimination. The oracle."""
    scale, zero = grid.fit(w)
    w, h_inv = w.clone(), torch.linalg.inv(h)
    codes = torch.zeros(w.shape, dtype=grid.code_dtype)
    for i in columns:
        codes[:, i] = grid.encode(w, scale, zero)[:, i]
        error = w[:, i] - grid.decode(codes, scale, zero, w.dtype)[:, i]
        w -= torch.outer(error, h_inv[i]) / h_inv[i, i]
        h_inv = h_inv - torch.outer(h_inv[:, i], h_inv[i]) / h_inv[i, i]
        h_inv[i, i] = 1.0  # eliminated: its row and column are zero now
    return codes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_obq_and_ldlq_code_for_code_in_fp64(shape: tuple[int, int], symmetric: bool) -> None:
    w = problems.weight(*shape, seed=1, dtype=torch.float64)
    h = problems.hessian(shape[1], seed=2, dtype=torch.float64)
    grid = IntGrid(3, symmetric)
    q, _ = gptq(w, h, grid, block_size=32)
    assert_codes_equal(q.codes, obq(w, damp(h, 0.01), grid, list(range(shape[1]))))
    assert_codes_equal(q.codes, ldlq(w, h, grid)[0].codes)


def test_activation_order_equals_obq_in_that_order() -> None:
    w = problems.weight(16, 64, seed=3, dtype=torch.float64)
    h = problems.hessian(64, seed=4, dtype=torch.float64)
    order = damp(h, 0.01).diagonal().argsort(descending=True, stable=True).tolist()
    for grid in (IntGrid(3), IntGrid(4, granularity="group", group_size=16)):
        q, _ = gptq(w, h, grid, block_size=16, order="activation")
        assert_codes_equal(q.codes, obq(w, damp(h, 0.01), grid, order))


@pytest.mark.parametrize("group", [None, 16, 32])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_block_size_changes_no_code(group: int | None, order: str) -> None:
    w = problems.weight(24, 96, seed=5, dtype=torch.float64)
    h = problems.hessian(96, seed=6, dtype=torch.float64)
    grid = IntGrid(3) if group is None else IntGrid(3, granularity="group", group_size=group)
    sizes = [1, 2, 8, 16, 32, 96, 128]
    results = [gptq(w, h, grid, block_size=size, order=order)[0] for size in sizes]
    for result in results[1:]:
        assert_codes_equal(result.codes, results[0].codes, group_size=group)
        assert torch.equal(result.scale, results[0].scale)


def test_block_size_in_float32_moves_only_ties() -> None:
    w, h = problems.weight(128, 256, seed=7), problems.hessian(256, seed=8)
    grid = IntGrid(4, granularity="group", group_size=64)
    base = gptq(w, h, grid, block_size=64)[0]
    for size in (1, 16, 128, 256):
        assert code_mismatch(gptq(w, h, grid, block_size=size)[0].codes, base.codes) <= tolerances.FP32_TIES


@pytest.mark.parametrize("shape", SHAPES)
def test_diagonal_hessian_gives_nearest(shape: tuple[int, int]) -> None:
    w = problems.weight(*shape, seed=9)
    h = torch.diag(torch.rand(shape[1], generator=problems.seeded(10)) + 0.1)
    for order in ("natural", "activation"):
        q, report = gptq(w, h, IntGrid(4), order=order)
        assert_codes_equal(q.codes, nearest(w, IntGrid(4))[0].codes)
        assert report.flips == 0


def test_beats_nearest_on_its_own_loss_on_average() -> None:
    """Not guaranteed for one matrix; over seeds it must win clearly."""
    ratios = []
    for seed in range(8):
        w, h = problems.weight(32, 96, seed=seed), problems.hessian(96, seed=100 + seed)
        grid = IntGrid(3, granularity="group", group_size=32)
        ratios.append(gptq(w, h, grid)[1].proxy_loss / nearest(w, grid, hessian=h)[1].proxy_loss)
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.7


def test_loss_identity() -> None:
    """tr(Δ H Δ^T) = Σ_k d_k ‖(Δ l)_k‖², the identity that LDLQ minimises term by term."""
    w = problems.weight(8, 40, seed=11, dtype=torch.float64)
    h = problems.hessian(40, seed=12, dtype=torch.float64)
    q, report = ldlq(w, h, IntGrid(2), damping=0.0)
    delta = q.dequantize(torch.float64) - w
    factor, d = ldl_upper(h)
    want = float(((delta @ factor).square().sum(0) * d).sum())
    assert report.proxy_loss == pytest.approx(want, rel=tolerances.FP64_IDENTITY)
    assert proxy_loss(delta, h) == pytest.approx(want, rel=tolerances.FP64_IDENTITY)


def test_factors_are_what_they_say() -> None:
    h = problems.hessian(64, seed=13, dtype=torch.float64)
    u = inverse_factor(h)
    assert torch.equal(u, u.triu())
    assert torch.allclose(u.T @ u @ h, torch.eye(64, dtype=torch.float64), atol=tolerances.FP64_IDENTITY)
    classic = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)  # the reference's route, two factorizations
    assert torch.allclose(u, classic, rtol=1e-8, atol=tolerances.FP64_IDENTITY)
    factor, d = ldl_upper(h)
    assert torch.allclose(factor @ torch.diag(d) @ factor.T, h, rtol=tolerances.FP64_IDENTITY)
    assert torch.equal(factor.diagonal(), torch.ones(64, dtype=torch.float64))


def test_groups_are_fitted_on_compensated_weights() -> None:
    """The second group's scale differs from the one the original weights give, whatever the block size."""
    w, h = problems.weight(16, 64, seed=14), problems.hessian(64, seed=15)
    grid = IntGrid(2, granularity="group", group_size=32)
    q, _ = gptq(w, h, grid)
    fitted, _ = grid.fit(w)
    assert torch.equal(q.scale[:, 0], fitted[:, 0])
    assert not torch.equal(q.scale[:, 1], fitted[:, 1])
    static, _ = gptq(w, h, grid, order="activation")
    assert torch.equal(static.scale, fitted)


def test_dead_columns_are_rounded_to_nearest_and_reported() -> None:
    w, h = problems.weight(8, 32, seed=16), problems.hessian(32, seed=17)
    h[[3, 20], :] = 0
    h[:, [3, 20]] = 0
    for rounding in (gptq, ldlq):
        q, report = rounding(w, h, IntGrid(4))
        assert report.dead_columns == 2
        near, _ = nearest(w, IntGrid(4))
        assert_codes_equal(q.codes[:, [3, 20]], near.codes[:, [3, 20]])
    q, report = gptq(w, torch.zeros(32, 32), IntGrid(4))  # nothing was ever active: all nearest, no crash
    assert_codes_equal(q.codes, near.codes)
    assert report.dead_columns == 32
    assert report.proxy_loss == 0


def test_permuting_inputs_permutes_the_answer() -> None:
    w = problems.weight(12, 48, seed=18, dtype=torch.float64)
    h = problems.hessian(48, seed=19, dtype=torch.float64)
    permutation = torch.randperm(48, generator=problems.seeded(20))
    straight, _ = gptq(w, h, IntGrid(3), order="activation")
    shuffled, _ = gptq(w[:, permutation], h[permutation][:, permutation], IntGrid(3), order="activation")
    assert_codes_equal(shuffled.codes, straight.codes[:, permutation])


@pytest.mark.parametrize(
    "grid",
    [
        IntGrid(bits, symmetric, granularity, 16 if granularity == "group" else None, search=search)
        for bits, symmetric, granularity, search in itertools.product(
            (2, 3, 4, 8), (False, True), ("tensor", "channel", "group"), ("none", "mse")
        )
    ],
    ids=str,
)
def test_every_grid_works_and_reports_what_it_did(grid: IntGrid) -> None:
    w, h = problems.weight(8, 48, seed=21), problems.hessian(48, seed=22)
    w[2, :16] = 0  # an all-zero group
    before = w.clone(), h.clone()
    for rounding in (gptq, ldlq):
        q, report = rounding(w, h, grid)
        assert torch.equal(w, before[0])
        assert torch.equal(h, before[1])
        assert report.proxy_loss == pytest.approx(proxy_loss(w - q.dequantize(), h), rel=1e-3, abs=1e-9)
        assert int(q.codes.min()) >= grid.code_min
        assert int(q.codes.max()) <= grid.code_max


def test_more_damping_moves_towards_nearest() -> None:
    w, h = problems.weight(16, 64, seed=23), problems.hessian(64, seed=24)
    flips = [gptq(w, h, IntGrid(4), damping=d)[1].flips for d in (0.01, 1.0, 100.0, 1e6)]
    assert flips == sorted(flips, reverse=True)
    assert flips[-1] == 0


def test_float16_and_bfloat16_weights_are_computed_in_float32() -> None:
    w, h = problems.weight(8, 32, seed=25).half(), problems.hessian(32, seed=26)
    assert_codes_equal(gptq(w, h, IntGrid(4))[0].codes, gptq(w.float(), h, IntGrid(4))[0].codes)


def test_refusals() -> None:
    w, h = problems.weight(8, 32, seed=27), problems.hessian(32, seed=28)
    grid = IntGrid(4)
    singular = torch.ones(32, 32)
    for rounding in (gptq, ldlq):
        with pytest.raises(NotPositiveDefiniteError, match="more damping"):
            rounding(w, singular, grid, damping=0.0)
        with pytest.raises(GridError, match="NaN"):
            rounding(torch.full((8, 32), torch.nan), h, grid)
        with pytest.raises(CalibrationError, match=r"needs a Hessian \[32, 32\]"):
            rounding(w, h[:16, :16], grid)
        with pytest.raises(CalibrationError, match="NaN"):
            rounding(w, h * torch.nan, grid)
        with pytest.raises(UsageError, match="damping"):
            rounding(w, h, grid, damping=-0.1)
        with pytest.raises(GridError, match="does not divide"):
            rounding(w, h, IntGrid(4, granularity="group", group_size=24))
    with pytest.raises(UsageError, match="order"):
        gptq(w, h, grid, order="random")
    with pytest.raises(GridError, match="block_size 24"):
        gptq(w, h, IntGrid(4, granularity="group", group_size=16), block_size=24)
    with pytest.raises(GridError, match="block_size"):
        gptq(w, h, grid, block_size=0)
    with pytest.raises(CalibrationError, match="Hessian"):
        nearest(w, grid, hessian=h[:2, :2])


def test_a_parameter_leaves_no_gradient_behind():
    weight = torch.nn.Parameter(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    h = torch.eye(16) + 0.5
    for quantized, _ in (
        gptq(weight, h, IntGrid(4)),
        ldlq(weight, h, IntGrid(4)),
        nearest(weight, IntGrid(4), hessian=h),
        hqq(weight, IntGrid(4, zero_point="float")),
    ):
        assert not quantized.scale.requires_grad and not quantized.dequantize().requires_grad


def test_arguments_of_a_wrong_type_get_a_sentence():
    w = torch.ones(2, 4)
    with pytest.raises(CalibrationError, match="got list"):
        gptq(w, [[1.0]], IntGrid(4))
    for damping in ("a", float("inf"), float("nan")):
        with pytest.raises(UsageError, match="damping"):
            gptq(w, torch.eye(4), IntGrid(4), damping=damping)
