"""Kinds of stored weights: what describes one in JSON, what holds its tensors, and what runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.fp8 import Float8Grid, Float8Tensor, check_scales
from lqedu.formats.progressive import ProgressiveGrid, ProgressiveTensor
from lqedu.formats.requantized import RequantizedGrid, RequantizedTensor
from lqedu.runtime.float8 import Float8Linear
from lqedu.runtime.incoherent import IncoherentLayout, IncoherentLinear, IncoherentWeight, check_orders
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.linear import QuantLinear
from lqedu.runtime.permuted import PermutedLayout, PermutedLinear, PermutedWeight, check_order
from lqedu.runtime.two_level import TwoLevelLinear


@dataclass(frozen=True)
class Kind:
    """Three classes that belong together.

    Attributes:
        grid: a frozen description with ``to_dict``, ``from_dict`` and ``nbytes``.
        weight: its tensors, with ``packed``, ``from_packed`` and ``empty``.
        layer: the linear layer that keeps them.
        check: refuses (GridError) tensors of the right shapes and dtypes whose values make no weight, where there are any.
    """

    grid: type
    weight: type
    layer: type[QuantLinear]
    check: Callable[[Mapping[str, Tensor]], None] = lambda tensors: None


KINDS: dict[str, Kind] = {
    "integer": Kind(IntGrid, QTensor, QuantLinear),
    "incoherent": Kind(IncoherentLayout, IncoherentWeight, IncoherentLinear, check_orders),
    "progressive": Kind(ProgressiveGrid, ProgressiveTensor, TwoLevelLinear),
    "requantized": Kind(RequantizedGrid, RequantizedTensor, TwoLevelLinear),
    "permuted": Kind(PermutedLayout, PermutedWeight, PermutedLinear, check_order),
    "float8": Kind(Float8Grid, Float8Tensor, Float8Linear, check_scales),
}


def layer_of(
    weight: Any,
    bias: Tensor | None,
    path: InputPath = InputPath(),  # noqa: B008  (frozen)
    static: tuple[Tensor, Tensor | None] | None = None,
) -> QuantLinear:
    """The linear layer that runs a stored weight behind an input path; arguments as :class:`QuantLinear` takes them."""
    return KINDS[_name(weight.grid)].layer(weight, bias, path, static)


def describe(weight: Any) -> dict[str, Any]:
    """All of a stored weight but its tensors, as JSON can store it; inverse: :func:`rebuild`."""
    return {"kind": _name(weight.grid), "grid": weight.grid.to_dict(), "shape": list(weight.shape)}


def rebuild(description: dict[str, Any], tensors: dict[str, Tensor] | None) -> Any:
    """A stored weight from :func:`describe` and its packed tensors, or a frame of zeros where these are ``None``.

    Raises:
        GridError: a kind that is not known, or tensors that do not fit the description.
    """
    if description.get("kind") not in KINDS:
        raise GridError(f"unknown kind of weight {description.get('kind')!r}; known: {', '.join(KINDS)}")
    kind = KINDS[description["kind"]]
    grid, shape = kind.grid.from_dict(description["grid"]), tuple(description["shape"])
    if tensors is None:
        return kind.weight.empty(grid, shape)
    weight = kind.weight.from_packed(tensors, grid, shape)
    kind.check(tensors)
    return weight


def check_layer(layer: QuantLinear) -> None:
    """Refuse (GridError) the values that were loaded into a layer, see :class:`Kind`; the layer's frame had the shapes."""
    KINDS[_name(layer.grid)].check(dict(layer.named_buffers(recurse=False)))


def _name(grid: Any) -> str:
    return next(name for name, kind in KINDS.items() if type(grid) is kind.grid)
