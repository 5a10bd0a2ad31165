"""FP8 against its reference: exact where float32 holds the sums, within the tensor cores' bound elsewhere."""

import re

import pytest
import torch
from torch import Tensor

from lqedu_kernels import _tensors
from lqedu_kernels._tensors import Target
from lqedu_kernels.fp8 import BLOCK, bytes_moved, default_config, fp8_matmul, fp8_reference, operations, search_space

#: Small tiles, so that the interpreter sees several of everything.
SPLIT = dict(kernel="split", block_m=16, block_n=32, block_k=128, warps=4, stages=2, group_m=2, splits=2)
TILES = dict(
    kernel="tiles", block_m=32, block_n=32, block_k=128, warps=4, stages=2, group_m=2, per_processor=1, flatten=True
)
CONFIGS = pytest.mark.parametrize("config", [SPLIT, TILES], ids=["split", "tiles"])
E4M3 = torch.float8_e4m3fn
#: Relative to Σ|x||w|: what Hopper's tensor cores cut off (measured in lqedu.runtime.float8: 2^-8.6 at most).
TENSOR_CORES = 2.0**-8


def problem(m: int, n: int, k: int, device: torch.device, scales: str = "token/channel") -> dict[str, Tensor]:
    """Operands with all 254 finite codes among them and scales of the named kinds."""
    make = torch.Generator().manual_seed(m + n + k)
    finite = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)

    def codes(rows: int) -> Tensor:
        return finite[torch.randint(0, 254, (rows, k), generator=make)].view(E4M3)

    runs, tiles = -(-k // BLOCK), -(-n // BLOCK)
    x_kind, w_kind = scales.split("/")
    x_shape = {"tensor": (1, 1), "token": (m, 1), "group": (m, runs)}[x_kind]
    w_shape = {"tensor": (1, 1), "channel": (n, 1), "block": (tiles, runs)}[w_kind]
    s_x = torch.rand(x_shape, generator=make) / 16 + 2.0**-6
    s_w = torch.rand(w_shape, generator=make) / 16 + 2.0**-6
    named = dict(x_codes=codes(m), x_scale=s_x, w_codes=codes(n), w_scale=s_w, bias=torch.randn(n, generator=make))
    return {name: t.to(device) for name, t in named.items()}


def assert_close(y: Tensor, a: dict[str, Tensor], dtype: torch.dtype = torch.float16) -> None:
    """Within the tensor cores' bound, element by element; the interpreter sums in float32 and is far inside."""
    want = fp8_reference(**a, dtype=torch.float64)
    magnitudes = {name: a[name].float().abs().to(E4M3) for name in ("x_codes", "w_codes")}
    terms = fp8_reference(**(a | magnitudes | {"bias": a["bias"].abs()}), dtype=torch.float64)
    step = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    cut = TENSOR_CORES if y.is_cuda else 2.0**-20
    assert y.dtype == dtype and y.isfinite().all()
    assert ((y.double() - want).abs() <= 1.01 * step * want.abs() + cut * terms).all()


def test_codes_are_complete() -> None:
    assert len(problem(16, 16, 128, torch.device("cpu"))["x_codes"].view(torch.uint8).unique()) == 254


@CONFIGS
@pytest.mark.parametrize(
    "scales", [f"{x}/{w}" for x in ("tensor", "token", "group") for w in ("tensor", "channel", "block")]
)
def test_every_pair_of_scales(scales: str, config: dict, device: torch.device) -> None:
    for m, n, k in ((19, 136, 272), (1, 160, 128), (33, 32, 400)):
        a = problem(m, n, k, device, scales)
        y = fp8_matmul(**a, config=config)
        assert_close(y, a)
        assert torch.equal(y, fp8_matmul(**a, config=config))


@CONFIGS
@pytest.mark.parametrize("scales", ["token/channel", "group/block"])
def test_small_integers_are_exact(scales: str, config: dict, device: torch.device) -> None:
    """Sums of small integers need few bits: tensor cores lose none, and powers of two as scales round nothing."""
    make = torch.Generator().manual_seed(0)
    a = problem(17, 144, 256, device, scales)
    a["x_codes"], a["w_codes"] = (
        torch.randint(-1, 2, a[name].shape, generator=make).float().to(E4M3).to(device)
        for name in ("x_codes", "w_codes")
    )
    for name in ("x_scale", "w_scale"):
        a[name] = 2.0 ** torch.randint(-2, 3, a[name].shape, generator=make).to(device)
    a["bias"] = torch.randint(-8, 9, a["bias"].shape, generator=make).float().to(device)
    assert torch.equal(fp8_matmul(**a, config=config), fp8_reference(**a))


def test_agrees_with_torch(device: torch.device) -> None:
    a = problem(32, 64, 128, device, "tensor/tensor") | {"bias": None}
    s_x, s_w = a["x_scale"].reshape(()), a["w_scale"].reshape(())
    want = torch._scaled_mm(a["x_codes"], a["w_codes"].T, scale_a=s_x, scale_b=s_w, out_dtype=torch.bfloat16)
    y = fp8_matmul(**a, config=SPLIT, dtype=torch.bfloat16)
    assert ((y.double() - want.double()).norm() / want.double().norm()) < 2.0**-8


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scales", ["token/channel", "group/block"])
def test_any_number_of_parts(scales: str, splits: int, device: torch.device) -> None:
    a = problem(20, 72, 330, device, scales)
    first, second = (fp8_matmul(**a, config={**SPLIT, "splits": splits}) for _ in range(2))
    assert torch.equal(first, second)
    assert_close(first, a)


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, config: dict, device: torch.device) -> None:
    for scales in ("token/channel", "group/block"):
        for bias in (None, torch.float16, torch.bfloat16):
            a = problem(18, 40, 144, device, scales)
            a["bias"] = torch.zeros_like(a["bias"]) if bias is None else a["bias"].to(bias)
            y = fp8_matmul(**(a | ({"bias": None} if bias is None else {})), dtype=dtype, config=config)
            assert_close(y, a, dtype)


