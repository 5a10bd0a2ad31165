"""The Gluon kernel of few tokens on a Hopper GPU; elsewhere there is nothing to run it (tests/kernels_compiled compiles it)."""

import pytest
import torch

from lqedu_kernels._tensors import INTERPRET, target_of
from lqedu_kernels.w4a16 import pack_w4a16, search_space, w4a16_matmul
from tests.kernels.test_w4a16 import assert_close, problem

if INTERPRET or not torch.cuda.is_available():
    pytest.skip("Gluon has no interpreter: these kernels need a Hopper GPU", allow_module_level=True)

from lqedu_kernels import hopper_few

if not hopper_few.available(target_of(torch.empty(1, device="cuda"), "x"), 1, 128, 128, hopper_few.search_space(1)[0]):
    pytest.skip("this kernel needs compute capability 9.0 and Triton 3.6", allow_module_level=True)

DEVICE = torch.device("cuda")
#: m, n, k: few outputs; ragged in each; programs that share the inputs, and tiles that do not divide among programs.
SHAPES = [(1, 40, 136), (7, 100, 1000), (16, 1000, 4224), (9, 4104, 4096), (16, 33, 11008)]
CONFIGS = [
    dict(warps=4, blocks=2),
    dict(warps=8, blocks=2, ahead=True),
    dict(warps=8, blocks=1, rows=32),
    dict(warps=16, blocks=1),
]


def launch(m: int, number: int) -> dict:
    base = dict(
        kernel="hopper_few", block_m=8 if m <= 8 else 16, rows=16, ahead=False, programs=1, registers=0, overlap=True
    )
    return base | CONFIGS[number % len(CONFIGS)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("zero", [None, torch.uint8, torch.float16], ids=["symmetric", "integer", "float"])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_every_form(group_size: int | None, zero: torch.dtype | None, dtype: torch.dtype) -> None:
    for number, (m, n, k) in enumerate(SHAPES):
        a = problem(m, n, k, group_size, zero, dtype, DEVICE)
        config = launch(m, number + (group_size or 0) // 32)
        bias = torch.linspace(-1, 1, n, device=DEVICE).to(dtype) if number % 2 else None
        first, second = (w4a16_matmul(**a, bias=bias, config=config) for _ in range(2))
        assert torch.equal(first, second)
        assert_close(first, a, config, bias)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_the_launch_before_wrote_is_read(overlap: bool) -> None:
    """Launches one behind the other, each on the result of the one before."""
    a = problem(8, 4096, 4096, 128, torch.uint8, torch.float16, DEVICE)
    config = launch(8, 1) | {"overlap": overlap}
    x, want = a["x"], a["x"]
    for _ in range(20):
        x = w4a16_matmul(**(a | {"x": x}), config=config) * 0.1
    for _ in range(20):
        torch.cuda.synchronize()
        want = w4a16_matmul(**(a | {"x": want}), config=config | {"overlap": False}) * 0.1
    assert x.isfinite().all() and torch.equal(x, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_numbers_are_exact(dtype: torch.dtype) -> None:
    """One input at a time: y is a column of the weight, every code at every place."""
    make = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (48, 256), generator=make, dtype=torch.uint8)
    scale, zero = torch.ones(4, 48, dtype=dtype), torch.randint(0, 16, (4, 48), generator=make, dtype=torch.uint8)
    for first in range(0, 256, 16):
        x = torch.eye(256)[first : first + 16]
        y = w4a16_matmul(
            x.to(dtype).cuda(), pack_w4a16(codes).cuda(), scale.cuda(), zero.cuda(), group_size=64, config=launch(16, 0)
        )
        assert torch.equal(y.cpu().float(), x @ (codes.float() - zero.repeat_interleave(64, 0).T.float()).T)


def test_search_space() -> None:
    target = target_of(torch.empty(1, device="cuda"), "x")
    for m in (1, 16):
        a = problem(m, 4096, 1024, 128, None, torch.float16, DEVICE)
        for config in search_space(m, 4096, 1024, target):
            if config["kernel"] == "hopper_few":
                assert_close(w4a16_matmul(**a, config=config), a, config)
