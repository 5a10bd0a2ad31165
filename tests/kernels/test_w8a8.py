"""W8A8 against its reference, bit for bit where the scales are one."""

import re

import pytest
import torch
from torch import Tensor

from lqedu_kernels._tensors import Target
from lqedu_kernels.w8a8 import (
    bytes_moved,
    default_config,
    operations,
    row_sums,
    search_space,
    w8a8_matmul,
    w8a8_reference,
)

H100 = Target("NVIDIA H100 80GB HBM3", (9, 0), 132)
#: Small tiles, so that the interpreter sees several of everything.
SPLIT = dict(kernel="split", block_m=16, block_n=32, block_k=64, warps=4, stages=2, group_m=2, splits=2)
TILES = dict(
    kernel="tiles", block_m=32, block_n=32, block_k=64, warps=4, stages=2, group_m=2, per_processor=1, flatten=True
)
#: One rounding to the dtype of y; the float32 operations before it add a few 2^-24.
RELATIVE = {torch.float16: 2.0**-11 * 1.01, torch.bfloat16: 2.0**-8 * 1.01}


def problem(m: int, n: int, k: int, device: torch.device, *, seed: int = 0) -> dict[str, Tensor]:
    """Operands with every code, the extreme ones too, and scales that keep y far inside float16."""
    make = torch.Generator().manual_seed(seed)

    def codes(rows: int) -> Tensor:
        q = torch.randint(-128, 128, (rows, k), generator=make, dtype=torch.int16).to(torch.int8)
        q[0, : min(k, 4)] = torch.tensor([-128, 127, -128, 127], dtype=torch.int8)[: min(k, 4)]
        return q

    q_x, q_w = codes(m), codes(n)
    s_x, s_w = torch.rand(m, 1, generator=make) + 0.5, (torch.rand(n, 1, generator=make) + 0.5) / k / 100
    zero = torch.randint(-128, 128, (m, 1), generator=make, dtype=torch.int32)
    named = dict(x_codes=q_x, x_scale=s_x, w_codes=q_w, w_scale=s_w, x_zero=zero, w_sum=row_sums(q_w))
    return {name: t.to(device) for name, t in named.items()} | {"bias": torch.randn(n, generator=make).to(device)}


def assert_close(y: Tensor, want: Tensor) -> None:
    """Each element within a rounding of its own dtype; subnormals within the smallest step."""
    y64, want64 = y.double(), want.double()
    bound = RELATIVE[want.dtype] * 2 * want64.abs() + 2.0**-24
    worst = ((y64 - want64).abs() / bound).max()
    assert y.isfinite().all() and worst <= 1, f"{worst} times the bound"


@pytest.mark.parametrize("config", [SPLIT, TILES], ids=["split", "tiles"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 32, 64), (3, 40, 80), (16, 64, 128), (17, 72, 208), (33, 96, 192)])
def test_integer_sums_are_exact(m: int, n: int, k: int, config: dict, device: torch.device) -> None:
    a = problem(m, n, k, device)
    one, scale = torch.ones(1, 1, device=device), torch.full((1, 1), 2.0**-12, device=device)
    total = a["x_codes"].cpu().int() @ a["w_codes"].cpu().int().T
    y = w8a8_matmul(a["x_codes"], scale, a["w_codes"], one, config=config)
    assert torch.equal(y.cpu(), (total.float() * 2.0**-12).half())
    total = total - a["x_zero"].cpu() * a["w_sum"].cpu()
    y = w8a8_matmul(a["x_codes"], scale, a["w_codes"], one, x_zero=a["x_zero"], w_sum=a["w_sum"], config=config)
    assert torch.equal(y.cpu(), (total.float() * 2.0**-12).half())


