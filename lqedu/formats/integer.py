"""Integer grids: which values can a low-bit weight take, and how are they fitted to the data?

Every integer format in the book is affine, ``w_hat = s * (q - z)``, and differs in four things: how many codes there
are (``bits``), whether zero sits in the middle (``symmetric``), how many weights share one scale (``granularity``,
``group_size``), and by which formula the scale follows from the data (``convention``, ``search``).

Derived in chapter ``02-grids``.
"""

from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats.packing import packed_width
from lqedu.options import check_count


class ScaleConvention(Enum):
    """The formula that turns a range of weights into a scale. Real tools disagree, so every grid names its own.

    ``a`` is max|w|, ``lo`` and ``hi`` are the smallest and largest weight, ``b`` the bits; the number is the scale of
    the weights (-1, 0.5) at 4 bits.
    """

    #: ``(max(hi, 0) - min(lo, 0)) / (2**b - 1)`` = 0.1, zero is always representable. GPTQ, llm-compressor, GPTQModel.
    MINMAX_ZERO = "minmax_zero"
    #: ``(hi - lo) / (2**b - 1)`` = 0.1, zero may fall outside the range. AWQ.
    MINMAX = "minmax"
    #: ``a / (2**(b-1) - 1/2)`` = 1/7.5: both ends of [-8, 7] reach half a step past the data. GPTQ ``--sym``,
    #: compressed-tensors, QQQ per group; int8: a/127.5.
    FULL_RANGE = "full_range"
    #: ``a / (2**(b-1) - 1)`` = 1/7: +a is hit exactly, the code -8 is used only after compensation. QuaRot, QQQ per
    #: channel; int8: a/127 (SmoothQuant).
    MAX_CODE = "max_code"
    #: ``2 * 2.4 * rms(w) / (2**b - 1)``: a range of 2.4 standard deviations to either side of zero, whatever the
    #: largest weight; zero lies halfway between the two middle codes, so the zero point is a float. QuIP.
    RMS = "rms"


_SYMMETRIC = (ScaleConvention.FULL_RANGE, ScaleConvention.MAX_CODE)
_RMS_RANGE = 2.4
_MSE_POINTS, _MSE_SHRINK, _MSE_NORM = 100, 0.8, 2.4  # the reference GPTQ's search: 80 ranges down to 21 %, |error|^2.4


