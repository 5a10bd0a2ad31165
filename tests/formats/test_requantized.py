"""Requantized groups: second codes never leave ± 127, whatever the weight; kernel arithmetic; bytes and round trips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.requantized import RequantizedGrid, RequantizedTensor, requantize
from lqedu.rounding import gptq, nearest
from tests import problems

GRID = RequantizedGrid(16)


def _requantize(w: Tensor, grid: RequantizedGrid = GRID) -> RequantizedTensor:
    return requantize(nearest(w, grid.groups())[0])


def _oracle(groups: QTensor) -> Tensor:
    """The second codes in float64 from their definition, without the package's decode; int64 ``[out, in]``."""
    q = groups.codes.double().view(*groups.scale.shape, -1)
    w_hat = q * groups.scale.double()[..., None]  # [out, groups, g]
    s_c = w_hat.abs().amax((1, 2), keepdim=True) / 127
    ratio = torch.nan_to_num(groups.scale.double()[..., None] / s_c, nan=0, posinf=0).to(torch.float16).double()
    return torch.round(q * ratio).to(torch.int64).view(groups.shape)


@pytest.mark.parametrize("shape", [(24, 48), (13, 96), (1, 16)])
def test_second_codes_follow_their_definition(shape: tuple[int, int]) -> None:
    groups = nearest(problems.weight(*shape, seed=1), GRID.groups())[0]
    q = requantize(groups)
    assert torch.equal(q.codes, groups.codes)
    assert torch.equal(q.int8().to(torch.int64), _oracle(groups))
    assert torch.equal(q.int8().to(torch.int64).abs().amax(1), torch.full(shape[:1], 127))  # the range is used
    # the second rounding alone moves a weight by half a step of s_c, and the float16 ratio by 2**-11 of its size
    error = (q.dequantize(torch.float64) - groups.dequantize(torch.float64)).abs()
    bound = q.channel_scale.double() / 2 + groups.dequantize(torch.float64).abs() * 2**-10
    assert bool((error <= bound).all())


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rows=st.integers(1, 3), groups=st.integers(1, 4), size=st.sampled_from([1, 2, 8]))
def test_no_weight_makes_a_kernel_wrap(data: st.DataObject, rows: int, groups: int, size: int) -> None:
    """Rows of any finite weights, subnormal and huge ones side by side, rounded to nearest."""
    numbers = st.floats(-(2.0**100), 2.0**100, width=32)
    values = data.draw(st.lists(numbers, min_size=rows * groups * size, max_size=rows * groups * size))
    w = torch.tensor(values).view(rows, groups * size)
    q = _requantize(w, RequantizedGrid(size))
    assert int(q.int8().to(torch.int64).abs().max()) <= 127
    assert bool(torch.isfinite(q.dequantize()).all()) and bool(torch.isfinite(q.group_ratio).all())


@settings(max_examples=200, deadline=None)
@given(
    codes=st.lists(st.integers(-8, 7), min_size=8, max_size=8),
    exponents=st.lists(st.floats(-45, 37), min_size=4, max_size=4),
)
def test_no_codes_and_scales_make_a_kernel_wrap(codes: list[int], exponents: list[float]) -> None:
    """Any rounding may hand over any codes: error feedback does not keep them inside the fitted range."""
    grid = RequantizedGrid(2)
    scale = torch.tensor([[10.0**e for e in exponents]], dtype=torch.float32)
    q = requantize(QTensor(torch.tensor([codes], dtype=torch.int8), scale, None, grid.groups()))
    assert int(q.int8().to(torch.int64).abs().max()) <= 127
    assert torch.equal(q.int8()[q.codes == 0], torch.zeros(int((q.codes == 0).sum()), dtype=torch.int8))
    assert bool((q.int8().to(torch.int32) * q.codes.to(torch.int32) >= 0).all())  # no sign was flipped


@pytest.mark.parametrize("damping", [0.01, 1e-5])
def test_error_feedback_stays_inside(damping: float) -> None:
    w, h = problems.weight(64, 128, seed=5), problems.hessian(128, seed=6)
    q = requantize(gptq(w, h, GRID.groups(), damping=damping, order="activation")[0])
    assert int(q.int8().to(torch.int64).abs().max()) == 127


