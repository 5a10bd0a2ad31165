"""What the transforms compile to on Ampere, Ada and Hopper, without a GPU."""

import json
from importlib import resources

import pytest
import torch
import triton

from lqedu_kernels.hadamard import hadamard_quantize, hadamard_transform
from lqedu_kernels.quantize import TokenGrid
from tests.kernels_compiled.compiler import SHARED, Compiled, compiling_for

HOPPER = (9, 0)
CAPABILITIES = ((8, 0), (8, 9), HOPPER)


def compiled(
    capability: tuple[int, int], k: int, *, fused: bool, dtype: torch.dtype = torch.float16, **more: object
) -> list[Compiled]:
    x = torch.empty(64, k, dtype=dtype)
    with compiling_for(capability) as found:
        (hadamard_quantize if fused else hadamard_transform)(x, **more)
    return found


def spills_of(k: int) -> int:
    """Bytes at most: rows of 11008 wait in registers for their turn; Triton 3.6 needs 233 of 255 for that, 3.9 two more than there are."""
    return 16 if k == 11008 and not triton.__version__.startswith("3.6.") else 0


def check(kernels: list[Compiled], capability: tuple[int, int], launches: int = 1, spills: int = 0) -> None:
    assert len(kernels) == launches
    for kernel in kernels:
        assert kernel.spills <= spills
        assert kernel.shared <= SHARED[capability]
        if kernel.name == "_quantize_kernel":
            continue
        if capability == HOPPER:
            assert not kernel.warnings and kernel.wgmma and not kernel.mma
        else:
            assert kernel.mma


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("k", [576, 4096, 8192, 11008, 13824, 14336])
def test_default_on_hopper(k: int, fused: bool) -> None:
    kernels = compiled(HOPPER, k, fused=fused)
    check(kernels, HOPPER, spills=spills_of(k))
    # (L X) R takes L X from registers: X crosses shared memory once.
    assert kernels[0].wgmma_from_registers > 0


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_default_elsewhere(capability: tuple[int, int]) -> None:
    for fused in (False, True):
        for k in (4096, 14336):
            check(compiled(capability, k, fused=fused), capability)
    # The table of 172 does not fit Ada's shared memory beside a tile: 172 elements 64 apart, then runs of 64.
    launches = 1 if capability == (8, 0) else 2
    check(compiled(capability, 11008, fused=False), capability, launches)


def test_long_and_strided() -> None:
    for k in (18944, 28672):
        check(compiled(HOPPER, k, fused=False), HOPPER)
        check(compiled(HOPPER, k, fused=True), HOPPER)
    check(compiled(HOPPER, 53248, fused=False), HOPPER, launches=2)
    check(compiled(HOPPER, 4096, fused=True, length=32, stride=128, sums=True), HOPPER)
    check(compiled(HOPPER, 13696, fused=True, length=128), HOPPER, launches=2)


def test_codes_of_every_format() -> None:
    for grid in (TokenGrid("int4", clip_ratio=0.9), TokenGrid("e4m3")):
        check(compiled(HOPPER, 4096, fused=True, grid=grid, dtype=torch.bfloat16), HOPPER)
    with pytest.raises(ValueError, match="NVIDIA A100 has no FP8"):
        compiled((8, 0), 4096, fused=True, grid=TokenGrid("e4m3"))


@pytest.mark.parametrize("operation", ["hadamard/transform", "hadamard/int8"])
def test_shipped(operation: str) -> None:
    """The measured configurations of the H100, each once."""
    table = json.loads((resources.files("lqedu_kernels") / "configs" / "h100.json").read_text(encoding="utf-8"))
    for k, config in sorted({(e["k"], json.dumps(e["config"])) for e in table.get(operation, [])}):
        kernels = compiled(HOPPER, k, fused=operation == "hadamard/int8", config=json.loads(config))
        check(kernels, HOPPER, spills=spills_of(k))
