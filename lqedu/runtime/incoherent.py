"""A weight stored in a rotated basis, and the layer that rotates its input and output while it runs.

The codes of QuIP belong to ``W' = U W D V^T``. Undoing the transforms would give a dense weight and throw the packing
away; instead the layer computes ``y = U^T (Ŵ' (V D^-1 x))`` with ``Ŵ'`` as it is stored. Beside the product of
``out · in`` multiplications a token that costs ``in (p + q) + out (p' + q')`` for the two rotations.

Derived in chapter ``07-quip``. This is the reference path, plain PyTorch on any device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lqedu.errors import GridError
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.stored import StoredWeight
from lqedu.linalg.orthogonal import KroneckerRotation, order_dtype
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.linear import QuantLinear
from lqedu.transforms.incoherence import Incoherence

Factors = tuple[int, int]

#: Names of the tensors that may be stored beside the grid's own.
TRANSFORMS = ("u_left", "u_right", "u_order", "v_left", "v_right", "v_order", "channel_scale")


@dataclass(frozen=True)
class IncoherentLayout:
    """A frozen description of a stored incoherent weight; what the shapes of its tensors follow from.

    Attributes:
        grid: the grid of the rotated weight.
        out_factors: sizes of the two factors of U, ``None`` for no rotation.
        in_factors: of V.
        rescaled: whether a channel scale D is stored.
    """

    grid: IntGrid
    out_factors: Factors | None
    in_factors: Factors | None
    rescaled: bool

    def shapes(self, weight_shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor stored beside the grid's own, for a weight ``[out, in]``.

        Raises:
            GridError: factors that do not multiply to the weight's sizes.
        """
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for side, factors, size in zip(("u", "v"), (self.out_factors, self.in_factors), weight_shape, strict=True):
            if factors is None:
                continue
            p, q = factors
            if p * q != size:
                raise GridError(f"rotation factors {p} and {q} do not make the {size} of a weight {list(weight_shape)}")
            tensors |= {f"{side}_left": ((p, p), torch.float32), f"{side}_right": ((q, q), torch.float32)}
            tensors[f"{side}_order"] = ((size,), order_dtype(size))
        return tensors | ({"channel_scale": ((weight_shape[1],), torch.float16)} if self.rescaled else {})

    def scale_shape(self, weight_shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scale of the rotated weight."""
        return self.grid.scale_shape(weight_shape)

    def nbytes(self, weight_shape: tuple[int, int]) -> int:
        """Bytes of every stored tensor: codes, scales, zero points, factors, permutations and channel scale."""
        beside = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.shapes(weight_shape).values())
        return self.grid.nbytes(weight_shape) + beside

    def bits_per_weight(self, weight_shape: tuple[int, int]) -> float:
        """Stored bits per weight, everything counted.

        >>> grid = IntGrid(2, granularity="tensor")
        >>> IncoherentLayout(grid, (64, 64), (64, 64), True).bits_per_weight((4096, 4096))
        2.0429...
        """
        return 8 * self.nbytes(weight_shape) / (weight_shape[0] * weight_shape[1])

    def macs(self, weight_shape: tuple[int, int]) -> int:
        """Multiplications and additions a token of the two rotations; the product itself takes ``out · in``."""
        pairs = zip((self.out_factors, self.in_factors), weight_shape, strict=True)
        return sum(size * sum(factors) for factors, size in pairs if factors is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        factors = {"out_factors": self.out_factors, "in_factors": self.in_factors}
        lists = {name: None if pair is None else list(pair) for name, pair in factors.items()}
        return {"grid": self.grid.to_dict(), **lists, "rescaled": self.rescaled}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "IncoherentLayout":
        """Inverse of :meth:`to_dict`.

        Raises:
            GridError: unknown or missing fields, or factors that are not pairs of sizes.
        """
        if set(d) != {"grid", "out_factors", "in_factors", "rescaled"}:
            raise GridError(
                f"an incoherent layout has the fields grid, in_factors, out_factors and rescaled, got {sorted(d)}"
            )
        return cls(IntGrid.from_dict(d["grid"]), _pair(d["out_factors"]), _pair(d["in_factors"]), bool(d["rescaled"]))


@dataclass(frozen=True, eq=False)
class IncoherentWeight(StoredWeight):
    """A quantized weight in a rotated basis, and the transforms that lead there.

    Attributes:
        rotated: the codes of ``Ŵ'``, ``[out, in]``.
        transforms: U, V and D.
    """

    rotated: QTensor
    transforms: Incoherence

    @property
    def codes(self) -> Tensor:
        """Of the rotated weight, ``[out, in]``."""
        return self.rotated.codes

    @property
    def grid(self) -> IncoherentLayout:
        """The layout: the grid of the rotated weight and the sizes of the transforms."""
        t = self.transforms
        sizes = [None if r is None else (len(r.left), len(r.right)) for r in (t.u, t.v)]
        return IncoherentLayout(self.rotated.grid, *sizes, t.channel_scale is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``U^T Ŵ' V D^-1`` of the original basis, ``[out, in]``."""
        working = torch.float64 if dtype == torch.float64 else torch.float32
        return self.transforms.undo(self.rotated.dequantize(working)).to(dtype)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors, by name; :meth:`from_packed` is the inverse."""
        tensors = self.rotated.packed()
        for side, rotation in (("u", self.transforms.u), ("v", self.transforms.v)):
            if rotation is not None:
                parts = (rotation.left, rotation.right, rotation.order)
                tensors |= {f"{side}_{name}": t for name, t in zip(("left", "right", "order"), parts, strict=True)}
        scale = self.transforms.channel_scale
        return tensors if scale is None else tensors | {"channel_scale": scale}

    @classmethod
    def from_packed(
        cls, tensors: dict[str, Tensor], layout: IncoherentLayout, shape: tuple[int, int]
    ) -> "IncoherentWeight":
        """Inverse of :meth:`packed`.

        Raises:
            GridError: tensors whose names, shapes or dtypes do not belong to this layout and shape.
        """
        want = layout.shapes(shape)
        for name, (size, dtype) in want.items():
            if name not in tensors or tuple(tensors[name].shape) != size or tensors[name].dtype != dtype:
                got = "none" if name not in tensors else f"{list(tensors[name].shape)} {tensors[name].dtype}"
                raise GridError(f"an incoherent weight {list(shape)} needs {name} {list(size)} {dtype}, got {got}")
        rest = {name: tensor for name, tensor in tensors.items() if name not in want}
        u, v = (
            KroneckerRotation(*(tensors[f"{side}_{part}"] for part in ("left", "right", "order")))
            if f"{side}_left" in want
            else None
            for side in ("u", "v")
        )
        transforms = Incoherence(u, v, tensors.get("channel_scale"))
        return cls(QTensor.from_packed(rest, layout.grid, shape), transforms)

    @classmethod
    def empty(cls, layout: IncoherentLayout, shape: tuple[int, int]) -> "IncoherentWeight":
        """A weight of zeros: the frame that a checkpoint's tensors are loaded into."""
        beside = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in layout.shapes(shape).items()}
        return cls.from_packed(QTensor.empty(layout.grid, shape).packed() | beside, layout, shape)


