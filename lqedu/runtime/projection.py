"""Products of a decoder layer, each with the step before it: norm, SiLU or transform, and quantization in one launch.

Linears that read the same tensor are one product: their weights are joined along the outputs (q, k and v; gate and up), so
that a layer has four products, and activations become codes once for each. Chapter ``21-serving``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lqedu.errors import GridError
from lqedu.models.copying import copy_sharing_tensors
from lqedu.runtime import backend
from lqedu.runtime.backend import KernelWeight, kernel_function, kernel_product, kernels
from lqedu.runtime.codes import Inputs, token_grid, transform_and_encode
from lqedu.runtime.inputs import InputPath, input_path
from lqedu.runtime.linear import QuantLinear
from lqedu.runtime.packed import PackedLinear, pack_layer

Static = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Part:
    """One linear, or several that were joined.

    Attributes:
        weight: in a kernel's layout, dense ``[out, in]``, or a quantized layer that no kernel runs.
        bias: ``[out]`` or ``None``.
        path: what happens to the activations first.
        static: scale and zero point of a static grid.
    """

    weight: KernelWeight | Tensor | QuantLinear
    bias: Tensor | None = None
    path: InputPath = InputPath()  # noqa: RUF009  (frozen)
    static: Static | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of weight and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.weight.nbytes + bias

    @property
    def sums(self) -> bool:
        """Whether the product needs the sums of each token's codes."""
        return isinstance(self.weight, KernelWeight) and "zero" in self.weight.tensors

    def product(self, inputs: Tensor | Inputs, dtype: torch.dtype) -> Tensor:
        """``[tokens, out]``."""
        if isinstance(self.weight, KernelWeight):
            return kernel_product(inputs, self.weight, dtype, self.bias)
        if isinstance(self.weight, Tensor):
            return nn.functional.linear(inputs, self.weight, self.bias)
        return self.weight(inputs)


