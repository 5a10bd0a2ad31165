"""Requantized groups: a 4-bit weight in groups, rounded a second time to int8 with one scale a row.

    w ≈ s_g · q,  q in [-8, 7]          the groups, as any 4-bit grid leaves them: ŵ
    w8 = round(q · r),  r = s_g / s_c   int8, r in float16;   s_c = max_row abs(ŵ) / 127

A kernel computes ``w8`` while it loads the codes, multiplies int8 by int8 across all groups of a row, and applies ``s_c``
once at the end. Nothing compensates the second rounding. It is safe because ``s_c`` comes from the *dequantized* weight:
then ``|q r| ≤ 127 (1 + 2**-11)``, which rounds to at most 127. The weight before rounding will not do. On a grid with
``s_g = 2 max/15`` the code -8 lies 1/15 beyond the largest weight, so ``w8`` would reach -136 and wrap in an int8 byte.

Zhang et al., 2024, arXiv:2406.09904 (QQQ; reference: HandH1998/QQQ, commit 54c5c99). Derived in chapter ``13-qqq``.
"""

from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats.integer import IntGrid
from lqedu.formats.packing import pack, packed_width, unpack
from lqedu.formats.qtensor import QTensor
from lqedu.formats.stored import StoredWeight
from lqedu.options import check_count

_TOP = 127  # largest magnitude of a second code
_HALF_RANGE = 8  # codes are stored unsigned, 0 to 15, with this zero point


