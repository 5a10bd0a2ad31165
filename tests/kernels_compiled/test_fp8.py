"""What the FP8 kernels compile to on Ada and Hopper, without a GPU; Ampere is refused."""

import pytest
import torch

from lqedu_kernels._tensors import Target
from lqedu_kernels.fp8 import default_config, fp8_matmul, search_space
from lqedu_kernels.tuning import configuration
from tests.kernels_compiled.compiler import SHARED, Compiled, compiling_for

ADA, HOPPER = (8, 9), (9, 0)
NAME = "NVIDIA H100 80GB HBM3"


def compiled(
    capability: tuple[int, int],
    m: int,
    n: int,
    k: int,
    config: dict | None = None,
    *,
    blocks: bool = False,
    full: bool = True,
) -> Compiled:
    """The kernel of a call, with everything optional present or nothing."""
    x, w = torch.empty(m, k, dtype=torch.float8_e4m3fn), torch.empty(n, k, dtype=torch.float8_e4m3fn)
    runs, tiles = -(-k // 128), -(-n // 128)
    x_scale, w_scale = (
        (torch.empty(m, runs), torch.empty(tiles, runs)) if blocks else (torch.empty(m, 1), torch.empty(n, 1))
    )
    extra = dict(bias=torch.empty(n, dtype=torch.float16), dtype=torch.bfloat16) if full else {}
    with compiling_for(capability) as found:
        fp8_matmul(x, x_scale, w, w_scale, config=config, **extra)
    (kernel,) = found
    return kernel


def check(kernel: Compiled, capability: tuple[int, int]) -> None:
    assert kernel.spills == 0
    assert kernel.shared <= SHARED[capability]
    if capability == HOPPER:
        assert not kernel.warnings  # no product waits for another (C7510 to C7515)
        # FP8 products with float32 sums; a "precise" accumulation would have become FP16 products of warps (kernels.md).
        assert kernel.wgmma and all(".f32.e4m3.e4m3" in name for name in kernel.wgmma) and not kernel.mma
    else:
        assert kernel.mma and all("f32.e4m3.e4m3.f32" in name for name in kernel.mma)


@pytest.mark.parametrize("blocks", [False, True], ids=["scales", "blocks"])
@pytest.mark.parametrize(("m", "capability"), [(m, HOPPER) for m in (1, 17, 64, 1024)] + [(m, ADA) for m in (1, 1024)])
def test_default(m: int, blocks: bool, capability: tuple[int, int]) -> None:
    config = default_config(m, 11008, 4096, Target("", capability, 132), blocks=blocks)
    check(compiled(capability, m, 11008, 4096, config, blocks=blocks), capability)


@pytest.mark.parametrize("blocks", [False, True], ids=["scales", "blocks"])
def test_parts_of_k_and_ragged_sizes(blocks: bool) -> None:
    config = default_config(1, 1024, 4096, Target("", HOPPER, 132), blocks=blocks)
    assert config["splits"] > 1
    check(compiled(HOPPER, 1, 1024, 4096, config, blocks=blocks), HOPPER)
    kernel = compiled(ADA, 100, 1000, 1001, blocks=blocks)
    assert kernel.spills == 0 and kernel.shared <= SHARED[ADA]


def test_products_of_blocks_are_wide() -> None:
    """A warpgroup multiplies 64 x 128 at a time, and two programs fit a processor."""
    config = default_config(4096, 11008, 4096, Target("", HOPPER, 132), blocks=True)
    kernel = compiled(HOPPER, 4096, 11008, 4096, config, blocks=True)
    assert all(name.startswith("m64n128k32") for name in kernel.wgmma)
    assert config["per_processor"] == 2 and 2 * kernel.shared <= SHARED[HOPPER] and 2 * 128 * kernel.registers <= 65536


@pytest.mark.parametrize("operation", ["fp8/token", "fp8/block"])
def test_shipped(operation: str) -> None:
    """The measured configurations of the H100, each once."""
    seen, blocks = set(), operation == "fp8/block"
    for m in (1, 16, 64, 256, 1024, 4096):
        for n, k in ((4096, 4096), (11008, 4096), (4096, 11008), (6144, 4096), (14336, 4096), (4096, 14336)):
            config = configuration(operation, m, n, k, gpu=NAME)
            if config is None or config["kernel"] == "hopper" or str(config) in seen:
                continue  # the Gluon kernel has tests of its own
            seen.add(str(config))
            kernel = compiled(HOPPER, m, n, k, dict(config), blocks=blocks, full=False)
            assert kernel.spills == 0 and kernel.shared <= SHARED[HOPPER] and not kernel.warnings


def test_candidates_of_one_shape() -> None:
    """A sample of what the tuner tries."""
    for m, blocks in ((16, False), (64, False), (64, True)):
        for config in search_space(m, 4096, 4096, Target(NAME, HOPPER, 132), blocks=blocks)[2::16]:
            kernel = compiled(HOPPER, m, 4096, 4096, config, blocks=blocks, full=False)
            assert kernel.spills == 0 and kernel.shared <= SHARED[HOPPER] and not kernel.warnings


def test_ampere_is_refused() -> None:
    with pytest.raises(ValueError, match="x_codes is on a NVIDIA A100, which has no FP8 tensor cores"):
        compiled((8, 0), 1, 4096, 4096)
