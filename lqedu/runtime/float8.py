"""FP8 matrix products, on the FP8 tensor cores where there are any, and the layer that keeps FP8 codes; ``16-fp8``.

    y = s_x Σ_k s_k [ Σ decode(q_x) decode(q_w) ]           (inner sum: the inputs of block k)

One product of codes for each run of inputs that shares its scales: all inputs at once for scales of tensors, channels and
tokens, 128 at a time for blocks and groups. Scales come after it, in float32.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqedu.errors import GridError
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Tensor, check_finite, check_scales, decode
from lqedu.formats.smallfloat import FORMATS
from lqedu.runtime.linear import QuantLinear

#: How far a sum of tensor cores may be from the exact one, relative to ``Σ|x||w|``. They align the products of an instruction
#: to the largest and cut off what lies some 13 bits below it (DeepSeek-V3, arXiv:2412.19437, section 3.3). Cutting always shrinks,
#: so sums of one sign are worst. Measured on an H200: at most 2^-8.6 for codes of all sizes and one sign, 2^-10 for both signs,
#: 2^-12 for Gaussian numbers. Measured up to 16384 inputs, with ``use_fast_accum=False`` as :func:`scaled_matmul` sets it.
TENSOR_CORE_ERROR = 2.0**-8


def has_tensor_cores(device: torch.device | str) -> bool:
    """Whether a device multiplies FP8: NVIDIA GPUs of compute capability 8.9 and later."""
    device = torch.device(device)
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def float8_matmul(x: Tensor, w: Tensor) -> Tensor:
    """``x w^T`` of E4M3 codes, summed in float32.

    On a GPU with FP8 (:func:`has_tensor_cores`) this is its tensor cores' product. Everywhere else the codes are decoded, which
    is exact, and multiplied in float32. The two differ by at most :data:`TENSOR_CORE_ERROR` times ``Σ|x||w|``.

    Args:
        x: uint8 ``[tokens, in]``.
        w: uint8 ``[out, in]``, on the same device.

    Returns:
        float32 ``[tokens, out]``. A product is exact in float32 (four bits times four bits); only the sum is rounded.

    Raises:
        TypeError: codes that are not uint8.
        ValueError: shapes that do not fit.

    >>> float8_matmul(torch.tensor([[56, 64]], dtype=torch.uint8), torch.tensor([[60, 184]], dtype=torch.uint8))
    tensor([[-0.5000]])
    """
    _check_operands(x, w)
    if has_tensor_cores(x.device):
        return scaled_matmul(x, w)
    return decode(x) @ decode(w).T


def scaled_matmul(x: Tensor, w: Tensor) -> Tensor:
    """:func:`float8_matmul` by ``torch._scaled_mm`` with scales of 1, whatever the device.

    It wants multiples of 16 inputs and outputs (codes of zero fill up what is missing), rows of ``x`` and, through the
    transpose, rows of ``w`` contiguous: both operands lie along the sum. Every partial sum is added up outside the tensor
    cores in float32 (``use_fast_accum=False``); TypeError and ValueError as in :func:`float8_matmul`.
    """
    _check_operands(x, w)
    outs = w.shape[0]
    x = pad(x, (0, -x.shape[1] % 16)).contiguous()
    w = pad(w, (0, -w.shape[1] % 16, 0, -outs % 16)).contiguous()
    one = torch.ones((), dtype=torch.float32, device=x.device)
    e4m3 = torch.float8_e4m3fn
    y = torch._scaled_mm(
        x.view(e4m3), w.view(e4m3).T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False
    )
    return y[:, :outs]


def _check_operands(x: Tensor, w: Tensor) -> None:
    if x.dtype != torch.uint8 or w.dtype != torch.uint8:
        raise TypeError(f"FP8 products multiply codes, uint8 by uint8, got {x.dtype} and {w.dtype}")
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"FP8 products need [tokens, in] and [out, in], got {list(x.shape)} and {list(w.shape)}")


def float8_linear(codes: Tensor, scale: Tensor, grid: Float8ActivationGrid, weight: Float8Tensor) -> Tensor:
    """``x w^T`` from the codes and scales of both.

    Args:
        codes: uint8 activations ``[..., in]``.
        scale: float32 ``[..., 1]``, ``[1]`` or ``[..., groups]``, as ``grid.fit`` returns it.
        grid: of the activations.
        weight: the stored weight.

    Returns:
        float32 ``[..., out]``. Codes of E4M3 on both sides are multiplied by :func:`float8_matmul`, others decoded.

    Raises:
        GridError: codes of another number of inputs than the weight's, scales that are not one a group (or one) of one
            or all tokens, or groups of the activations and blocks of the weight of different sizes.
    """
    size = inputs_per_scale(grid, weight)
    _check_inputs(codes, scale, size, weight)
    fast = (grid.format, weight.grid.format) == ("E4M3", "E4M3")
    x, rows = codes.reshape(-1, codes.shape[-1]), weight.shape[0]
    s_x = scale.reshape(-1, scale.shape[-1])  # [tokens or 1, groups or 1]
    s_w = _by_row(weight)  # [out, blocks or 1]
    y = torch.zeros(x.shape[0], rows, dtype=torch.float32, device=x.device)
    for k, start in enumerate(range(0, x.shape[1], size)):
        q_x, q_w = x[:, start : start + size], weight.codes[:, start : start + size]
        if fast:
            term = float8_matmul(q_x, q_w)
        else:
            term = decode(q_x, FORMATS[grid.format]) @ decode(q_w, FORMATS[weight.grid.format]).T
        y += term * s_w[:, min(k, s_w.shape[1] - 1)] * s_x[:, min(k, s_x.shape[1] - 1), None]
    return y.view(*codes.shape[:-1], rows)


def _check_inputs(codes: Tensor, scale: Tensor, size: int, weight: Float8Tensor) -> None:
    inputs = weight.shape[1]
    if codes.dim() == 0 or codes.shape[-1] != inputs:
        raise GridError(
            f"a weight {list(weight.shape)} is multiplied with codes [..., {inputs}], got {list(codes.shape)}"
        )
    groups, tokens = -(-inputs // size), math.prod(codes.shape[:-1])
    last = scale.shape[-1] if scale.dim() else 0
    if last not in (1, groups) or math.prod(scale.shape[:-1]) not in (1, tokens):
        raise GridError(
            f"codes {list(codes.shape)} in runs of {size} inputs have scales [1], {[*codes.shape[:-1], 1]} or "
            f"{[*codes.shape[:-1], groups]}, got {list(scale.shape)}; use those that grid.fit returns"
        )


def inputs_per_scale(grid: Float8ActivationGrid, weight: Float8Tensor) -> int:
    """How many inputs of the product share their scales: all of them, or a block or group.

    Raises:
        GridError: groups of the activations and blocks of the weight of different sizes.
    """
    sizes = {grid.group_size} if grid.granularity == "group" else set()
    sizes |= {weight.grid.block_size} if weight.grid.granularity == "block" else set()
    if len(sizes) > 1:
        raise GridError(
            f"groups of {grid.group_size} activations and blocks of {weight.grid.block_size} weights share no run of "
            "inputs; use one size for both"
        )
    return sizes.pop() if sizes else weight.shape[1]


def _by_row(weight: Float8Tensor) -> Tensor:
    """The scales of each output, ``[out, blocks or 1]``."""
    if weight.grid.granularity != "block":
        return weight.scale.expand(weight.shape[0], 1)
    return weight.scale.repeat_interleave(weight.grid.block_size, 0)[: weight.shape[0]]


class Float8Linear(QuantLinear):
    """``y = x ŵ^T + bias`` with ``ŵ`` stored as FP8 codes and float32 scales.

    With FP8 inputs both operands are codes. Otherwise the weight is decoded at every call: memory is saved, time is not.

    FP8 inputs that hold NaN or infinities are refused (GridError), whether their scales are dynamic or static: a static
    scale would turn an infinity into its largest value, and nobody would notice.

    Buffers: ``codes`` uint8 ``[out, in]``, ``scale`` float32 ``grid.scale_shape``, and ``input_scale`` for a static grid.

    Raises:
        GridError: as :class:`QuantLinear`; groups and blocks of different sizes; a static scale not finite and above 0.
    """

    _activation_type = Float8ActivationGrid

    def __init__(self, quantized: Float8Tensor, *args, **kwargs) -> None:
        super().__init__(quantized, *args, **kwargs)
        if self.path.activation is not None:
            inputs_per_scale(self.path.activation, quantized)  # contradictions die here
        check_scales(dict(self.named_buffers(recurse=False)))

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`QuantLinear.forward`."""
        if self.path.activation is not None and self.path.activation.static:
            check_finite(x)
        return super().forward(x)

    def product(self, codes: Tensor, scale: Tensor, zero: None) -> Tensor:
        """See :func:`float8_linear`."""
        return float8_linear(codes, scale, self.path.activation, self.quantized)