@dataclass(frozen=True)
class RequantizedGrid:
    """A frozen description of 4-bit groups that a kernel requantizes to int8.

    Attributes:
        group_size: inputs that share a group scale; must divide the inputs.

    Raises:
        GridError: a group size that is no positive number.
    """

    group_size: int = 128

    def __post_init__(self) -> None:
        check_count("group_size", self.group_size, least=1, error=GridError)

    def scale_shape(self, weight_shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the group scales of a weight ``[out, in]`` (GridError where the group size does not divide)."""
        return self.groups().scale_shape(weight_shape)

    def groups(self, search: str = "none") -> IntGrid:
        """The first level: symmetric 4-bit groups with ``s_g = 2 max|w| / 15``.

        Args:
            search: "none" or "mse", see :class:`IntGrid`.
        """
        # float32, because s_g itself is not stored: s_g / s_c is
        return IntGrid(4, True, "group", self.group_size, scale_dtype=torch.float32, search=search)

    def nbytes(self, weight_shape: tuple[int, int]) -> int:
        """Bytes of packed codes, channel scales (float32) and group ratios (float16).

        >>> RequantizedGrid(128).nbytes((8, 256))   # 1024 codes + 32 channel scales + 32 ratios
        1088
        """
        rows, groups = self.scale_shape(weight_shape)
        return rows * packed_width(weight_shape[1], 4) + 4 * rows + 2 * rows * groups

    def bits_per_weight(self, weight_shape: tuple[int, int]) -> float:
        """Stored bits per weight, both levels of scales counted."""
        return 8 * self.nbytes(weight_shape) / (weight_shape[0] * weight_shape[1])

    def decode_int8(self, codes: Tensor, ratio: Tensor) -> Tensor:
        """The second codes ``w8 = round(q · r)``, ties to even, int8 ``[out, in]``.

        The product of a 4-bit code and a float16 number is exact in float32, so this is rounded once, as by a kernel.

        Args:
            codes: int8 ``[out, in]`` in ``[-8, 7]``.
            ratio: float16 ``[out, groups]``.

        Raises:
            GridError: a value outside ± 127 or not finite, which a kernel would wrap silently.
        """
        w8 = torch.round(codes.to(torch.float32).view(*ratio.shape, -1) * ratio.to(torch.float32).unsqueeze(-1))
        largest = float(w8.abs().max())
        if not largest <= _TOP:  # NaN too
            raise GridError(
                f"second codes reach ± {largest:.0f}, outside ± {_TOP}; take the channel scale from the dequantized weight"
            )
        return w8.to(torch.int8).view(codes.shape)

    def to_dict(self) -> dict:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict) -> "RequantizedGrid":
        """Inverse of :meth:`to_dict`.

        Raises:
            GridError: unknown or missing fields.
        """
        if set(d) != {f.name for f in fields(cls)}:
            raise GridError(f"a requantized grid has the field group_size, got {sorted(d)}")
        return cls(**d)


@dataclass(frozen=True)
class RequantizedTensor(StoredWeight):
    """A weight in 4-bit groups with the scales of its second rounding.

    Attributes:
        codes: int8 ``[out, in]`` in ``[-8, 7]``.
        channel_scale: ``s_c``, float32 ``[out, 1]``.
        group_ratio: ``s_g / s_c``, float16 ``[out, groups]``.
        grid: the grid.
    """

    codes: Tensor
    channel_scale: Tensor
    group_ratio: Tensor
    grid: RequantizedGrid

    def int8(self) -> Tensor:
        """The second codes that enter the product, int8 ``[out, in]`` (GridError as in ``decode_int8``)."""
        return self.grid.decode_int8(self.codes, self.group_ratio)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``s_c · w8``, ``[out, in]``: what the kernel multiplies with, not what the groups alone would give."""
        return self.int8().to(dtype) * self.channel_scale.to(dtype)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors; :meth:`from_packed` is the inverse."""
        unsigned = (self.codes.to(torch.int16) + _HALF_RANGE).to(torch.uint8)
        return {"codes": pack(unsigned, 4), "scale": self.channel_scale, "group_scale": self.group_ratio}

    @classmethod
    def from_packed(
        cls, tensors: dict[str, Tensor], grid: RequantizedGrid, shape: tuple[int, int]
    ) -> "RequantizedTensor":
        """Inverse of :meth:`packed`.

        Raises:
            GridError: tensors whose names or shapes do not belong to this grid and shape.
        """
        if set(tensors) != {"codes", "scale", "group_scale"}:
            raise GridError(f"a requantized weight has codes, scale and group_scale, got {sorted(tensors)}")
        if tuple(tensors["codes"].shape) != (shape[0], packed_width(shape[1], 4)):
            raise GridError(f"packed codes of shape {tuple(tensors['codes'].shape)} do not fit a weight {list(shape)}")
        scales = {"scale": (shape[0], 1), "group_scale": grid.scale_shape(shape)}
        if any(tuple(tensors[name].shape) != size for name, size in scales.items()):
            raise GridError(f"the scales do not fit a weight {list(shape)} in groups of {grid.group_size}")
        codes = unpack(tensors["codes"], 4, shape[1]).to(torch.int8) - _HALF_RANGE
        return cls(codes, tensors["scale"], tensors["group_scale"], grid)

    @classmethod
    def empty(cls, grid: RequantizedGrid, shape: tuple[int, int]) -> "RequantizedTensor":
        """A weight of zeros: the frame that a checkpoint's tensors are loaded into."""
        return cls(
            torch.zeros(shape, dtype=torch.int8),
            torch.ones(shape[0], 1),
            torch.ones(grid.scale_shape(shape), dtype=torch.float16),
            grid,
        )


def requantize(groups: QTensor) -> RequantizedTensor:
    """Add the second level to a weight in symmetric 4-bit groups.

    Args:
        groups: from any rounding on :meth:`RequantizedGrid.groups`, or on another symmetric 4-bit grid with groups along
            the inputs.

    Returns:
        The same codes, with the scales that a kernel needs.

    Raises:
        GridError: another grid, or scales that are not finite.

    >>> grid = RequantizedGrid(group_size=2)
    >>> w = torch.tensor([[1.0, -2.0, 0.5, 12.0]])
    >>> scale, _ = grid.groups().fit(w)
    >>> q = requantize(QTensor(grid.groups().encode(w, scale, None), scale, None, grid.groups()))
    >>> q.codes, q.int8()
    (tensor([[ 4, -7,  0,  7]], dtype=torch.int8), tensor([[ 12, -21,   0, 127]], dtype=torch.int8))
    """
    if not isinstance(groups, QTensor):
        raise GridError(f"a second level goes on a rounded weight (QTensor), got {type(groups).__name__}")
    grid = groups.grid
    if grid.bits != 4 or not grid.symmetric or grid.granularity != "group" or grid.axis != 1:
        raise GridError(f"a second level goes on symmetric 4-bit groups along the inputs, got {grid}")
    if not bool(torch.isfinite(groups.scale).all()):
        raise GridError("the group scales hold NaN or infinite values")
    s_g = groups.scale.to(torch.float64)
    largest = grid.grouped(groups.codes).to(torch.float64).abs().amax(-1)  # of the codes in each group
    top = (largest * s_g).amax(1, keepdim=True) / _TOP
    # A row of zeros may have any scale. Below the smallest normal float32 a scale could round to far too little.
    channel = torch.where(top == 0, 1.0, top.clamp(min=torch.finfo(torch.float32).tiny)).to(torch.float32)
    # A group of zeros has an arbitrary scale, which in a row of small weights would be an infinite ratio.
    ratio = torch.where(largest == 0, 0.0, s_g / channel.to(torch.float64)).to(torch.float16)
    return RequantizedTensor(groups.codes, channel, ratio, RequantizedGrid(grid.group_size))
