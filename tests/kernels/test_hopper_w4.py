"""The Gluon kernels of 4-bit weights on a Hopper GPU; elsewhere there is nothing to run them (tests/kernels_compiled compiles them)."""

import pytest
import torch
from torch import Tensor

from lqedu_kernels import w4a8, w4a16
from lqedu_kernels._tensors import INTERPRET, target_of

if INTERPRET or not torch.cuda.is_available():
    pytest.skip("Gluon has no interpreter: these kernels need a Hopper GPU", allow_module_level=True)

from lqedu_kernels import hopper_w4

if not hopper_w4.available(target_of(torch.empty(1, device="cuda"), "x")):
    pytest.skip("these kernels need compute capability 9.0 and Triton 3.6", allow_module_level=True)

#: m, n, k: one tile and less; ragged in each; several rounds of tiles, and tiles that are left over and shared.
SHAPES = [(17, 136, 272), (300, 1000, 1040), (250, 11008, 640), (700, 4104, 512)]


def _configs(dtype: torch.dtype) -> list[dict]:
    """One candidate for each tile, shared and not."""
    found = {}
    for m in (64, 256, 1024):
        for config in hopper_w4.search_space(m, 11008, 4096, dtype):
            found.setdefault((config["block_n"], config["block_m"], config["warps"], config["share"]), config)
    return list(found.values())


def _name(config: dict) -> str:
    return f"{config['block_n']}x{config['block_m']}-{config['warps']}{'-share' if config['share'] else ''}"


def _tokens(m: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda", generator=generator)
    return x, torch.rand(m, device="cuda", generator=generator) + 0.5


def _integers(
    low: int, high: int, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.uint8
) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int32, device="cuda", generator=generator).to(dtype)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


@pytest.mark.parametrize("config", _configs(torch.int8), ids=_name)
@pytest.mark.parametrize("form", ["channel", "zero", "integer64", "integer128", "ratio64", "ratio128"])
def test_w4a8_is_equal_to_the_reference(form: str, config: dict, generator: torch.Generator) -> None:
    size = int(form.lstrip("aceghilnorstz") or 128)
    for m, n, k in SHAPES:
        k = k if form in ("channel", "zero") else -(-k // size) * size
        x, x_scale = _tokens(m, k, generator)
        scale = torch.rand(n, device="cuda", generator=generator).half() + 0.5
        more = {}
        if form in ("channel", "zero"):
            codes = w4a8.pack_w4a8(_integers(-8, 8, (n, k), generator, torch.int8))
            if form == "zero":
                more = {"zero": _integers(-8, 8, (n,), generator, torch.int32), "x_sum": x.sum(1, dtype=torch.int32)}
        else:
            codes = w4a8.pack_w4a8(_integers(0, 16, (n, k), generator))
            if form.startswith("integer"):
                s = _integers(1, 9, (n, k // size), generator)
                groups = w4a8.pack_groups(s, s * _integers(0, 16, s.shape, generator))
            else:
                groups = w4a8.pack_ratios((torch.rand(n, k // size, device="cuda", generator=generator) * 15).half())
            more = {"groups": groups, "group_size": size}
        expected = w4a8.w4a8_reference(x, x_scale, codes, scale, **more)
        for _ in range(2):
            y = torch.empty(m, n, dtype=torch.float16, device="cuda")
            hopper_w4.w4a8(
                x, x_scale, codes, scale, more.get("groups"), more.get("zero"), more.get("x_sum"), None, y,
                group_size=more.get("group_size", 0), config=config, processors=132,
            )  # fmt: skip
            assert torch.equal(y, expected), (m, n, k)


@pytest.mark.parametrize("config", _configs(torch.float16), ids=_name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_w4a16_is_near_the_reference(
    group_size: int | None, dtype: torch.dtype, config: dict, generator: torch.Generator
) -> None:
    unit = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    for (m, n, k), zero_dtype in zip(SHAPES, [None, dtype, torch.uint8, torch.float32], strict=True):
        rows = 1 if group_size is None else -(-k // group_size)
        x = torch.randn(m, k, device="cuda", generator=generator).to(dtype)
        words = w4a16.pack_w4a16(_integers(0, 16, (n, k), generator))
        scale = (torch.rand(rows, n, device="cuda", generator=generator) + 0.5).to(
            torch.float32 if zero_dtype == torch.float32 else dtype
        )
        zero = None
        if zero_dtype is not None:
            zero = (torch.rand(rows, n, device="cuda", generator=generator) * 15).to(zero_dtype)
        bias = torch.randn(n, device="cuda", generator=generator).to(dtype)
        expected = w4a16.w4a16_reference(x.double(), words, scale.double(), zero, group_size=group_size, bias=bias)
        runs = []
        for _ in range(2):
            y = torch.empty(m, n, dtype=dtype, device="cuda")
            hopper_w4.w4a16(x, words, scale, zero, bias, y, group_size=group_size, config=config, processors=132)
            runs.append(y)
        assert torch.equal(*runs)
        # A weight is off by at most 1.5 units of |w| plus what a float zero point's rest adds; random signs: sqrt(k), not k.
        bound = unit * (expected.abs() + 4 * 8 * 1.5 * k**0.5 * 1.5)
        assert ((runs[0].double() - expected.double()).abs() <= bound).all(), (m, n, k, zero_dtype)


def test_results_are_bfloat16_on_request(generator: torch.Generator) -> None:
    x, x_scale = _tokens(33, 256, generator)
    codes = w4a8.pack_w4a8(_integers(-8, 8, (64, 256), generator, torch.int8))
    scale, bias = (
        torch.rand(64, device="cuda", generator=generator),
        torch.randn(64, device="cuda", generator=generator),
    )
    y = torch.empty(33, 64, dtype=torch.bfloat16, device="cuda")
    hopper_w4.w4a8(
        x,
        x_scale,
        codes,
        scale,
        None,
        None,
        None,
        bias,
        y,
        group_size=0,
        config=_configs(torch.int8)[0],
        processors=132,
    )
    torch.testing.assert_close(
        y, w4a8.w4a8_reference(x, x_scale, codes, scale, bias=bias, dtype=torch.bfloat16), rtol=2**-8, atol=0.0
    )
