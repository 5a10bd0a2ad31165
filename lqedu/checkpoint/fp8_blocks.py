"""The layout of FP8 checkpoints in blocks, as DeepSeek-V3 began it and Qwen3 follows it. It is read, not written.

With K inputs, N outputs, blocks of B by B, 128 as a rule, for each linear layer::

    weight            float8_e4m3fn [N, K]
    weight_scale_inv  float32 [N / B, K / B], the last of each smaller     Ŵ = weight_scale_inv · weight, block by block

The name is misleading: the scale multiplies. Inputs are E4M3 with a scale for each B features of a token, as they come
(``"activation_scheme": "dynamic"``). The same numbers are the FP8_BLOCK of compressed-tensors, which a model that was
read here can be exported to.

Source: ``quantization_config`` of deepseek-ai/DeepSeek-V3 and Qwen/Qwen3-8B-FP8; vLLM 0.33 ``fp8.py``. Chapters
``16-fp8``, ``21-serving``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lqedu.checkpoint.layout import LinearParts, field, nothing_else, take, take_scale
from lqedu.errors import CheckpointError
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Grid, Float8Tensor
from lqedu.runtime.inputs import InputPath

NAME = "fp8"


def decode(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], shape: tuple[int, int]) -> LinearParts:
    """The parts of a layer ``[out, in]`` from its tensors.

    Raises:
        CheckpointError: tensors that do not fit the scheme or the shape.
    """
    nothing_else(tensors, "weight", "weight_scale_inv")
    grid = Float8Grid("block", scheme["block_size"])
    codes = take(tensors, "weight", shape, torch.float8_e4m3fn).view(torch.uint8)
    scale = take_scale(tensors, "weight_scale_inv", grid.scale_shape(shape)).to(torch.float32)
    inputs = Float8ActivationGrid("group", group_size=scheme["block_size"])
    return LinearParts(Float8Tensor(codes, scale, grid), InputPath(activation=inputs))


def schemes(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], names: set[str]
) -> dict[str, dict[str, Any]]:
    """The scheme of each quantized layer.

    Args:
        config: ``quantization_config``.
        shapes: ``[out, in]`` of each linear layer of the model, by name.
        names: of all tensors of the checkpoint.

    Raises:
        CheckpointError: a config that this layout does not know.
    """
    sides = field(config, "weight_block_size", (list, type(None)), None)
    if not sides or len(sides) != 2 or sides[0] != sides[1]:
        raise CheckpointError(f"its weight_block_size is {sides!r}; square blocks are read, such as [128, 128]")
    size = field({"weight_block_size": sides[0]}, "weight_block_size", int)
    for key, known in (("activation_scheme", "dynamic"), ("fmt", "e4m3"), ("scale_fmt", "float")):
        if (found := field(config, key, (str, type(None)), None) or known) != known:
            raise CheckpointError(f"its {key} is {found!r}, and only {known!r} is read")
    return {name: {"block_size": size} for name in shapes if f"{name}.weight_scale_inv" in names}
