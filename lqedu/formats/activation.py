"""Activation grids: which codes do activations get, and who chooses their scale, the token at hand or a calibration?

Weights are quantized once and at leisure; activations arrive while the model runs. A *dynamic* scale is fitted to each
token (or to the tensor) as it comes, a *static* one was fitted to calibration text and is a constant of the layer.

    x ≈ s * (q - z),   q signed in [-2**(b-1), 2**(b-1) - 1],   z = 0 on a symmetric grid

Codes are signed in both cases, because integer matrix units multiply int8 by int8. Derived in chapter
``08-smoothquant``.
"""

from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.options import check_count, check_number


@dataclass(frozen=True)
class ActivationGrid:
    """A frozen description of how activations ``[..., in]`` become codes of at most 8 bits.

    >>> x = torch.tensor([[0.6, -1.0, 0.25], [8.0, 5.0, -2.0]])
    >>> grid = ActivationGrid(bits=4)
    >>> scale, zero = grid.fit(x)                     # one scale a token
    >>> grid.encode(x, scale, zero)
    tensor([[ 4, -7,  2],
            [ 7,  4, -2]], dtype=torch.int8)

    Attributes:
        bits: 2 to 8.
        symmetric: range ``± max|x|``, its end on code 2**(b-1) - 1 (the rule MAX_CODE of weights), no zero point. Otherwise the
            range from min(x, 0) to max(x, 0) and an integer zero point.
        granularity: "token" (all features of a token share a scale) or "tensor" (all tokens share it too).
        static: scales come from calibration; only with granularity "tensor".
        clip_ratio: the range is multiplied by this before the scale is computed.

    Raises:
        GridError: fields that contradict each other, saying which one to change.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Literal["token", "tensor"] = "token"
    static: bool = False
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_count("bits", self.bits, least=2, most=8, error=GridError)
        if self.granularity not in ("token", "tensor"):
            raise GridError(f"granularity is 'token' or 'tensor', got {self.granularity!r}")
        if self.static and self.granularity != "tensor":
            raise GridError("a static scale cannot know the tokens to come; use granularity='tensor' or static=False")
        check_number("clip_ratio", self.clip_ratio, above=0, most=1, error=GridError)

    @property
    def code_min(self) -> int:
        """-2**(b-1)."""
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """2**(b-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each token, ``[..., 1]``, or of the tensor, ``[1]``, in float32.

        Raises:
            GridError: activations that hold NaN or infinities.
        """
        flat = x.to(torch.float32) if self.granularity == "token" else x.to(torch.float32).reshape(-1)
        lo, hi = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
        if not bool(torch.isfinite(hi - lo).all()):
            raise GridError(f"the activations {list(x.shape)} hold NaN or infinite values")
        return lo, hi

    def scale_and_zero(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of a range, both float32 of its shape; the zero point holds integers.

        A range of nothing gets scale 1, so that it decodes to zeros.
        """
        if self.symmetric:
            scale = self.clip_ratio * torch.maximum(hi, -lo) / self.code_max
        else:
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
            scale = self.clip_ratio * (hi - lo) / (self.code_max - self.code_min)
        tiny = torch.finfo(torch.float32).tiny
        scale = torch.where(scale < tiny, torch.ones_like(scale), scale)
        if self.symmetric:
            return scale, None
        return scale, torch.round(self.code_min - self.clip_ratio * lo / scale).clamp_(self.code_min, self.code_max)

    def fit(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Dynamic scale and zero point of activations: ``[..., 1]`` per token, ``[1]`` per tensor; float32.

        Raises:
            GridError: activations that hold NaN or infinities.
        """
        return self.scale_and_zero(*self.extremes(x))

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes ``clamp(round(x / s) + z)``, int8 of the shape of ``x``; ties go to the even integer."""
        q = torch.round(x.to(torch.float32) / scale)
        q = q if zero is None else q.add_(zero)
        return q.clamp_(self.code_min, self.code_max).to(torch.int8)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """``s * (q - z)`` in ``dtype``."""
        q = codes.to(torch.float32)
        return (scale * (q if zero is None else q - zero)).to(dtype)

    def round_trip(self, x: Tensor) -> Tensor:
        """The values that codes with a dynamic scale stand for, in the dtype of ``x``: a simulation, nothing is stored."""
        scale, zero = self.fit(x)
        return self.decode(self.encode(x, scale, zero), scale, zero, x.dtype)

    def to_dict(self) -> dict:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict) -> "ActivationGrid":
        """Inverse of :meth:`to_dict`.

        Raises:
            GridError: unknown or missing fields, or values that contradict each other.
        """
        known = {f.name for f in fields(cls)}
        if set(d) != known:
            raise GridError(f"an activation grid has the fields {sorted(known)}, got {sorted(d)}")
        return cls(**d)