def test_agrees_with_torch(device: torch.device) -> None:
    a = problem(32, 64, 128, device)
    one, scale = torch.ones(1, 1, device=device), torch.full((1, 1), 2.0**-12, device=device)
    y = w8a8_matmul(a["x_codes"], scale, a["w_codes"], one, config=SPLIT)
    assert torch.equal(y, (torch._int_mm(a["x_codes"], a["w_codes"].T).float() * 2.0**-12).half())


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 8])
def test_any_number_of_parts_gives_the_same_bits(splits: int, device: torch.device) -> None:
    a = problem(20, 72, 230, device)
    first, second, whole = (w8a8_matmul(**a, config={**SPLIT, "splits": s}) for s in (splits, splits, 1))
    assert torch.equal(first, second) and torch.equal(first, whole)
    assert_close(first, w8a8_reference(**a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [SPLIT, TILES], ids=["split", "tiles"])
@pytest.mark.parametrize("zero", [None, torch.int32, torch.float32])
def test_scales_zero_points_and_bias(
    zero: torch.dtype | None, config: dict, dtype: torch.dtype, device: torch.device
) -> None:
    a = problem(19, 48, 112, device)
    a |= {"x_zero": None, "w_sum": None} if zero is None else {"x_zero": a["x_zero"].to(zero)}
    for scales in (torch.float16, torch.bfloat16, torch.float32):
        b = a | {"w_scale": a["w_scale"].to(scales), "bias": a["bias"].to(scales)}
        y = w8a8_matmul(**b, dtype=dtype, config=config)
        assert y.dtype == dtype
        # The float32 sum of a product and a bias may cancel: the bound is that of the terms.
        want = w8a8_reference(**b, dtype=torch.float32).double()
        terms = (want - b["bias"].double()).abs() + b["bias"].double().abs()
        assert ((y.double() - want).abs() <= RELATIVE[dtype] * want.abs() + 2.0**-22 * terms).all()


def test_scales_of_tensors(device: torch.device) -> None:
    a = problem(5, 40, 96, device) | {"bias": None, "x_zero": None, "w_sum": None}
    for name in ("x_scale", "w_scale"):
        b = a | {name: a[name][:1].clone()}
        assert_close(w8a8_matmul(**b), w8a8_reference(**b))


@pytest.mark.parametrize(("n", "k"), [(7, 33), (50, 100), (8, 24), (129, 65)])
def test_sizes_that_no_descriptor_walks_over(n: int, k: int, device: torch.device) -> None:
    a = problem(3, n, k, device)
    for config in (SPLIT, None):
        assert_close(w8a8_matmul(**a, config=config), w8a8_reference(**a))
    with pytest.raises(ValueError, match=r"config asks for kernel 'tiles', which needs .* K a multiple of 16"):
        w8a8_matmul(**a, config=TILES)


@pytest.mark.parametrize("m", [1, 17, 40, 100])
def test_default_configuration(m: int, device: torch.device) -> None:
    a = problem(m, 144, 288, device)
    assert_close(w8a8_matmul(**a), w8a8_reference(**a))


def test_no_tokens(device: torch.device) -> None:
    a = {name: t[:0] if name.startswith("x_") else t for name, t in problem(1, 8, 16, device).items()}
    assert w8a8_matmul(**a).shape == (0, 8)


def test_arguments_are_unchanged(device: torch.device) -> None:
    a = problem(3, 40, 80, device)
    before = {name: t.clone() for name, t in a.items()}
    w8a8_matmul(**a, config=SPLIT)
    assert all(torch.equal(before[name], a[name]) for name in a)


def test_what_an_asymmetric_grid_stores(device: torch.device) -> None:
    """The bracket is Σ (q_x - z) q_w: a token of the constant z gives the bias alone."""
    a = problem(2, 40, 80, device)
    a["x_codes"] = a["x_zero"].to(torch.int8).expand(2, 80).contiguous()
    assert torch.equal(w8a8_matmul(**a, config=SPLIT), a["bias"].half().expand(2, 40))


def test_search_space_and_default_fit_every_shape() -> None:
    for capability in ((8, 0), (8, 9), (9, 0)):
        target = Target("any", capability, 100)
        for m in (1, 16, 17, 64, 256, 4096, 8192):
            for n, k in ((4096, 4096), (11008, 4096), (136, 40), (100, 33)):
                space = search_space(m, n, k, target)
                assert space[0] == default_config(m, n, k, target) and len(space) <= 24
                for c in space:
                    assert c["kernel"] == "split" or (k % 16 == 0 and n % 8 == 0 and capability >= (9, 0))
    assert search_space(1, 4096, 4096, H100) == search_space(1, 4096, 4096, H100)


def test_bytes_and_operations() -> None:
    assert bytes_moved(1, 4096, 4096) == 4096 + 4096**2 + 2 * 4096 + 4 * 4097
    assert operations(2, 3, 5) == 60


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("x_codes", lambda t: t.float(), TypeError, "x_codes must be int8, got float32"),
        ("x_codes", lambda t: t.tolist(), TypeError, "x_codes must be a tensor, got list"),
        ("x_codes", lambda t: t[0], ValueError, "x_codes must have shape [any, any], got [80]"),
        ("x_codes", lambda t: t.T.contiguous().T, ValueError, "x_codes is not contiguous, strides (1, 3): pass x_codes.contiguous()"),
        ("w_codes", lambda t: t[:, :64].contiguous(), ValueError, "w_codes ([N, K], K as x_codes) must have shape [any, 80], got [40, 64]"),
        ("w_codes", lambda t: t.to(torch.uint8), TypeError, "must be int8, got uint8"),
        ("x_scale", lambda t: t[:2], ValueError, "x_scale (one a token, or one) must have shape [3, 1], got [2, 1]"),
        ("x_scale", lambda t: t.half(), TypeError, "x_scale (one a token, or one) must be float32, got float16"),
        ("w_scale", lambda t: t.flatten(), ValueError, "w_scale (one an output, or one) must have shape [40, 1], got [40]"),
        ("x_zero", lambda t: t.to(torch.int8), TypeError, "x_zero must be int32 or float32, got int8"),
        ("w_sum", lambda t: None, ValueError, "pass w_sum=row_sums(w_codes), computed once"),
        ("w_sum", lambda t: t.long(), TypeError, "w_sum (row_sums(w_codes)) must be int32, got int64"),
        ("bias", lambda t: t[:8], ValueError, "bias must have shape [40], got [8]"),
        ("dtype", lambda _: torch.float32, TypeError, "dtype must be torch.float16 or torch.bfloat16, got torch.float32"),
    ],
)  # fmt: skip
def test_refusals(name: str, change: object, error: type, message: str, device: torch.device) -> None:
    a: dict = problem(3, 40, 80, device) | {"dtype": torch.float16}
    a[name] = change(a[name])
    with pytest.raises(error, match=re.escape(message)):
        w8a8_matmul(**a)


def test_long_sums_are_refused(device: torch.device) -> None:
    x = torch.zeros(1, 1 << 16, dtype=torch.int8, device=device)
    one = torch.ones(1, 1, device=device)
    with pytest.raises(ValueError, match="K from 1 to 65535: int32 sums overflow beyond"):
        w8a8_matmul(x, one, x, one)


def test_longest_sum_is_exact(device: torch.device) -> None:
    """2^16 - 1 products of -128 and -128 with a zero point of 127: the largest integer the contract allows."""
    k = (1 << 16) - 1
    x = torch.full((1, k), -128, dtype=torch.int8, device=device)
    zero = torch.full((1, 1), 127, dtype=torch.int32, device=device)
    scale, one = torch.full((1, 1), 2.0**-20, device=device), torch.ones(1, 1, device=device)
    config = {**SPLIT, "block_k": 4096, "splits": 4}
    y = w8a8_matmul(x, scale, x, one, x_zero=zero, w_sum=row_sums(x), config=config)
    assert y.item() == torch.tensor((128 + 127) * 128 * k * 2.0**-20).half().item()
