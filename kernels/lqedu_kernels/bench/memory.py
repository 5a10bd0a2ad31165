"""The cases of operations that memory bounds: transforms, quantization, and attention over a quantized cache.

Their baseline is torch's copy of as many bytes, read and written, and torch's own operations where it has them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lqedu_kernels import hadamard, kv_attention, quantize
from lqedu_kernels._tensors import target_of
from lqedu_kernels.bench.cases import OURS, Call, Case
from lqedu_kernels.bench.timing import copies_for
from lqedu_kernels.kv_pages import BITS, PAGE, Pages, empty_pages

COPY = "torch copy of as many bytes"
EAGER = "torch, unfused"
SDPA = "torch FP16 attention"
TOKENS = (64, 1024, 16384)
WIDTHS = (4096, 5120, 8192, 11008, 13824, 14336)
LLAMA_3_8B = (32, 8, 128)  # query heads, key-value heads, head size
CACHES = ((1, 1024), (1, 8192), (1, 32768), (8, 8192), (32, 1024), (32, 8192), (64, 8192))  # sequences, tokens of each


def hadamard_cases(device: torch.device, variant: str | None) -> Iterator[Case]:
    """Transforms of whole rows, alone and with the quantization behind them."""
    for operation in _wanted(("hadamard/transform", "hadamard/int8"), variant):
        fused = operation == "hadamard/int8"
        for n in WIDTHS:
            for m in TOKENS:
                xs = _inputs(device, m, n)
                nbytes = m * n * (3 if fused else 4)

                def run(x: Tensor, config: object = None, fused: bool = fused) -> object:
                    return (hadamard.hadamard_quantize if fused else hadamard.hadamard_transform)(x, config=config)

                kernels = {COPY: _copy(device, nbytes)}
                space = hadamard.search_space(m, n, target_of(xs[0], "x"))
                reference = hadamard.hadamard_quantize_reference if fused else hadamard.hadamard_reference
                yield _case(operation, {"m": m, "k": n}, xs, run, kernels, nbytes, (m, n, n), space, reference)


def quantize_cases(device: torch.device, variant: str | None) -> Iterator[Case]:
    """One scale a token: alone, behind RMSNorm with a residual, and behind SiLU(gate) · up."""
    for operation in _wanted(("quantize/tokens", "quantize/rmsnorm", "quantize/silu"), variant):
        for k in (4096, 14336) if operation != "quantize/rmsnorm" else (4096, 8192):
            for m in TOKENS:
                xs = _inputs(device, m, k)
                others = _inputs(device, m, k, seed=1)
                weight = torch.rand(k, device=device).half() + 0.5
                pairs = list(zip(xs, others, strict=True))
                kind = operation.split("/")[1]
                nbytes = quantize.bytes_moved(m, k, residual=kind == "rmsnorm", gate=kind == "silu")

                def run(
                    pair: tuple[Tensor, Tensor], config: object = None, kind: str = kind, w: Tensor = weight
                ) -> object:
                    x, other = pair
                    if kind == "tokens":
                        return quantize.quantize_tokens(x, config=config)
                    if kind == "rmsnorm":
                        return quantize.rmsnorm_quantize(x, w, eps=1e-5, residual=other, config=config)
                    return quantize.silu_quantize(x, other, config=config)

                def reference(pair: tuple[Tensor, Tensor], kind: str = kind, w: Tensor = weight) -> object:
                    return _eager(kind, pair, w)

                eager = [lambda pair=pair, kind=kind, w=weight: _eager(kind, pair, w) for pair in pairs]
                kernels = {COPY: _copy(device, nbytes), EAGER: eager}
                space = quantize.search_space(m, k, target_of(xs[0], "x"))
                yield _case(operation, {"m": m, "k": k}, pairs, run, kernels, nbytes, (m, k, k), space, reference)


def _eager(kind: str, pair: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    """The same in torch's operations, one kernel each."""
    x, other = pair
    if kind == "rmsnorm":
        other = x + other
        x = functional.rms_norm(other, (x.shape[1],), weight, 1e-5)
    elif kind == "silu":
        x = functional.silu(x) * other
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return torch.round(x / scale).to(torch.int8), scale, other


