"""A drop-in for QServe's W4A8 linear layer: the same tensors and the same call, our kernel; chapter ``21-serving``.

    model = replace(model)                       # layers of QServe's class, in a model of QServe or any other, become ours
    layer = W4A8Linear(in_features, out_features, bias=False, group_size=128);  layer.load_state_dict(tensors)
    layer(x, input_scales, input_sum, output_buffer)

QServe (mit-han-lab/omniserve, commit 02b2925, ``w4a8_linear.py``) hands int8 activations and their scales to a layer, which writes
into a buffer. Its kernels are built for compute capability 8.x; ours also run on Hopper. The layout of its tensors is that
of ``lqedu.checkpoint.qserve``; ours is made of it once, losslessly, at the first call.

In groups the two compute the same. Per channel QServe takes the zero point off with sums of the *unrounded* inputs
(``input_sum``), ``s1 (q x̂) - s1 z Σ x``; here both terms use the codes, ``s1 (q - z) x̂``, and ``input_sum`` is not looked at.
They differ by ``s1 z Σ (x - x̂)``, a part of the rounding error of the inputs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lqedu.checkpoint.layout import LinearParts
from lqedu.checkpoint.qserve import GROUP, decode, encode
from lqedu.errors import CheckpointError, GridError, UsageError
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.progressive import ProgressiveGrid, ProgressiveTensor
from lqedu.models.copying import copy_sharing_tensors
from lqedu.runtime.backend import KernelWeight, kernel_product, kernel_weight
from lqedu.runtime.codes import Inputs
from lqedu.runtime.inputs import InputPath

QSERVE_CLASS = "W4A8OF16LinearDynamicInputScale"
_STORED = ("qweight", "s1_scales", "s1_szeros", "s2_scales", "s2_zeros")


class W4A8Linear(nn.Module):
    """Arguments, buffers and call of QServe's ``W4A8OF16LinearDynamicInputScale``.

    Buffers, until the first call: ``qweight`` int8 ``[out, in / 2]``, ``s1_scales`` float16 ``[out]``, and per channel
    ``s1_szeros`` float16 ``[out]``, in groups ``s2_scales`` and ``s2_zeros`` int8 ``[in / 128, out]``; ``bias`` float16 ``[out]``.

    Args:
        in_features, out_features: multiples of 32.
        bias: whether there is one.
        group_size: 128, or -1 for one scale a channel.
        device: of the buffers.

    Raises:
        GridError: sizes that QServe's layout does not hold.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int = GROUP,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if group_size not in (-1, GROUP) or in_features % 32 or out_features % 32 or in_features % max(group_size, 1):
            raise GridError(
                f"QServe stores tiles of 32 by 32 in groups of {GROUP} or by channel (-1), got [{out_features}, "
                f"{in_features}] in groups of {group_size}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.w_bit, self.per_channel = 4, group_size == -1
        self.group_size = in_features if self.per_channel else group_size
        self._kernel: tuple[tuple[str, ...], Any] | None = None  # names of the kernel's tensors, and its options
        self.register_buffer("qweight", torch.zeros(out_features, in_features // 2, dtype=torch.int8, device=device))
        self.register_buffer("s1_scales", torch.zeros(out_features, dtype=torch.float16, device=device))
        if self.per_channel:
            self.register_buffer("s1_szeros", torch.zeros(out_features, dtype=torch.float16, device=device))
        else:
            shape = (in_features // group_size, out_features)
            self.register_buffer("s2_scales", torch.zeros(shape, dtype=torch.int8, device=device))
            self.register_buffer("s2_zeros", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16, device=device) if bias else None)

    @torch.no_grad()
    def forward(self, x: Tensor, input_scales: Tensor, input_sum: Tensor | None, output_buffer: Tensor) -> None:
        """Write ``input_scales (x ŵ^T) + bias`` into ``output_buffer``.

        Args:
            x: int8 ``[tokens, in]``.
            input_scales: float16 ``[tokens]``.
            input_sum: what QServe's kernels per channel read; not looked at here.
            output_buffer: float16 ``[tokens, out]``.
        """
        weight = self.kernel_weight()
        sums = x.sum(1, keepdim=True, dtype=torch.int32) if "zero" in weight.tensors else None
        inputs = Inputs(x, input_scales.to(torch.float32).view(-1, 1), None, sums)
        output_buffer.copy_(kernel_product(inputs, weight, torch.float16, self.bias))

    def kernel_weight(self) -> KernelWeight:
        """The weight as the kernel reads it; made at the first call, which frees the loaded tensors.

        Raises:
            CheckpointError: tensors that were not loaded, or are damaged.
        """
        if self._kernel is None:
            stored = {name: self._buffers[name] for name in _STORED if name in self._buffers}
            scheme = {"group_size": -1 if self.per_channel else self.group_size, "sym": False, "zero": None}
            try:
                weight = decode(stored, scheme, (self.out_features, self.in_features)).weight
                made = kernel_weight(weight, integer_inputs=True)
            except (CheckpointError, GridError, ValueError) as error:
                raise CheckpointError(f"the tensors of this layer make no weight: {error}; load them again") from error
            for name in stored:
                del self._buffers[name]
            for name, tensor in made.tensors.items():
                self.register_buffer(name, tensor, persistent=False)  # so that they move with the model
            self._kernel = (tuple(made.tensors), made.options)
        names, options = self._kernel
        tensors = {name: self._buffers[name] for name in names}
        return KernelWeight("w4a8", tensors, options, (self.out_features, self.in_features))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        w_bit: int,
        group_size: int,
        init_only: bool = False,
        s1_scale: Tensor | None = None,
        s2_scale: Tensor | None = None,
        zeros: Tensor | None = None,
    ) -> "W4A8Linear":
        """A layer from a dense one whose weights lie on the grid of these scales, as QServe's converter calls it.

        Args:
            linear: its weight is ``s1 (q - z)``, in groups ``s1 s2 (q - z)``; not changed.
            w_bit: 4.
            group_size: 128 or -1.
            init_only: leave the weight to a checkpoint.
            s1_scale: one a row.
            s2_scale: whole numbers, one a group of a row.
            zeros: whole numbers 0 to 15, one a row, or one a group of a row.

        Raises:
            UsageError: scales that are missing, or another number of bits.
            GridError: weights that do not lie on the grid.
        """
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, group_size, linear.weight.device)
        if w_bit != 4:
            raise UsageError(f"this layer has 4-bit weights, got w_bit={w_bit}")
        if init_only:
            return layer
        if s1_scale is None or zeros is None or (s2_scale is None) != (group_size == -1):
            raise UsageError("pass s1_scale and zeros, and s2_scale for groups; or init_only=True")
        weight = _on_grid(linear.weight.detach(), group_size, s1_scale, s2_scale, zeros)
        tensors, _ = encode(LinearParts(weight, InputPath(activation=ActivationGrid(8))))
        bias = {} if linear.bias is None else {"bias": linear.bias.detach().to(torch.float16)}
        layer.load_state_dict(tensors | bias)
        return layer

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, w_bit={self.w_bit}, group_size={self.group_size}"


def replace(model: nn.Module) -> nn.Module:
    """A model whose layers of QServe's class are ours, around the same tensors.

    Args:
        model: with loaded weights; not changed.

    Raises:
        UsageError: there are no such layers.
    """
    result = copy_sharing_tensors(model)
    found = {name: module for name, module in result.named_modules() if type(module).__name__ == QSERVE_CLASS}
    if not found:
        raise UsageError(f"the model has no layers of QServe's class {QSERVE_CLASS}; nothing to replace")
    for name, module in found.items():
        group_size = -1 if module.per_channel else module.group_size
        bias = getattr(module, "bias", None)
        layer = W4A8Linear(module.in_features, module.out_features, bias is not None, group_size, "meta")
        layer.load_state_dict(module.state_dict(), assign=True)
        result.set_submodule(name, layer)
    return result


def _on_grid(weight: Tensor, group_size: int, s1: Tensor, s2: Tensor | None, zeros: Tensor) -> Any:
    """The stored weight of one that lies on the grid of these scales."""
    rows, columns = weight.shape
    s1 = s1.reshape(rows, 1).to(weight.device, torch.float16)
    codes = torch.round(weight.to(torch.float32) / s1.to(torch.float32))
    zeros = zeros.reshape(rows, -1, 1).to(weight.device, torch.float32)
    if s2 is not None:
        s2 = s2.reshape(rows, -1, 1).to(weight.device, torch.float32)
        codes = codes.view(rows, -1, group_size) / s2
    codes = codes.view(rows, zeros.shape[1], -1) + zeros
    whole = torch.round(codes)
    if not bool(((codes - whole).abs() < 1e-3).all()) or float(whole.min()) < 0 or float(whole.max()) > 15:
        raise GridError(
            "the weights do not lie on the 4-bit grid of these scales; pass the scales they were rounded with"
        )
    whole = whole.view(rows, columns).to(torch.uint8)
    if s2 is None:
        grid = IntGrid(4, False, "channel", scale_dtype=torch.float16)
        return QTensor(whole, s1, zeros.view(rows, 1).to(torch.uint8), grid)
    grid = ProgressiveGrid(group_size, "code")
    return ProgressiveTensor(whole, s1, s2[..., 0].to(torch.uint8), zeros[..., 0].to(torch.int8), grid)
