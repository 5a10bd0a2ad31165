"""Integer grids against closed forms: scales by convention, half-step bounds, storage, refusals."""

import itertools

import pytest
import torch

from lqedu.errors import GridError
from lqedu.formats import IntGrid, QTensor, ScaleConvention
from lqedu.formats.packing import packed_width
from tests import problems

GRIDS = [
    IntGrid(bits, symmetric, granularity, 16 if granularity == "group" else None, scale_dtype=torch.float32)
    for bits, symmetric, granularity in itertools.product((2, 3, 4, 8), (False, True), ("tensor", "channel", "group"))
]


@pytest.mark.parametrize(
    ("grid", "want"),
    [
        (IntGrid(4, scale_dtype=torch.float64), 1.5 / 15),
        (IntGrid(4, convention=ScaleConvention.MINMAX, scale_dtype=torch.float64), 1.5 / 15),
        (IntGrid(4, symmetric=True, scale_dtype=torch.float64), 1 / 7.5),
        (IntGrid(4, symmetric=True, convention=ScaleConvention.MAX_CODE, scale_dtype=torch.float64), 1 / 7),
        (IntGrid(8, symmetric=True, scale_dtype=torch.float64), 1 / 127.5),
        (IntGrid(8, symmetric=True, convention=ScaleConvention.MAX_CODE, scale_dtype=torch.float64), 1 / 127),
    ],
)
def test_scale_of_each_convention(grid: IntGrid, want: float) -> None:
    scale, _ = grid.fit(torch.tensor([[-1.0, 0.5]], dtype=torch.float64))
    assert float(scale) == pytest.approx(want, rel=1e-12)


def test_minmax_conventions_part_where_zero_lies_outside() -> None:
    w = torch.tensor([[1.0, 2.5]])
    forced, _ = IntGrid(4, scale_dtype=torch.float32).fit(w)
    free, zero = IntGrid(4, convention=ScaleConvention.MINMAX, scale_dtype=torch.float32).fit(w)
    assert float(forced) == pytest.approx(2.5 / 15)
    assert float(free) == pytest.approx(1.5 / 15)
    assert int(zero) == 0  # AWQ clamps the zero point into the codes


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_error_is_at_most_half_a_step_inside_the_range(grid: IntGrid) -> None:
    w = problems.weight(8, 48, seed=1)
    scale, zero = grid.fit(w)
    w_hat = grid.decode(grid.encode(w, scale, zero), scale, zero)
    step = scale.expand(8, -1).repeat_interleave(48 // scale.shape[1], dim=1)
    z = 0 if zero is None else zero.float().expand(8, -1).repeat_interleave(48 // scale.shape[1], dim=1)
    inside = (w >= step * (grid.code_min - z)) & (w <= step * (grid.code_max - z))
    error = (w - w_hat).abs()
    assert bool((error[inside] <= step[inside] / 2 * (1 + 1e-5)).all())
    # The asymmetric range is covered but for the rounding of the zero point; the symmetric one to half a step on top.
    assert bool((error <= step * (1 + 1e-5)).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_grid_points_are_fixed_points(grid: IntGrid) -> None:
    w = problems.weight(8, 48, seed=2)
    scale, zero = grid.fit(w)
    codes = torch.randint(grid.code_min, grid.code_max + 1, w.shape, generator=problems.seeded(3)).to(grid.code_dtype)
    assert torch.equal(grid.encode(grid.decode(codes, scale, zero), scale, zero), codes)


def test_rounds_half_to_even() -> None:
    grid = IntGrid(4, symmetric=True, convention=ScaleConvention.MAX_CODE)
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.0]])  # scale 1
    scale, _ = grid.fit(w)
    assert float(scale) == 1.0
    assert grid.encode(w, scale, None).tolist() == [[0, 2, 2, 0, -2, 7]]


def test_scale_is_rounded_before_codes_are_computed() -> None:
    w = problems.weight(4, 64, seed=4)
    grid = IntGrid(8)
    scale, zero = grid.fit(w)
    assert scale.dtype == torch.float16
    s = scale.double()
    want = (torch.round(w.double() / s) + zero).clamp(0, 255)
    assert int((want != grid.encode(w, scale, zero)).sum()) == 0


@pytest.mark.parametrize(
    "grid", [IntGrid(4), IntGrid(4, symmetric=True), IntGrid(2, granularity="group", group_size=4)]
)
def test_zero_group_decodes_to_zeros(grid: IntGrid) -> None:
    w = torch.zeros(3, 8)
    w[1] = 0.3
    scale, zero = grid.fit(w)
    assert bool(torch.isfinite(scale).all())
    w_hat = grid.decode(grid.encode(w, scale, zero), scale, zero)
    assert torch.equal(w_hat[[0, 2]], torch.zeros(2, 8))
    assert bool(((w_hat[1] - w[1]).abs() <= scale[1, 0]).all())


def test_scale_invariance() -> None:
    """A power of two changes the scale and nothing else."""
    w = problems.weight(4, 32, seed=5)
    grid = IntGrid(4, granularity="group", group_size=16)
    (s1, z1), (s2, z2) = grid.fit(w), grid.fit(4 * w)
    assert torch.equal(4 * s1, s2)
    assert torch.equal(grid.encode(w, s1, z1), grid.encode(4 * w, s2, z2))