class Projection:
    """Linears with one input, as few products as their weights allow.

    Args:
        parts: in the order of their outputs.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = _joined(parts)
        self._same = all(_same_inputs(self.parts[0], part) for part in self.parts[1:])
        self._sums = any(part.sums for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes that a call reads of weights and biases."""
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, in]`` to ``[tokens, outputs of all]``."""
        if self._same:
            first = self.parts[0]
            return self._products(transform_and_encode(x, first.path, first.static, sums=self._sums), x.dtype)
        return torch.cat(
            [p.product(transform_and_encode(x, p.path, p.static, sums=p.sums), x.dtype) for p in self.parts], 1
        )

    def after_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The products of RMSNorm of ``x + residual``, and that sum.

        Args:
            x: ``[tokens, in]``.
            weight, eps: of the norm.
            residual: as x, or ``None``.
        """
        grid = self._fused_grid(x)
        if grid is None:
            h, hidden = norm(x, weight, eps, residual)
            return self(h), hidden
        out = kernels("quantize").rmsnorm_quantize(x, weight, grid, eps=eps, residual=residual, sums=self._sums)
        return self._products(Inputs(*out[:4]), x.dtype), x if residual is None else out.hidden

    def after_silu(self, gate: Tensor, up: Tensor) -> Tensor:
        """The products of ``silu(gate) · up``; both ``[tokens, in]``, rows may be apart."""
        grid = self._fused_grid(gate)
        if grid is None:
            return self(kernel_function("steps16", "silu_mul", "silu_reference", gate)(gate, up))
        return self._products(
            Inputs(*kernels("quantize").silu_quantize(gate, up, grid, sums=self._sums)[:4]), gate.dtype
        )

    def _products(self, inputs: Tensor | Inputs, dtype: torch.dtype) -> Tensor:
        outputs = [part.product(inputs, dtype) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _fused_grid(self, x: Tensor) -> object | None:
        """The grid of codes that a kernel makes behind the step before; ``None`` where that step ends in 16 bits."""
        path = self.parts[0].path
        fused = backend.runs_kernels(x) and self._same and path.hadamard is None
        return token_grid(path.activation) if fused else None


def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``x + residual``, and that sum."""
    return kernel_function("steps16", "rmsnorm", "rmsnorm_reference", x)(x, weight, eps, residual)


def part_of(linear: nn.Module, dtype: torch.dtype) -> Part:
    """A linear of a model, dense or quantized, as a part; dense weights and biases in ``dtype``.

    Raises:
        GridError: inputs that share a scale with all tokens of a call: what a text gets would depend on the others.
    """
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    if isinstance(linear, QuantLinear):
        try:
            linear = pack_layer(linear)
        except GridError:
            if linear.path.activation is not None:
                _refuse_shared(linear.path)
            return Part(_in_dtype(linear, dtype))
    if isinstance(linear, PackedLinear):
        _refuse_shared(linear.path)
        return Part(linear.kernel_weight, bias, linear.path, linear.static)
    return Part(linear.weight.detach().to(dtype), bias, input_path(linear))


def _in_dtype(linear: QuantLinear, dtype: torch.dtype) -> QuantLinear:
    """A copy around the same codes with its bias in the dtype of activations."""
    copy = copy_sharing_tensors(linear)
    if copy.bias is not None:
        copy.bias = nn.Parameter(copy.bias.to(dtype), requires_grad=False)
    return copy


def _refuse_shared(path: InputPath) -> None:
    grid = path.activation
    if grid is not None and grid.granularity == "tensor" and not grid.static:
        raise GridError(
            "activations of all tokens of a call share a scale, so that a text's tokens would depend on the texts beside it; "
            "use activation='token' or 'static', or generate of transformers"
        )


def _same_inputs(a: Part, b: Part) -> bool:
    """Whether both read the same codes (a layer that no kernel runs makes its own)."""
    if isinstance(a.weight, QuantLinear) or isinstance(b.weight, QuantLinear):
        return isinstance(a.weight, QuantLinear) and isinstance(b.weight, QuantLinear)
    if a.path != b.path or (a.static is None) != (b.static is None):
        return False
    pairs = zip(a.static or (), b.static or (), strict=True)
    return all((x is None and y is None) or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbours that one product can serve, joined."""
    done = [parts[0]]
    for part in parts[1:]:
        weight = _join(done[-1], part)
        if weight is None:
            done.append(part)
        else:
            done[-1] = replace(done[-1], weight=weight, bias=_join_biases(done[-1], part))
    return done


def _join(a: Part, b: Part) -> KernelWeight | Tensor | None:
    if not _same_inputs(a, b) or type(a.weight) is not type(b.weight):
        return None
    if isinstance(a.weight, Tensor):
        return torch.cat((a.weight, b.weight))
    return join_weights(a.weight, b.weight) if isinstance(a.weight, KernelWeight) else None


def join_weights(a: KernelWeight, b: KernelWeight) -> KernelWeight | None:
    """The outputs of ``a``, then those of ``b``, as one weight; ``None`` where no kernel reads both as one.

    Two weights that differ in format, or whose FP8 blocks would not start at multiples of 128 outputs, stay two.
    """
    kinds = [{name: t.dtype for name, t in w.tensors.items()} for w in (a, b)]
    if a.operation != b.operation or a.options != b.options or kinds[0] != kinds[1] or a.shape[1] != b.shape[1]:
        return None
    joined = {}
    for name in a.tensors:
        x, y = a.tensors[name], b.tensors[name]
        if name in ("scale", "zero", "groups") and x.dim() == 2:  # [groups, outputs]; W4A8 fills outputs up to 8
            x, y = x[:, : a.shape[0]], y[:, : b.shape[0]]
            z = torch.cat((x, y), 1)
            joined[name] = nn.functional.pad(z, (0, -z.shape[1] % 8 if name == "groups" else 0)).contiguous()
        elif name == "w_scale":
            of_blocks = [scale.shape[0] not in (1, w.shape[0]) or scale.shape[1] > 1 for scale, w in ((x, a), (y, b))]
            if any(of_blocks):
                if not all(of_blocks) or a.shape[0] % 128:
                    return None
                joined[name] = torch.cat((x, y))
            else:  # one scale for a tensor becomes one for each of its rows
                joined[name] = torch.cat((x.expand(a.shape[0], 1), y.expand(b.shape[0], 1)))
        else:
            joined[name] = torch.cat((x, y))
    return KernelWeight(a.operation, joined, a.options, (a.shape[0] + b.shape[0], a.shape[1]))


def _join_biases(a: Part, b: Part) -> Tensor | None:
    if a.bias is None and b.bias is None:
        return None
    dtype = (a.bias if b.bias is None else b.bias).dtype
    device = (a.bias if b.bias is None else b.bias).device
    rows = [p.weight.shape[0] for p in (a, b)]
    filled = [
        torch.zeros(n, dtype=dtype, device=device) if p.bias is None else p.bias
        for p, n in zip((a, b), rows, strict=True)
    ]
    return torch.cat(filled)
