"""What the 16-bit steps and cache compile to on Ampere, Ada and Hopper, without a GPU."""

import pytest
import torch

from lqedu_kernels.kv16 import kv16_append, kv16_attention
from lqedu_kernels.steps16 import rmsnorm, rope, rope_append, silu_mul
from tests.kernels_compiled.compiler import SHARED, Compiled, compiling_for

CAPABILITIES = ((8, 0), (8, 9), (9, 0))


def half(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float16)


def check(kernels: list[Compiled], capability: tuple[int, int], count: int) -> None:
    assert len(kernels) == count
    for kernel in kernels:
        assert kernel.spills == 0, kernel.name
        assert kernel.shared <= SHARED[capability], kernel.name
        assert ("griddepcontrol.wait" in kernel.ptx) == (capability >= (9, 0)), kernel.name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_steps(capability: tuple[int, int]) -> None:
    positions, table = torch.empty(4, dtype=torch.int32), torch.empty(128, 128)
    with compiling_for(capability) as found:
        rmsnorm(half(4, 4096), half(4096), 1e-5, half(4, 4096))
        rmsnorm(half(4, 8192), half(8192), 1e-5)
        silu_mul(*half(4, 2 * 14336).chunk(2, 1))
        rope(half(4, 48 * 128), table, table, positions, heads=32, kv_heads=8)
        rope(half(4, 48 * 128), table, table, positions, heads=32, kv_heads=8, norms=(half(128), half(128)), eps=1e-6)
        pages, blocks = half(8, 8, 64, 128), torch.empty(4, 8, dtype=torch.int32)
        rope_append(half(4, 48 * 128), table, table, pages, pages, blocks, positions, heads=32, kv_heads=8)
    check(found, capability, 6)
    assert "ld.global.v4" in found[0].ptx or ".v4.b32" in found[0].ptx  # 16 bytes a thread


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 8, 128), (32, 32, 128), (9, 3, 64), (4, 2, 256)])
def test_cache(heads: int, kv_heads: int, size: int, capability: tuple[int, int]) -> None:
    pages, table, lengths = (
        half(8, kv_heads, 64, size),
        torch.empty(1, 8, dtype=torch.int32),
        torch.empty(1, dtype=torch.int32),
    )
    with compiling_for(capability) as found:
        kv16_append(half(1, kv_heads, 1, size), half(1, kv_heads, 1, size), pages, pages, table, lengths)
        kv16_attention(half(1, heads, size), pages, pages, table, lengths)
    check(found, capability, 3)
    assert found[1].mma or found[1].wgmma
