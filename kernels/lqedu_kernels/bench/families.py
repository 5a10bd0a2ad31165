"""The cases of every operation: random operands, never zeros, our call and the calls of its peers.

A peer is named as its users call it. Peers that do less than our call (no scaling, say) are named so.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lqedu_kernels import fp8, w4a8, w4a16, w8a8
from lqedu_kernels._tensors import target_of
from lqedu_kernels.bench import memory, steps
from lqedu_kernels.bench.cases import FP16, OURS, Call, Case, Family
from lqedu_kernels.bench.shapes import ROWS, SHAPES
from lqedu_kernels.bench.timing import copies_for

INT8_CEILING = FP8_CEILING = (
    "torch._scaled_mm FP8"  # both run at twice the rate of FP16; torch's INT8 product is slower
)
FP16_CEILING = FP16

Operands = tuple[Tensor, ...]


def _w4a16(device: torch.device, variant: str | None) -> Iterator[Case]:
    zeros = {
        "w4a16/group128": (128, torch.uint8, torch.float16),
        "w4a16/group64": (64, torch.uint8, torch.float16),
        "w4a16/float64": (64, torch.float16, torch.float16),
        "w4a16/bf16-group128": (128, torch.uint8, torch.bfloat16),
        "w4a16/channel": (None, None, torch.float16),
    }
    for operation, (group, zero_dtype, dtype) in _wanted(zeros, variant):
        for n, k in _shapes(operation == "w4a16/group128"):
            make = _Random(device, n + k)
            words = w4a16.pack_w4a16(make.codes(n, k))
            rows = 1 if group is None else -(-k // group)
            scale = make.uniform(rows, n, low=0.002, high=0.01).to(dtype)
            zero = None if zero_dtype is None else make.integers(1, 15, rows, n).to(zero_dtype)
            weights = _copies(words, scale, *(() if zero is None else (zero,)))
            dense = _copies(make.normal(n, k).to(dtype))

            def call(x: Operands, w: Operands, config: object = None, group: int | None = group) -> object:
                zero = w[2] if len(w) > 2 else None
                return w4a16.w4a16_matmul(x[0], w[0], w[1], zero, group_size=group, config=config)

            def reference(x: Operands, w: Operands, group: int | None = group) -> object:
                return w4a16.w4a16_reference(x[0], w[0], w[1], w[2] if len(w) > 2 else None, group_size=group)

            for m in ROWS:
                x = (make.normal(m, k).to(dtype),)
                kernels = {FP16: [lambda w=w, x=x: x[0] @ w[0].T for w in dense]}
                if operation == "w4a16/bf16-group128" and m <= 64:
                    kernels["tinygemm (torch)"] = _tinygemm(make, x[0], n, k)
                yield _case(
                    operation, m, n, k, x, weights, call, kernels, FP16_CEILING,
                    w4a16.bytes_moved(m, n, k, group, 0 if zero is None else zero.element_size()),
                    w4a16.search_space(m, n, k, target_of(x[0], "x")), reference,
                )  # fmt: skip


def _tinygemm(make: "_Random", x: Tensor, n: int, k: int) -> Sequence[Call]:
    packed = torch.ops.aten._convert_weight_to_int4pack(make.integers(0, 256, n, k // 2).to(torch.uint8), 8)
    scales = make.uniform(k // 128, n, 2, low=0.002, high=0.01).to(torch.bfloat16)
    return [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w[0], 128, w[1]) for w in _copies(packed, scales)]


def _w4a8(device: torch.device, variant: str | None) -> Iterator[Case]:
    groups = {"w4a8/channel": None, "w4a8/integer128": 128, "w4a8/integer64": 64, "w4a8/ratio128": 128}
    for operation, group in _wanted(groups, variant):
        for n, k in _shapes(operation in ("w4a8/channel", "w4a8/integer128")):
            make = _Random(device, n + k)
            weights = _w4a8_weight(operation, group, make, n, k)
            dense = _copies(make.normal(n, k).half())

            def call(x: Operands, w: Operands, config: object = None, group: int | None = group) -> object:
                groups = w[2] if len(w) > 2 else None
                return w4a8.w4a8_matmul(x[0], x[1], w[0], w[1], groups=groups, group_size=group or 128, config=config)

            def reference(x: Operands, w: Operands, group: int | None = group) -> object:
                groups = w[2] if len(w) > 2 else None
                return w4a8.w4a8_reference(x[0], x[1], w[0], w[1], groups=groups, group_size=group or 128)

            for m in ROWS:
                x = (make.integers(-127, 128, m, k).to(torch.int8), make.uniform(m, low=0.01, high=0.03))
                half = make.normal(m, k).half()
                kernels = {FP16: [lambda w=w, half=half: half @ w[0].T for w in dense]}
                nbytes = w4a8.bytes_moved(m, n, k, group_size=group)
                yield _case(
                    operation, m, n, k, x, weights, call, kernels, INT8_CEILING, nbytes, w4a8.search_space(m, n, k), reference
                )  # fmt: skip


def _w4a8_weight(operation: str, group: int | None, make: "_Random", n: int, k: int) -> list[Operands]:
    """Copies of codes, channel scales and, in groups, of their numbers."""
    scale = make.uniform(n, low=1e-3, high=5e-3)
    if group is None:
        return _copies(w4a8.pack_w4a8(make.integers(-8, 8, n, k).to(torch.int8)), scale)
    codes = w4a8.pack_w4a8(make.codes(n, k))
    if operation.startswith("w4a8/ratio"):
        return _copies(codes, scale, w4a8.pack_ratios(make.uniform(n, k // group, low=4.0, high=15.0).half()))
    step, zero = make.integers(4, 16, n, k // group), make.integers(7, 9, n, k // group)  # within int8
    return _copies(codes, scale, w4a8.pack_groups(step.to(torch.uint8), step * zero))


def _w8a8(device: torch.device, variant: str | None) -> Iterator[Case]:
    for operation, _ in _wanted({"w8a8": None}, variant):
        for n, k in _shapes(True):
            make = _Random(device, n + k)
            weights = _copies(make.integers(-127, 128, n, k).to(torch.int8), make.uniform(n, 1, low=1e-4, high=1e-3))
            dense = _copies(make.normal(n, k).half())

            def call(x: Operands, w: Operands, config: object = None) -> object:
                return w8a8.w8a8_matmul(x[0], x[1], w[0], w[1], config=config)

            def reference(x: Operands, w: Operands) -> object:
                return w8a8.w8a8_reference(x[0], x[1], w[0], w[1])

            for m in ROWS:
                x = (make.integers(-127, 128, m, k).to(torch.int8), make.uniform(m, 1, low=0.01, high=0.03))
                half = make.normal(m, k).half()
                kernels = {FP16: [lambda w=w, half=half: half @ w[0].T for w in dense]}
                if m > 16:
                    kernels["torch._int_mm, no scales"] = [
                        lambda w=w, x=x: torch._int_mm(x[0], w[0].T) for w in weights
                    ]
                yield _case(
                    operation,
                    m,
                    n,
                    k,
                    x,
                    weights,
                    call,
                    kernels,
                    INT8_CEILING,
                    w8a8.bytes_moved(m, n, k),
                    w8a8.search_space(m, n, k, target_of(x[0], "x")),
                    reference,
                )


def _fp8(device: torch.device, variant: str | None) -> Iterator[Case]:
    for operation, _ in _wanted({"fp8/tensor": None, "fp8/token": None, "fp8/block": None}, variant):
        for n, k in _shapes(True):
            make = _Random(device, n + k)
            scales = {"fp8/tensor": (1, 1), "fp8/token": (n, 1), "fp8/block": (-(-n // 128), -(-k // 128))}[operation]
            weights = _copies(make.normal(n, k).to(torch.float8_e4m3fn), make.uniform(*scales, low=1e-3, high=1e-2))
            dense = _copies(make.normal(n, k).half())

            def call(x: Operands, w: Operands, config: object = None) -> object:
                return fp8.fp8_matmul(x[0], x[1], w[0], w[1], config=config)

            def reference(x: Operands, w: Operands) -> object:
                return fp8.fp8_reference(x[0], x[1], w[0], w[1])

            for m in ROWS:
                scales = {"fp8/tensor": (1, 1), "fp8/token": (m, 1), "fp8/block": (m, -(-k // 128))}[operation]
                x = (make.normal(m, k).to(torch.float8_e4m3fn), make.uniform(*scales, low=0.01, high=0.03))
                half = make.normal(m, k).half()
                kernels = {FP16: [lambda w=w, half=half: half @ w[0].T for w in dense]}
                kernels |= _scaled_mm(operation, x, weights, make)
                yield _case(
                    operation,
                    m,
                    n,
                    k,
                    x,
                    weights,
                    call,
                    kernels,
                    FP8_CEILING,
                    fp8.bytes_moved(m, n, k, blocks=operation == "fp8/block"),
                    fp8.search_space(m, n, k, target_of(x[0], "x"), blocks=operation == "fp8/block"),
                    reference,
                )


def _scaled_mm(operation: str, x: Operands, weights: Sequence[Operands], make: "_Random") -> dict[str, Sequence[Call]]:
    """torch's product with a scale a tensor, and a scale a row; it has no name for blocks that every build supports."""
    one = make.uniform(1, 1, low=0.01, high=0.03)
    ones = make.uniform(1, weights[0][0].shape[0], low=0.01, high=0.03)
    rows = make.uniform(x[0].shape[0], 1, low=0.01, high=0.03)
    tensor = [lambda w=w: torch._scaled_mm(x[0], w[0].T, one, one, out_dtype=torch.bfloat16) for w in weights]
    token = [lambda w=w: torch._scaled_mm(x[0], w[0].T, rows, ones, out_dtype=torch.bfloat16) for w in weights]
    if operation == "fp8/token":
        return {"torch._scaled_mm by row": token}
    name = "torch._scaled_mm" if operation == "fp8/tensor" else "torch._scaled_mm, one scale"
    return {name: tensor}


