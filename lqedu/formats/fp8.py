"""FP8 grids for weights and activations: a scale moves the numbers under the format's ceiling, the format does the rest.

    x ≈ s · decode(code),   code = encode(x / s),   s = max|x| / 448   (E4M3; 57344 for E5M2)

An integer grid spends its codes evenly, so its scale sets the error of every number. A float grid has the same relative
error over many octaves, so its scale only has to keep the largest number finite and the small ones out of the subnormals.
Derived in chapter ``16-fp8``.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqedu.errors import GridError, UsageError
from lqedu.formats.integer import check_weight
from lqedu.formats.smallfloat import (
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    FORMATS,
    ExponentFormat,
    FloatFormat,
    check_floating,
)
from lqedu.formats.stored import StoredWeight
from lqedu.options import check_count

#: The formats that torch has a dtype for; its casts between them and wider floats are the definition, only faster.
DTYPES: dict[FloatFormat, torch.dtype] = {
    E4M3: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
    E4M3FNUZ: torch.float8_e4m3fnuz,
    E5M2FNUZ: torch.float8_e5m2fnuz,
}
_SEARCHED = 16  # scales tried over one octave


def encode(x: Tensor, form: FloatFormat = E4M3, *, saturate: bool = True) -> Tensor:
    """Nearest codes of values, uint8 of the same shape, see :meth:`lqedu.formats.smallfloat.FloatFormat.encode`.

    Saturating casts from 32 bits or fewer go through torch, which gives the same bits for all numbers. A NaN becomes some NaN:
    torch keeps its sign, but may make all of a bfloat16 tensor's negative (255). torch's cast alone will not do: what it
    makes of values beyond the largest has changed between versions, and it rounds float64 twice.

    Raises:
        UsageError: no floating-point tensor of 16 bits or more, or a form that is no format.

    >>> encode(torch.tensor([1.0, -448.0, 1000.0]))
    tensor([ 56, 254, 126], dtype=torch.uint8)
    """
    check_floating(x, "values to encode")
    _check_form(form)
    if not saturate or form not in DTYPES or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return form.encode(x, saturate=saturate)
    top = torch.finfo(DTYPES[form]).max
    return x.clamp(-top, top).to(DTYPES[form]).view(torch.uint8)


def decode(codes: Tensor, form: FloatFormat = E4M3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes in ``dtype``, see :meth:`lqedu.formats.smallfloat.FloatFormat.decode`.

    >>> decode(torch.tensor([56, 254, 1], dtype=torch.uint8))
    tensor([ 1.0000e+00, -4.4800e+02,  1.9531e-03])
    """
    _check_form(form)
    if form not in DTYPES or getattr(codes, "dtype", None) != torch.uint8:
        return form.decode(codes, dtype)
    return codes.view(DTYPES[form]).to(dtype)


def check_scales(tensors: Mapping[str, Tensor]) -> None:
    """Refuse scales of weights (``scale``) and static scales of inputs (``input_scale``) that scale nothing (GridError).

    Args:
        tensors: the buffers of an FP8 layer or the packed tensors of an FP8 weight, by name.
    """
    for name in ("scale", "input_scale"):
        scale = tensors.get(name)
        if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise GridError(f"{name} holds zero, negative, infinite or NaN values; scales are above 0, quantize again")


def check_finite(x: Tensor) -> None:
    """Refuse activations that hold NaN or infinities (GridError)."""
    if not bool(torch.isfinite(x).all()):
        raise GridError(f"the activations {list(x.shape)} hold NaN or infinite values")


