"""Grids of keys and values: a token of a head is one record of bytes, its codes and the scale that they need.

A cache grows by tokens, and what it holds is read again at every later step. So the scale of a token must be known when it
arrives and must not change afterwards: each token of each head has its own, and carries it along.

    record = [ codes, b bits each | scale, FP16 | zero point, FP16 ]         x ≈ s (c - z)

Scale and zero point are rounded to FP16 before the codes are computed, so that the codes fit what will be read. A cache of
records is one tensor of bytes: it is cut, joined and reordered like any other. Derived in chapter ``15-kv-cache``.

Serving engines also know a scale that is a constant of the layer, fitted before to a text. A record is then its codes alone,
and what is larger than the text had is cut off: :class:`KVStaticFloat8`.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats import fp8
from lqedu.formats.packing import pack, packed_width, unpack
from lqedu.formats.smallfloat import E4M3, check_floating
from lqedu.options import check_count, check_number


class Codes(NamedTuple):
    """Keys or values as they are stored, unpacked: they stand for ``scale * (codes - zero)``.

    Attributes:
        codes: what each code stands for before scale and zero point, float32 ``[..., head_dim]``.
        scale: float32 ``[..., 1]`` that FP16 holds exactly; ``None`` for 1.
        zero: as ``scale``; ``None`` for 0.
    """

    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None

    def values(self) -> Tensor:
        """Keys or values, float32 ``[..., head_dim]``."""
        x = self.codes if self.zero is None else self.codes - self.zero
        return x if self.scale is None else self.scale * x


class KVGrid(ABC):
    """What grids of keys and values share: each token of each head has its own scale, and all of it fits a record."""

    kind: ClassVar[str]
    _numbers: ClassVar[int]  # FP16 numbers of a record

    @abstractmethod
    def quantize(self, x: Tensor) -> Codes:
        """Codes, scale and zero point of keys or values ``[..., head_dim]``; nothing but zeros gets scale 1.

        Raises:
            GridError: no floating-point vectors, values that are not finite, or a scale beyond FP16.
        """

    @abstractmethod
    def _code_bytes(self, head_dim: int) -> int: ...

    @abstractmethod
    def _pack(self, codes: Tensor) -> Tensor: ...

    @abstractmethod
    def _unpack(self, packed: Tensor, head_dim: int) -> Tensor: ...

    def record_bytes(self, head_dim: int) -> int:
        """Bytes of a token of a head: codes, scale and zero point."""
        return self._code_bytes(head_dim) + 2 * self._numbers

    def encode(self, x: Tensor) -> Tensor:
        """Records of keys or values ``[..., head_dim]``, uint8 ``[..., record_bytes]`` (GridError as :meth:`quantize`)."""
        codes, *numbers = self.quantize(x)
        halves = [n.to(torch.float16).view(torch.uint8) for n in numbers if n is not None]
        return torch.cat([self._pack(codes), *halves], -1)

    def decode(self, records: Tensor, head_dim: int) -> Codes:
        """What :meth:`quantize` found, from its records.

        Raises:
            GridError: records of another size.
        """
        if records.dtype != torch.uint8 or records.shape[-1] != self.record_bytes(head_dim):
            raise GridError(
                f"{self} stores heads of {head_dim} in uint8 records of {self.record_bytes(head_dim)} bytes, "
                f"got {records.dtype} of {records.shape[-1]}; use a cache that was made for this model"
            )
        width = self._code_bytes(head_dim)
        if not self._numbers:
            return Codes(self._unpack(records, head_dim))
        numbers = records[..., width:].clone(memory_format=torch.contiguous_format)  # a view would need an even offset
        numbers = numbers.view(torch.float16).to(torch.float32)
        return Codes(self._unpack(records[..., :width], head_dim), *numbers.split(1, -1))

    def round_trip(self, x: Tensor) -> Tensor:
        """The values that the record of ``x`` stands for, in the dtype of ``x``."""
        return self.quantize(x).values().to(x.dtype)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :func:`kv_grid_from_dict` is the inverse."""
        return {"kind": self.kind} | asdict(self)


@dataclass(frozen=True)
class KVInt(KVGrid):
    """Unsigned integer codes with a scale and a zero point, both FP16.

    >>> grid = KVInt(bits=4)
    >>> x = torch.tensor([[-1.0, 0.5, 2.0, 0.0]])
    >>> grid.quantize(x).codes.int()
    tensor([[ 0,  8, 15,  5]], dtype=torch.int32)
    >>> grid.encode(x).shape, grid.record_bytes(4)     # 2 bytes of codes, 2 of scale, 2 of zero point
    (torch.Size([1, 6]), 6)

    Attributes:
        bits: 2 to 8.
        clip_ratio: the range from min(x, 0) to max(x, 0) is multiplied by this.
        zero_point: "float" puts the ends of the range on codes exactly, with any fraction FP16 holds (the kernels of
            QServe); "integer" rounds it to a code, so that zero is represented exactly (the reference of QuaRot).

    Raises:
        GridError: fields out of range.
    """

    bits: int = 4
    clip_ratio: float = 1.0
    zero_point: Literal["float", "integer"] = "float"

    kind: ClassVar[str] = "integer"
    _numbers: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_count("bits", self.bits, least=2, most=8, error=GridError)
        check_number("clip_ratio", self.clip_ratio, above=0, most=1, error=GridError)
        if self.zero_point not in ("float", "integer"):
            raise GridError(f"zero_point is 'float' or 'integer', got {self.zero_point!r}")

    def quantize(self, x: Tensor) -> Codes:
        """Codes 0 to 2**b - 1, and a zero point in the same range."""
        x, top = _vectors(x), (1 << self.bits) - 1
        lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = _half(self.clip_ratio * (hi - lo) / top)
        zero = (self.clip_ratio * lo.abs() / scale).clamp_(max=top)
        zero = torch.round(zero) if self.zero_point == "integer" else zero.to(torch.float16).to(torch.float32)
        return Codes(torch.round(x / scale + zero).clamp_(0, top), scale, zero)

    def _code_bytes(self, head_dim: int) -> int:
        return packed_width(head_dim, self.bits)

    def _pack(self, codes: Tensor) -> Tensor:
        return pack(codes.to(torch.uint8), self.bits)

    def _unpack(self, packed: Tensor, head_dim: int) -> Tensor:
        return unpack(packed, self.bits, head_dim).to(torch.float32)


