"""Small floating-point formats from their definition: sign, exponent, mantissa, and what the top codes mean.

    value = (-1)^sign · 2^(e - bias) · (1 + m / 2^M)     for exponent fields e ≥ 1
    value = (-1)^sign · 2^(1 - bias) · m / 2^M           for e = 0: subnormals, evenly spaced down to zero

Read as an integer, a code without its sign counts the non-negative values in order. So encoding is rounding: find the
spacing at ``|x|``, divide by it, round half to even, and count. Derived in chapter ``16-fp8``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lqedu.errors import LqeduError, UsageError
from lqedu.options import check_count

_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(x: object, what: str, error: type[LqeduError] = UsageError) -> None:
    """Refuse what is no floating-point tensor of 16 bits or more: numbers, lists, integer codes, torch's own FP8 tensors.

    Args:
        x: whatever the caller gave.
        what: it should be, for the sentence.
        error: class to raise.

    >>> check_floating([1.0], "a weight")
    Traceback (most recent call last):
        ...
    lqedu.errors.UsageError: a weight: a floating-point tensor of 16 bits or more is needed, got list; convert it first
    """
    if not isinstance(x, Tensor) or x.dtype not in _WIDE:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise error(f"{what}: a floating-point tensor of 16 bits or more is needed, got {got}; convert it first")


def _check_codes(codes: object, name: str) -> None:
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise UsageError(f"codes of {name} are a tensor of uint8, got {got}; encode makes them")


@dataclass(frozen=True)
class FloatFormat:
    """A signed format of at most 8 bits.

    >>> E4M3.max, E5M2.max, E2M1.max
    (448.0, 57344.0, 6.0)
    >>> E4M3.decode(E4M3.encode(torch.tensor([1.06, 1.07, 500.0])))
    tensor([  1.0000,   1.1250, 448.0000])

    Attributes:
        name: what it is called.
        exponent_bits, mantissa_bits: with the sign they fill a code.
        bias: subtracted from the exponent field.
        specials: "ieee" keeps the top exponent for infinities and NaN; "fn" (finite, NaN) only the code of all ones, as
            NaN; "fnuz" (finite, NaN, unsigned zero) only the code of minus zero, as NaN; "none" has no special code.

    Raises:
        UsageError: no exponent or no mantissa, more than 8 bits, a bias whose values float32 does not hold exactly, or
            specials that are none of these.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Literal["ieee", "fn", "fnuz", "none"]

    def __post_init__(self) -> None:
        check_count("exponent_bits", self.exponent_bits, least=1, most=6)
        check_count("mantissa_bits", self.mantissa_bits, least=1, most=7 - self.exponent_bits)  # a code is a byte
        check_count("bias", self.bias, least=-64, most=144)  # 2^-149 and 2^127 are the ends of float32
        if self.specials not in ("ieee", "fn", "fnuz", "none"):
            raise UsageError(f"specials is 'ieee', 'fn', 'fnuz' or 'none', got {self.specials!r}")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def _sign(self) -> int:
        """The sign bit, which is also the number of codes without it."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def top_code(self) -> int:
        """Code of the largest finite value."""
        unusable = {"ieee": 1 << self.mantissa_bits, "fn": 1, "fnuz": 0, "none": 0}[self.specials]
        return self._sign - 1 - unusable

    @property
    def max(self) -> float:
        """Largest finite value."""
        e, m = divmod(self.top_code, 1 << self.mantissa_bits)
        return ((1 << self.mantissa_bits) + m) * 2.0 ** (e - self.bias - self.mantissa_bits)

    @property
    def smallest_normal(self) -> float:
        """Smallest value with a full mantissa."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value: the spacing of the subnormals."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of codes, exact in float32 and float64.

        Args:
            codes: uint8, any shape; only the lowest :attr:`bits` bits count.
            dtype: of the result.

        Raises:
            UsageError: codes that are not uint8.
        """
        _check_codes(codes, self.name)
        code = codes.to(torch.int64)
        negative, magnitude = (code & self._sign) != 0, code & (self._sign - 1)
        e, m = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        significand = m + ((e > 0).to(torch.int64) << self.mantissa_bits)  # normal numbers have a hidden one
        value = torch.ldexp(significand.double(), e.clamp(min=1) - self.bias - self.mantissa_bits)
        if self.specials == "fnuz":
            value = torch.where(negative & (magnitude == 0), torch.nan, value)
        value = torch.where(magnitude > self.top_code, torch.nan, value)
        if self.specials == "ieee":
            value = torch.where(magnitude == self.top_code + 1, torch.inf, value)
        return torch.where(negative, -value, value).to(dtype)

    def encode(self, x: Tensor, *, saturate: bool = True) -> Tensor:
        """Nearest codes; ties go to the even code, as in IEEE 754.

        Args:
            x: any floating dtype and shape; float64 is the exact way in, nothing is rounded on the way.
            saturate: what lies beyond the largest value, infinities included, becomes the largest value; otherwise what
                rounds beyond it becomes infinity, or NaN in formats without one. Formats without NaN must saturate.

        Returns:
            uint8 of the same shape. NaN becomes the format's NaN.

        Raises:
            UsageError: not a floating dtype; or NaN, or ``saturate=False``, in a format without NaN.
        """
        check_floating(x, f"values for codes of {self.name}")
        missing = torch.isnan(x)
        if self.specials == "none" and (not saturate or bool(missing.any())):
            raise UsageError(f"{self.name} has no code for NaN or infinity; saturate, and keep NaN out")
        magnitude = x.to(torch.float64).abs()
        finite = torch.where(torch.isfinite(magnitude), magnitude, 0.0)
        exponent = (torch.frexp(finite).exponent.to(torch.int64) - 1).clamp(min=1 - self.bias)
        exponent = torch.where(finite == 0, 1 - self.bias, exponent)  # frexp gives zero the exponent of one
        steps = torch.round(torch.ldexp(finite, self.mantissa_bits - exponent)).to(torch.int64)
        # at the lowest exponent the code counts steps from zero; each further exponent begins 2^M codes later
        code = ((exponent - (1 - self.bias)) << self.mantissa_bits) + steps
        code = torch.where(torch.isinf(magnitude), self._sign, code)
        beyond = {"ieee": self.top_code + 1, "fn": self._sign - 1, "fnuz": self._sign}.get(self.specials, 0)
        code = code.clamp(max=self.top_code) if saturate else torch.where(code > self.top_code, beyond, code)
        signed = torch.where(torch.signbit(x), code | self._sign, code)
        if self.specials == "fnuz":
            signed = torch.where(code == 0, 0, signed)  # its zero has no sign
        nan = {"ieee": self.top_code + 2 ** max(self.mantissa_bits - 1, 0) + 1}.get(self.specials, beyond)
        return torch.where(missing, nan, signed).to(torch.uint8)

    def values(self) -> Tensor:
        """All codes decoded, float32 ``[2**bits]``."""
        return self.decode(torch.arange(1 << self.bits, dtype=torch.uint8))


#: 4 exponent and 3 mantissa bits, finite with NaN: weights and activations. Micikevicius et al., 2022, arXiv:2209.05433.
E4M3 = FloatFormat("E4M3", 4, 3, 7, "fn")
#: 5 exponent and 2 mantissa bits, with infinities: gradients.
E5M2 = FloatFormat("E5M2", 5, 2, 15, "ieee")
#: The variants of another family of GPUs: one NaN, no minus zero, a bias larger by one.
E4M3FNUZ = FloatFormat("E4M3FNUZ", 4, 3, 8, "fnuz")
E5M2FNUZ = FloatFormat("E5M2FNUZ", 5, 2, 16, "fnuz")
#: Elements of the microscaling formats. OCP Microscaling Formats (MX) Specification, 1.0, 2023.
E2M1 = FloatFormat("E2M1", 2, 1, 1, "none")
E3M2 = FloatFormat("E3M2", 3, 2, 3, "none")
E2M3 = FloatFormat("E2M3", 2, 3, 1, "none")


@dataclass(frozen=True)
class ExponentFormat:
    """A format of nothing but an exponent, ``2^(e - bias)``: unsigned, without a zero; its top code is NaN.

    With no mantissa there are no subnormals, and neighbours are a factor of two apart.

    >>> E8M0.encode(torch.tensor([1.0, 1.4, 1.5, 0.0]))
    tensor([127, 127, 128, 255], dtype=torch.uint8)

    Attributes:
        name: what it is called.
        exponent_bits: all of a code.
        bias: subtracted from the exponent field.
    """

    name: str
    exponent_bits: int
    bias: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.exponent_bits

    @property
    def nan_code(self) -> int:
        """All ones."""
        return (1 << self.exponent_bits) - 1

    @property
    def max(self) -> float:
        """Largest value."""
        return 2.0 ** (self.nan_code - 1 - self.bias)

    @property
    def smallest(self) -> float:
        """Smallest value."""
        return 2.0**-self.bias

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of codes (uint8, any shape), exact in float32 (as a subnormal for code 0) and float64.

        Raises:
            UsageError: codes that are not uint8.
        """
        _check_codes(codes, self.name)
        code = codes.to(torch.int64)
        value = torch.ldexp(torch.ones_like(code, dtype=torch.float64), code - self.bias)
        return torch.where(code >= self.nan_code, torch.nan, value).to(dtype)

    def encode(self, x: Tensor, *, saturate: bool = True) -> Tensor:
        """Nearest codes; a value halfway between two powers of two goes to the larger one.

        Args:
            x: any floating dtype and shape.
            saturate: what rounds beyond the largest value becomes the largest value, otherwise NaN.

        Returns:
            uint8 of the same shape. Positive values below the smallest become the smallest; zero, negative values and NaN
            have no neighbour here and become NaN.

        From 2^-127 to 1.5 · 2^-127, casts of others (ml_dtypes, torch) round up to 2^-126. Here the nearest is taken.

        Raises:
            UsageError: not a floating dtype.
        """
        check_floating(x, f"values for codes of {self.name}")
        fraction, exponent = torch.frexp(x.to(torch.float64))  # x = fraction * 2^exponent, 1/2 <= fraction < 1
        code = exponent.to(torch.int64) - 1 + self.bias + (fraction >= 0.75).to(torch.int64)
        code = torch.where(torch.isinf(x), self.nan_code, code).clamp(min=0)
        code = code.clamp(max=self.nan_code - 1 if saturate else self.nan_code)
        return torch.where(x > 0, code, self.nan_code).to(torch.uint8)

    def values(self) -> Tensor:
        """All codes decoded, float32 ``[2**bits]``."""
        return self.decode(torch.arange(1 << self.bits, dtype=torch.uint8))


#: Scales of the microscaling formats.
E8M0 = ExponentFormat("E8M0", 8, 127)

FORMATS = {f.name: f for f in (E4M3, E5M2, E4M3FNUZ, E5M2FNUZ, E2M1, E3M2, E2M3)}