@dataclass(frozen=True)
class Float8Grid:
    """A frozen description of an FP8 grid for weights ``[out, in]``, with float32 scales.

    >>> Float8Grid("channel").scale_shape((576, 1536)), Float8Grid("block").scale_shape((576, 1536))
    ((576, 1), (5, 12))

    Attributes:
        granularity: "tensor", "channel" (output rows) or "block" (square tiles of ``block_size``; the last ones of a row
            or column may be smaller).
        block_size: 128, which kernels expect; only read for "block".
        format: "E4M3" or another 8-bit format of :data:`DTYPES`, by name.
        search: "none" puts the largest weight on the largest code; "mse" tries 16 scales from there to twice that, and takes
            the one with the least squared error. Larger ones would only repeat them (a factor of two moves the grid
            onto itself), smaller ones clip.

    Raises:
        GridError: fields that are none of these.
    """

    granularity: Literal["tensor", "channel", "block"] = "channel"
    block_size: int = 128
    format: str = "E4M3"
    search: Literal["none", "mse"] = "none"

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "channel", "block"):
            raise GridError(f"granularity is 'tensor', 'channel' or 'block', got {self.granularity!r}")
        check_count("block_size", self.block_size, least=1, error=GridError)
        _format(self.format)
        if self.search not in ("none", "mse"):
            raise GridError(f"search is 'none' or 'mse', got {self.search!r}")

    def tile(self, weight_shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that share a scale; the last tiles of a row or column may be smaller."""
        if len(weight_shape) != 2 or 0 in weight_shape:
            raise GridError(f"a weight has shape [out, in] with both at least 1, got {list(weight_shape)}")
        rows, columns = weight_shape
        return {"tensor": (rows, columns), "channel": (1, columns)}.get(self.granularity, (self.block_size,) * 2)

    def scale_shape(self, weight_shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales: how many tiles there are along the outputs and inputs."""
        height, width = self.tile(weight_shape)
        return -(-weight_shape[0] // height), -(-weight_shape[1] // width)

    def nbytes(self, weight_shape: tuple[int, int]) -> int:
        """Bytes of codes and scales of a weight ``[out, in]``."""
        rows, columns = self.scale_shape(weight_shape)
        return weight_shape[0] * weight_shape[1] + 4 * rows * columns

    def bits_per_weight(self, weight_shape: tuple[int, int]) -> float:
        """Stored bits per weight, scales counted.

        >>> Float8Grid("block").bits_per_weight((4096, 4096))
        8.001953125
        """
        return 8 * self.nbytes(weight_shape) / (weight_shape[0] * weight_shape[1])

    def fit(self, weight: Tensor) -> Tensor:
        """Scales of a weight ``[out, in]``, float32 of :meth:`scale_shape`; a tile of zeros gets scale 1.

        Raises:
            GridError: weights that are not finite or not floating point, or whose scale is beyond float32.
        """
        check_floating(weight, "a weight", GridError)
        check_weight(weight)
        x = self._tiled(_working(weight))
        scale = _scale(x.abs().amax((1, 3)), self.format)
        if self.search == "none":
            return scale
        best, least = scale, torch.full_like(scale, torch.inf, dtype=x.dtype)
        for step in range(_SEARCHED):
            candidate = scale * (1 + step / _SEARCHED)
            error = (self._values(x, candidate) - x).square().sum((1, 3))
            best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
        return best

    def encode(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Nearest codes, uint8 ``[out, in]``, with scales as :meth:`fit` returns them.

        Raises:
            GridError: no floating-point weight, or scales of another shape or that are not finite and above 0.
        """
        check_floating(weight, "a weight", GridError)
        self._check_scale(scale, tuple(weight.shape))
        x = self._tiled(_working(weight))
        codes = encode(x / scale[:, None, :, None].to(x.dtype), _format(self.format))
        return _untiled(codes, tuple(weight.shape))

    def decode(self, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """``s · decode(code)`` in ``dtype``, ``[out, in]``; multiplied in float32 or higher.

        Raises:
            UsageError: codes that are not uint8.
            GridError: scales as in :meth:`encode`.
        """
        self._check_scale(scale, tuple(getattr(codes, "shape", ())))
        working = torch.promote_types(dtype, torch.float32)
        x = decode(self._tiled(codes), _format(self.format), working) * scale[:, None, :, None].to(working)
        return _untiled(x, tuple(codes.shape)).to(dtype)

    def _check_scale(self, scale: Tensor, weight_shape: tuple[int, int]) -> None:
        check_floating(scale, "scales of an FP8 grid", GridError)
        want = self.scale_shape(weight_shape)
        if tuple(scale.shape) != want:
            raise GridError(f"scales of a weight {list(weight_shape)} have shape {want}, got {tuple(scale.shape)}")
        check_scales({"scale": scale})

    def _tiled(self, x: Tensor) -> Tensor:
        """``[out, in]`` as ``[tile rows, height, tile columns, width]``, filled up with zeros."""
        height, width = self.tile(tuple(x.shape))
        x = pad(x, (0, -x.shape[1] % width, 0, -x.shape[0] % height))
        return x.unflatten(1, (-1, width)).unflatten(0, (-1, height))

    def _values(self, x: Tensor, scale: Tensor) -> Tensor:
        s, form = scale[:, None, :, None].to(x.dtype), _format(self.format)
        return decode(encode(x / s, form), form, x.dtype) * s

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "Float8Grid":
        """Inverse of :meth:`to_dict`.

        Raises:
            GridError: unknown or missing fields, or values that make no grid.
        """
        known = {f.name for f in fields(cls)}
        if not isinstance(d, dict) or set(d) != known:
            raise GridError(f"an FP8 grid has the fields {sorted(known)}, got {d!r}")
        return cls(**d)


@dataclass(frozen=True)
class Float8Tensor(StoredWeight):
    """A weight on an FP8 grid.

    Attributes:
        codes: uint8 ``[out, in]``.
        scale: float32, ``grid.scale_shape``; it multiplies (files of others call it ``weight_scale``, and
            ``weight_scale_inv`` too).
        grid: the grid.

    Raises:
        GridError: tensors whose dtypes or shapes do not belong to the grid, or scales that are not finite and above 0.
    """

    codes: Tensor
    scale: Tensor
    grid: Float8Grid

    def __post_init__(self) -> None:
        _check_grid(self.grid)
        for name, tensor in (("codes", self.codes), ("scale", self.scale)):
            if not isinstance(tensor, Tensor):
                raise GridError(f"{name} of an FP8 weight is a tensor, got {type(tensor).__name__}")
        want = self.grid.scale_shape(tuple(self.codes.shape))
        if self.codes.dtype != torch.uint8:
            raise GridError(f"codes of an FP8 grid are uint8, got {self.codes.dtype}")
        if tuple(self.scale.shape) != want or self.scale.dtype != torch.float32:
            raise GridError(
                f"scales of this grid have shape {want} and dtype torch.float32, "
                f"got {tuple(self.scale.shape)} and {self.scale.dtype}"
            )
        check_scales({"scale": self.scale})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``s · decode(code)``, ``[out, in]``."""
        return self.grid.decode(self.codes, self.scale, dtype)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors, as they are: a code fills its byte. :meth:`from_packed` is the inverse."""
        return {"codes": self.codes, "scale": self.scale}

    @classmethod
    def from_packed(cls, tensors: dict[str, Tensor], grid: Float8Grid, shape: tuple[int, int]) -> "Float8Tensor":
        """Inverse of :meth:`packed`.

        Raises:
            GridError: tensors whose names, dtypes or shapes do not belong to this grid and shape, or impossible scales.
        """
        if set(tensors) != {"codes", "scale"}:
            raise GridError(f"an FP8 weight has the tensors codes and scale, got {sorted(tensors)}")
        if tuple(tensors["codes"].shape) != tuple(shape):
            raise GridError(f"codes of shape {tuple(tensors['codes'].shape)} do not fit a weight {list(shape)}")
        return cls(tensors["codes"], tensors["scale"], grid)

    @classmethod
    def empty(cls, grid: Float8Grid, shape: tuple[int, int]) -> "Float8Tensor":
        """A weight of zeros: the frame that a checkpoint's tensors are loaded into."""
        return cls(torch.zeros(shape, dtype=torch.uint8), torch.ones(grid.scale_shape(shape)), grid)


def float8_quantize(weight: Tensor, grid: Float8Grid) -> Float8Tensor:
    """Round a weight ``[out, in]`` to nearest on an FP8 grid fitted to it.

    Raises:
        GridError: see :meth:`Float8Grid.fit`.

    >>> float8_quantize(torch.tensor([[1.0, -2.0, 0.3, 7.0]]), Float8Grid()).dequantize()
    tensor([[ 1.0000, -2.0000,  0.3125,  7.0000]])
    """
    check_floating(weight, "a weight", GridError)
    _check_grid(grid)
    weight = weight.detach()
    scale = grid.fit(weight)
    return Float8Tensor(grid.encode(weight, scale), scale, grid)


@dataclass(frozen=True)
class Float8ActivationGrid:
    """A frozen description of how activations ``[..., in]`` become FP8 codes; the interface of ``ActivationGrid``.

    >>> Float8ActivationGrid("group").fit(torch.ones(3, 576))[0].shape      # 576 = 4 · 128 + 64
    torch.Size([3, 5])

    Attributes:
        granularity: "token" (all features of a token share a scale), "tensor" (all tokens share it too) or "group"
            (``group_size`` consecutive features of a token; the last group may be smaller).
        static: scales come from calibration, and what lies beyond saturates, infinities too; only with granularity
            "tensor". A layer refuses inputs with NaN or infinities before they are encoded, as :meth:`fit` does.
        group_size: 128, which kernels expect; only read for "group".
        format: "E4M3" or another 8-bit format of :data:`DTYPES`, by name.

    Raises:
        GridError: fields that contradict each other, saying which one to change.
    """

    granularity: Literal["token", "tensor", "group"] = "token"
    static: bool = False
    group_size: int = 128
    format: str = "E4M3"

    kind: ClassVar[str] = "float8"

    def __post_init__(self) -> None:
        if self.granularity not in ("token", "tensor", "group"):
            raise GridError(f"granularity is 'token', 'tensor' or 'group', got {self.granularity!r}")
        if not isinstance(self.static, bool):
            raise GridError(f"static is True or False, got {self.static!r}")
        if self.static and self.granularity != "tensor":
            raise GridError("a static scale cannot know the tokens to come; use granularity='tensor' or static=False")
        check_count("group_size", self.group_size, least=1, error=GridError)
        _format(self.format)

    def fit(self, x: Tensor) -> tuple[Tensor, None]:
        """Dynamic scales, ``[..., 1]`` per token, ``[1]`` per tensor, ``[..., groups]``; float32. There is no zero point.

        Raises:
            GridError: no floating-point activations ``[..., in]`` with a feature or more (and a token or more where all
                share a scale), or activations that hold NaN or infinities.
        """
        check_floating(x, "activations", GridError)
        if x.dim() == 0 or x.shape[-1] == 0 or (self.granularity == "tensor" and x.numel() == 0):
            raise GridError(f"activations have shape [..., in] with a token and a feature or more, got {list(x.shape)}")
        magnitude = x.to(torch.float32).abs()
        if self.granularity == "tensor":
            amax = magnitude.reshape(-1).amax(-1, keepdim=True)
        elif self.granularity == "token":
            amax = magnitude.amax(-1, keepdim=True)
        else:
            amax = pad(magnitude, (0, -x.shape[-1] % self.group_size)).unflatten(-1, (-1, self.group_size)).amax(-1)
        if not bool(torch.isfinite(amax).all()):  # cheaper than check_finite: the largest tells of all
            check_finite(x)
        return _scale(amax, self.format), None

    def encode(self, x: Tensor, scale: Tensor, zero: None = None) -> Tensor:
        """Nearest codes of ``x / s``, uint8 of the shape of ``x``; beyond the largest value they saturate.

        Raises:
            GridError: no floating-point activations, or scales that are not one for each of their groups.
        """
        check_floating(x, "activations", GridError)
        return encode(x.to(torch.float32) / self._spread(scale, x.shape[-1]), _format(self.format))

    def decode(self, codes: Tensor, scale: Tensor, zero: None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """``s · decode(code)`` in ``dtype``."""
        return (decode(codes, _format(self.format)) * self._spread(scale, codes.shape[-1])).to(dtype)

    def round_trip(self, x: Tensor) -> Tensor:
        """The values that codes with dynamic scales stand for, in the dtype of ``x``: a simulation, nothing is stored."""
        scale, _ = self.fit(x)
        return self.decode(self.encode(x, scale), scale, dtype=x.dtype)

    def _spread(self, scale: Tensor, features: int) -> Tensor:
        check_floating(scale, "scales of activations", GridError)
        groups = -(-features // self.group_size) if self.granularity == "group" else 1
        if scale.dim() == 0 or scale.shape[-1] != groups:
            raise GridError(f"{features} features have scales [..., {groups}] on this grid, got {list(scale.shape)}")
        return scale.repeat_interleave(self.group_size, -1)[..., :features] if self.granularity == "group" else scale

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        return {"kind": self.kind} | asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "Float8ActivationGrid":
        """Inverse of :meth:`to_dict`.

        Raises:
            GridError: unknown or missing fields, or values that contradict each other.
        """
        known = {"kind"} | {f.name for f in fields(cls)}
        if not isinstance(d, dict) or set(d) != known or d["kind"] != cls.kind:
            raise GridError(f"an FP8 activation grid has the fields {sorted(known)} and kind {cls.kind!r}, got {d!r}")
        return cls(**{key: value for key, value in d.items() if key != "kind"})


def _check_form(form: object) -> None:
    if not isinstance(form, FloatFormat | ExponentFormat):
        raise UsageError(f"form is a format such as lqedu.formats.smallfloat.E4M3, got {form!r}")


def _check_grid(grid: object) -> None:
    if not isinstance(grid, Float8Grid):
        raise GridError(f"grid is a Float8Grid, such as Float8Grid('channel'), got {grid!r}")


def _format(name: str) -> FloatFormat:
    form = FORMATS.get(name) if isinstance(name, str) else None
    if form not in DTYPES:
        raise GridError(f"format is one of {', '.join(f.name for f in DTYPES)}, got {name!r}")
    return form


def _scale(amax: Tensor, name: str) -> Tensor:
    """``max|x| / largest value`` in float32, at least its smallest normal number; 1 where there is nothing but zeros."""
    exact = amax / torch.finfo(DTYPES[_format(name)]).max
    scale = exact.to(torch.float32)
    if not bool(torch.isfinite(scale).all()):
        raise GridError(f"a scale of {float(exact.max()):.3g} overflows float32; rescale the weight")
    return torch.where(amax == 0, 1.0, scale.clamp(min=torch.finfo(torch.float32).tiny))


def _untiled(x: Tensor, shape: tuple[int, int]) -> Tensor:
    return x.flatten(2).flatten(0, 1)[: shape[0], : shape[1]].contiguous()


def _working(x: Tensor) -> Tensor:
    """float64 stays float64; everything else is computed in float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)
