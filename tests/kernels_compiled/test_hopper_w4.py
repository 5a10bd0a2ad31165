"""What the compiler makes of the Gluon kernels of 4-bit weights: Triton 3.6 only, whose Gluon they are written for."""

import json
import re
from importlib import resources

import pytest
import torch
import triton

if not triton.__version__.startswith("3.6."):
    pytest.skip(f"the Gluon kernels are written for Triton 3.6, this is {triton.__version__}", allow_module_level=True)

from lqedu_kernels import hopper_w4
from tests.kernels_compiled.compiler import SHARED, Compiled, compiling_for

HOPPER = (9, 0)
M, N, K = 1024, 11008, 4096
#: Two blocks of threads on a multiprocessor: 128 registers a thread before the consumers take more; scaling a tile keeps
#: some addresses in local memory, once a tile.
SPILLS = 256


def compiled(
    kind: str, config: dict, *, size: int | None = 128, zero: torch.dtype | None = None, bias: bool = False
) -> Compiled:
    """The kernel of one form; ``kind`` "channel", "zero", "integer", "ratio", "float16" or "bfloat16"."""
    empty = torch.empty
    with compiling_for(HOPPER) as found:
        if kind in ("float16", "bfloat16"):
            dtype, rows = getattr(torch, kind), K // size if size else 1
            hopper_w4.w4a16(
                empty(M, K, dtype=dtype), empty(N, K // 4, dtype=torch.int16), empty(rows, N, dtype=zero or dtype)
                if zero in (None, torch.float32) else empty(rows, N, dtype=dtype),
                None if zero is None else empty(rows, N, dtype=zero), empty(N, dtype=dtype) if bias else None,
                empty(M, N, dtype=dtype), group_size=size, config=config, processors=132,
            )  # fmt: skip
        else:
            groups = {"integer": torch.int16, "ratio": torch.float16}.get(kind)
            hopper_w4.w4a8(
                empty(M, K, dtype=torch.int8), empty(M), empty(N, K // 2, dtype=torch.uint8), empty(N),
                None if groups is None else empty(K // size, N, dtype=groups),
                empty(N, dtype=torch.int32) if kind == "zero" else None,
                empty(M, dtype=torch.int32) if kind == "zero" else None, empty(N) if bias else None,
                empty(M, N, dtype=torch.float16), group_size=size or 0, config=config, processors=132,
            )  # fmt: skip
    return found[0]


def loop(kernel: Compiled) -> list[str]:
    """Instructions of the shortest loop that multiplies: two blocks of 128 inputs."""
    lines, labels = [], {}
    loops = []
    for line in kernel.sass().splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            lines.append(found[1])
            target = re.search(r"BRA.*?(\.L_x_\d+)", found[1])
            if target and target[1] in labels:
                loops.append(lines[labels[target[1]] :])
    return min((body for body in loops if any("GMMA" in text for text in body)), key=len)


def check(kernel: Compiled, warps: int = 8) -> None:
    assert len(kernel.wgmma) == kernel.wgmma_from_registers > 0 and not kernel.mma
    assert not kernel.warnings  # serialized products
    assert kernel.spills <= (0 if warps == 8 else SPILLS)
    assert kernel.shared <= SHARED[HOPPER] // (1 if warps == 8 else 2)
    assert "setmaxnreg" in kernel.ptx and "cp.async.bulk.tensor" in kernel.ptx and "stmatrix" in kernel.ptx


def entries(operation: str) -> list[dict]:
    table = json.loads((resources.files("lqedu_kernels") / "configs" / "h100.json").read_text(encoding="utf-8"))
    configs = [e["config"] for e in table.get(operation, []) if e["config"].get("kernel") == "hopper"]
    # The order of tiles is the same code; where some launches are early (ahead) and some not, the early one has more.
    by_tile = {tuple(c[key] for key in ("block_n", "block_m", "warps", "stages", "share")): c for c in configs}
    by_tile |= {
        tuple(c[key] for key in ("block_n", "block_m", "warps", "stages", "share")): c
        for c in configs
        if c.get("ahead")
    }
    return list(by_tile.values())


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("w4a8/channel", "channel"), ("w4a8/integer128", "integer"), ("w4a8/ratio128", "ratio"),
        ("w4a16/group128", "float16"),
    ],
)  # fmt: skip
def test_shipped_configurations(operation: str, kind: str) -> None:
    found = entries(operation)
    assert found
    for config in found:
        check(compiled(kind, config), config["warps"])


@pytest.mark.parametrize(
    ("kind", "size", "zero"),
    [
        ("zero", None, None), ("integer", 64, None), ("ratio", 64, None), ("float16", 32, torch.uint8),
        ("float16", None, torch.float16), ("bfloat16", 64, torch.bfloat16),
    ],
)  # fmt: skip
def test_every_form(kind: str, size: int | None, zero: torch.dtype | None) -> None:
    int8 = kind not in ("float16", "bfloat16")
    config = {"block_n": 128, "block_m": 256, "warps": 8, "stages": 5 if int8 else 3, "group_m": 8, "share": False}
    check(compiled(kind, config, size=size, zero=zero, bias=True))


@pytest.mark.parametrize(("kind", "most"), [("channel", 170), ("integer", 260), ("ratio", 400), ("float16", 370)])
def test_the_loop_is_short_and_keeps_products_under_way(kind: str, most: int) -> None:
    """For 128 weights a thread; a wait lets the products of the last step run, and no value goes through local memory."""
    int8 = kind != "float16"
    config = {"block_n": 128, "block_m": 256, "warps": 8, "stages": 5 if int8 else 3, "group_m": 8, "share": False}
    body = loop(compiled(kind, config))
    waits = [line for line in body if line.startswith("WARPGROUP.DEPBAR")]
    assert len(body) <= most
    assert len(waits) == 2 and all(
        line.endswith(f"gsb0, {'0x2' if int8 else '0x4'} ") or f"0x{2 if int8 else 4}" in line for line in waits
    )
    assert not any(line.startswith(("LDL", "STL", "STS")) for line in body)
