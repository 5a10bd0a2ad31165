"""Models of a known shape with random weights, made where they run: what speed and memory are measured on; ``21-serving``.

Speed does not depend on what weights say, but it does on their being there: processors spend less power, and run faster, on
zeros. So weights are normal numbers, rounded to nearest on the grid of each format, layer by layer, in seconds.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lqedu.errors import UsageError
from lqedu.evaluation.roofline import ModelShape
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Grid, float8_quantize
from lqedu.formats.kv import kv_grid
from lqedu.formats.progressive import ProgressiveGrid, progressive_quantize
from lqedu.rounding import nearest
from lqedu.runtime.attention import AttentionPath
from lqedu.runtime.backend import kernel_weight
from lqedu.runtime.decoder import Decoder, Layer
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.projection import Part, Projection

SHAPES = {
    "llama-2-7b": ModelShape(32, 4096, 11008, 32, 32, 128, 32000),
    "llama-3-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256),
}


@dataclass(frozen=True)
class Format:
    """How a model is stored and multiplied.

    Attributes:
        weight: grid of the weights of linears; ``None`` is FP16.
        activation: grid of their inputs; ``None`` is FP16.
        kv: of keys and values, as :func:`lqedu.formats.kv.kv_grid` reads it.
    """

    weight: IntGrid | ProgressiveGrid | Float8Grid | None = None
    activation: ActivationGrid | Float8ActivationGrid | None = None
    kv: int | str = 16

    def linear_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a weight ``[rows, columns]`` in its kernel's layout: codes, scales, zero points.

        >>> FORMATS["w4a16"].linear_bytes(4096, 4096) * 8 / 4096**2        # 4 bits, and 24 a group of 128
        4.1875
        """
        blocks = -(-columns // 128)
        if self.weight is None:
            return 2 * rows * columns
        if isinstance(self.weight, Float8Grid):
            return rows * columns + 4 * rows
        if isinstance(self.weight, ProgressiveGrid):
            return 64 * rows * blocks + 2 * rows + 2 * (columns // self.weight.group_size) * 8 * -(-rows // 8)
        if self.weight.bits == 8:
            return rows * columns + 2 * rows
        groups = columns // self.weight.group_size
        return 64 * rows * blocks + groups * rows * (2 if self.weight.symmetric else 3)

    def kv_bytes(self, head_dim: int) -> int:
        """Bytes of a token's key, or value, of one head in a page: codes and two FP16 numbers."""
        if self.kv == 16:
            return 2 * head_dim
        return head_dim * (4 if self.kv == 4 else 8) // 8 + 4


FORMATS = {
    "fp16": Format(),
    "w4a16": Format(IntGrid(4, granularity="group", group_size=128)),
    "w8a8": Format(IntGrid(8, True, "channel"), ActivationGrid(8)),
    "fp8": Format(Float8Grid("channel"), Float8ActivationGrid("token")),
    "w4a8": Format(ProgressiveGrid(128), ActivationGrid(8)),
    "w4a8kv4": Format(ProgressiveGrid(128), ActivationGrid(8), 4),
}


def random_decoder(
    shape: ModelShape,
    form: Format,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float16,
    positions: int = 16384,
    seed: int = 0,
) -> Decoder:
    """A decoder of random weights in a format.

    Args:
        shape: of the model; inputs of all linears must be multiples of 128 for formats with groups.
        form: of weights, activations, keys and values.
        device: where it is made, and where it runs.
        dtype: of activations.
        positions: rows of the table of rotations.
        seed: of the weights.

    Raises:
        UsageError: a shape that the format's groups do not divide.
        MissingDependencyError: Triton is not installed.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device) * std

    def projection(rows: int, columns: int) -> Projection:
        return Projection([_part(normal(rows, columns, std=columns**-0.5), form, dtype)])

    def norm() -> Tensor:
        return (1 + normal(shape.hidden, std=0.1)).to(dtype)

    _check(shape, form)
    heads, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layers = tuple(
        Layer(
            input_norm=norm(),
            qkv=projection(heads + 2 * kv, shape.hidden),
            o=projection(shape.hidden, heads),
            post_norm=norm(),
            gate_up=projection(2 * shape.intermediate, shape.hidden),
            down=projection(shape.hidden, shape.intermediate),
        )
        for _ in range(shape.layers)
    )
    embedding = normal(shape.vocabulary, shape.hidden).to(dtype)
    head = embedding if shape.tied else normal(shape.vocabulary, shape.hidden, std=shape.hidden**-0.5).to(dtype)
    frequencies = 10000.0 ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    angles = (torch.arange(positions, device=device)[:, None] * frequencies).repeat(1, 2)
    grid = kv_grid(form.kv)
    return Decoder(
        layers, embedding, head, norm(), angles.cos(), angles.sin(), shape.heads, shape.kv_heads, 1e-5, shape.head_dim**-0.5,
        None if grid is None else AttentionPath(key=grid, value=grid),
    )  # fmt: skip


def _part(weight: Tensor, form: Format, dtype: torch.dtype) -> Part:
    if form.weight is None:
        return Part(weight.to(dtype))
    stored: Any
    if isinstance(form.weight, Float8Grid):
        stored = float8_quantize(weight, form.weight)
    elif isinstance(form.weight, ProgressiveGrid):
        stored = progressive_quantize(weight, form.weight)
    else:
        stored, _ = nearest(weight, form.weight)
    packed = kernel_weight(stored, integer_inputs=isinstance(form.activation, ActivationGrid))
    return Part(packed, None, InputPath(activation=form.activation))


def _check(shape: ModelShape, form: Format) -> None:
    size = getattr(form.weight, "group_size", None) or 1
    widths = {shape.hidden, shape.heads * shape.head_dim, shape.intermediate}
    if bad := [width for width in sorted(widths) if width % size]:
        raise UsageError(f"groups of {size} inputs do not divide linears of {bad} inputs; use a format without groups")
