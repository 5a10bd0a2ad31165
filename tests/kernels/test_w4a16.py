"""W4A16 against its reference and against float64; sums that must be exact, bit for bit."""

import re

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lqedu_kernels._tensors import Target, row_major, target_of
from lqedu_kernels.tuning import configuration
from lqedu_kernels.w4a16 import (
    bytes_moved,
    default_config,
    operations,
    pack_w4a16,
    search_space,
    unpack_w4a16,
    w4a16_matmul,
    w4a16_reference,
)

H100 = Target("NVIDIA H100 80GB HBM3", (9, 0), 132)
#: Small tiles, so that the interpreter sees several of everything.
FEW = dict(kernel="few", block_m=8, block_n=16, slices=2, splits=2, warps=2, stages=2)
MANY = dict(kernel="many", block_m=16, block_n=64, warps=4, stages=2, group_m=2, programs=3)
#: Unit roundoff: the largest relative error of one rounding.
ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
GROUPS = [None, 128, 64, 32]
ZEROS = [None, torch.uint8, torch.float32]


def problem(
    m: int, n: int, k: int, group_size: int | None, zero: torch.dtype | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor | int | None]:
    """Operands with every code in every nibble; scales and zero points of their own for each group."""
    make = torch.Generator().manual_seed(m + n + k)
    codes = torch.randint(0, 16, (n, k), generator=make, dtype=torch.uint8)
    codes[:16] = (torch.arange(k) + torch.arange(min(n, 16))[:, None]).remainder(16).to(torch.uint8)
    groups = 1 if group_size is None else -(-k // group_size)
    zeros = torch.rand(groups, n, generator=make) * 15
    return {
        "x": torch.randn(m, k, generator=make).to(dtype).to(device),
        "words": pack_w4a16(codes).to(device),
        # as lqedu.runtime.backend has it: of one group, [n, 1].T is contiguous already and keeps its stride of one element
        "scale": (torch.rand(n, groups, generator=make) * 0.02 + 0.005).to(dtype).to(device).T.contiguous(),
        "zero": None if zero is None else zeros.round().to(zero).to(device) if zero == torch.uint8 else zeros.to(zero).to(device),
        "group_size": group_size,
    }  # fmt: skip


def weight_in_float64(words: Tensor, scale: Tensor, zero: Tensor | None, group_size: int | None, k: int) -> Tensor:
    """The contract written once more, column by column of the stored bits."""
    bits = words.cpu().to(torch.int32) & 0xFFFF
    weight = torch.empty(words.shape[0], k, dtype=torch.float64)
    for i in range(k):
        group = 0 if group_size is None else i // group_size
        code = (bits[:, i // 128 * 32 + i % 32] >> (4 * (i % 128 // 32))) & 15
        offset = 8 if zero is None else zero[group].cpu().double()
        weight[:, i] = scale[group].cpu().double() * (code - offset)
    return weight


def assert_close(y: Tensor, a: dict, config: dict, bias: Tensor | None = None) -> None:
    """Every element is y rounded once; in "many" the weights were rounded too, each by itself.

    A weight takes at most three roundings (scale, product, rest of a float zero point). Their errors are independent, so
    the error of a sum is of the size that the sum would have with random signs; five times that is never reached.
    """
    x, dtype = a["x"].cpu().double(), y.dtype
    weight = weight_in_float64(a["words"], a["scale"], a["zero"], a["group_size"], x.shape[1])
    want = x @ weight.T + (0 if bias is None else bias.cpu().double())
    spread = (x.square() @ weight.square().T).sqrt()
    # "hopper_few" adds up to 11008 products with tensor cores, which cut off what is below float32 (twice 2^-20 was seen).
    rounded = (
        5 * ROUNDOFF[dtype]
        if config["kernel"] == "many"
        else 2.0**-18
        if config["kernel"] == "hopper_few"
        else 2.0**-20
    )
    allowed = ROUNDOFF[dtype] * 1.001 * want.abs() + rounded * spread
    worst = ((y.cpu().double() - want).abs() / allowed).max()
    assert y.isfinite().all() and worst <= 1, f"{float(worst):.2f} times what is allowed"


def test_words_hold_quarters_of_a_block() -> None:
    codes = torch.arange(128, dtype=torch.uint8).remainder(16)[None].repeat(2, 1)
    codes[1] = torch.arange(128).div(32, rounding_mode="floor").to(torch.uint8) + 9
    words = pack_w4a16(codes)
    assert [f"{int(w) & 0xFFFF:04x}" for w in words[0, :3]] == ["0000", "1111", "2222"]
    assert {f"{int(w) & 0xFFFF:04x}" for w in words[1]} == {"cba9"}


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 127), (2, 128), (5, 300)])
def test_packing_is_inverted(n: int, k: int) -> None:
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
    words = pack_w4a16(codes)
    assert words.shape == (n, -(-k // 128) * 32) and words.dtype == torch.int16
    assert torch.equal(unpack_w4a16(words, k), codes)
    assert torch.equal(
        unpack_w4a16(words, words.shape[1] * 4)[:, k:], torch.zeros(n, words.shape[1] * 4 - k, dtype=torch.uint8)
    )


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("zero", [None, torch.uint8, torch.float16])
def test_reference_is_the_contract(group_size: int | None, zero: torch.dtype | None) -> None:
    a = problem(3, 20, 200, group_size, zero, torch.float16, torch.device("cpu"))
    assert_close(w4a16_reference(**a), a, FEW)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize(("config", "m"), [(FEW, 3), (MANY, 19)], ids=["few", "many"])
def test_every_grid(
    config: dict, m: int, zero: torch.dtype | None, group_size: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    a = problem(m, 40, 416, group_size, zero, dtype, device)
    y = w4a16_matmul(**a, config=config)
    assert y.shape == (m, 40) and y.dtype == dtype
    assert_close(y, a, config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
def test_whole_numbers_are_exact(config: dict, dtype: torch.dtype, device: torch.device) -> None:
    """Where codes, zero points and x are small integers nothing rounds: every code at every place is exact."""
    make = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (16, 256), generator=make, dtype=torch.uint8)
    codes[:, :128] = (torch.arange(128) + torch.arange(16)[:, None]).remainder(16).to(torch.uint8)
    x = torch.eye(128, 256)[:: 5 if config is FEW else 1]  # one input at a time: y is a column of the weight
    scale, zero = torch.ones(4, 16, dtype=dtype), torch.randint(0, 16, (4, 16), generator=make, dtype=torch.uint8)
    y = w4a16_matmul(
        x.to(dtype).to(device),
        pack_w4a16(codes).to(device),
        scale.to(device),
        zero.to(device),
        group_size=64,
        config=config,
    )
    want = x @ (codes.float() - zero.repeat_interleave(64, 0).T.float()).T
    assert torch.equal(y.cpu().float(), want)


@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 7, 33), (2, 65, 100), (17, 33, 256)])
def test_ragged_shapes_and_bias(m: int, n: int, k: int, config: dict, device: torch.device) -> None:
    a = problem(m, n, k, 32, torch.uint8, torch.float16, device)
    for bias in (None, torch.linspace(-1, 1, n, device=device), torch.linspace(-1, 1, n, device=device).half()):
        assert_close(w4a16_matmul(**a, bias=bias, config=config), a, config, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
def test_scales_and_zero_points_of_every_dtype(config: dict, dtype: torch.dtype, device: torch.device) -> None:
    a = problem(4, 48, 256, 64, dtype, torch.float16, device)
    a["scale"] = (a["scale"].float() * 1.0009).to(dtype)
    assert_close(w4a16_matmul(**a, config=config), a, config)


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_programs_that_share_a_tile(shares: int, device: torch.device) -> None:
    """Any number of programs, any order of arrival: the same bits in two launches, and sums that are right."""
    for config in (FEW | {"splits": shares}, MANY | {"programs": 3 * shares + 1}):
        a = problem(9, 40, 650, 128, torch.uint8, torch.float16, device)
        first, second = (w4a16_matmul(**a, config=config) for _ in range(2))
        assert torch.equal(first, second)
        assert_close(first, a, config)


@pytest.mark.parametrize("m", [1, 8, 16, 17, 70])
def test_default_configuration(m: int, device: torch.device) -> None:
    a = problem(m, 72, 256, 128, torch.uint8, torch.float16, device)
    kernel = (configuration("w4a16/group128", m, 72, 256, gpu=target_of(a["x"], "x").name) or {}).get("kernel")
    untuned = "few" if m <= 16 else "many"  # also what runs where the GPU's measured kernel does not take the call
    assert_close(w4a16_matmul(**a), a, {"kernel": kernel if kernel == "hopper_few" else untuned})


def test_no_tokens(device: torch.device) -> None:
    a = problem(1, 16, 128, 128, None, torch.float16, device)
    assert w4a16_matmul(**(a | {"x": a["x"][:0]})).shape == (0, 16)


def test_arguments_are_unchanged(device: torch.device) -> None:
    a = problem(3, 40, 256, 64, torch.uint8, torch.float16, device)
    before = {name: t.clone() for name, t in a.items() if isinstance(t, Tensor)}
    for config in (FEW, MANY):
        w4a16_matmul(**a, config=config)
    assert all(torch.equal(before[name], a[name]) for name in before)


def test_bytes_and_operations() -> None:
    assert bytes_moved(1, 4096, 4096, 128) == 4096 * 2048 + 32 * 4096 * 2 + 2 * 8192
    assert bytes_moved(2, 10, 130, None, 1) == 10 * 128 + 30 + 4 * 140
    assert operations(3, 4, 5) == 120


def test_search_space_and_default_fit_every_shape() -> None:
    for capability in ((8, 0), (8, 9), (9, 0)):
        target = Target("any", capability, 100)
        for m in (1, 8, 9, 16, 17, 64, 256, 4096, 8192):
            for n, k in ((4096, 4096), (11008, 4096), (136, 40), (100, 33)):
                space = search_space(m, n, k, target)
                assert space[0] == default_config(m, n, k, target) and len(space) <= 40
                assert all(c["kernel"] in ("few", "many", "hopper", "hopper_few") for c in space)
    assert search_space(1, 4096, 4096, H100) == search_space(1, 4096, 4096, H100)


REFUSALS = [
    ("x", lambda a: a["x"].float(), TypeError, "x must be float16 or bfloat16, got float32"),
    ("x", lambda a: a["x"][0], ValueError, "x must have shape [any, any], got [256]"),
    ("x", lambda a: a["x"].T.contiguous().T, ValueError, "x is not contiguous"),
    ("words", lambda a: a["words"].to(torch.int32), TypeError, "must be int16, got int32"),
    ("words", lambda a: a["words"][:, :32], ValueError, "must have shape [any, 64], got [40, 32]"),
    ("scale", lambda a: a["scale"].T.contiguous(), ValueError, "must have shape [4, 40], got [40, 4]"),
    ("scale", lambda a: a["scale"].to(torch.int8), TypeError, "scale"),
    ("zero", lambda a: a["zero"].to(torch.int8), TypeError, "zero"),
    ("zero", lambda a: a["zero"][:1], ValueError, "zero"),
    ("bias", lambda a: torch.zeros(41, device=a["x"].device), ValueError, "bias must have shape [40], got [41]"),
    ("group_size", lambda a: 16, ValueError, "group_size must be 32, 64, 128 or None (per channel), got 16"),
    ("words", lambda a: a["words"][:0], ValueError, "n and k must be at least 1"),
]


@pytest.mark.parametrize(
    ("argument", "wrong", "error", "message"), REFUSALS, ids=[f"{r[0]}-{i}" for i, r in enumerate(REFUSALS)]
)
def test_refusals(argument: str, wrong: object, error: type, message: str, device: torch.device) -> None:
    a = problem(3, 40, 256, 64, torch.uint8, torch.float16, device)
    with pytest.raises(error, match=re.escape(message)):
        w4a16_matmul(**(a | {argument: wrong(a)}))


def test_a_descriptor_takes_the_scales_of_one_group() -> None:
    """What the kernel builds on a Hopper GPU, which the interpreter does not reach: a row with a stride of one element."""
    scale = torch.ones(64, 1, dtype=torch.float16).T.contiguous()
    assert scale.stride() == (1, 1)
    with pytest.raises(AssertionError, match="16-byte aligned"):
        TensorDescriptor.from_tensor(scale, [1, 16])
    assert TensorDescriptor.from_tensor(row_major(scale), [1, 16]).strides == (64, 1)
