"""Roundings that are the same bits compiled and interpreted, as helpers for kernels.

Triton's interpreter truncates where it casts to bfloat16 and casts wrongly to FP8, so on the CPU these helpers round by
integer arithmetic on the bits; on a GPU the hardware's own conversion does the same (a test holds both to torch).
"""

import triton
import triton.language as tl

from lqedu_kernels._tensors import INTERPRET as _INTERPRET

INTERPRET = tl.constexpr(_INTERPRET)


@triton.jit
def round_half_even(x):
    """float32, |x| < 2^22, to the nearest whole number, ties to even: adding 1.5 * 2^23 leaves a unit step of 1."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_bfloat16(x):
    """float32 to bfloat16, nearest, ties to even."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def to_dtype(x, dtype: tl.constexpr):
    """float32 to float16, bfloat16 or float32, nearest, ties to even."""
    if dtype == tl.bfloat16:
        return to_bfloat16(x)
    return x.to(dtype)


@triton.jit
def float8_e4m3_bits(x):
    """float32 within ±448 to the code of E4M3 (uint8), nearest, ties to even: integer arithmetic, on any GPU."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20  # 3 bits of mantissa are left
    normal = normal - ((127 - 7) << 3)
    # Below 2^-6 the step is 2^-9: adding 2^14 leaves exactly that step in a float32.
    shifted = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True)
    subnormal = shifted - 0x46800000
    code = tl.where(magnitude < (121 << 23), subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def to_float8_e4m3(x):
    """float32 within ±448 to E4M3, nearest, ties to even (saturate before the call)."""
    if INTERPRET:
        return float8_e4m3_bits(x).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def from_float8_e4m3(codes):
    """E4M3 to float32; every code but NaN is exact in both worlds."""
    if INTERPRET:
        bits = codes.to(tl.uint8, bitcast=True).to(tl.uint32)
        exponent = (bits >> 3) & 0xF
        mantissa = bits & 7
        normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
        value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
        return tl.where(bits >= 0x80, -value, value)
    return codes.to(tl.float32)