def _steps(device: torch.device, variant: str | None) -> Iterator[Case]:
    """The four teaching kernels of chapter 18, as operations of their own, each beside FP16."""
    n, k = SHAPES["Llama-2-7B gate"]
    make = _Random(device, n + k)
    codes = make.codes(n, k)
    scale = make.uniform(k // steps.GROUP, n, low=0.002, high=0.01).half()
    zero = make.integers(1, 15, k // steps.GROUP, n).half()
    group = torch.arange(k, device=device) // steps.GROUP
    exact = (codes.float() - zero.float()[group].T) * scale.float()[group].T
    dense = _copies(make.normal(n, k).half())
    for name, (_, pack) in steps.STEPS.items():
        operation = f"steps/{name}"
        if variant not in (None, operation):
            continue
        weights = _copies(pack(codes), scale, zero)
        for m in ROWS:
            x = make.normal(m, k).half()
            kernels = {
                OURS: [lambda w=w, x=x, name=name: steps.step_matmul(name, x, *w) for w in weights],
                FP16: [lambda w=w, x=x: x @ w[0].T for w in dense],
            }
            nbytes = w4a16.bytes_moved(m, n, k, steps.GROUP, 2)
            work = 2 * m * n * k
            sizes = {"m": m, "n": n, "k": k}
            yield Case(operation, sizes, kernels, nbytes, work, FP16_CEILING, reference=lambda x=x: x.float() @ exact.T)


FAMILIES: dict[str, Family] = {
    "w4a16": _w4a16, "w8a8": _w8a8, "w4a8": _w4a8, "fp8": _fp8, "steps": _steps,
    "hadamard": memory.hadamard_cases, "quantize": memory.quantize_cases, "kv_attention": memory.attention_cases,
}  # fmt: skip


# --- what the products share ------------------------------------------------------------------------------------------


def _case(
    operation: str, m: int, n: int, k: int, x: Operands, weights: Sequence[Operands], call: Callable[..., object],
    kernels: Mapping[str, Sequence[Call]], ceiling: str, nbytes: int, space: list[dict], reference: Callable[..., object],
) -> Case:  # fmt: skip
    def configured(config: Mapping[str, object] | None) -> Sequence[Call]:
        return [lambda w=w: call(x, w, config) for w in weights]

    ours = {OURS: configured(None)}
    sizes = {"m": m, "n": n, "k": k}
    operations = 2 * m * n * k
    return Case(
        operation, sizes, ours | dict(kernels), nbytes, operations, ceiling, (m, n, k), space, configured,
        lambda: reference(x, weights[0]),
    )  # fmt: skip


def _wanted(variants: Mapping[str, object], variant: str | None) -> list[tuple[str, object]]:
    return [(name, value) for name, value in variants.items() if variant in (None, name)]


def _shapes(everywhere: bool) -> list[tuple[int, int]]:
    """All shapes for the main variants; one of them shows what the others cost."""
    return list(SHAPES.values()) if everywhere else [SHAPES["Llama-2-7B gate"]]


def _copies(*tensors: Tensor) -> list[Operands]:
    """Copies of a weight's tensors that together exceed the L2 cache several times."""
    nbytes = sum(t.numel() * t.element_size() for t in tensors)
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(copies_for(nbytes) - 1))]


class _Random:
    """Random tensors on a device, seeded."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def uniform(self, *shape: int, low: float, high: float) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=self.device, generator=self.generator)

    def codes(self, n: int, k: int) -> Tensor:
        return torch.randint(0, 16, (n, k), dtype=torch.uint8, device=self.device, generator=self.generator)
