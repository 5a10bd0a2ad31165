"""What this GPU reaches on a large copy and on large matrix products: the ceilings that every fraction refers to."""

import statistics
from collections.abc import Callable

import torch

from lqedu_kernels.bench.timing import time_calls


def ceilings(device: torch.device, *, matrix: int = 8192, copy_bytes: int = 2**31) -> list[dict[str, object]]:
    """Rows ``{"op": "ceiling", "kernel": name, "rate": per second, ...}``: bytes read and written, or operations.

    Args:
        device: a CUDA device.
        matrix: side of the square products.
        copy_bytes: size of the tensor that is copied.
    """
    generator = torch.Generator(device).manual_seed(0)
    rows = [_copy(copy_bytes, device, generator)]
    a, b = (torch.randn(matrix, matrix, device=device, generator=generator) for _ in range(2))
    operations = 2 * matrix**3
    half = [t.half() for t in (a, b)]
    rows.append(_row("torch.matmul FP16", lambda: half[0] @ half[1].T, operations, "operations/s"))
    int8 = [t.mul(30).round().clamp(-127, 127).to(torch.int8) for t in (a, b)]
    rows.append(_row("torch._int_mm INT8", lambda: torch._int_mm(int8[0], int8[1].T), operations, "operations/s"))
    if torch.cuda.get_device_capability(device) >= (8, 9):
        fp8 = [t.to(torch.float8_e4m3fn) for t in (a, b)]
        one = torch.ones((), device=device)
        rows.append(
            _row(
                "torch._scaled_mm FP8",
                lambda: torch._scaled_mm(fp8[0], fp8[1].T, one, one, out_dtype=torch.bfloat16),
                operations,
                "operations/s",
            )
        )
    return rows


def _copy(nbytes: int, device: torch.device, generator: torch.Generator) -> dict[str, object]:
    source = torch.randint(0, 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=device, generator=generator)
    target = torch.empty_like(source)
    # An addition of 0 copies by an ordinary kernel; in a CUDA graph ``copy_`` becomes a memory operation, which is slower.
    return _row("copy, read and write", lambda: torch.add(source, 0, out=target), 2 * nbytes, "bytes/s")


def _row(name: str, call: Callable[[], object], work: int, unit: str) -> dict[str, object]:
    call()
    samples = time_calls([call], replays=20)
    return {
        "op": "ceiling",
        "kernel": name,
        "rate": work / statistics.median(samples),
        "rate_unit": unit,
        "samples": samples,
        "unit": "s",
    }
