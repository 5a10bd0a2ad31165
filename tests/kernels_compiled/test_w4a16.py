"""What the W4A16 kernels compile to on Ampere, Ada and Hopper, without a GPU."""

import pytest
import torch

from lqedu_kernels._tensors import Target
from lqedu_kernels.tuning import configuration
from lqedu_kernels.w4a16 import default_config, w4a16_matmul
from tests.kernels_compiled.compiler import SHARED, Compiled, compiling_for

HOPPER = (9, 0)
NAME = "NVIDIA H100 80GB HBM3"
N, K = 11008, 4096


def compiled(
    capability: tuple[int, int], m: int, *, n: int = N, k: int = K, dtype: torch.dtype = torch.float16,
    group_size: int | None = 128, zero: torch.dtype | None = torch.uint8, config: dict | None = None,
) -> Compiled:  # fmt: skip
    """The plain Triton kernel of a call."""
    config = config or default_config(m, n, k, Target("", capability, 132))
    rows = 1 if group_size is None else -(-k // group_size)
    words = torch.empty(n, -(-k // 128) * 32, dtype=torch.int16)
    zeros = None if zero is None else torch.empty(rows, n, dtype=zero)
    with compiling_for(capability) as found:
        w4a16_matmul(
            torch.empty(m, k, dtype=dtype),
            words,
            torch.empty(rows, n, dtype=dtype),
            zeros,
            group_size=group_size,
            config=config,
        )
    (kernel,) = found
    return kernel


def check(kernel: Compiled, capability: tuple[int, int], *, spills: int = 0) -> None:
    assert kernel.spills <= spills
    assert kernel.shared <= SHARED[capability]
    assert not kernel.warnings  # no product waits for another (C7510 to C7515)
    if capability == HOPPER and kernel.name == "_many_kernel":
        assert kernel.wgmma and not kernel.mma
        assert kernel.wgmma_from_registers == len(kernel.wgmma)  # unpacked weights never go back to shared memory
    else:
        assert kernel.mma and not kernel.wgmma


@pytest.mark.parametrize(
    ("m", "capability"),
    [(m, HOPPER) for m in (1, 16, 64, 1024)] + [(m, old) for m in (1, 1024) for old in ((8, 0), (8, 9))],
)
def test_default(m: int, capability: tuple[int, int]) -> None:
    check(compiled(capability, m), capability)


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize(
    ("dtype", "group_size", "zero"),
    [
        (torch.float16, 32, torch.uint8),
        (torch.float16, 64, torch.float16),
        (torch.float16, None, None),
        (torch.bfloat16, 64, torch.bfloat16),
    ],
)
def test_every_form_on_hopper(m: int, dtype: torch.dtype, group_size: int | None, zero: torch.dtype | None) -> None:
    # Four scales and four zero points at once: 16 tokens in groups of 32 keep a few of them in local memory.
    spills = 32 if (m, group_size) == (16, 32) else 0
    check(compiled(HOPPER, m, dtype=dtype, group_size=group_size, zero=zero), HOPPER, spills=spills)


def test_shipped_configurations() -> None:
    """Each of them once: how often a tile is shared, and between how many programs, is another launch of the same kernel."""
    seen: list[dict] = []
    for n, k in ((11008, 4096), (4096, 4096), (4096, 11008), (6144, 4096)):
        for m in (1, 16, 32, 64, 256, 1024, 4096):
            config = configuration("w4a16/group128", m, n, k, gpu=NAME)
            assert config is not None
            same = dict(config) | {"programs": 0, "splits": min(config.get("splits", 1), 2)}
            if not config["kernel"].startswith("hopper") and same not in seen:  # Gluon has tests of its own
                seen.append(same)
                check(compiled(HOPPER, m, n=n, k=k, config=config), HOPPER)
    assert len(seen) >= 2


def test_ragged_sizes_are_served_by_pointers() -> None:
    for capability in ((8, 0), HOPPER):
        kernel = compiled(capability, 100, n=1001, k=1003, group_size=32)
        assert kernel.spills == 0 and kernel.shared <= SHARED[capability] and "cp.async.bulk" not in kernel.ptx


def test_one_instruction_unpacks_two_codes() -> None:
    """Few tokens: of a pair of words come 4 pairs of codes by 4 ANDs and a shift, whatever the scales and zero points."""
    kernel = compiled(HOPPER, 1, zero=None)
    assert (
        kernel.ptx.count("lop3.b32 t, t, 0x000f000f, 0, 0xea")
        == kernel.ptx.count("lop3.b32 t, t, 0x00f000f0, 0, 0xea")
        > 0
    )
    assert "fma.rn.f16x2" not in kernel.ptx
    assert "cp.async.cg.shared.global" in kernel.ptx