def check_orders(tensors: Mapping[str, Tensor]) -> None:
    """Refuse a stored order of features that is no permutation (GridError): a layer would read some twice and some never.

    Args:
        tensors: the packed tensors of an incoherent weight, by name.
    """
    for name in ("u_order", "v_order"):
        order = tensors.get(name)
        if order is not None and order.sort().values.tolist() != list(range(len(order))):
            raise GridError(f"{name} is not a permutation of {len(order)} features; quantize the model again")


class IncoherentLinear(QuantLinear):
    """``y = U^T (Ŵ' (V D^-1 x)) + bias``: packed codes, and transforms that run with every token.

    Buffers: those of :class:`QuantLinear` for ``Ŵ'``, and what :meth:`IncoherentLayout.shapes` lists.
    """

    def __init__(
        self,
        weight: IncoherentWeight,
        bias: Tensor | None = None,
        path: InputPath = InputPath(),  # noqa: B008  (frozen)
        static: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        if path.activation is not None:
            raise GridError("an incoherent weight multiplies floating-point inputs; leave the activation grid out")
        super().__init__(weight, bias, path, static)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        weight = self.quantized
        z = weight.transforms.input(self.path.transform(x))
        y = weight.transforms.output(nn.functional.linear(z, weight.rotated.dequantize(x.dtype)))
        return y if self.bias is None else y + self.bias.to(x.dtype)


def _pair(value: Any) -> Factors | None:
    if value is None:
        return None
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)):
        raise GridError(f"rotation factors are two positive sizes, got {value!r}")
    return tuple(value)