@pytest.mark.parametrize(("n", "k"), [(7, 33), (50, 100), (8, 24), (129, 130)])
def test_sizes_that_no_descriptor_walks_over(n: int, k: int, device: torch.device) -> None:
    for scales in ("token/channel", "group/block"):
        a = problem(3, n, k, device, scales)
        for config in (SPLIT, None):
            assert_close(fp8_matmul(**a, config=config), a)
        with pytest.raises(ValueError, match=r"config asks for kernel 'tiles', which needs .* K a multiple of 16"):
            fp8_matmul(**a, config=TILES)


@pytest.mark.parametrize("m", [1, 17, 40, 100])
def test_default_configuration(m: int, device: torch.device) -> None:
    for scales in ("tensor/channel", "group/block"):
        a = problem(m, 144, 288, device, scales)
        assert_close(fp8_matmul(**a), a)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter's FP8 product takes NaN for 480")
def test_not_a_number_stays_one(device: torch.device) -> None:
    a = problem(3, 16, 128, device)
    a["x_codes"].view(torch.uint8)[1, 5] = 0x7F
    y = fp8_matmul(**a, config=SPLIT)
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()


def test_no_tokens(device: torch.device) -> None:
    a = problem(1, 8, 16, device)
    a |= {name: a[name][:0] for name in ("x_codes", "x_scale")}
    assert fp8_matmul(**a).shape == (0, 8)


def test_arguments_are_unchanged(device: torch.device) -> None:
    a = problem(3, 40, 144, device, "group/block")
    before = {name: t.clone().view(torch.uint8) for name, t in a.items()}
    fp8_matmul(**a, config=SPLIT)
    assert all(torch.equal(before[name], a[name].view(torch.uint8)) for name in a)


def test_search_space_and_default() -> None:
    for capability in ((8, 9), (9, 0)):
        target = Target("any", capability, 100)
        for m in (1, 17, 64, 256, 4096):
            for n, k in ((4096, 4096), (11008, 4096), (136, 40), (100, 33)):
                for blocks in (False, True):
                    space = search_space(m, n, k, target, blocks=blocks)
                    assert space[0] == default_config(m, n, k, target, blocks=blocks)
                    assert all(c["block_k"] == BLOCK and c["block_n"] <= BLOCK for c in space) or not blocks
                    assert all(c["kernel"] == "split" or (k % 16 == 0 and n % 8 == 0) for c in space)


def test_bytes_and_operations() -> None:
    assert bytes_moved(1, 4096, 4096) == 4096 + 4096**2 + 2 * 4096 + 4 * 4097
    assert bytes_moved(1, 4096, 4096, blocks=True) == 4096 + 4096**2 + 2 * 4096 + 4 * (32 + 1024)
    assert operations(2, 3, 5) == 60


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("x_codes", lambda t: t.view(torch.uint8), TypeError, "x_codes (codes: .view(torch.float8_e4m3fn)) must be float8_e4m3fn, got uint8"),
        ("w_codes", lambda t: t.to(torch.float8_e5m2), TypeError, "must be float8_e4m3fn, got float8_e5m2"),
        ("w_codes", lambda t: t[:, :128].contiguous(), ValueError, "w_codes ([N, K], K as x_codes) must have shape [any, 256], got [136, 128]"),
        ("x_scale", lambda t: t[:2], ValueError, "x_scale must have shape [1, 1], [3, 1] or (blocks of 128) [3, 2], got [2, 1]"),
        ("w_scale", lambda t: t.flatten(), ValueError, "w_scale must have shape [1, 1], [136, 1] or (blocks of 128) [2, 2], got [136]"),
        ("x_scale", lambda t: t.half(), TypeError, "x_scale must be float32, got float16"),
        ("w_scale", lambda t: t.tolist(), TypeError, "w_scale must be a tensor, got list"),
        ("bias", lambda t: t[:8], ValueError, "bias must have shape [136], got [8]"),
        ("bias", lambda t: t.double(), TypeError, "bias must be float16 or bfloat16 or float32, got float64"),
        ("dtype", lambda _: torch.float32, TypeError, "dtype must be torch.float16 or torch.bfloat16, got torch.float32"),
    ],
)  # fmt: skip
def test_refusals(name: str, change: object, error: type, message: str, device: torch.device) -> None:
    a: dict = problem(3, 136, 256, device) | {"dtype": torch.float16}
    a[name] = change(a[name])
    with pytest.raises(error, match=re.escape(message)):
        fp8_matmul(**a)


def test_wide_tiles_of_blocks_are_refused(device: torch.device) -> None:
    a = problem(3, 136, 256, device, "group/block")
    for change in ({"block_n": 256}, {"block_k": 64}):
        with pytest.raises(ValueError, match="config has block_k"):
            fp8_matmul(**a, config={**SPLIT, **change})


def test_ampere_is_refused_by_name(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tensors, "assumed", Target("NVIDIA A100-SXM4-80GB", (8, 0), 108))
    message = (
        "x_codes is on a NVIDIA A100-SXM4-80GB, which has no FP8 tensor cores (compute capability 8.9 and later have)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fp8_matmul(**problem(3, 16, 128, device))
