"""A linear layer that keeps its packed codes: what a quantized model holds instead of ``nn.Linear``.

Derived in chapter ``02-grids``. This is the reference path, plain PyTorch on any device: unpack, dequantize, multiply.
"""

import torch
from torch import Tensor, nn

from lqedu.errors import GridError
from lqedu.formats import QTensor
from lqedu.formats.activation import ActivationGrid
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.integer import integer_linear


class QuantLinear(nn.Module):
    """``y = x ŵ^T + bias`` with ``ŵ`` stored as packed codes, scales and zero points.

    ``path`` says what happens to ``x`` first: with an activation grid both operands are codes and the product is one of
    integers. ``static`` is that grid's scale and zero point where they come from calibration (buffers ``input_scale``
    and ``input_zero``, float32 ``[1]``).

    Buffers: ``codes`` uint8 ``[out, packed_width(in, bits)]``, ``scale`` ``grid.scale_shape``, and for an asymmetric
    grid ``zero``: uint8, packed along the groups, or float zero points as they are. ``bias`` stays as it was.

    Raises:
        GridError: a grid of the inputs whose codes do not multiply with this weight's.
    """

    _activation_type: type = ActivationGrid

    def __init__(
        self,
        quantized: QTensor,
        bias: Tensor | None = None,
        path: InputPath = InputPath(),  # noqa: B008  (frozen)
        static: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(path.activation, self._activation_type | None):
            raise GridError(
                f"{type(quantized).__name__} is multiplied with inputs on a grid of the kind "
                f"{self._activation_type.__name__}, got {path.activation!r}"
            )
        self.path = path
        self.grid = quantized.grid
        self.out_features, self.in_features = quantized.shape
        packed = quantized.packed()
        self._stored, self._weight_type = tuple(packed), type(quantized)
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)
        if path.activation is not None and path.activation.static:
            scale, zero = static if static is not None else path.activation.fit(torch.zeros(1))
            self.register_buffer("input_scale", scale)
            self.register_buffer("input_zero", zero)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def quantized(self) -> QTensor:
        """The weight, unpacked."""
        packed = {name: self.get_buffer(name) for name in self._stored}
        return self._weight_type.from_packed(packed, self.grid, (self.out_features, self.in_features))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight: codes, scales and zero points."""
        return self.grid.nbytes((self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]`` in the dtype of ``x``: a floating product, or one of integer codes."""
        z = self.path.transform(x)
        grid = self.path.activation
        if grid is None:
            return nn.functional.linear(z, self.quantized.dequantize(x.dtype), self.bias)
        scale, zero = (self.input_scale, self.input_zero) if grid.static else grid.fit(z)
        y = self.product(grid.encode(z, scale, zero), scale, zero).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def product(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """``x w^T`` in float32 from the codes of both, see :func:`lqedu.runtime.integer.integer_linear`."""
        return integer_linear(codes, scale, zero, self.quantized)

    def extra_repr(self) -> str:
        path = "" if self.path == InputPath() else f", path={self.path}"
        return f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid}{path}"

    def _apply(self, fn, recurse: bool = True):
        """Move with the model, but keep the stored bits: ``model.bfloat16()`` must not re-round the scales."""
        stored = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor.to(self.get_buffer(name).device))
        return self


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of a model by their dotted names, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