@dataclass(frozen=True)
class IntGrid:
    """A frozen description of an integer grid for weights ``[out, in]``.

    Shapes of the scale ``s`` (and of the integer zero point ``z`` of an asymmetric grid):

    >>> IntGrid(4, granularity="group", group_size=64).scale_shape((8, 128))   # one scale per 64 inputs of a row
    (8, 2)
    >>> IntGrid(4, granularity="channel").scale_shape((8, 128))                 # one per output channel
    (8, 1)
    >>> IntGrid(8, symmetric=True, granularity="tensor").scale_shape((8, 128))  # one for the matrix
    (1, 1)

    Attributes:
        bits: 2 to 8.
        symmetric: signed codes ``[-2**(b-1), 2**(b-1) - 1]`` with z = 0 that is not stored; otherwise unsigned codes
            ``[0, 2**b - 1]`` with a stored integer zero point.
        granularity: "tensor", "channel" (output rows) or "group" (``group_size`` consecutive inputs of a row).
        group_size: weights that share a scale; must divide the inputs (outputs for axis 0); only with "group".
        axis: 1 for groups of consecutive inputs of a row, 0 for groups of consecutive outputs of a column.
        zero_point: "integer" stores a code of ``bits`` bits, so that zero is a grid point where the range holds it;
            "float" stores ``z`` in ``scale_dtype``.
        convention: formula of the scale; ``None`` means MINMAX_ZERO (asymmetric) or FULL_RANGE (symmetric).
        scale_dtype: dtype in which scales are stored. Scales are rounded to it *before* codes are computed.
        search: "none" takes the range of the data; "mse" shrinks it to the range with the least sum of
            ``|w - w_hat|**2.4`` (80 candidates, the reference GPTQ's ``mse=True``).

    Raises:
        GridError: when the fields contradict each other, saying which one to change.
    """

    bits: int = 4
    symmetric: bool = False
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = None
    convention: ScaleConvention | None = None
    scale_dtype: torch.dtype = torch.float16
    search: Literal["none", "mse"] = "none"
    axis: Literal[0, 1] = 1
    zero_point: Literal["integer", "float"] = "integer"

    def __post_init__(self) -> None:
        check_count("bits", self.bits, least=2, most=8, error=GridError)
        if self.granularity not in ("tensor", "channel", "group"):
            raise GridError(f"granularity is 'tensor', 'channel' or 'group', got {self.granularity!r}")
        if self.granularity == "group":
            check_count("group_size", self.group_size, least=1, error=GridError)
        if self.granularity != "group" and self.group_size is not None:
            raise GridError(f"group_size={self.group_size} needs granularity='group', got {self.granularity!r}")
        if self.axis not in (0, 1) or (self.axis == 0 and self.granularity != "group"):
            raise GridError(f"axis is 0 or 1, and 0 needs granularity='group', got axis={self.axis!r}")
        if self.zero_point not in ("integer", "float"):
            raise GridError(f"zero_point is 'integer' or 'float', got {self.zero_point!r}")
        if self.symmetric and self.zero_point == "float":
            raise GridError("a symmetric grid has no zero point; zero_point='float' needs symmetric=False")
        if self.search not in ("none", "mse"):
            raise GridError(f"search is 'none' or 'mse', got {self.search!r}")
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise GridError(f"scale_dtype must be a floating dtype of 16 bits or more, got {self.scale_dtype}")
        if self.convention is None:
            default = ScaleConvention.FULL_RANGE if self.symmetric else ScaleConvention.MINMAX_ZERO
            object.__setattr__(self, "convention", default)
        if not isinstance(self.convention, ScaleConvention):
            raise GridError(f"convention must be a ScaleConvention, got {self.convention!r}")
        if self.symmetric != (self.convention in _SYMMETRIC):
            kind = "symmetric" if self.symmetric else "asymmetric"
            choices = [c.name for c in ScaleConvention if (c in _SYMMETRIC) == self.symmetric]
            raise GridError(f"{self.convention.name} does not fit a {kind} grid; choose {' or '.join(choices)}")
        if self.convention is ScaleConvention.RMS and (self.zero_point != "float" or self.search != "none"):
            raise GridError("the convention RMS has a float zero point and no search")

    # --- the codes -----------------------------------------------------------------------------------------------

    @property
    def code_min(self) -> int:
        """Smallest code: -2**(b-1) symmetric, 0 asymmetric."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def code_max(self) -> int:
        """Largest code: 2**(b-1) - 1 symmetric, 2**b - 1 asymmetric."""
        return self.code_min + self.levels - 1

    @property
    def levels(self) -> int:
        """Number of codes, 2**b."""
        return 1 << self.bits

    @property
    def code_dtype(self) -> torch.dtype:
        """int8 for signed codes, uint8 for unsigned ones."""
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def zero_dtype(self) -> torch.dtype:
        """uint8 for integer zero points, ``scale_dtype`` for float ones."""
        return self.scale_dtype if self.zero_point == "float" else torch.uint8

    # --- shapes and storage --------------------------------------------------------------------------------------

    def columns_per_scale(self, columns: int) -> int:
        """How many consecutive inputs of a row share a scale, for rows of ``columns`` inputs.

        Raises:
            GridError: groups run along the outputs, so that no two inputs of a row share a scale.
        """
        if self.axis == 0:
            raise GridError("this algorithm rounds column by column and needs groups along the inputs; use axis=1")
        return self.group_size if self.granularity == "group" else columns

    def scale_shape(self, weight_shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scale (and zero point) of a weight of shape ``[out, in]``.

        Raises:
            GridError: the weight is not two-dimensional, is empty, or the group size does not divide its inputs
                (its outputs for axis 0).
        """
        if len(weight_shape) != 2 or 0 in weight_shape:
            raise GridError(f"a weight has shape [out, in] with both at least 1, got {list(weight_shape)}")
        rows, columns = weight_shape
        if self.granularity == "tensor":
            return (1, 1)
        if self.granularity == "channel":
            return (rows, 1)
        length, what = (columns, "inputs") if self.axis == 1 else (rows, "outputs")
        if length % self.group_size:
            divisors = [g for g in (128, 64, 32, 16, 8) if length % g == 0]
            raise GridError(
                f"group_size {self.group_size} does not divide the {length} {what} of a weight {list(weight_shape)}; "
                f"use {' or '.join(map(str, divisors)) or 'per-channel scales'}"
            )
        return (rows, columns // self.group_size) if self.axis == 1 else (rows // self.group_size, columns)

    def nbytes(self, weight_shape: tuple[int, int]) -> int:
        """Bytes of the packed codes, the scales and the packed zero points of a weight ``[out, in]``.

        >>> IntGrid(4, granularity="group", group_size=64).nbytes((8, 128))   # 512 codes + 32 scales + 8 zeros
        552
        """
        rows, columns = weight_shape
        scale_rows, scale_columns = self.scale_shape(weight_shape)
        codes = rows * packed_width(columns, self.bits)
        scales = scale_rows * scale_columns * self.scale_dtype.itemsize
        if self.symmetric:
            return codes + scales
        return (
            codes
            + scales
            + (scales if self.zero_point == "float" else scale_rows * packed_width(scale_columns, self.bits))
        )

    def bits_per_weight(self, weight_shape: tuple[int, int]) -> float:
        """Stored bits per weight, scales and zero points counted.

        >>> IntGrid(4, granularity="group", group_size=64).bits_per_weight((4096, 4096))   # 4 + (16 + 4) / 64
        4.3125
        """
        return 8 * self.nbytes(weight_shape) / (weight_shape[0] * weight_shape[1])

    # --- fit, encode, decode -------------------------------------------------------------------------------------

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of a weight.

        Args:
            weight: ``[out, in]``, a floating dtype; computed in float32, or float64 if it is float64.

        Returns:
            ``(scale, zero)`` of :meth:`scale_shape`; the scale in ``scale_dtype``, the zero point in ``zero_dtype``
            (``None`` for a symmetric grid). A group of zeros gets scale 1, so that it decodes to zeros.

        Raises:
            GridError: weights that are not finite, not floating point, or whose scale overflows ``scale_dtype``.
        """
        check_weight(weight)
        x = self.grouped(_working(weight))  # [..., g], leading axes as scale_shape
        if self.convention is ScaleConvention.RMS:
            hi = _RMS_RANGE * x.square().mean(-1).sqrt()
            return self._scale_and_zero(-hi, hi)
        lo, hi = x.amin(-1), x.amax(-1)
        if self.search == "mse":
            lo, hi = self._search(x, lo, hi)
        return self._scale_and_zero(lo, hi)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Nearest codes, see :meth:`nearest_code`.

        Args:
            weight: ``[out, in]``.
            scale, zero: as :meth:`fit` returns them.

        Returns:
            int8 (symmetric) or uint8 codes, ``[out, in]``.
        """
        x = self.grouped(_working(weight))
        z = 0 if zero is None else zero.to(x.dtype).unsqueeze(-1)
        q = self.nearest_code(x, scale.to(x.dtype).unsqueeze(-1), z)
        return self.ungrouped(q.to(self.code_dtype), weight.shape)

    def nearest_code(self, w: Tensor, s: Tensor, z: Tensor | float) -> Tensor:
        """``clamp(round(w / s) + z)``, or ``clamp(round(w / s + z))`` for a float ``z``; ties go to the even integer.

        ``s`` and ``z`` broadcast against ``w``, and the codes come in w's dtype: the rule itself, for callers that keep
        scales in the dtype they compute in. :meth:`encode` is the usual way in.
        """
        if self.zero_point == "float":
            return (w / s).add_(z).round_().clamp_(self.code_min, self.code_max)
        return torch.round(w / s).add_(z).clamp_(self.code_min, self.code_max)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """``w_hat = s * (q - z)`` in ``dtype``, ``[out, in]``."""
        q = self.grouped(codes).to(dtype)
        if zero is not None:
            q = q - zero.to(dtype).unsqueeze(-1)
        return self.ungrouped(q * scale.to(dtype).unsqueeze(-1), codes.shape)

    def grouped(self, x: Tensor) -> Tensor:
        """``[out, in]`` as ``[*scale_shape, g]``: the weights that share a scale lie along the last axis.

        The result may share memory with ``x``.
        """
        rows, columns = self.scale_shape(tuple(x.shape))
        if self.axis == 0:
            return x.reshape(rows, self.group_size, columns).transpose(1, 2)
        return x.reshape(rows, columns, -1)

    def ungrouped(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Inverse of :meth:`grouped`, for a weight of ``shape`` ``[out, in]``."""
        return (x.transpose(1, 2) if self.axis == 0 else x).reshape(shape)

    def _scale_and_zero(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.symmetric:
            top = (self.levels - 1) / 2 if self.convention is ScaleConvention.FULL_RANGE else self.code_max
            exact = torch.maximum(hi.abs(), lo.abs()) / top
        else:
            if self.convention is ScaleConvention.MINMAX_ZERO:
                lo, hi = lo.clamp(max=0), hi.clamp(min=0)
            exact = (hi - lo) / (self.levels - 1)
        scale = exact.to(self.scale_dtype)
        if not bool(torch.isfinite(scale).all()):
            raise GridError(
                f"a scale of {float(exact.max()):.3g} overflows {self.scale_dtype}; "
                "store scales in a wider scale_dtype or rescale the weight"
            )
        # A constant group has no range, and a range below the smallest float16 rounds to no scale: any scale will do.
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        if self.symmetric:
            return scale, None
        if self.zero_point == "float":
            return self._float_zero(lo, scale)
        if self.convention is ScaleConvention.MINMAX:  # a constant is no range, but its own size is a step
            constant = (hi == lo) & (lo != 0)
            scale = torch.where(constant, lo.abs().to(self.scale_dtype), scale)
        zero = torch.round(-lo / scale.to(lo.dtype)).clamp_(0, self.code_max).to(torch.uint8)
        return scale, zero

    def _float_zero(self, lo: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``z = -lo / s`` in ``scale_dtype``, so that ``lo`` decodes from code 0.

        A group much narrower than its distance from zero has a ``z`` whose own rounding error, relative to a step, is
        too large: such a group is stored as the constant it nearly is.
        """
        zero = -lo / scale.to(lo.dtype)
        constant = zero.abs() > 0.25 / torch.finfo(self.scale_dtype).eps
        zero = torch.where(constant, -lo, zero).to(self.scale_dtype)
        return torch.where(constant, torch.ones_like(scale), scale), zero

    def _search(self, x: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """The shrunk range of each group with the least sum of |error|^2.4."""
        if self.convention is not ScaleConvention.MINMAX:
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)  # shrink towards zero, as the reference does
        best_lo, best_hi, best = lo, hi, torch.full_like(lo, torch.inf)
        for i in range(int(_MSE_SHRINK * _MSE_POINTS)):
            p = 1 - i / _MSE_POINTS
            scale, zero = self._scale_and_zero(p * lo, p * hi)
            s, z = (None if t is None else t.to(x.dtype).unsqueeze(-1) for t in (scale, zero))
            q = self.nearest_code(x, s, 0 if z is None else z)
            error = (s * (q if z is None else q - z) - x).abs().pow_(_MSE_NORM).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            best_lo, best_hi = torch.where(better, p * lo, best_lo), torch.where(better, p * hi, best_hi)
        return best_lo, best_hi

    # --- as data -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        d = asdict(self)
        return d | {"convention": self.convention.value, "scale_dtype": str(self.scale_dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, d: dict) -> "IntGrid":
        """Inverse of :meth:`to_dict`.

        Raises:
            GridError: unknown or missing fields, or values that contradict each other.
        """
        known = {f.name for f in fields(cls)}
        if set(d) != known:
            raise GridError(f"an integer grid has the fields {sorted(known)}, got {sorted(d)}")
        try:
            convention = ScaleConvention(d["convention"])
            scale_dtype = getattr(torch, d["scale_dtype"])
        except (ValueError, AttributeError, TypeError):
            raise GridError(
                f"unknown convention or scale_dtype in a stored grid: {d['convention']!r}, {d['scale_dtype']!r}"
            ) from None
        return cls(**(d | {"convention": convention, "scale_dtype": scale_dtype}))


def check_weight(weight: Tensor) -> None:
    """Refuse what no grid can describe: integer dtypes, empty or non-matrix shapes, NaN and infinities (GridError)."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise GridError(
            f"a weight must be a floating-point tensor, got {getattr(weight, 'dtype', type(weight).__name__)}"
        )
    if weight.dim() != 2 or weight.numel() == 0:
        raise GridError(f"a weight has shape [out, in] with both at least 1, got {list(weight.shape)}")
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise GridError(
            f"the weight {list(weight.shape)} holds {bad} NaN or infinite values; repair it before quantizing"
        )


def _working(x: Tensor) -> Tensor:
    """float64 stays float64; everything else is computed in float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)
