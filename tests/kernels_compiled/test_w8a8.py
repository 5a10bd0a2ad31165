"""What the W8A8 kernels compile to on Ampere, Ada and Hopper, without a GPU."""

import pytest
import torch

from lqedu_kernels._tensors import Target
from lqedu_kernels.tuning import configuration
from lqedu_kernels.w8a8 import default_config, search_space, w8a8_matmul
from tests.kernels_compiled.compiler import SHARED, Compiled, compiling_for

HOPPER = (9, 0)
NAME = "NVIDIA H100 80GB HBM3"
ROWS = (1, 16, 64, 256, 1024, 4096)


def compiled(
    capability: tuple[int, int], m: int, n: int, k: int, config: dict | None = None, *, full: bool = True
) -> Compiled:
    """The kernel of a call, with everything optional present or nothing."""
    x, w = torch.empty(m, k, dtype=torch.int8), torch.empty(n, k, dtype=torch.int8)
    extra = {}
    if full:
        zero, total = torch.empty(m, 1, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
        extra = dict(x_zero=zero, w_sum=total, bias=torch.empty(n, dtype=torch.float16), dtype=torch.bfloat16)
    with compiling_for(capability) as found:
        w8a8_matmul(x, torch.empty(m, 1), w, torch.empty(n, 1), config=config, **extra)
    (kernel,) = found
    return kernel


def check(kernel: Compiled, capability: tuple[int, int]) -> None:
    assert kernel.spills == 0
    assert kernel.shared <= SHARED[capability]
    if capability == HOPPER:
        assert not kernel.warnings  # no product waits for another (C7510 to C7515)
        assert kernel.wgmma and all(".s32.s8.s8" in name for name in kernel.wgmma) and not kernel.mma
    else:
        assert kernel.mma and all("s32.s8.s8.s32" in name for name in kernel.mma)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), HOPPER])
@pytest.mark.parametrize("m", [1, 17, 64, 1024])
def test_default(m: int, capability: tuple[int, int]) -> None:
    config = default_config(m, 11008, 4096, Target("", capability, 132))
    check(compiled(capability, m, 11008, 4096, config), capability)


def test_parts_of_k_and_ragged_sizes() -> None:
    for capability in ((8, 9), HOPPER):
        config = default_config(1, 1024, 4096, Target("", capability, 132))
        assert config["splits"] > 1
        check(compiled(capability, 1, 1024, 4096, config), capability)
        kernel = compiled(capability, 100, 1000, 1001)
        assert kernel.spills == 0 and kernel.shared <= SHARED[capability]


def test_codes_are_copied_ahead() -> None:
    """The loop of few tokens copies to shared memory asynchronously, 16 bytes a thread, weights with their hint."""
    kernel = compiled(HOPPER, 16, 11008, 4096)
    assert "cp.async.cg.shared.global" in kernel.ptx and ", 0x10" in kernel.ptx.replace("16;", "0x10")
    assert "griddepcontrol.wait" in kernel.ptx


def test_many_tokens_are_loaded_by_descriptors() -> None:
    config = default_config(4096, 11008, 4096, Target("", HOPPER, 132))
    kernel = compiled(HOPPER, 4096, 11008, 4096, config)
    assert config["kernel"] == "tiles"
    assert "cp.async.bulk.tensor" in kernel.ptx and "cp.async.cg" not in kernel.ptx


@pytest.mark.parametrize("m", ROWS)
def test_shipped(m: int) -> None:
    """The measured configurations of the H100, each once."""
    seen = set()
    for n, k in ((4096, 4096), (11008, 4096), (4096, 11008), (6144, 4096), (14336, 4096), (4096, 14336)):
        config = configuration("w8a8", m, n, k, gpu=NAME)
        if config is None or config["kernel"] == "hopper" or str(config) in seen:
            continue  # the Gluon kernel has tests of its own
        seen.add(str(config))
        kernel = compiled(HOPPER, m, n, k, dict(config), full=False)
        assert kernel.spills == 0 and kernel.shared <= SHARED[HOPPER] and not kernel.warnings


def test_candidates_of_one_shape() -> None:
    """A sample of what the tuner tries; candidates with tiles of 32 outputs multiply by warps."""
    for m in (16, 64):
        for config in search_space(m, 4096, 4096, Target(NAME, HOPPER, 132))[2::8]:
            kernel = compiled(HOPPER, m, 4096, 4096, config, full=False)
            assert kernel.spills == 0 and kernel.shared <= SHARED[HOPPER] and not kernel.warnings
            assert bool(kernel.wgmma) == (config["kernel"] == "tiles" or config["block_n"] >= 64)
