"""A weight whose inputs are sorted by group, and the layer that sorts its input in the same way.

GPTQ with ``desc_act`` and no static groups rounds columns in the order of their activations and lets whichever come
next share a scale. Its file says which group each input belongs to (``g_idx``). Sorted by group, the weight is on an
ordinary grid:

    y = x W^T = x[order] W[:, order]^T

lqedu itself keeps groups where they are (chapter ``04-gptq``); such a weight comes from an import only. This is the
reference path, plain PyTorch on any device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lqedu.errors import GridError
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.stored import StoredWeight
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.linear import QuantLinear


@dataclass(frozen=True)
class PermutedLayout:
    """A frozen description of a weight with sorted inputs.

    Attributes:
        sorted: the grid of the sorted weight.
    """

    sorted: IntGrid

    def scale_shape(self, weight_shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scale."""
        return self.sorted.scale_shape(weight_shape)

    def nbytes(self, weight_shape: tuple[int, int]) -> int:
        """Bytes of the sorted weight and of the order, an int32 for each input."""
        return self.sorted.nbytes(weight_shape) + 4 * weight_shape[1]

    def bits_per_weight(self, weight_shape: tuple[int, int]) -> float:
        """Stored bits per weight, everything counted."""
        return 8 * self.nbytes(weight_shape) / (weight_shape[0] * weight_shape[1])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        return {"sorted": self.sorted.to_dict()}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "PermutedLayout":
        """Inverse of :meth:`to_dict` (GridError for unknown or missing fields)."""
        if set(d) != {"sorted"}:
            raise GridError(f"a permuted layout has the field sorted, got {sorted(d)}")
        return cls(IntGrid.from_dict(d["sorted"]))


@dataclass(frozen=True, eq=False)
class PermutedWeight(StoredWeight):
    """A quantized weight with sorted inputs.

    Attributes:
        sorted: ``W[:, order]``, ``[out, in]``.
        order: int32 ``[in]``: which input each column of ``sorted`` belongs to.

    Raises:
        GridError: an order of another shape or dtype.
    """

    sorted: QTensor
    order: Tensor

    def __post_init__(self) -> None:
        if tuple(self.order.shape) != (self.sorted.shape[1],) or self.order.dtype != torch.int32:
            raise GridError(
                f"the order of {self.sorted.shape[1]} inputs is int32, got {self.order.dtype} {list(self.order.shape)}"
            )

    @property
    def grid(self) -> PermutedLayout:
        """The layout."""
        return PermutedLayout(self.sorted.grid)

    @property
    def codes(self) -> Tensor:
        """Codes in the order of the inputs, ``[out, in]``."""
        return self._unsorted(self.sorted.codes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight in the order of the inputs, ``[out, in]``."""
        return self._unsorted(self.sorted.dequantize(dtype))

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors; :meth:`from_packed` is the inverse."""
        return self.sorted.packed() | {"order": self.order}

    @classmethod
    def from_packed(
        cls, tensors: dict[str, Tensor], layout: PermutedLayout, shape: tuple[int, int]
    ) -> "PermutedWeight":
        """Inverse of :meth:`packed`.

        Raises:
            GridError: tensors whose names, dtypes or shapes do not belong to this layout and shape.
        """
        if "order" not in tensors:
            raise GridError(f"a permuted weight has an order, got {', '.join(sorted(tensors))}")
        rest = {name: tensor for name, tensor in tensors.items() if name != "order"}
        return cls(QTensor.from_packed(rest, layout.sorted, shape), tensors["order"])

    @classmethod
    def empty(cls, layout: PermutedLayout, shape: tuple[int, int]) -> "PermutedWeight":
        """A weight of zeros: the frame that a checkpoint's tensors are loaded into."""
        return cls(QTensor.empty(layout.sorted, shape), torch.arange(shape[1], dtype=torch.int32))

    def _unsorted(self, x: Tensor) -> Tensor:
        return x[:, self.order.long().argsort()]


def check_order(tensors: Mapping[str, Tensor]) -> None:
    """Refuse an order that is no permutation (GridError): a layer would read some inputs twice and some never."""
    order = tensors["order"]
    if order.sort().values.tolist() != list(range(len(order))):
        raise GridError(f"order is not a permutation of {len(order)} inputs; import the model again")


class PermutedLinear(QuantLinear):
    """``y = x[order] W_sorted^T + bias``: packed codes, and one gather of the input.

    Buffers: those of :class:`QuantLinear`, and ``order``.
    """

    def __init__(
        self,
        weight: PermutedWeight,
        bias: Tensor | None = None,
        path: InputPath = InputPath(),  # noqa: B008  (frozen)
        static: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        if path.activation is not None:
            raise GridError("a permuted weight multiplies floating-point inputs; leave the activation grid out")
        super().__init__(weight, bias, path, static)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        weight = self.quantized
        z = self.path.transform(x)[..., weight.order.long()]
        return nn.functional.linear(z, weight.sorted.dequantize(x.dtype), self.bias)
