"""What quantization compiles to on Ampere, Ada and Hopper, without a GPU."""

import json
from importlib import resources

import pytest
import torch

from lqedu_kernels.quantize import TokenGrid, quantize_tokens, rmsnorm_quantize, silu_quantize
from tests.kernels_compiled.compiler import SHARED, Compiled, compiling_for

CAPABILITIES = ((8, 0), (8, 9), (9, 0))


def compiled(capability: tuple[int, int], kind: str, k: int, grid: TokenGrid = TokenGrid(), **more: object) -> Compiled:  # noqa: B008
    x = torch.empty(64, k, dtype=torch.float16)
    with compiling_for(capability) as found:
        if kind == "tokens":
            quantize_tokens(x, grid, **more)
        elif kind == "rmsnorm":
            rmsnorm_quantize(x, x[0], grid, eps=1e-5, residual=torch.empty_like(x), **more)
        else:
            silu_quantize(x, torch.empty_like(x), grid, **more)
    (kernel,) = found
    return kernel


def check(kernel: Compiled, capability: tuple[int, int]) -> None:
    assert kernel.spills == 0
    assert kernel.shared <= SHARED[capability]
    assert "ld.global.v4" in kernel.ptx or ".v4.b32" in kernel.ptx  # 16 bytes a thread


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", ["tokens", "rmsnorm", "silu"])
def test_default(kind: str, capability: tuple[int, int]) -> None:
    for k in (4096, 11008):
        check(compiled(capability, kind, k, sums=True), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_grid(capability: tuple[int, int]) -> None:
    for grid in (TokenGrid("int8", False, 0.9), TokenGrid("int4", clip_ratio=0.9)):
        check(compiled(capability, "tokens", 5120, grid), capability)
    for grid in (TokenGrid("e4m3"), TokenGrid("e4m3", group_size=128)):
        if capability == (8, 0):
            with pytest.raises(ValueError, match=r"NVIDIA A100 has no FP8: use 'int8', or capability 8.9 or newer"):
                compiled(capability, "tokens", 4096, grid)
        else:
            kernel = compiled(capability, "tokens", 4096, grid)
            check(kernel, capability)
            assert "cvt.rn.satfinite.e4m3x2" in kernel.ptx


def test_a_quotient_is_three_instructions() -> None:
    """A product and two fused multiply-adds an element, no division; a code is the low byte of a sum, not a conversion."""
    kernel = compiled((9, 0), "tokens", 4096, config=dict(piece=4096, warps=4, stages=1, resident=0))
    each = 4096 // 128
    assert each * 2 <= kernel.ptx.count("fma.rn.f32") <= each * 2 + 8
    assert "div.rn" not in kernel.ptx and kernel.ptx.count("div.full.f32") == 1
    assert "cvt.rzi" not in kernel.ptx and "cvt.rni" not in kernel.ptx


def test_long_tokens() -> None:
    for k in (28672, 53248):
        check(compiled((9, 0), "tokens", k), (9, 0))


@pytest.mark.parametrize("kind", ["tokens", "rmsnorm", "silu"])
def test_shipped(kind: str) -> None:
    """The measured configurations of the H100, each once."""
    table = json.loads((resources.files("lqedu_kernels") / "configs" / "h100.json").read_text(encoding="utf-8"))
    for k, config in sorted({(e["k"], json.dumps(e["config"])) for e in table.get(f"quantize/{kind}", [])}):
        check(compiled((9, 0), kind, k, config=json.loads(config)), (9, 0))