def test_a_channel_scale_from_the_weight_before_rounding_wraps() -> None:
    """The defect this format cannot have: s_c = max|w| / 127 lets the code -8 reach -136, and a byte makes it 120."""
    w = torch.full((64, 16), 0.1)
    w[:, 3] = -torch.linspace(1, 2, 64)  # largest of its row: w / s is -7.5 but for the rounding of s
    groups = nearest(w, GRID.groups())[0]
    row = int(groups.codes[:, 3].argmin())
    assert int(groups.codes[row, 3]) == -8
    ratio = (groups.scale * 127 / w.abs().amax(1, keepdim=True)).to(torch.float16)
    with pytest.raises(GridError, match=r"± 136.*dequantized weight"):
        GRID.decode_int8(groups.codes, ratio)
    byte = torch.round(groups.codes.float() * ratio.float()).to(torch.int32).to(torch.int8)  # as a register wraps
    assert int(byte[row, 3]) == 120
    assert int(requantize(groups).int8()[row, 3]) == -127


def test_the_fused_multiply_add_of_a_kernel_gives_the_same_bytes() -> None:
    """q r + 1152 in float16, rounded once: from 1024 to 2048 its step is 1, and its low byte holds w8 + 128."""
    ratios = torch.cat([torch.linspace(0, 15.87, 4001), torch.linspace(0, 0.2, 1001)]).to(torch.float16)
    codes = torch.arange(-8, 8, dtype=torch.int8)
    exact = codes.double()[None] * ratios.double()[:, None] + 1152  # [ratios, 16], no rounding yet
    low_byte = exact.to(torch.float16).view(torch.int16) & 0xFF
    signed = (low_byte ^ 0x80).to(torch.uint8).view(torch.int8)
    w8 = RequantizedGrid(1).decode_int8(codes.repeat(len(ratios), 1), ratios[:, None].expand(-1, 16).contiguous())
    assert torch.equal(signed, w8)


def test_bytes_and_round_trip() -> None:
    q = _requantize(problems.weight(24, 48, seed=2))
    assert q.nbytes == 24 * 24 + 4 * 24 + 2 * 24 * 3 == sum(t.nbytes for t in q.packed().values())
    assert q.bits_per_weight == 8 * q.nbytes / (24 * 48)
    back = RequantizedTensor.from_packed(q.packed(), RequantizedGrid.from_dict(q.grid.to_dict()), q.shape)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dequantize(), q.dequantize())
    empty = RequantizedTensor.empty(q.grid, q.shape).packed()
    assert {k: (v.shape, v.dtype) for k, v in empty.items()} == {k: (v.shape, v.dtype) for k, v in q.packed().items()}


def test_rows_and_groups_of_zeros() -> None:
    w = problems.weight(24, 48, seed=3) * 1e-6
    w[3], w[5, :16] = 0, 0
    q = _requantize(w)
    assert not q.dequantize()[3].any() and not q.dequantize()[5, :16].any()
    assert bool(torch.isfinite(q.dequantize()).all())


def test_what_does_not_fit_is_refused() -> None:
    w = problems.weight(4, 48, seed=4)
    for size in (0, 2.0, True):
        with pytest.raises(GridError, match="group_size is a whole number, at least 1"):
            RequantizedGrid(size)
    with pytest.raises(GridError, match="does not divide the 48"):
        RequantizedGrid(32).nbytes((4, 48))
    for grid in (IntGrid(4), IntGrid(4, True), IntGrid(8, True, "group", 16), IntGrid(4, True, "group", 4, axis=0)):
        with pytest.raises(GridError, match="symmetric 4-bit groups"):
            requantize(nearest(w, grid)[0])
    with pytest.raises(GridError, match="NaN"):
        requantize(QTensor(torch.zeros(1, 16, dtype=torch.int8), torch.full((1, 1), torch.nan), None, GRID.groups()))
    q = _requantize(w)
    with pytest.raises(GridError, match="± nan"):
        GRID.decode_int8(q.codes, q.group_ratio * torch.nan)
    packed = q.packed()
    with pytest.raises(GridError, match="has codes"):
        RequantizedTensor.from_packed({"codes": packed["codes"]}, GRID, (4, 48))
    with pytest.raises(GridError, match="do not fit a weight"):
        RequantizedTensor.from_packed(packed, GRID, (4, 32))
    with pytest.raises(GridError, match="do not fit a weight"):
        RequantizedTensor.from_packed(packed, RequantizedGrid(8), (4, 48))
    with pytest.raises(GridError, match="field group_size"):
        RequantizedGrid.from_dict({"size": 3})
