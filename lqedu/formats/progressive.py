"""Progressive grids: 4-bit groups inside an 8-bit channel, so that a kernel multiplies int8 and scales once a channel.

    w ≈ s_c · w8,     w8 = (q - z) · s_g     with q in [0, 15] and *integer* group scales s_g and zero points z

The second line is computed in integers while the weight is loaded, and the product runs on int8 operands with one
floating-point scale a row. It works only if ``w8`` fits int8. The group scale is rounded, so the end of the 4-bit grid can
lie beyond the weight it stands for: channels are therefore quantized to ± 119 (:data:`PROTECTIVE`) and not to ± 127.

Lin et al., 2024, arXiv:2405.04532 (QoQ), section 4.1. Derived in chapter ``12-progressive``.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats.integer import IntGrid, check_weight
from lqedu.formats.packing import pack, packed_width, unpack
from lqedu.formats.stored import StoredWeight
from lqedu.options import check_count

#: Largest channel code for which every *rounded* weight decodes inside int8: 119 with :attr:`ProgressiveGrid.zero` "code",
#: one more with "offset". A search over all groups finds both (chapter ``12-progressive``).
PROTECTIVE = {"code": 119, "offset": 120}

#: Largest channel code for which all 16 codes of every group decode inside int8, also those that no weight of the group is
#: rounded to. Error feedback may choose these; with "code" it needs this smaller range, or weights held in the protective one.
PROTECTIVE_ALL_CODES = {"code": 116, "offset": 120}


@dataclass(frozen=True)
class ProgressiveGrid:
    """A frozen description of a two-level grid for weights ``[out, in]``.

    Attributes:
        group_size: inputs that share an integer group scale; must divide the inputs.
        zero: "code" subtracts a 4-bit zero point before the group scale multiplies, ``(q - z) s_g``; "offset" subtracts
            an int8 offset after it, ``q s_g - z``: the form that the QServe kernel runs.
        protective: largest magnitude of a channel code; 127 would overflow.

    Raises:
        GridError: fields outside these ranges.
    """

    group_size: int = 128
    zero: Literal["code", "offset"] = "code"
    protective: int | None = None

    def __post_init__(self) -> None:
        check_count("group_size", self.group_size, least=1, error=GridError)
        if self.zero not in PROTECTIVE:
            raise GridError(f"zero is 'code' or 'offset', got {self.zero!r}")
        if self.protective is None:
            object.__setattr__(self, "protective", PROTECTIVE[self.zero])
        check_count("protective", self.protective, least=15, most=127, error=GridError)

    def scale_shape(self, weight_shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the group scales of a weight ``[out, in]``.

        Raises:
            GridError: the group size does not divide the inputs.
        """
        return IntGrid(4, granularity="group", group_size=self.group_size).scale_shape(weight_shape)

    def nbytes(self, weight_shape: tuple[int, int]) -> int:
        """Bytes of packed codes, channel scales (float16), group scales (int8) and zero points.

        >>> ProgressiveGrid(128).nbytes((8, 256))   # 1024 codes + 16 channel + 16 group scales + 8 zeros
        1064
        """
        rows, groups = self.scale_shape(weight_shape)
        zeros = rows * (packed_width(groups, 4) if self.zero == "code" else groups)
        return rows * packed_width(weight_shape[1], 4) + 2 * rows + rows * groups + zeros

    def bits_per_weight(self, weight_shape: tuple[int, int]) -> float:
        """Stored bits per weight, both levels of scales counted."""
        return 8 * self.nbytes(weight_shape) / (weight_shape[0] * weight_shape[1])

    def fit(self, weight: Tensor, channel: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Channel scale, group scale and zero point of a weight.

        Args:
            weight: ``[out, in]``, a floating dtype.
            channel: channel scales to keep, float16 ``[out, 1]``; by default they follow from the largest weights.

        Returns:
            ``(channel_scale, group_scale, zero)``: float16 ``[out, 1]``, uint8 ``[out, groups]`` of at least 1, and int8
            ``[out, groups]``. A row of zeros gets scale 1.

        Raises:
            GridError: weights that are not finite or whose scale overflows float16.
        """
        check_weight(weight)
        w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
        if channel is None:
            channel = (w.abs().amax(1, keepdim=True) / self.protective).to(torch.float16)
        if not bool(torch.isfinite(channel).all()):
            raise GridError("a channel scale overflows float16; rescale the weight")
        channel = torch.where(channel == 0, torch.ones_like(channel), channel)
        w8 = torch.round(w / channel.to(w.dtype)).clamp_(-self.protective, self.protective)
        w8 = w8.view(*self.scale_shape(tuple(w.shape)), -1)
        lo, hi = w8.amin(-1).clamp(max=0), w8.amax(-1).clamp(min=0)
        group = torch.round((hi - lo) / 15).clamp_(min=1)
        zero = torch.round(-lo / group).clamp_(0, 15) if self.zero == "code" else -lo
        return channel, group.to(torch.uint8), zero.to(torch.int8)

    def affine(self, channel: Tensor, group: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The same grid as ``s (q - z)`` with one float32 scale a group, for algorithms that know no levels.

        Returns:
            ``(scale, zero)``, float32 ``[out, groups]``; with "offset" zeros the zero point is a fraction of a step.
        """
        scale = channel.to(torch.float32) * group.to(torch.float32)
        z = zero.to(torch.float32)
        return scale, z if self.zero == "code" else z / group.to(torch.float32)

    def encode(self, weight: Tensor, channel: Tensor, group: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes, uint8 ``[out, in]`` in ``[0, 15]``, rounded once: from the weight, not from the channel code.

        Weights beyond the protective range are moved to its end first, so that whatever is encoded decodes inside int8:
        a scale that float16 rounded down hard (rows near zero), or a weight that carries the errors of others.
        """
        scale, z = (t.unsqueeze(-1) for t in self.affine(channel, group, zero))
        limit = self.protective * channel.to(torch.float32)
        x = weight.to(torch.float32).clamp(-limit, limit).view(*group.shape, -1)
        q = torch.round(x / scale) + z if self.zero == "code" else torch.round(x / scale + z)
        return q.clamp_(0, 15).to(torch.uint8).view(weight.shape)

    def decode_int8(self, codes: Tensor, group: Tensor, zero: Tensor) -> Tensor:
        """Channel codes ``w8``, int8 ``[out, in]``, by the integer arithmetic of a kernel.

        Raises:
            GridError: a value outside int8, which a kernel would wrap silently.
        """
        q = codes.to(torch.int32).view(*group.shape, -1)
        s, z = group.to(torch.int32).unsqueeze(-1), zero.to(torch.int32).unsqueeze(-1)
        w8 = (q - z) * s if self.zero == "code" else q * s - z
        if int(w8.max()) > 127 or int(w8.min()) < -128:
            raise GridError(
                f"group codes decode to [{int(w8.min())}, {int(w8.max())}], outside int8; "
                f"quantize channels to ± {PROTECTIVE[self.zero]}"
            )
        return w8.to(torch.int8).view(codes.shape)

    def to_dict(self) -> dict:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, d: dict) -> "ProgressiveGrid":
        """Inverse of :meth:`to_dict`.

        Raises:
            GridError: unknown or missing fields.
        """
        if set(d) != {f.name for f in fields(cls)}:
            raise GridError(f"a progressive grid has the fields group_size, protective and zero, got {sorted(d)}")
        return cls(**d)


@dataclass(frozen=True)
class ProgressiveTensor(StoredWeight):
    """A weight on a progressive grid.

    Attributes:
        codes: uint8 ``[out, in]`` in ``[0, 15]``.
        channel_scale: float16 ``[out, 1]``.
        group_scale: uint8 ``[out, groups]``.
        zero: int8 ``[out, groups]``.
        grid: the grid.
    """

    codes: Tensor
    channel_scale: Tensor
    group_scale: Tensor
    zero: Tensor
    grid: ProgressiveGrid

    def int8(self) -> Tensor:
        """The channel codes that enter the product, int8 ``[out, in]`` (GridError as in ``decode_int8``)."""
        return self.grid.decode_int8(self.codes, self.group_scale, self.zero)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``s_c · w8``, ``[out, in]``."""
        return self.int8().to(dtype) * self.channel_scale.to(dtype)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors; :meth:`from_packed` is the inverse."""
        zero = pack(self.zero.to(torch.uint8), 4) if self.grid.zero == "code" else self.zero
        return {
            "codes": pack(self.codes, 4),
            "scale": self.channel_scale,
            "group_scale": self.group_scale,
            "zero": zero.contiguous(),
        }

    @classmethod
    def from_packed(
        cls, tensors: dict[str, Tensor], grid: ProgressiveGrid, shape: tuple[int, int]
    ) -> "ProgressiveTensor":
        """Inverse of :meth:`packed`.

        Raises:
            GridError: tensors whose names or shapes do not belong to this grid and shape.
        """
        if set(tensors) != {"codes", "scale", "group_scale", "zero"}:
            raise GridError(f"a progressive weight has codes, scale, group_scale and zero, got {sorted(tensors)}")
        groups = grid.scale_shape(shape)
        if tuple(tensors["codes"].shape) != (shape[0], packed_width(shape[1], 4)):
            raise GridError(f"packed codes of shape {tuple(tensors['codes'].shape)} do not fit a weight {list(shape)}")
        if tuple(tensors["group_scale"].shape) != groups or tuple(tensors["scale"].shape) != (shape[0], 1):
            raise GridError(f"the scales do not fit a weight {list(shape)} in groups of {grid.group_size}")
        zero = unpack(tensors["zero"], 4, groups[1]).to(torch.int8) if grid.zero == "code" else tensors["zero"]
        return cls(unpack(tensors["codes"], 4, shape[1]), tensors["scale"], tensors["group_scale"], zero, grid)

    @classmethod
    def empty(cls, grid: ProgressiveGrid, shape: tuple[int, int]) -> "ProgressiveTensor":
        """A weight of zeros: the frame that a checkpoint's tensors are loaded into."""
        groups = grid.scale_shape(shape)
        return cls(
            torch.zeros(shape, dtype=torch.uint8),
            torch.ones(shape[0], 1, dtype=torch.float16),
            torch.ones(groups, dtype=torch.uint8),
            torch.zeros(groups, dtype=torch.int8),
            grid,
        )


def progressive_quantize(weight: Tensor, grid: ProgressiveGrid) -> ProgressiveTensor:
    """Round a weight ``[out, in]`` to nearest on a progressive grid fitted to it.

    Raises:
        GridError: a weight or group size that does not fit, or, without a protective range, codes that overflow int8.

    >>> w = torch.tensor([[1.0, -2.0, 0.5, 11.9]])
    >>> q = progressive_quantize(w, ProgressiveGrid(group_size=2))
    >>> q.int8(), q.group_scale
    (tensor([[ 10, -20,   8, 120]], dtype=torch.int8), tensor([[2, 8]], dtype=torch.uint8))
    """
    if not isinstance(grid, ProgressiveGrid):
        raise GridError(f"a weight is rounded on two levels by a ProgressiveGrid, got {grid!r}")
    channel, group, zero = grid.fit(weight)
    result = ProgressiveTensor(grid.encode(weight, channel, group, zero), channel, group, zero, grid)
    result.int8()  # raises where a kernel would wrap
    return result
