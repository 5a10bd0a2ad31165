"""A linear layer trained in 8-bit floats, simulated exactly on any device.

Values are rounded to the formats and multiplied in float32, in which every product of two such values is exact; sums
are float32, as in a tensor core that accumulates in full precision. Weights and optimizer stay float32 ("master
weights"). Derived in chapter ``17-fp8-training``; Micikevicius et al., 2022, arXiv:2209.05433.
"""

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lqedu.errors import UsageError
from lqedu.training.scaling import SCALINGS, Recipe, fp8_round


class _Products(torch.autograd.Function):
    """``y = x w^T`` and its two gradients, each a product of two rounded operands with the scales of those."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, layer: "Fp8Linear") -> Tensor:
        q_x, s_x = layer.rounded("input", x)
        q_w, s_w = layer.rounded("weight", w)
        ctx.save_for_backward(q_x, s_x, q_w, s_w)
        ctx.layer = layer
        return (q_x @ q_w.T) * (s_x * s_w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        q_x, s_x, q_w, s_w = ctx.saved_tensors
        q_g, s_g = ctx.layer.rounded("gradient", g)
        needs_x, needs_w, _ = ctx.needs_input_grad
        dx = (q_g @ q_w) * (s_g * s_w) if needs_x else None
        dw = (q_g.flatten(0, -2).T @ q_x.flatten(0, -2)) * (s_g * s_x) if needs_w else None
        return dx, dw, None


class Fp8Linear(nn.Linear):
    """``y = x w^T + bias`` whose three products multiply 8-bit floats; the bias and its gradient are not rounded.

    ``weight`` and ``bias`` are the float32 parameters of the layer that it replaces, under the same names. Scales are the
    submodules ``scales.input``, ``scales.weight`` and ``scales.gradient``; delayed ones have buffers, so that a
    checkpoint resumes with its history. ``half``, ``bfloat16`` and ``to(dtype)`` leave all of them float32.
    """

    def __init__(self, linear: nn.Linear, recipe: Recipe, name: str = "a linear layer") -> None:
        """
        Args:
            linear: the layer to replace; its parameters are used, not copied.
            recipe: formats and scaling.
            name: what errors call the layer.

        Raises:
            UsageError: ``linear`` is no plain float32 layer.
        """
        if type(linear) is not nn.Linear:
            raise UsageError(f"{name} is of type {type(linear).__name__}; only plain nn.Linear layers are replaced")
        if linear.weight.dtype != torch.float32:
            raise UsageError(f"{name} has {linear.weight.dtype} weights; master weights are float32, use model.float()")
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.recipe, self.name = recipe, name
        formats = {"input": recipe.forward, "weight": recipe.forward, "gradient": recipe.gradient}
        self.scales = nn.ModuleDict({role: SCALINGS[recipe.scaling](fmt, recipe) for role, fmt in formats.items()})
        self.scales.to(linear.weight.device)
        self.formats = formats
        self.train(linear.training)

    def rounded(self, role: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor on the grid of its role ("input", "weight" or "gradient"), and its scale.

        Raises:
            UsageError: current scaling met NaN or infinities, or a loaded scale is not positive and finite.
        """
        try:
            s = self.scales[role](x)
            return fp8_round(x, s, self.formats[role]), s
        except UsageError as error:
            raise UsageError(f"the {role} of {self.name}: {error}") from error

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        y = _Products.apply(x.float(), self.weight, self).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp8Linear":
        """Move with the model, but stay float32: in float16 an amax of 1e5 is infinite and one of 1e-9 is zero."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """Formats and scaling, for ``print(model)``."""
        r = self.recipe
        return f"{super().extra_repr()}, {r.forward.name} x {r.gradient.name}, {r.scaling} scaling"


def convert(model: nn.Module, recipe: Recipe, *, skip: Collection[str] = ("lm_head",)) -> nn.Module:
    """A copy of a model whose linear layers train in 8-bit floats.

    Args:
        model: any module with float32 ``nn.Linear`` layers; it is not changed.
        recipe: formats and scaling.
        skip: last names of layers that stay as they are. Like embeddings and norms, the output layer usually does.

    Returns:
        The copy. A layer that the model holds under several names is one converted layer under all of them.

    Raises:
        UsageError: no layer to convert, one that is converted already, or one whose weights are not float32; a name in
            ``skip``, other than the default, that no linear layer has.
    """
    if isinstance(skip, str) or not isinstance(skip, Collection):
        raise UsageError(f"skip is a collection of last names such as ('lm_head',), got {skip!r}")
    if isinstance(model, nn.Linear):
        raise UsageError("convert replaces layers inside a model; for one layer use Fp8Linear(layer, recipe)")
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        raise UsageError("the model is converted already; convert the float32 model that it was made from")
    result = copy.deepcopy(model)
    every = result.named_modules(remove_duplicate=False)
    linears = [(name, name.rsplit(".", 1)[-1], module) for name, module in every if isinstance(module, nn.Linear)]
    unknown = set(skip) - {last for _, last, _ in linears} - {"lm_head"}
    if unknown:
        raise UsageError(f"skip names no linear layer of the model: {', '.join(sorted(map(repr, unknown)))}")
    found = [(name, module) for name, last, module in linears if last not in skip]
    if not found:
        raise UsageError(f"the model has no linear layer to convert besides those to skip ({', '.join(skip)})")
    converted: dict[int, Fp8Linear] = {}  # by identity, since one layer may have several names
    for name, module in found:
        if id(module) not in converted:
            converted[id(module)] = Fp8Linear(module, recipe, name)
        result.set_submodule(name, converted[id(module)])
    return result