def test_mse_search_never_loses_on_its_own_objective() -> None:
    for seed in range(5):
        w = problems.weight(16, 64, seed=seed)
        for bits, symmetric in itertools.product((2, 3, 4), (False, True)):
            plain = IntGrid(bits, symmetric, "group", 32)
            searched = IntGrid(bits, symmetric, "group", 32, search="mse")
            losses = []
            for grid in (plain, searched):
                scale, zero = grid.fit(w)
                losses.append((grid.decode(grid.encode(w, scale, zero), scale, zero) - w).abs().pow(2.4).sum())
            assert losses[1] <= losses[0]
    assert losses[1] < 0.99 * losses[0]  # and the search does something


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nbytes_counts_what_is_stored(grid: IntGrid) -> None:
    w = problems.weight(6, 48, seed=6)
    scale, zero = grid.fit(w)
    q = QTensor(grid.encode(w, scale, zero), scale, zero, grid)
    stored = q.packed()
    assert sum(t.nbytes for t in stored.values()) == q.nbytes
    rows, columns = {"tensor": (1, 1), "channel": (6, 1), "group": (6, 3)}[grid.granularity]
    zeros = 0 if grid.symmetric else rows * packed_width(columns, grid.bits)
    assert q.nbytes == 6 * packed_width(48, grid.bits) + rows * columns * 4 + zeros
    assert q.bits_per_weight == 8 * q.nbytes / (6 * 48)
    back = QTensor.from_packed(stored, grid, (6, 48))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())


def test_dict_round_trip_and_strictness() -> None:
    for grid in GRIDS:
        assert IntGrid.from_dict(grid.to_dict()) == grid
    good = IntGrid(4).to_dict()
    for bad in (good | {"extra": 1}, {k: v for k, v in good.items() if k != "bits"}, good | {"convention": "guess"},
                good | {"scale_dtype": "int3"}):  # fmt: skip
        with pytest.raises(GridError):
            IntGrid.from_dict(bad)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"bits": 1}, "2 to 8"),
        ({"bits": 9}, "2 to 8"),
        ({"bits": True}, "2 to 8"),
        ({"granularity": "row"}, "granularity"),
        ({"granularity": "group"}, "group_size"),
        ({"granularity": "group", "group_size": 0}, "group_size"),
        ({"group_size": 64}, "granularity='group'"),
        ({"symmetric": True, "convention": ScaleConvention.MINMAX}, "FULL_RANGE or MAX_CODE"),
        ({"convention": ScaleConvention.MAX_CODE}, "MINMAX_ZERO or MINMAX"),
        ({"search": "best"}, "search"),
        ({"scale_dtype": torch.int8}, "scale_dtype"),
        ({"convention": "max"}, "ScaleConvention"),
    ],
)
def test_contradictions_die_at_construction(fields: dict, match: str) -> None:
    with pytest.raises(GridError, match=match):
        IntGrid(**fields)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (torch.tensor([[1.0, float("nan")]]), "1 NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), "1 NaN or infinite"),
        (torch.ones(2, 4, dtype=torch.int32), "floating"),
        (torch.ones(4), r"\[out, in\]"),
        (torch.ones(0, 4), r"\[out, in\]"),
        (torch.full((1, 4), 1e8), "overflows"),
    ],
)
def test_bad_weights_are_refused(weight: torch.Tensor, match: str) -> None:
    with pytest.raises(GridError, match=match):
        IntGrid(4).fit(weight)


def test_group_size_that_does_not_divide_names_the_remedy() -> None:
    with pytest.raises(GridError, match=r"128 does not divide the 576 inputs.*use 64"):
        IntGrid(4, granularity="group", group_size=128).scale_shape((8, 576))


def test_qtensor_refuses_parts_that_do_not_belong_together() -> None:
    grid = IntGrid(4, granularity="group", group_size=4)
    w = problems.weight(2, 8, seed=7)
    scale, zero = grid.fit(w)
    codes = grid.encode(w, scale, zero)
    for bad in (
        (codes.to(torch.int8), scale, zero),
        (codes, scale[:1], zero),
        (codes, scale.float(), zero),
        (codes, scale, None),
        (codes, scale, zero[:, :1]),
    ):
        with pytest.raises(GridError):
            QTensor(*bad, grid)
    packed = QTensor(codes, scale, zero, grid).packed()
    with pytest.raises(GridError, match="tensors"):
        QTensor.from_packed({"codes": packed["codes"]}, grid, (2, 8))
    with pytest.raises(GridError, match="do not fit"):
        QTensor.from_packed(packed, grid, (2, 16))


@pytest.mark.parametrize("value", [3.3, 100.0, -100.0, 1e-3])
def test_a_constant_group_decodes_to_itself_under_every_convention(value):
    w = torch.full((2, 32), value)
    for convention in ScaleConvention:
        if convention is ScaleConvention.RMS:
            continue
        symmetric = convention in (ScaleConvention.FULL_RANGE, ScaleConvention.MAX_CODE)
        grid = IntGrid(4, symmetric, "group", 16, convention=convention)
        scale, zero = grid.fit(w)
        w_hat = grid.decode(grid.encode(w, scale, zero), scale, zero)
        assert torch.allclose(w_hat, w, rtol=0.07 if symmetric else 2e-3), convention
