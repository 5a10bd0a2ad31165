"""What the config of compressed-tensors says of layers: its words for our grids, and our grids from its words.

Source: compressed-tensors 0.19.0 ``quantization/quant_args.py``, ``quant_scheme.py``, ``utils/match.py``. Chapter
``21-serving``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lqedu.checkpoint.layout import field
from lqedu.errors import CheckpointError, ExportError
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Grid

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def weight_args(grid: IntGrid | Float8Grid) -> dict[str, Any]:
    """``weights`` of a grid."""
    block = getattr(grid, "block_size", None) if grid.granularity == "block" else None
    return {
        "num_bits": getattr(grid, "bits", 8),
        "type": "int" if isinstance(grid, IntGrid) else "float",
        "symmetric": getattr(grid, "symmetric", True),
        "group_size": getattr(grid, "group_size", None),
        "strategy": grid.granularity,
        "block_structure": None if block is None else [block, block],
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def input_args(grid: ActivationGrid | Float8ActivationGrid | None, columns: int) -> dict[str, Any] | None:
    """``input_activations`` of a grid of the inputs (ExportError where there are none)."""
    if grid is None:
        return None
    floats = isinstance(grid, Float8ActivationGrid)
    if floats and grid.format != "E4M3":
        raise ExportError(f"its inputs are in {grid.format}, and compressed-tensors has E4M3")
    if floats and grid.granularity == "group" and columns % grid.group_size:
        raise ExportError(
            f"groups of {grid.group_size} inputs do not divide {columns}, and compressed-tensors has no smaller last one"
        )
    if not floats and grid.bits != 8:
        raise ExportError(
            f"its inputs have {grid.bits} bits; who reads compressed-tensors runs 8 and takes another scale for fewer"
        )
    if not floats and grid.clip_ratio != 1 and not grid.static:
        raise ExportError(
            f"the range of its inputs is clipped to {grid.clip_ratio} as they come, and compressed-tensors has no such field"
        )
    grouped = floats and grid.granularity == "group"
    return {
        "num_bits": 8,
        "type": "float" if floats else "int",
        "symmetric": floats or grid.symmetric,
        "group_size": grid.group_size if grouped else None,
        "strategy": grid.granularity,
        "block_structure": None,
        "dynamic": not grid.static,
        "actorder": None,
        "observer": "minmax" if grid.static else None,
        "observer_kwargs": {},
    }


def targets_of(group: Any) -> list[str]:
    """Which layers a group of ``config_groups`` is for."""
    if not isinstance(group, Mapping):
        raise CheckpointError("its config names a preset instead of a scheme; only full schemes are read")
    return field(group, "targets", list)


def rank(name: str, targets: Sequence[str]) -> int | None:
    """How well a layer fits a list of targets: 0 by name, 1 by pattern, 2 as a linear layer, ``None`` not at all."""
    ranks = []
    for target in targets:
        if target == name:
            ranks.append(0)
        elif str(target).startswith("re:"):
            try:
                ranks += [1] if re.match(target.removeprefix("re:"), name) else []
            except re.error as error:
                raise CheckpointError(f"the target {target!r} of its config is no pattern: {error}") from error
        elif target == nn.Linear.__name__:
            ranks.append(2)
    return min(ranks, default=None)


def scheme_of(group: Mapping[str, Any], overall: str) -> dict[str, Any]:
    """Format, grid of the weights and grid of the inputs of a group (CheckpointError where lqedu has none)."""
    form = field(group, "format", (str, type(None)), None) or overall
    if form not in FORMATS:
        raise CheckpointError(f"its format is {form!r}; {', '.join(FORMATS)} are read")
    if group.get("output_activations") is not None:
        raise CheckpointError("its layers quantize what they put out, which is not read")
    return {
        "format": form,
        "grid": weight_grid(field(group, "weights", dict)),
        "activation": activation_grid(field(group, "input_activations", (dict, type(None)), None)),
    }


def _strategy(args: Mapping[str, Any]) -> str:
    size = field(args, "group_size", (int, type(None)), None)
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    return field(args, "strategy", (str, type(None)), None) or default


def weight_grid(args: Mapping[str, Any]) -> IntGrid | Float8Grid:
    """The grid of ``weights``; an integer one gets its ``scale_dtype`` from the tensors."""
    bits, kind, strategy = field(args, "num_bits", int, 8), field(args, "type", str, "int"), _strategy(args)
    symmetric = field(args, "symmetric", bool, True)
    if args.get("actorder") in ("group", "dynamic", True):
        raise CheckpointError("its inputs are sorted into groups (actorder 'group'), which is not read; quantize again")
    if kind == "int" and strategy in ("tensor", "channel", "group") and 2 <= bits <= 8:
        return IntGrid(bits, symmetric, strategy, field(args, "group_size", int) if strategy == "group" else None)
    if kind == "float" and bits == 8 and symmetric and strategy in ("tensor", "channel", "block"):
        if strategy != "block":
            return Float8Grid(strategy)
        sides = field(args, "block_structure", list)
        if len(sides) == 2 and sides[0] == sides[1]:
            return Float8Grid("block", field({"block_structure": sides[0]}, "block_structure", int))
    raise CheckpointError(f"lqedu has no grid for weights of {bits} bits, type {kind!r}, strategy {strategy!r}")


def activation_grid(args: Mapping[str, Any] | None) -> ActivationGrid | Float8ActivationGrid | None:
    """The grid of ``input_activations``."""
    if args is None:
        return None
    bits, kind, strategy = field(args, "num_bits", int, 8), field(args, "type", str, "int"), _strategy(args)
    symmetric, dynamic = field(args, "symmetric", bool, True), field(args, "dynamic", (bool, str), False)
    fits = (
        bits == 8
        and isinstance(dynamic, bool)
        and strategy in (("token", "tensor", "group") if dynamic else ("tensor",))
    )
    if fits and kind == "int" and strategy != "group":
        return ActivationGrid(8, symmetric, strategy, static=not dynamic)
    if fits and kind == "float" and symmetric:
        size = field(args, "group_size", int) if strategy == "group" else 128
        return Float8ActivationGrid(strategy, static=not dynamic, group_size=size)
    how = "dynamic" if dynamic else "static"
    raise CheckpointError(f"lqedu has no {how} grid for inputs of {bits} bits, type {kind!r}, strategy {strategy!r}")
