"""Activations as codes, where they are: by the kernels on a GPU, by their grids in PyTorch elsewhere, with the same bits.

What a packed layer does before its product: an online Hadamard transform, then codes and scales. Chapters
``08-smoothquant``, ``10-quarot`` and ``20-hadamard-kv``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid
from lqedu.runtime import backend
from lqedu.runtime.backend import kernels
from lqedu.runtime.inputs import InputPath

Grid = ActivationGrid | Float8ActivationGrid


class Inputs(NamedTuple):
    """Codes of activations, and what they are multiplied with.

    Attributes:
        codes: int8 or float8_e4m3fn ``[tokens, in]``.
        scale: float32 ``[tokens, 1]``, or one for each group of 128 inputs.
        zero: whole numbers, float32 ``[tokens, 1]``; ``None`` on a symmetric grid.
        sums: of the codes of each token, int32 ``[tokens, 1]``, where a weight has zero points.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    sums: Tensor | None = None


def token_grid(grid: Grid | None) -> Any | None:
    """The ``TokenGrid`` of ``lqedu_kernels.quantize`` that makes the same codes; ``None`` where no kernel makes them.

    Kernels give each token (or, FP8, 128 inputs of it) a scale of its own, and codes of 8 or 4 bits.
    """
    if isinstance(grid, ActivationGrid) and grid.granularity == "token" and grid.bits in (4, 8):
        return kernels("quantize").TokenGrid(f"int{grid.bits}", grid.symmetric, grid.clip_ratio)
    if isinstance(grid, Float8ActivationGrid) and grid.format == "E4M3" and grid.granularity in ("token", "group"):
        size = grid.group_size if grid.granularity == "group" else None
        return kernels("quantize").TokenGrid("e4m3", group_size=size)
    return None


def encode_inputs(
    x: Tensor, grid: Grid, static: tuple[Tensor, Tensor | None] | None = None, *, sums: bool = False
) -> Inputs:
    """Codes of activations ``[tokens, in]``.

    Args:
        x: floating point.
        grid: of the codes.
        static: scale and zero point of a static grid, ``[1]``.
        sums: of the codes too.

    Raises:
        GridError: activations that are not finite, where PyTorch makes the codes: a kernel cannot ask without waiting, and
            makes NaN of what it finds.
    """
    token = token_grid(grid) if backend.runs_kernels(x) else None
    if token is not None:
        return Inputs(*kernels("quantize").quantize_tokens(x, token, sums=sums)[:4])
    scale, zero = static if grid.static and static is not None else grid.fit(x)
    codes = grid.encode(x, scale, zero)
    if isinstance(grid, Float8ActivationGrid):
        return Inputs(codes.view(torch.float8_e4m3fn), _of_tokens(scale, len(x)))
    total = codes.sum(1, keepdim=True, dtype=torch.int32) if sums else None
    return Inputs(codes, _of_tokens(scale, len(x)), None if zero is None else _of_tokens(zero, len(x)), total)


def transform_inputs(x: Tensor, path: InputPath) -> Tensor:
    """:meth:`InputPath.transform` of activations ``[tokens, in]``, by the kernel where there is one for this transform."""
    if path.hadamard is None or not _has_kernel(x, path):
        return path.transform(x)
    return kernels("hadamard").hadamard_transform(x.contiguous(), length=path.hadamard, stride=path.stride)


def transform_and_encode(
    x: Tensor, path: InputPath, static: tuple[Tensor, Tensor | None] | None = None, *, sums: bool = False
) -> Tensor | Inputs:
    """Both, in one launch where a kernel does both; the transformed activations where the path has no grid."""
    grid = path.activation
    if (
        grid is not None
        and path.hadamard is not None
        and _has_kernel(x, path)
        and (token := token_grid(grid)) is not None
    ):
        run = kernels("hadamard").hadamard_quantize
        return Inputs(*run(x.contiguous(), token, length=path.hadamard, stride=path.stride, sums=sums)[:4])
    z = transform_inputs(x, path)
    return z if grid is None else encode_inputs(z, grid, static, sums=sums)


def _has_kernel(x: Tensor, path: InputPath) -> bool:
    if not backend.runs_kernels(x) or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return path.stride > 1 or kernels("hadamard_tables").factors(path.hadamard)[1] >= 16


def _of_tokens(scale: Tensor, tokens: int) -> Tensor:
    """One scale for all tokens as one for each: kernels read ``[tokens, 1]``."""
    return scale.reshape(-1, scale.shape[-1]).expand(tokens, -1).to(torch.float32).contiguous()
