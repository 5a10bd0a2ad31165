"""Models on kernels: each quantized linear keeps its weight in the layout of the kernel that multiplies it; ``21-serving``.

    fast = lqedu.runtime.to_kernels(qmodel.cuda())       # fast.generate(...) as ever; fast.lqedu_kernels tells what runs where

On a GPU the products are those of ``lqedu_kernels``, elsewhere their references in PyTorch. Layers that no kernel reads
(3-bit codes, QuIP's rotated weights) keep their own module, and the model says so.
"""

from collections import Counter

import torch
from torch import Tensor, nn

from lqedu.errors import GridError, UsageError
from lqedu.formats.activation import ActivationGrid
from lqedu.models.copying import copy_sharing_tensors
from lqedu.runtime.backend import KernelWeight, check_inputs_grid, kernel_product, kernel_weight
from lqedu.runtime.codes import transform_and_encode
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.linear import QuantLinear, quantized_linears

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PackedLinear(nn.Module):
    """``y = x ŵ^T + bias`` by a kernel; the same function as the :class:`QuantLinear` it was made of.

    Buffers: the tensors of the :class:`KernelWeight` by their names, and ``input_scale`` and ``input_zero`` of a static grid.
    They move with the model and keep their dtypes.

    Attributes:
        path: what happens to ``x`` first.
        operation: the family of kernels.
    """

    def __init__(
        self,
        weight: KernelWeight,
        bias: Tensor | None = None,
        path: InputPath = InputPath(),  # noqa: B008  (frozen)
        static: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.operation, self.options, self.path = weight.operation, weight.options, path
        self._stored = tuple(weight.tensors)
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, tensor)
        if static is not None:
            self.register_buffer("input_scale", static[0])
            self.register_buffer("input_zero", static[1])
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def kernel_weight(self) -> KernelWeight:
        """The weight as its kernel takes it."""
        tensors = {name: self._buffers[name] for name in self._stored}
        return KernelWeight(self.operation, tensors, self.options, (self.out_features, self.in_features))

    @property
    def static(self) -> tuple[Tensor, Tensor | None] | None:
        """Scale and zero point of a static grid of the inputs."""
        return (self.input_scale, self.input_zero) if "input_scale" in self._buffers else None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight: codes, scales, zero points, sums of rows."""
        return self.kernel_weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        weight, flat = self.kernel_weight, x.reshape(-1, self.in_features)
        with torch.cuda.device_of(x):
            inputs = transform_and_encode(flat, self.path, self.static, sums="zero" in weight.tensors)
            y = kernel_product(inputs, weight, x.dtype, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        path = "" if self.path == InputPath() else f", path={self.path}"
        return f"in_features={self.in_features}, out_features={self.out_features}, operation={self.operation}{path}"

    def _apply(self, fn, recurse: bool = True):
        """Move with the model, but keep the stored bits, see :class:`QuantLinear`."""
        stored = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor.to(self.get_buffer(name).device))
        return self


def to_kernels(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    """A quantized model whose linears run on kernels.

    Args:
        model: from :func:`lqedu.quantize` or :func:`lqedu.load_model`, on any device; not changed.
        dtype: of activations, norms, embeddings, head and biases: float16 or bfloat16, which kernels read; float32 for the
            references on the CPU.

    Returns:
        A new model for everything that transformers does with one, ``generate`` too; it cannot be saved. Its attribute
        ``lqedu_kernels`` says for each quantized linear which kernels run it ("w4a16", ...), or "reference: why none
        does"; a sentence of ``lqedu_notes`` counts those.

    Raises:
        UsageError: a model without quantized linears, or another dtype.
        MissingDependencyError: Triton is not installed, where the layouts are defined.
    """
    if dtype not in DTYPES:
        raise UsageError(f"kernels compute in float16 or bfloat16, their references in float32 too, got {dtype!r}")
    if hasattr(model, "lqedu_kernels"):
        raise UsageError("the model runs on kernels already; call to_kernels with the one that it was made from")
    if not isinstance(model, nn.Module) or not (layers := quantized_linears(model)):
        raise UsageError(
            "the model has no quantized linear layers; quantize it first, or load one that is: lqedu.load_model"
        )
    result = copy_sharing_tensors(model)
    plan: dict[str, str] = {}
    for name, layer in layers.items():
        try:
            result.set_submodule(name, pack_layer(layer))
            plan[name] = result.get_submodule(name).operation
        except GridError as error:
            plan[name] = f"reference: {error}"
    _cast(result, dtype)
    result.lqedu_kernels = plan
    kept = Counter(entry for entry in plan.values() if entry.startswith("reference: "))
    notes = (f"{count} of {len(plan)} linears run as their {entry}" for entry, count in kept.items())
    result.lqedu_notes = (*getattr(model, "lqedu_notes", ()), *notes)
    return result


def pack_layer(layer: QuantLinear) -> PackedLinear:
    """One quantized linear on its kernel.

    Raises:
        GridError: no kernel runs this weight with these inputs; the sentence says which ones do.
    """
    grid = layer.path.activation
    integer = isinstance(grid, ActivationGrid)
    weight = kernel_weight(layer.quantized, integer_inputs=integer, zero_points=integer and not grid.symmetric)
    if weight.operation != "w4a16":
        check_inputs_grid(weight, grid)
    static = (layer.input_scale, layer.input_zero) if grid is not None and grid.static else None
    return PackedLinear(weight, layer.bias, layer.path, static)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a copy floating-point parameters of another dtype; tensors that it shares stay, and so do tied parameters."""
    cast: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                new = cast.setdefault(id(parameter), nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
                module._parameters[name] = new
    model.config.dtype = dtype
