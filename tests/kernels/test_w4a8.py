"""W4A8 against its reference and against what lqedu stores; integer sums bit for bit."""

import re

import pytest
import torch
from torch import Tensor

from lqedu.formats.progressive import ProgressiveGrid, progressive_quantize
from lqedu.formats.qtensor import QTensor
from lqedu.formats.requantized import RequantizedGrid, requantize
from lqedu_kernels.w4a8 import (
    bytes_moved,
    default_config,
    few,
    int8_weight,
    one,
    operations,
    pack_groups,
    pack_ratios,
    pack_w4a8,
    search_space,
    tile,
    unpack_groups,
    unpack_w4a8,
    w4a8_matmul,
    w4a8_reference,
)

FORMS = [("channel", 128), ("integer", 64), ("integer", 128), ("ratio", 64), ("ratio", 128)]
LAUNCHES = [
    few(32, 8, 4, stages=2),
    few(16, 16, 2, stages=3),
    tile(64, 16, 1, warps=4, stages=3),
    tile(64, 64, 2, warps=4, stages=2),
    one(64, 2, warps=4),
]
IDS = ["few4", "few2", "tile1", "tile2", "one"]


def groups_of(form: str, n: int, k: int, size: int, make: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Codes that use all 16 values, and groups whose every code decodes inside int8."""
    if form == "channel":
        return torch.randint(-8, 8, (n, k), generator=make).to(torch.int8), None
    q = torch.randint(0, 16, (n, k), generator=make).to(torch.uint8)
    if form == "ratio":
        return q, pack_ratios((torch.rand(n, k // size, generator=make) * 15.8).half())
    scale = torch.randint(1, 18, (n, k // size), generator=make).to(torch.uint8)
    offset = torch.randint(0, 10**6, scale.shape, generator=make) % (256 - 15 * scale.int()) + 15 * scale.int() - 127
    return q, pack_groups(scale, offset.clamp(0, 128))


def problem(
    m: int,
    n: int,
    k: int,
    form: str,
    size: int,
    device: torch.device,
    *,
    zero: bool = False,
    bias: torch.dtype | None = None,
) -> dict:
    """Operands of a call; extreme codes of x and every nibble occur."""
    make = torch.Generator().manual_seed(m * n + k)
    q, groups = groups_of(form, n, k, size, make)
    assert q.unique().numel() == 16
    x = torch.randint(-128, 128, (m, k), generator=make).to(torch.int8)
    x[0, :2] = torch.tensor([-128, 127], dtype=torch.int8)
    scale = (torch.rand(n, generator=make) + 0.5) / k / 16
    named = {
        "x": x,
        "x_scale": torch.rand(m, generator=make) + 0.5,
        "codes": pack_w4a8(q),
        "scale": scale.half(),
        "groups": groups,
    }
    if zero:
        named |= {
            "zero": torch.randint(-8, 8, (n,), generator=make, dtype=torch.int32),
            "x_sum": x.sum(1, dtype=torch.int32),
        }
    if bias is not None:
        named["bias"] = torch.randn(n, generator=make).to(bias)
    return {name: None if t is None else t.to(device) for name, t in named.items()} | {"group_size": size}


def assert_close(y: Tensor, want: Tensor) -> None:
    """One rounding to the dtype of y: a float32 in front of it may be a few 2^-24 off and round to the other neighbour."""
    step = 2.0**-10 if y.dtype == torch.float16 else 2.0**-7
    worst = ((y.double() - want.double()).abs() / (step * want.double().abs() + 2.0**-24)).max()
    assert y.isfinite().all() and worst <= 1, f"{worst} times a rounding of {y.dtype}"


@pytest.mark.parametrize("launch", LAUNCHES, ids=IDS)
@pytest.mark.parametrize(("form", "size"), FORMS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 128), (3, 70, 384), (17, 33, 640)])
def test_integer_sums_are_exact(
    m: int, n: int, k: int, form: str, size: int, launch: dict, device: torch.device
) -> None:
    a = problem(m, n, k, form, size, device) | {"x_scale": torch.ones(m, device=device)}
    a["scale"] = torch.full((n,), 2.0**-8, device=device)
    w8 = int8_weight(a["codes"], a["groups"], k, group_size=size)
    total = a["x"].cpu().int() @ w8.cpu().int().T
    assert torch.equal(w4a8_matmul(**a, config=launch).cpu(), (total.float() * 2.0**-8).half())


@pytest.mark.parametrize("launch", LAUNCHES[:4], ids=IDS[:4])
@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("k", [1, 65, 200, 530])
def test_ragged_inputs(n: int, k: int, launch: dict, device: torch.device) -> None:
    q = torch.arange(n * k).view(n, k).remainder(16).sub(8).to(torch.int8)
    x = torch.arange(5 * k).view(5, k).mul(37).remainder(256).sub(128).to(torch.int8)
    y = w4a8_matmul(
        x.to(device),
        torch.ones(5, device=device),
        pack_w4a8(q).to(device),
        torch.full((n,), 2.0**-6, device=device),
        config=launch,
    )
    assert torch.equal(y.cpu(), ((x.int() @ q.int().T).float() * 2.0**-6).half())


@pytest.mark.parametrize(("form", "size"), FORMS)
def test_agrees_with_the_reference_and_with_torch(form: str, size: int, device: torch.device) -> None:
    a = problem(18, 72, 512, form, size, device, bias=torch.float32)
    want = w4a8_reference(**a)
    w8 = int8_weight(a["codes"], a["groups"], 512, group_size=size)
    product = torch._int_mm(a["x"], w8.T) if form else None  # wants more than 16 rows and multiples of 8
    assert_close((product.float() * a["scale"].float() * a["x_scale"][:, None] + a["bias"]).half(), want)
    first = [w4a8_matmul(**a, config=launch) for launch in [*LAUNCHES, None]]
    again = [w4a8_matmul(**a, config=launch) for launch in [*LAUNCHES, None]]
    for y, same in zip(first, again, strict=True):
        assert_close(y, want)
        assert torch.equal(y, same) and torch.equal(y, first[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.float32, "same"])
def test_output_and_bias(dtype: torch.dtype, bias: torch.dtype | str | None, device: torch.device) -> None:
    a = problem(7, 40, 256, "channel", 128, device, zero=True, bias=dtype if bias == "same" else bias)
    y = w4a8_matmul(**a, dtype=dtype)
    assert y.dtype == dtype
    assert_close(y, w4a8_reference(**a, dtype=dtype))


def read_weight(codes: Tensor, groups: Tensor | None, launch: dict, device: torch.device) -> Tensor:
    """``w8`` as a kernel unpacks it: the product with one input at a time."""
    n = len(codes)
    y = w4a8_matmul(
        torch.eye(128, dtype=torch.int8, device=device),
        torch.ones(128, device=device),
        codes.to(device),
        torch.ones(n, device=device),
        groups=None if groups is None else groups.to(device),
        config=launch,
    )
    return y.T.cpu().to(torch.int32)


@pytest.mark.parametrize(
    ("launch", "every"), [(LAUNCHES[1], 8), (LAUNCHES[3], 1), (one(512, 1, warps=8), 8)], ids=["few", "tile", "one"]
)
def test_every_integer_group_decodes(launch: dict, every: int, device: torch.device) -> None:
    """Each scale with each offset it can have, and each code that stays inside int8: q s - b without a carry."""
    s, b = torch.cartesian_prod(torch.arange(1, 18), torch.arange(0, 241))[::every].T
    w8 = torch.arange(16) * s[:, None] - b[:, None]
    fits = (w8 >= -128) & (w8 <= 127)
    # A code outside stands aside for one inside, so that its neighbours in the register are not spoilt.
    q = torch.where(fits, torch.arange(16), fits.int().argmax(1, keepdim=True)).repeat(1, 8)
    some = fits.any(1)
    q, s, b = q[some], s[some], b[some]
    groups = pack_groups(s[:, None].to(torch.uint8), b[:, None])
    assert torch.equal(
        read_weight(pack_w4a8(q.to(torch.uint8)), groups, launch, device), (q * s[:, None] - b[:, None]).int()
    )


@pytest.mark.parametrize("launch", [LAUNCHES[1], LAUNCHES[3], one(512, 1, warps=8)], ids=["few", "tile", "one"])
def test_ratios_round_half_to_even(launch: dict, device: torch.device) -> None:
    special = [0.0, 0.5, 1.5, 2.5, 0.25, 0.75, 15.875, 15.9, 2.0**-11, 2.0**-24, 0.0625, 1 / 3, 14.5]
    ratio = torch.tensor(special + torch.linspace(0, 15.8, 200).tolist()).half()
    q = torch.arange(16, dtype=torch.uint8).repeat(len(ratio), 8)
    want = torch.round((q.double() - 8) * ratio.double()[:, None]).int()
    assert torch.equal(read_weight(pack_w4a8(q), pack_ratios(ratio[:, None]), launch, device), want)


def test_serves_what_lqedu_stores(device: torch.device) -> None:
    w = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 24)[:, None]
    for size in (64, 128):
        for zero in ("code", "offset"):
            stored = progressive_quantize(w, ProgressiveGrid(size, zero=zero))
            offset = stored.zero.int() * (stored.group_scale.int() if zero == "code" else 1)
            groups = pack_groups(stored.group_scale, offset)
            assert torch.equal(int8_weight(pack_w4a8(stored.codes), groups, 256, group_size=size), stored.int8())
            s, b = unpack_groups(groups, 24)
            assert torch.equal(s, stored.group_scale) and torch.equal(b.int(), offset)
        grid = RequantizedGrid(size).groups()
        scale, _ = grid.fit(w)
        stored = requantize(QTensor(grid.encode(w, scale, None), scale, None, grid))
        packed = pack_w4a8((stored.codes.short() + 8).to(torch.uint8))
        assert torch.equal(int8_weight(packed, pack_ratios(stored.group_ratio), 256, group_size=size), stored.int8())


def test_zero_points(device: torch.device) -> None:
    """QoQ per channel: 4-bit codes with a zero point; and, by the same term, activations with zero points."""
    make = torch.Generator().manual_seed(1)
    q, z = torch.randint(0, 16, (32, 128), generator=make), torch.randint(0, 16, (32,), generator=make)
    x, zx = torch.randint(-128, 128, (4, 128), generator=make), torch.randint(-128, 128, (4,), generator=make)
    codes = pack_w4a8((q - 8).to(torch.int8)).to(device)
    ones, scale = torch.ones(4, device=device), torch.full((32,), 2.0**-6, device=device)
    x8 = x.to(torch.int8).to(device)
    y = w4a8_matmul(x8, ones, codes, scale, zero=(z - 8).int().to(device), x_sum=x.sum(1).int().to(device))
    assert torch.equal(y.cpu(), ((x @ (q - z[:, None]).T).float() * 2.0**-6).half())
    y = w4a8_matmul(x8, ones, codes, scale, zero=(q - 8).sum(1).int().to(device), x_sum=zx.int().to(device))
    assert torch.equal(y.cpu(), (((x - zx[:, None]) @ (q - 8).T).float() * 2.0**-6).half())


def test_rows_of_groups_are_rows_of_16_bytes() -> None:
    for n, g in ((1, 1), (8, 1), (13, 2)):
        groups = pack_ratios(torch.ones(n, g, dtype=torch.float16))
        assert groups.shape == (g, -(-n // 8) * 8) and groups.stride() == (groups.shape[1], 1)


def test_bytes_of_a_word() -> None:
    q = torch.zeros(1, 256, dtype=torch.uint8)
    q[0, [1, 65, 128, 255]] = torch.tensor([5, 10, 15, 1], dtype=torch.uint8)
    packed = pack_w4a8(q)
    assert packed.shape == (1, 128)
    assert {i: hex(v) for i, v in enumerate(packed[0].tolist()) if v} == {1: "0xa5", 64: "0xf", 127: "0x10"}
    for k in (1, 64, 129, 300):
        codes = torch.randint(0, 16, (3, k), generator=torch.Generator().manual_seed(k)).to(torch.uint8)
        assert torch.equal(unpack_w4a8(pack_w4a8(codes), k), codes)


def test_no_tokens(device: torch.device) -> None:
    a = problem(2, 32, 128, "channel", 128, device)
    assert w4a8_matmul(**a | {"x": a["x"][:0], "x_scale": a["x_scale"][:0]}).shape == (0, 32)


REFUSALS = [
    ({"x": torch.zeros(2, 256)}, TypeError, "x (tokens) must be int8, got float32"),
    (
        {"x": torch.zeros(2, 255, dtype=torch.int8)},
        ValueError,
        "group_size must be 64 or 128 and divide the 255 inputs of x",
    ),
    ({"x": torch.zeros(2, 2**17, dtype=torch.int8)}, ValueError, "x has 131072 inputs"),
    ({"x": torch.zeros(4, 256, dtype=torch.int8)[::2]}, ValueError, "x (tokens) is not contiguous"),
    ({"x_scale": torch.ones(3)}, ValueError, "x_scale (of a column: .flatten()) must have shape [2], got [3]"),
    ({"codes": torch.zeros(32, 64, dtype=torch.uint8)}, ValueError, "codes (pack_w4a8) must have shape [any, 128]"),
    ({"scale": torch.ones(32, dtype=torch.float64)}, TypeError, "scale must be float16 or float32"),
    ({"groups": torch.zeros(2, 32)}, TypeError, "groups (pack_groups) must be int16 or float16"),
    ({"groups": torch.zeros(4, 32, dtype=torch.int16)}, ValueError, "groups (pack_groups) must have shape [2, 32]"),
    ({"group_size": 32}, ValueError, "group_size must be 64 or 128"),
    ({"zero": torch.zeros(32, dtype=torch.int32)}, ValueError, "zero and x_sum go together, and only per channel"),
    ({"groups": None, "zero": torch.zeros(32, dtype=torch.int32)}, ValueError, "zero and x_sum go together"),
    ({"bias": torch.zeros(32, dtype=torch.bfloat16)}, TypeError, "bias must be float16 or float32"),
    ({"dtype": torch.float32}, TypeError, "dtype must be float16 or bfloat16"),
    (
        {"x": torch.zeros(2, 192, dtype=torch.int8), "groups": None, "config": one(8, 1, warps=4)},
        ValueError,
        "config asks for the kernel of whole blocks of 128 inputs",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refusals(change: dict, error: type[Exception], message: str, device: torch.device) -> None:
    a = problem(2, 32, 256, "integer", 128, device)
    change = {name: t.to(device) if isinstance(t, Tensor) and name != "x" else t for name, t in change.items()}
    if isinstance(change.get("x"), Tensor):
        strided = not change["x"].is_contiguous()
        change["x"] = (
            change["x"].to(device) if not strided else torch.zeros(4, 256, dtype=torch.int8, device=device)[::2]
        )
    with pytest.raises(error, match=re.escape(message)):
        w4a8_matmul(**a | change)


@pytest.mark.parametrize(("scale", "offset"), [(18, 0), (1, -1), (1, 241)])
def test_groups_that_a_byte_cannot_hold(scale: int, offset: int) -> None:
    with pytest.raises(ValueError, match="group_scale must be at most 17 and offset within"):
        pack_groups(torch.tensor([[scale]], dtype=torch.uint8), torch.tensor([[offset]]))


def test_configurations_are_pure() -> None:
    for m in (1, 8, 16, 17, 64, 256, 1024, 8192):
        for n, k in ((4096, 4096), (11008, 4096), (4096, 14336)):
            assert default_config(m, n, k) == default_config(m, n, k)
            space = search_space(m, n, k)
            assert 0 < len(space) <= 24 and all(list(space).count(c) == 1 for c in space)
    assert operations(2, 3, 4) == 48
    assert bytes_moved(1, 11008, 4096) == 4096 + 11008 * 2048 + 2 * 11008 + 4 + 4 * 11008
    assert bytes_moved(1, 128, 256, group_size=128) - bytes_moved(1, 128, 256) == 2 * 2 * 128
