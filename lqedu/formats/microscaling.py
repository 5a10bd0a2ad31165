"""Microscaling formats: a short block of small floats shares a scale that is itself a small float.

    MXFP8, MXFP4   x ≈ 2^e · c           c in E4M3 or E2M1, blocks of 32, scale in E8M0
    NVFP4          x ≈ s_t · s_b · c     c in E2M1, blocks of 16, s_b in E4M3, one float32 s_t for the tensor

The two families choose their scale by different rules. MX takes the power of two that puts the largest element into the
top octave of its format, ``e = floor(log2 max|x|) - emax``: what lies beyond the format's largest value saturates and loses up
to an eighth of its value in E4M3 (512 to 448) and a quarter in E2M1 (8 to 6). NVFP4 puts the largest element onto the
largest code, to the accuracy of a three-bit mantissa; its float32 scale puts the largest block scale onto 448. A block whose
largest element is below 2.1e-6 of the tensor's has a scale that underflows E4M3: all of it becomes zero.

OCP Microscaling Formats (MX) Specification, 1.0, 2023. Derived in chapter ``16-fp8``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats.fp8 import decode, encode
from lqedu.formats.packing import pack
from lqedu.formats.smallfloat import E2M1, E4M3, E8M0, ExponentFormat, FloatFormat, check_floating


@dataclass(frozen=True)
class BlockFormat:
    """A frozen description of a microscaling format.

    >>> MXFP8.bits_per_element, MXFP4.bits_per_element, NVFP4.bits_per_element
    (8.25, 4.25, 4.5)

    Attributes:
        name: what it is called.
        element: format of the elements.
        block_size: consecutive elements of the last axis that share a scale.
        scale: format of the scales; E4M3 comes with a float32 scale of the whole tensor.
    """

    name: str
    element: FloatFormat
    block_size: int
    scale: FloatFormat | ExponentFormat

    @property
    def bits_per_element(self) -> float:
        """Stored bits of an element, block scales counted; a scale of the whole tensor is not."""
        return self.element.bits + 8 / self.block_size

    @property
    def top_exponent(self) -> int:
        """``emax``: exponent of the largest element."""
        return math.frexp(self.element.max)[1] - 1


MXFP8 = BlockFormat("MXFP8", E4M3, 32, E8M0)
MXFP4 = BlockFormat("MXFP4", E2M1, 32, E8M0)
NVFP4 = BlockFormat("NVFP4", E2M1, 16, E4M3)


@dataclass(frozen=True)
class BlockTensor:
    """A tensor in a microscaling format.

    Attributes:
        codes: of the elements, uint8 ``[..., n]``, one an element; :meth:`packed` gives the stored bytes.
        scale: codes of the block scales, uint8 ``[..., n / block_size]``.
        tensor_scale: float32 scalar that multiplies all of them; 1 for the MX formats, which store none.
        form: the format.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor
    form: BlockFormat

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, ``[..., n]``; multiplied in float32."""
        scale = decode(self.scale, self.form.scale) * self.tensor_scale
        x = decode(self.codes, self.form.element).unflatten(-1, (-1, self.form.block_size)) * scale[..., None]
        return x.flatten(-2).to(dtype)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors: ``codes`` (uint8 bit stream), ``scale``, and ``tensor_scale`` where there is one."""
        tensors = {"codes": pack(self.codes, self.form.element.bits), "scale": self.scale}
        return tensors if self.form.scale is E8M0 else tensors | {"tensor_scale": self.tensor_scale}

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(tensor.nbytes for tensor in self.packed().values())


def block_quantize(x: Tensor, form: BlockFormat) -> BlockTensor:
    """Round a tensor ``[..., n]`` to a microscaling format; computed in float32. Blocks of zeros decode to zeros.

    So do blocks of NVFP4 that are tiny beside the largest of the tensor: 1e-6 beside 1 (their E4M3 scale underflows).

    Raises:
        GridError: values that are not finite or not floating point, a form that is no block format, or blocks that do not
            divide the last axis.

    >>> block_quantize(torch.tensor([[1.0, -3.0, 7.0, 0.3] * 8]), MXFP4).dequantize()[0, :4]     # 7 = 1.75 · 4 is clipped
    tensor([ 1.0000, -3.0000,  6.0000,  0.5000])
    """
    if not isinstance(form, BlockFormat):
        raise GridError(f"form is a block format such as lqedu.formats.microscaling.MXFP8, got {form!r}")
    check_floating(x, f"values for {form.name}", GridError)
    if x.dim() == 0 or x.numel() == 0 or x.shape[-1] % form.block_size:
        raise GridError(
            f"blocks of {form.block_size} do not divide the last axis of {list(x.shape)}; fill it up with zeros"
        )
    blocks = x.detach().to(torch.float32).unflatten(-1, (-1, form.block_size))
    amax = blocks.abs().amax(-1)
    if not bool(torch.isfinite(amax).all()):
        raise GridError(f"the tensor {list(x.shape)} holds NaN or infinite values")
    whole = torch.ones((), device=x.device)
    if form.scale is E8M0:
        _, exponent = torch.frexp(amax)  # amax = f * 2^exponent, 1/2 <= f < 1
        shared = torch.ldexp(torch.ones_like(amax), (exponent - 1 - form.top_exponent).clamp(min=-E8M0.bias))
        scale = E8M0.encode(torch.where(amax == 0, 1.0, shared))
    else:
        tiny = torch.finfo(torch.float32).tiny
        top = amax.max() / (form.scale.max * form.element.max)
        whole = torch.where(top == 0, 1.0, top.clamp(min=tiny))
        scale = encode(amax / form.element.max / whole, form.scale)
    step = decode(scale, form.scale) * whole
    codes = encode(
        blocks / torch.where(step == 0, torch.inf, step)[..., None], form.element
    )  # a step of nothing holds zeros
    return BlockTensor(codes.flatten(-2), scale, whole, form)


def block_round_trip(x: Tensor, form: BlockFormat) -> Tensor:
    """The values that the codes of ``x`` stand for, in the dtype of ``x``: a simulation, nothing is stored.

    Raises:
        GridError: see :func:`block_quantize`.
    """
    return block_quantize(x, form).dequantize(x.dtype)