def attention_cases(device: torch.device, variant: str | None) -> Iterator[Case]:
    """Decode, one new token a sequence, heads of Llama-3-8B; beside torch's attention over an FP16 cache of that length."""
    heads, kv_heads, size = LLAMA_3_8B
    for operation in _wanted(("kv_attention/kv4", "kv_attention/kv8", "kv_attention/fp8"), variant):
        kind = operation.split("/")[1]
        for batch, length in CACHES:
            generator = torch.Generator(device).manual_seed(batch + length)
            count = batch * length // PAGE
            nbytes = kv_attention.bytes_moved(batch * length, kv_heads, size, kind, kind, queries=batch * heads)
            caches = [
                tuple(_pages(kind, role, count, kv_heads, size, generator, device) for role in ("key", "value"))
                for _ in range(copies_for(nbytes))
            ]
            table = torch.randperm(count, device=device, generator=generator).to(torch.int32).view(batch, -1)
            lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
            query = torch.randn(batch, heads, 1, size, device=device, generator=generator).half()

            def run(
                cache: tuple[Pages, Pages],
                config: object = None,
                q: Tensor = query,
                t: Tensor = table,
                n: Tensor = lengths,
            ) -> object:
                return kv_attention.kv_attention(q, cache[0], cache[1], t, n, config=config)

            def reference(
                cache: tuple[Pages, Pages], q: Tensor = query, t: Tensor = table, n: Tensor = lengths
            ) -> object:
                return kv_attention.kv_attention_reference(q, cache[0], cache[1], t, n)

            dense = [
                tuple(torch.randn(batch, kv_heads, length, size, device=device, dtype=torch.float16) for _ in range(2))
                for _ in range(copies_for(4 * batch * length * kv_heads * size))
            ]
            kernels = {SDPA: [lambda kv=kv, q=query: _attend(q, *kv) for kv in dense]}
            columns = 8 if heads // kv_heads <= 8 else 16
            programs = batch * kv_heads * -(-(heads // kv_heads) // columns)
            space = kv_attention.search_space(programs, length // PAGE)
            sizes = {"batch": batch, "context": length}
            yield _case(operation, sizes, caches, run, kernels, nbytes, (programs, length, size), space, reference)
            del caches, dense


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def _pages(
    kind: str, role: str, count: int, kv_heads: int, size: int, generator: torch.Generator, device: torch.device
) -> Pages:
    """Random codes, scales near those of keys, and zero points in the middle."""
    pages = empty_pages(kind, role, count, kv_heads, size, device=device)
    if kind == "fp8":  # no NaN among the bytes
        values = torch.randn(pages.codes.shape, device=device, generator=generator).clamp(-8, 8)
        low, high = (v.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16) for v in (values, -values))
        pages.codes.copy_(low | high << 8)
        zero = 0.0
    else:
        pages.codes.copy_(torch.randint(-(2**15), 2**15, pages.codes.shape, device=device, generator=generator))
        zero = 2 ** (BITS[kind] - 1) - 0.5
    pages.numbers[..., 0] = 0.01 + 0.02 * torch.rand(pages.numbers.shape[:-1], device=device, generator=generator)
    pages.numbers[..., 1] = zero
    return pages


# --- what they share --------------------------------------------------------------------------------------------------


def _case(
    operation: str, sizes: Mapping[str, int], inputs: Sequence[object], run: Callable[..., object],
    kernels: Mapping[str, Sequence[Call]], nbytes: int, lookup: tuple[int, int, int], space: list[dict],
    reference: Callable[..., object],
) -> Case:  # fmt: skip
    def configured(config: Mapping[str, object] | None) -> Sequence[Call]:
        return [lambda x=x: run(x, config) for x in inputs]

    kernels = {OURS: configured(None)} | dict(kernels)
    return Case(operation, sizes, kernels, nbytes, 0, None, lookup, space, configured, lambda: reference(inputs[0]))


def _wanted(operations: Sequence[str], variant: str | None) -> list[str]:
    return [name for name in operations if variant in (None, name)]


def _inputs(device: torch.device, m: int, k: int, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(m, k, device=device, generator=generator).half() for _ in range(copies_for(2 * m * k, most=32))]


def _copy(device: torch.device, nbytes: int) -> list[Call]:
    """torch's fastest copy that reads and writes ``nbytes`` in all (an addition of 0), on buffers that exceed the cache."""
    words = nbytes // 8
    pairs = [
        (
            torch.randint(0, 2**31 - 1, (words,), dtype=torch.int32, device=device),
            torch.empty(words, dtype=torch.int32, device=device),
        )
        for _ in range(copies_for(nbytes, most=32))
    ]
    return [lambda source=source, target=target: torch.add(source, 0, out=target) for source, target in pairs]