@dataclass(frozen=True)
class KVFloat8(KVGrid):
    """E4M3 codes with an FP16 scale that takes ``max|x|`` to the largest code, 448; no zero point.

    >>> KVFloat8().quantize(torch.tensor([[7.0, 1.0, -0.1]])).codes
    tensor([[448.0000,  64.0000,  -6.5000]])
    """

    kind: ClassVar[str] = "e4m3"
    _numbers: ClassVar[int] = 1

    def quantize(self, x: Tensor) -> Codes:
        """The nearest values of E4M3; ties go to the even code."""
        x = _vectors(x)
        scale = _half(x.abs().amax(-1, keepdim=True) / E4M3.max)
        # a scale that was rounded down takes the largest value beyond the largest code: it saturates
        return Codes(fp8.decode(fp8.encode(x / scale)), scale)

    def _code_bytes(self, head_dim: int) -> int:
        return head_dim

    def _pack(self, codes: Tensor) -> Tensor:
        return fp8.encode(codes)

    def _unpack(self, packed: Tensor, head_dim: int) -> Tensor:
        return fp8.decode(packed)


@dataclass(frozen=True)
class KVStaticFloat8(KVFloat8):
    """E4M3 codes of what was divided by a constant of its layer before: no scale, no zero point, ±448 at most.

    The constants of a layer are kept with its attention, see :func:`lqedu.runtime.attention.set_attention_path`; files of
    compressed-tensors call them ``k_scale`` and ``v_scale``.

    >>> KVStaticFloat8().quantize(torch.tensor([[7.0, 1.1, -1000.0]]))
    Codes(codes=tensor([[   7.0000,    1.1250, -448.0000]]), scale=None, zero=None)
    """

    kind: ClassVar[str] = "e4m3_static"
    _numbers: ClassVar[int] = 0

    def quantize(self, x: Tensor) -> Codes:
        """The nearest values of E4M3; what is beyond them saturates."""
        x = _vectors(x)
        if not bool(torch.isfinite(x).all()):
            raise GridError("the keys or values hold NaN or infinities; check the model and its text")
        return Codes(fp8.decode(fp8.encode(x)))


def kv_grid(spec: int | str | KVGrid) -> KVGrid | None:
    """A grid from a short word for it.

    Args:
        spec: 2 to 8 (bits of integer codes), "fp8", "fp8-static" (a constant of the layer), 16 (no grid: the model's own floats), or a grid.

    Raises:
        GridError: none of these.

    >>> kv_grid(4), kv_grid("fp8"), kv_grid(16)
    (KVInt(bits=4, clip_ratio=1.0, zero_point='float'), KVFloat8(), None)
    """
    if isinstance(spec, KVGrid):
        return spec
    if isinstance(spec, str) and spec in (words := {"fp8": KVFloat8, "fp8-static": KVStaticFloat8}):
        return words[spec]()
    if not isinstance(spec, bool) and spec in (*range(2, 9), 16):
        return None if spec == 16 else KVInt(spec)
    raise GridError(f"keys and values take 2 to 8 bits, 'fp8', 'fp8-static' or 16, got {spec!r}")


def kv_grid_from_dict(d: dict[str, Any]) -> KVGrid:
    """Inverse of :meth:`KVGrid.to_dict`.

    Raises:
        GridError: an unknown kind, or unknown or missing fields.
    """
    kinds = {cls.kind: cls for cls in (KVInt, KVFloat8, KVStaticFloat8)}
    cls = kinds.get(str(d.get("kind"))) if isinstance(d, dict) else None
    if cls is None or d.keys() != cls().to_dict().keys():
        raise GridError(f"a grid of keys and values is of a kind in {sorted(kinds)} with its fields, got {d!r}")
    return cls(**{key: value for key, value in d.items() if key != "kind"})


def _vectors(x: Tensor) -> Tensor:
    """Keys or values in float32."""
    check_floating(x, "keys or values", GridError)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise GridError(f"keys and values are [..., head_dim] with a feature or more, got {list(x.shape)}")
    return x.to(torch.float32)


def _half(scale: Tensor) -> Tensor:
    """A scale rounded to FP16, in float32; 1 where there is nothing to scale."""
    half = scale.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise GridError(
            "the keys or values hold NaN or infinities, or their range is beyond an FP16 scale; check the model and its text"
        )
    return torch.where(half == 0, torch.ones_like(half), half).to(torch.float32)
