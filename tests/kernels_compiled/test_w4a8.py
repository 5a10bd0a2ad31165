"""What W4A8 compiles to: products from registers, no spills, group words copied ahead; Triton 3.6 and 3.9, no GPU needed."""

import re

import pytest
import torch
import triton

from lqedu_kernels.tuning import _table
from lqedu_kernels.w4a8 import few, one, tile, w4a8_matmul
from tests.kernels_compiled.compiler import SHARED, Compiled, compiling_for

FORMS = [("channel", 128), ("integer", 128), ("integer", 64), ("ratio", 128)]


def compiled(
    capability: tuple[int, int], m: int, form: str = "channel", size: int = 128, config: dict | None = None
) -> Compiled:
    n = k = 4096
    groups = {"integer": torch.int16, "ratio": torch.float16}.get(form)
    with compiling_for(capability) as found:
        w4a8_matmul(
            torch.empty(m, k, dtype=torch.int8),
            torch.empty(m),
            torch.empty(n, k // 2, dtype=torch.uint8),
            torch.empty(n),
            groups=None if groups is None else torch.empty(k // size, n, dtype=groups),
            group_size=size,
            config=config,
        )
    (kernel,) = found
    assert kernel.spills == 0 and kernel.shared <= SHARED[capability]
    return kernel


@pytest.mark.parametrize(("form", "size"), FORMS)
def test_tiles_multiply_from_registers(form: str, size: int) -> None:
    kernel = compiled((9, 0), 4096, form, size, tile(128, 128, 1, warps=8, stages=3))
    assert set(kernel.wgmma) == {"m64n128k32.s32.s8.s8"}
    assert kernel.wgmma_from_registers == len(kernel.wgmma) == 4  # 128 inputs a product, 32 an instruction
    assert not kernel.warnings
    assert kernel.registers <= 128  # two blocks of 256 threads on a multiprocessor


@pytest.mark.parametrize("m", [16, 64, 256])
def test_tiles_of_few_tokens_multiply_from_registers(m: int) -> None:
    columns = min(m, 64)
    kernel = compiled((9, 0), m, config=tile(64, columns, 1, warps=4, stages=6, ahead=True))
    assert set(kernel.wgmma) == {f"m64n{columns}k32.s32.s8.s8"}
    assert kernel.wgmma_from_registers == len(kernel.wgmma)
    assert "griddepcontrol.wait" in kernel.ptx
    assert not kernel.warnings


@pytest.mark.parametrize("form", ["channel", "integer", "ratio"])
@pytest.mark.parametrize("m", [1, 16])
def test_few_tokens_multiply_by_a_warp_each(m: int, form: str) -> None:
    kernel = compiled((9, 0), m, form, config=few(32, 8 if m == 1 else 16, 4, stages=4))
    assert not kernel.wgmma
    assert all(name.startswith("m16n8k32") for name in kernel.mma) and kernel.mma


@pytest.mark.parametrize("form", ["channel", "integer", "ratio"])
def test_one_token_goes_around_shared_memory(form: str) -> None:
    """Weights go from memory to registers 16 bytes at a time; only sums of warps and words of groups are handed over."""
    kernel = compiled((9, 0), 1, form, config=one(4, 32, warps=4, ahead=True))
    assert not kernel.wgmma and not kernel.mma and kernel.ptx.count("dp4a") == 2 * 4 * 4
    assert kernel.shared <= 512
    assert len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", kernel.ptx)) >= 4 + 2  # four rows, and x twice


def test_group_words_are_copied_ahead() -> None:
    """Of a 16-bit word Triton makes a load that the loop waits for; two of them together go by ``cp.async``."""
    plain = compiled((9, 0), 64, "channel", config=tile(64, 64, 1, warps=4, stages=4))
    grouped = compiled((9, 0), 64, "integer", config=tile(64, 64, 1, warps=4, stages=4))
    copies = [len(re.findall(r"cp\.async\.ca\.shared\.global[^,]*, \[[^]]*\], 0x4", k.ptx)) for k in (plain, grouped)]
    assert copies[0] == 0 and copies[1] > 0


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
@pytest.mark.parametrize("m", [1, 1024])
def test_default_on_older_gpus(capability: tuple[int, int], m: int) -> None:
    kernel = compiled(capability, m)
    assert (kernel.mma or ("dp4a" in kernel.ptx and m == 1)) and "griddepcontrol" not in kernel.ptx


@pytest.mark.parametrize("m", [1, 16, 64, 256, 4096])
def test_default_on_hopper(m: int) -> None:
    assert not compiled((9, 0), m).warnings


SHIPPED = {
    (name, str(entry["config"])): (name, entry["m"], entry["config"])
    for name, entries in _table("h100.json").items()
    if name.startswith("w4a8/")
    for entry in entries
    if entry["config"]["kernel"] != "hopper"  # tests of hopper_w4
}


@pytest.mark.parametrize(("name", "m", "config"), SHIPPED.values() or [("w4a8/channel", 1, few(32, 8, 4, stages=4))])
def test_shipped_configurations(name: str, m: int, config: dict) -> None:
    form, size = re.fullmatch(r"w4a8/([a-z]+)(\d*)", name).groups()
    kernel = compiled((9, 0), m, form, int(size or 128), config)
    assert not kernel.warnings and kernel.wgmma_from_registers == len(kernel.wgmma)


def test_runs_under_the_versions_it_is_written_for() -> None:
    assert triton.__version__ >= "3.6"
