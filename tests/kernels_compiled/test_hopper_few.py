"""What the compiler makes of the Gluon kernel of few tokens: Triton 3.6 only, whose Gluon it is written for."""

import json
from importlib import resources

import pytest
import torch
import triton

if not triton.__version__.startswith("3.6."):
    pytest.skip(f"the Gluon kernels are written for Triton 3.6, this is {triton.__version__}", allow_module_level=True)

from lqedu_kernels.hopper_few import search_space
from lqedu_kernels.w4a16 import w4a16_matmul
from tests.kernels_compiled.compiler import SHARED, Compiled, compiling_for

HOPPER = (9, 0)


def compiled(
    config: dict, *, n: int = 11008, k: int = 4096, dtype: torch.dtype = torch.float16, size: int | None = 128,
    zero: torch.dtype | None = torch.uint8, bias: bool = False,
) -> Compiled:  # fmt: skip
    rows = -(-k // size) if size else 1
    with compiling_for(HOPPER) as found:
        w4a16_matmul(
            torch.empty(config["block_m"], k, dtype=dtype), torch.empty(n, -(-k // 128) * 32, dtype=torch.int16),
            torch.empty(rows, n, dtype=dtype), None if zero is None else torch.empty(rows, n, dtype=zero),
            group_size=size, bias=torch.empty(n, dtype=dtype) if bias else None, config=config,
        )  # fmt: skip
    (kernel,) = found
    return kernel


def check(kernel: Compiled, config: dict, spills: int = 0) -> None:
    """Products of ``mma.sync``, from registers that nothing but 16-byte loads fills."""
    assert kernel.name == "_hopper_few_kernel" and kernel.mma and not kernel.wgmma
    assert kernel.spills <= spills
    assert kernel.shared * config["programs"] <= SHARED[HOPPER]
    body = kernel.loop()
    assert "LDG" in body and "STS" in body and "LDS" not in body  # neither weights nor x pass shared memory
    assert (
        "ld.global.L1::evict_first.L2::cache_hint.v4.b32" in kernel.ptx
    )  # words: 16 bytes a thread, not kept in the caches


def entries() -> list[tuple[str, int, int, dict]]:
    table = json.loads((resources.files("lqedu_kernels") / "configs" / "h100.json").read_text(encoding="utf-8"))
    found: list[tuple[str, int, int, dict]] = []
    for operation, rows in table.items():
        for e in rows:
            same = [f for f in found if f[0] == operation and f[3] == e["config"]]
            if e["config"].get("kernel") == "hopper_few" and not same:
                found.append((operation, e["n"], e["k"], e["config"]))
    return found


def test_shipped_configurations() -> None:
    forms = {
        "w4a16/group128": {}, "w4a16/group64": {"size": 64}, "w4a16/float64": {"size": 64, "zero": torch.float16},
        "w4a16/bf16-group128": {"dtype": torch.bfloat16}, "w4a16/channel": {"size": None, "zero": None},
    }  # fmt: skip
    found = entries()
    assert len(found) >= 5
    for operation, n, k, config in found:
        kernel = compiled(config, n=n, k=k, **forms[operation])
        check(kernel, config, SPILLS)
        assert kernel.registers * 32 * config["warps"] * config["programs"] <= 65536


@pytest.mark.parametrize(
    ("size", "zero", "dtype"),
    [(32, None, torch.float16), (64, torch.float16, torch.bfloat16), (None, torch.float32, torch.float16)],
)
@pytest.mark.parametrize("m", [8, 16])
def test_every_form(m: int, size: int | None, zero: torch.dtype | None, dtype: torch.dtype) -> None:
    config = {"kernel": "hopper_few", **search_space(m)[0]}
    check(compiled(config, n=1000, k=4000, dtype=dtype, size=size, zero=zero, bias=True), config, 256)


#: Of the shipped launches, in bytes: some addresses and sums of x at 16 tokens.
SPILLS = 32


def test_the_loop_is_short() -> None:
    """A step of 16 outputs and two blocks: 128 weights a thread, of which one instruction unpacks two."""
    config = {
        "block_m": 8,
        "rows": 16,
        "warps": 16,
        "blocks": 2,
        "programs": 1,
        "ahead": False,
        "registers": 128,
        "overlap": True,
    }
    body = compiled({"kernel": "hopper_few", **config}).loop()
    assert len(body) <= 260
    assert sum(line == "HMMA" for line in body) == 16 and sum(line == "BAR" for line in body) == 1
