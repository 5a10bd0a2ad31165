"""What a linear layer does to its input before the product: an online Hadamard transform, then quantization.

A transform that no earlier layer can absorb (the input of ``down_proj`` comes out of an element-wise product) is applied
while the model runs; the weight behind it was multiplied by the transform's inverse, so the layer's function is
unchanged until something is rounded. Chapters ``08-smoothquant`` (quantized inputs) and ``10-quarot`` (transforms).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lqedu.errors import GridError
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid
from lqedu.linalg.hadamard import fast_hadamard
from lqedu.options import check_count


@dataclass(frozen=True)
class InputPath:
    """A frozen description of what happens to ``x [..., in]`` before the product.

    Attributes:
        hadamard: length of the online transform, a divisor of ``in``; ``None`` for none.
        stride: features between two neighbours in a transform. 1 transforms runs of ``hadamard`` consecutive features;
            the head size with ``hadamard`` = number of heads transforms across heads.
        activation: the grid of the codes that enter the product; ``None`` leaves the input in floating point.

    Raises:
        GridError: a length or stride that is no whole number of at least 1.
    """

    hadamard: int | None = None
    stride: int = 1
    activation: ActivationGrid | Float8ActivationGrid | None = None

    def __post_init__(self) -> None:
        if self.hadamard is not None:
            check_count("hadamard", self.hadamard, least=1, error=GridError)
        check_count("stride", self.stride, least=1, error=GridError)

    def transform(self, x: Tensor) -> Tensor:
        """The orthonormal Hadamard transform of ``x`` along its last axis, or ``x`` itself.

        Raises:
            GridError: features that the transform does not divide.
        """
        if self.hadamard is None:
            return x
        if x.shape[-1] % (self.hadamard * self.stride):
            raise GridError(
                f"a transform of {self.hadamard} features, {self.stride} apart, does not divide {x.shape[-1]} features"
            )
        spread = x.unflatten(-1, (-1, self.hadamard, self.stride)).transpose(-1, -2)
        return fast_hadamard(spread).transpose(-1, -2).reshape(x.shape)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        activation = None if self.activation is None else self.activation.to_dict()
        return {"hadamard": self.hadamard, "stride": self.stride, "activation": activation}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "InputPath":
        """Inverse of :meth:`to_dict`.

        Raises:
            GridError: unknown or missing fields.
        """
        if set(d) != {"hadamard", "stride", "activation"}:
            raise GridError(f"an input path has the fields activation, hadamard and stride, got {sorted(d)}")
        grid = d["activation"]
        if grid is not None:
            # grids of integers carry no kind: they were there first
            grid = (Float8ActivationGrid if "kind" in grid else ActivationGrid).from_dict(grid)
        return cls(d["hadamard"], d["stride"], grid)


class TransformedLinear(nn.Linear):
    """A dense linear layer with an online transform of its input: the same function as the layer it was made of.

    Its ``weight`` is in the transformed basis; rounding it there is what the transform is for.
    """

    def __init__(self, linear: nn.Linear, path: InputPath) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.path = linear.in_features, linear.out_features, path
        # x w^T = (x H^T)(w H^T)^T: the rows of w are transformed as the tokens are
        weight = path.transform(linear.weight.detach().to(torch.float64)).to(linear.weight.dtype)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.path.transform(x), self.weight, self.bias)


def input_path(linear: nn.Module) -> InputPath:
    """The path of a dense linear layer: its online transform, or none."""
    return linear.path if isinstance(linear, TransformedLinear) else InputPath()
