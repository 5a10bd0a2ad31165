"""What the Gluon kernel of 8-bit matrices compiles to: Triton 3.6 only, whose Gluon it is written for; no GPU needed."""

import re

import pytest
import torch
import triton

if not triton.__version__.startswith("3.6."):
    pytest.skip(f"the Gluon kernels are written for Triton 3.6, this is {triton.__version__}", allow_module_level=True)

from lqedu_kernels import hopper_dense
from lqedu_kernels._tensors import Target
from tests.kernels_compiled.compiler import SHARED, Compiled, compiling_for

H100 = Target("NVIDIA H100 80GB HBM3", (9, 0), 132)
M, N, K = 4096, 11008, 4096
#: Columns of a tile -> columns of its wgmma instructions, for int8 and for blocks (at most 128), and for E4M3.
HALVES = {256: {128}, 192: {128, 64}, 128: {128}, 96: {64, 32}, 64: {64}}
WHOLE = {**HALVES, 256: {256}}


def compiled(codes: torch.dtype, config: dict, *, runs: int = 1, **more: torch.Tensor) -> Compiled:
    w_scale = torch.empty(N // 128, runs) if runs > 1 else torch.empty(N, 1)
    with compiling_for((9, 0)) as found:
        hopper_dense.matmul(
            torch.empty(M, K).to(codes),
            torch.empty(M, runs),
            torch.empty(N, K).to(codes),
            w_scale,
            dtype=torch.float16,
            config=config,
            **more,
        )
    (kernel,) = found
    assert kernel.spills == 0 and not kernel.warnings and kernel.shared <= SHARED[9, 0]
    # Threads of the producer give registers back, those of the consumers take them: together what 384 threads of 168 have.
    assert kernel.registers == 168
    assert {
        line
        for line in ("dec.sync.aligned.u32 \t40", "inc.sync.aligned.u32 \t232")
        if f"setmaxnreg.{line}" in kernel.ptx
    }
    return kernel


def configs(*, blocks: bool = False) -> list[dict]:
    found = {}
    for m in (256, 1024, 4096):
        for config in hopper_dense.search_space(m, N, K, H100, blocks=blocks):
            found.setdefault((config["block_m"], config["block_n"]), config)
    # One more tile than the search at this size has: of 6144 outputs and 256 tokens, 128 of them fill 132 processors.
    narrow = dict(found[128, 256], block_n=96, stages=7)
    return [*found.values()] + ([] if blocks else [narrow])


def _name(config: dict) -> str:
    return f"{config['block_m']}x{config['block_n']}"


def columns(kernel: Compiled, suffix: str) -> set[int]:
    """The n of every product, which are all of one type."""
    assert all(name.endswith(suffix) for name in kernel.wgmma)
    return {int(name.split(".")[0].split("n")[1].split("k")[0]) for name in kernel.wgmma}


@pytest.mark.parametrize("config", configs(), ids=_name)
def test_int8(config: dict) -> None:
    assert columns(compiled(torch.int8, config), ".s32.s8.s8") == HALVES[config["block_n"]]


@pytest.mark.parametrize("config", configs(), ids=_name)
def test_float8(config: dict) -> None:
    kernel = compiled(torch.float8_e4m3fn, config)
    assert columns(kernel, ".f32.e4m3.e4m3") == WHOLE[config["block_n"]]
    # The loop waits until all but the newest step's products are done, one a part: those run on while the next step is awaited.
    newest = len(WHOLE[config["block_n"]])
    assert "griddepcontrol.wait" in kernel.ptx  # the launch may begin before the one before it has ended
    assert re.search(rf"wgmma\.wait_group\.sync\.aligned\s+{newest};", kernel.ptx)


@pytest.mark.parametrize("config", configs(blocks=True), ids=_name)
def test_blocks(config: dict) -> None:
    kernel = compiled(torch.float8_e4m3fn, config, runs=K // 128)
    assert columns(kernel, ".f32.e4m3.e4m3") == HALVES[config["block_n"]]
    # One product in flight, then an addition for each of its sums, in both consumers.
    sums = 2 * 64 * config["block_n"] // 128
    assert kernel.ptx.count("fma.rn.f32") == sums


def test_zero_points_and_bias() -> None:
    config = hopper_dense.default_config(M, N, K, H100)
    more = dict(x_zero=torch.empty(M, 1), w_sum=torch.empty(N, dtype=torch.int32), bias=torch.empty(N))
    compiled(torch.int8, config, **more)


def test_default_fills_rounds() -> None:
    """256 tokens and 11008 outputs: 116 tiles of 128 x 192 are one round of 132 processors; 86 of 128 x 256 leave 46 idle."""
    tile = hopper_dense.default_config(256, 11008, 4096, H100)
    assert (tile["block_m"], tile["block_n"]) == (128, 192)
    tile = hopper_dense.default_config(256, 4096, 4096, H100)
    assert (tile["block_m"], tile["block_n"]) == (128, 64)


def test_refusals() -> None:
    config = hopper_dense.default_config(4096, 4096, 4096, H100)
    x, one = torch.empty(16, 256, dtype=torch.int8), torch.empty(1, 1)
    with compiling_for((8, 0)) as found, pytest.raises(ValueError, match="kernel of Hopper"):
        hopper_dense.matmul(x, one, torch.empty(64, 256, dtype=torch.int8), one, dtype=torch.float16, config=config)
    with compiling_for((9, 0)) as found, pytest.raises(ValueError, match="N of 8"):
        hopper_dense.matmul(x, one, torch.empty(65, 256, dtype=torch.int8), one, dtype=torch.float16, config=config)
    assert not found
