"""Costs of a serving step from the recorded times of the kernels; chapter ``21-serving``.

Read from ``book/results/kernels_*.json``: each linear layer of a block at its own shape, attention at its measured bytes a
second, the head and the attention of prompts at the rates that the GPU reached. Norms, RoPE and activations are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lqedu.book.kernels import FP16, OURS, ceilings, times
from lqedu.errors import UsageError
from lqedu.evaluation.roofline import ModelShape, kv_bytes_per_token
from lqedu.evaluation.serving import StepCost

LLAMA_3_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)


@dataclass(frozen=True)
class Serving:
    """A format to serve in.

    Attributes:
        title: as a table shows it.
        operation: of the linear layers in the result files; ``None`` is FP16, ``torch.matmul``.
        weight_bits: bits of a weight, scales included.
        kv: variant of the attention kernel, ``"kv4"``; ``None`` is FP16, torch's attention.
        kv_bits: bits of a key or value element.
    """

    title: str
    operation: str | None
    weight_bits: float
    kv: str | None = None
    kv_bits: int = 16


FORMATS: dict[str, Serving] = {
    "FP16": Serving("FP16", None, 16),
    "W4A16": Serving("W4A16, groups of 128", "w4a16/group128", 4 + 16 / 128),
    "W8A8": Serving("W8A8, INT8 cache", "w8a8", 8, "kv8", 8),
    "FP8": Serving("FP8 by token, FP8 cache", "fp8/token", 8, "fp8", 8),
    "W4A8KV4": Serving("W4A8KV4, groups of 128", "w4a8/integer128", 4 + 16 / 128, "kv4", 4),
}


def block_shapes(shape: ModelShape) -> dict[tuple[int, int], int]:
    """``[out, in]`` of a block's products with q, k, v and gate, up side by side as they were measured -> how many."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        (q + 2 * kv, shape.hidden): 1,
        (shape.hidden, q): 1,
        (shape.intermediate, shape.hidden): 2,
        (shape.hidden, shape.intermediate): 1,
    }


def step_cost(files: Mapping[str, Mapping[str, Any]], form: Serving, shape: ModelShape = LLAMA_3_8B) -> StepCost:
    """What a step costs in a format.

    Args:
        files: the result files of the kernels by family, as :func:`lqedu.book.results` reads them.
        form: one of :data:`FORMATS`.
        shape: the model. Attention was measured with the heads of Llama-3-8B.

    Raises:
        UsageError: a product that was not measured at this model's shape.
    """
    operation = form.operation or "w4a16/group128"  # FP16 was timed beside every kernel
    measured = times(files[operation.partition("/")[0]], operation)[OURS if form.operation else FP16]
    rows = sorted({m for m, _, _ in measured})
    try:
        seconds = [
            shape.layers * sum(count * measured[m, n, k] for (n, k), count in block_shapes(shape).items()) for m in rows
        ]
    except KeyError as missing:
        raise UsageError(f"{operation} was not measured at [rows, out, in] = {missing}") from missing
    attention = times(files["kv_attention"], f"kv_attention/{form.kv or 'kv4'}")
    largest = max(attention[OURS], key=lambda sizes: sizes[0] * sizes[1])
    one = attention[OURS if form.kv else "torch FP16 attention"][largest] / (largest[0] * largest[1])
    rates = ceilings(files["kv_attention"])
    products = rates["torch.matmul FP16"]
    return StepCost(
        rows=tuple(rows),
        seconds=tuple(seconds),
        cached_token=shape.layers * one,
        prompt_pair=4 * shape.layers * shape.heads * shape.head_dim / products,
        head_bytes=2 * shape.head_weights / rates["copy, read and write"],
        head_row=2 * shape.head_weights / products,
    )


def tokens_beside(form: Serving, memory: float, shape: ModelShape = LLAMA_3_8B) -> int:
    """Tokens whose keys and values fit into ``memory`` bytes beside the weights; head and embedding stay in 16 bits."""
    weights = shape.linear_weights * form.weight_bits / 8 + 2 * (shape.head_weights + shape.embedding_weights)
    return max(0, int((memory - weights) / kv_bytes_per_token(shape, bits=form.kv_bits)))
