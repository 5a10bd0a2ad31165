"""Codes and a scale for each token, made where the token is: alone, after RMSNorm, after SiLU; chapter ``20-hadamard-kv``::

    h[m, k] = x[m, k]                                              or RMSNorm or SiLU of it, rounded to the dtype of x
    s[m]    = clip_ratio · max_k |h[m, k]| / L                     L = 127 (int8), 7 (int4), 448 (E4M3);  1 for a row of zeros
    q[m, k] = round(h[m, k] / s[m])                                ties to even, L at most

An asymmetric grid spans [min(h, 0), max(h, 0)] with 2^b - 1 steps and has an integer zero point, round(-2^(b-1) - lo/s). One
code fills one byte, also a 4-bit one: it is multiplied as int8.

What rounds: the scale is the IEEE quotient, and so is h/s, which every element gets for one multiplication and two fused
multiply-adds (:func:`quotient`): codes and scales are the bits of :func:`quantize_reference` for every input that float16 can
hold. RMSNorm sums its squares in float32 in another order than torch and its rsqrt is good to 2 units in the last place;
SiLU's exponential and quotient likewise. An h beside a tie of its 16-bit dtype can then fall on the other side; so can codes.
A row that holds NaN or an infinity gets that as its scale: nothing is hidden, nothing else is touched.

Bytes of a call: 2 read and 1 written an element; a residual 4 more, a gate 2 more. Operations: some 15 an element.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels._numerics import INTERPRET, round_half_even, to_dtype, to_float8_e4m3
from lqedu_kernels._tensors import Target, check_keys, target_of
from lqedu_kernels.tuning import configuration

__all__ = [
    "Quantized",
    "TokenGrid",
    "bytes_moved",
    "default_config",
    "operations",
    "quantize_reference",
    "quantize_tokens",
    "rmsnorm_quantize",
    "rmsnorm_reference",
    "search_space",
    "silu_quantize",
    "silu_reference",
]

#: The largest code of each format.
LARGEST: Mapping[str, int] = {"int8": 127, "int4": 7, "e4m3": 448}
#: Longest token, in elements: a token is in registers from its first load to its last store.
LONGEST = 57344
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class TokenGrid(NamedTuple):
    """How a token becomes codes.

    >>> TokenGrid("int4", clip_ratio=0.9).largest
    7
    """

    format: Literal["int8", "int4", "e4m3"] = "int8"
    symmetric: bool = True  #: otherwise an integer grid gets a zero point
    clip_ratio: float = 1.0  #: the range is multiplied by this; E4M3 does not clip
    group_size: int | None = None  #: E4M3 only: so many consecutive elements share a scale, a power of two

    @property
    def largest(self) -> int:
        """The largest code."""
        return LARGEST[self.format]

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return torch.float8_e4m3fn if self.format == "e4m3" else torch.int8


class Quantized(NamedTuple):
    """Codes of tokens, and what they are multiplied with: ``x ≈ scale · (codes - zero)``."""

    codes: Tensor  #: ``[M, K]``, int8 or float8_e4m3fn
    scale: Tensor  #: float32 ``[M, 1]``, or ``[M, ceil(K / group_size)]``
    zero: Tensor | None = None  #: float32 ``[M, 1]`` of whole numbers, on an asymmetric grid
    sums: Tensor | None = None  #: int32 ``[M, 1]``, of the codes of a token, if wanted
    hidden: Tensor | None = None  #: ``x + residual`` in the dtype of x, if a residual was added


def quantize_reference(x: Tensor, grid: TokenGrid = TokenGrid(), *, sums: bool = False) -> Quantized:  # noqa: B008
    """The contract in plain torch; ``x`` of any floating dtype, computed in float32.

    >>> quantize_reference(torch.tensor([[0.6, -1.0, 0.25], [8.0, 5.0, -2.0]]), TokenGrid("int4"), sums=True)[::3]
    (tensor([[ 4, -7,  2],
            [ 7,  4, -2]], dtype=torch.int8), tensor([[-1],
            [ 9]], dtype=torch.int32))
    """
    k, tiny, x = x.shape[1], torch.finfo(torch.float32).tiny, x.float()
    size = grid.group_size or k
    runs = torch.nn.functional.pad(x, (0, -k % size)).unflatten(1, (-1, size))  # [M, runs, size]
    largest = torch.full(
        (), float(grid.largest), device=x.device
    )  # a tensor: torch multiplies by the inverse of a number
    if grid.format == "e4m3":
        amax = runs.abs().amax(2)
        scale = torch.where(amax == 0, 1.0, (amax / largest).clamp(min=tiny))
        codes = (runs / scale[:, :, None]).clamp(-448, 448).flatten(1)[:, :k].to(torch.float8_e4m3fn)
        return Quantized(codes, scale)
    lo, hi = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if grid.symmetric:
        lo, hi, steps = torch.zeros_like(lo), torch.maximum(hi, -lo), largest
    else:
        lo, hi, steps = lo.clamp(max=0), hi.clamp(min=0), 2 * largest + 1
    scale = grid.clip_ratio * (hi - lo) / steps
    scale = torch.where(scale < tiny, 1.0, scale)
    zero = torch.zeros_like(scale) if grid.symmetric else -grid.largest - 1 - grid.clip_ratio * lo / scale
    zero = zero.round().clamp(-grid.largest - 1, grid.largest)
    codes = ((x / scale).round() + zero).clamp(-grid.largest - 1, grid.largest).to(torch.int8)
    total = codes.sum(1, keepdim=True, dtype=torch.int32) if sums else None
    return Quantized(codes, scale, None if grid.symmetric else zero, total)


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(h, x + residual)``, both in the dtype of x; h as transformers' LlamaRMSNorm computes it, with its two roundings."""
    hidden = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = hidden.float()
    normal = (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)).to(x.dtype)
    return (weight.float() * normal.float()).to(x.dtype), hidden


def silu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``, rounded to the dtype of gate after each of the two, as transformers' MLP does."""
    return (torch.nn.functional.silu(gate.float()).to(gate.dtype).float() * up.float()).to(gate.dtype)


def bytes_moved(m: int, k: int, *, element: int = 2, residual: bool = False, gate: bool = False) -> int:
    """Fewest bytes of a call: inputs read once, codes and one float32 scale a token written once."""
    return m * (k * (element * (1 + 2 * residual + gate) + 1) + 4)


def operations(m: int, k: int) -> int:
    """Floating-point operations of quantizing alone: magnitude, maximum, quotient (5), rounding (2) an element."""
    return 9 * m * k


# --- launch configurations --------------------------------------------------------------------------------------------


def default_config(m: int, k: int, target: Target) -> dict[str, int]:
    """Where nothing was measured: pieces that leave at most an eighth of them empty, 28 to 56 elements a thread.

    Keys: ``piece`` elements, a power of two, are loaded at once; ``warps``; ``stages`` of loads in flight; ``resident``
    programs a processor that share the tokens (0: one program a token).
    """
    piece = triton.next_power_of_2(k)
    while piece > 1024 and 8 * (-k % piece) > k:
        piece //= 2
    warps = min(16, triton.next_power_of_2(triton.cdiv(k, 1792)))
    return dict(piece=piece, warps=warps, stages=1, resident=0)


def search_space(m: int, k: int, target: Target) -> list[dict[str, int]]:
    """Configurations worth timing at a shape, the likely best first; see :func:`default_config` for the keys."""
    space = [default_config(m, k, target)]
    for piece in (triton.next_power_of_2(k) >> i for i in range(4)):
        for warps in (2, 4, 8, 16):
            if piece // (32 * warps) >= 4 and 8 <= k // (32 * warps) <= 128 and k // piece <= 16:
                space.append(dict(piece=piece, warps=warps, stages=1, resident=0))
    return space


def _suits(piece: int, k: int) -> bool:
    """Whether pieces of another token's configuration are good for this one: few, and the last one nearly full."""
    pieces = triton.cdiv(k, piece)
    return pieces <= 16 and (8 * pieces * piece <= 9 * k or piece == triton.next_power_of_2(k))


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def largest_of(a, b):
    """The larger one, and NaN if one of them is: for ``tl.reduce``."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smallest_of(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_along(b, axis: tl.constexpr):
    """:func:`largest_of` along an axis; the interpreter is slow to reduce by a function of ours, and its maximum drops NaN."""
    if INTERPRET:
        return tl.where(tl.max((b != b).to(tl.int32), axis) > 0, float("nan"), tl.max(b, axis))
    return tl.reduce(b, axis, largest_of)


@triton.jit
def quotient(x, s, inverse):
    """The IEEE quotient x / s of many x by one s, from ``inverse`` = the IEEE quotient 1 / s.

    The product is within a unit of the quotient; its remainder is exact in a fused multiply-add, and what it adds makes the
    quotient right (Markstein, 1990). The interpreter has no fused multiply-add, but it divides.
    """
    if INTERPRET:
        return x / s
    q = x * inverse
    return tl.fma(tl.fma(q, -s, x), inverse, q)


@triton.jit
def inverse_of(s):
    """The IEEE quotient 1 / s: two Newton steps, in fused multiply-adds, from one that is good to two units."""
    if INTERPRET:
        return 1.0 / s
    y = 1.0 / s
    y = tl.fma(tl.fma(-s, y, 1.0), y, y)
    return tl.fma(tl.fma(-s, y, 1.0), y, y)


@triton.jit
def reciprocal(x):
    """1 / x, good to one unit, for x from 1: one instruction, where a quotient takes seven."""
    if INTERPRET:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def low_byte(b_q):
    """The nearest int8, ties to even: 1.5 · 2^23 + q has it in its lowest bits (see ``round_half_even``)."""
    return (b_q + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def scale_of(b_range, STEPS: tl.constexpr, FLOAT: tl.constexpr):
    """``range / STEPS``; a range of nothing gets scale 1, NaN stays."""
    b_scale = quotient(b_range, STEPS * 1.0, 1.0 / STEPS)
    b_small = tl.where(b_range == 0, 1.0, _TINY) if FLOAT else 1.0
    return tl.where(b_scale < _TINY, b_small, b_scale)


@triton.jit
def _prepared(p_x, p_up, p_residual, p_hidden, o_k, m_k, dtype: tl.constexpr):
    """A piece of a token in float32, with the residual added or SiLU applied; every rounding is one that torch makes."""
    b_x = tl.load(p_x + o_k, mask=m_k, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_hidden = to_dtype(b_x + tl.load(p_residual + o_k, mask=m_k, other=0.0).to(tl.float32), dtype)
        tl.store(p_hidden + o_k, b_hidden, mask=m_k)
        b_x = b_hidden.to(tl.float32)
    if p_up is not None:
        b_up = tl.load(p_up + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_x = to_dtype(b_x * reciprocal(1.0 + tl.exp(-b_x)), dtype).to(tl.float32)
        b_x = to_dtype(b_x * b_up, dtype).to(tl.float32)
    return b_x


@triton.jit
def _normed(b_x, p_weight, o_k, K, eps, dtype: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """RMSNorm of a token's pieces."""
    b_square = b_x[0] * b_x[0]
    for j in tl.static_range(1, PIECES):
        b_square += b_x[j] * b_x[j]
    inverse = tl.rsqrt(tl.sum(tl.sum(b_square, 1), 0) / K + eps)
    b_out = ()
    for j in tl.static_range(PIECES):
        b_weight = tl.load(
            p_weight + j * PIECE + o_k, mask=o_k < K - j * PIECE, other=0.0, eviction_policy="evict_last"
        )
        b_normal = to_dtype(b_x[j] * inverse, dtype).to(tl.float32)
        b_out = b_out + (to_dtype(b_normal * b_weight.to(tl.float32), dtype).to(tl.float32),)  # noqa: RUF005
    return b_out


@triton.jit
def _range(b_x, PIECES: tl.constexpr):
    """Smallest and largest of each run, 0 included: [GROUPS] each."""
    b_lo, b_hi = b_x[0], b_x[0]
    for j in tl.static_range(1, PIECES):
        b_lo, b_hi = smallest_of(b_lo, b_x[j]), largest_of(b_hi, b_x[j])
    return smallest_of(-largest_along(-b_lo, 1), 0.0), largest_of(largest_along(b_hi, 1), 0.0)


@triton.jit
def largest_of_pieces(b_x, PIECES: tl.constexpr):
    """Largest magnitude of each run: [GROUPS]."""
    b_largest = tl.abs(b_x[0])
    for j in tl.static_range(1, PIECES):
        b_largest = largest_of(b_largest, tl.abs(b_x[j]))
    return largest_along(b_largest, 1)


@triton.jit
def _to_codes(b_x, b_scale, b_inverse, b_zero, LARGEST: tl.constexpr, CLIPPED: tl.constexpr, FLOAT: tl.constexpr):
    """``round(x / s) + z``: int8, or E4M3."""
    b_q = quotient(b_x, b_scale, b_inverse)
    if FLOAT:
        b_codes = to_float8_e4m3(tl.minimum(tl.maximum(b_q, -LARGEST), LARGEST))
    else:
        if b_zero is not None:
            b_q = round_half_even(b_q) + b_zero
        if CLIPPED:
            b_q = tl.minimum(tl.maximum(b_q, -LARGEST - 1), LARGEST)
        b_codes = low_byte(b_q)
    return b_codes


@triton.jit
def _quantize_kernel(
    p_x, p_up, p_residual, p_weight, p_hidden, p_codes, p_scale, p_zero, p_sums,
    M, K, x_stride, up_stride, eps, clip_ratio,
    PIECES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    LARGEST: tl.constexpr, FLOAT: tl.constexpr, CLIPPED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One token at a time: PIECES of GROUPS runs of SIZE elements, a scale for each run, or one for all if GROUPS is 1."""
    # 1. Place.
    dtype: tl.constexpr = p_x.dtype.element_ty
    PIECE: tl.constexpr = GROUPS * SIZE
    o_g = tl.arange(0, GROUPS)
    o_k = o_g[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    for m in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
        row = tl.full((), 1, tl.int64) * m
        p_up_row = None if p_up is None else p_up + row * up_stride
        p_residual_row = None if p_residual is None else p_residual + row * K
        p_hidden_row = None if p_hidden is None else p_hidden + row * K
        # 2. Load and prepare; elements beyond K are 0.
        b_x = ()  # PIECES times [GROUPS, SIZE]
        for j in tl.static_range(PIECES):
            o_j = j * PIECE + o_k
            b_piece = _prepared(p_x + row * x_stride, p_up_row, p_residual_row, p_hidden_row, o_j, o_j < K, dtype)
            b_x = b_x + (b_piece,)  # noqa: RUF005
        if p_weight is not None:
            b_x = _normed(b_x, p_weight, o_k, K, eps, dtype, PIECES, PIECE)
        # 3. Scale: [GROUPS].
        b_zero = None
        if p_zero is not None:
            b_lo, b_hi = _range(b_x, PIECES)
            b_scale = scale_of(clip_ratio * (b_hi - b_lo), 2 * LARGEST + 1, FLOAT)
            b_zero = round_half_even(-LARGEST - 1 - tl.div_rn(clip_ratio * b_lo, b_scale))
            b_zero = tl.minimum(tl.maximum(b_zero, -LARGEST - 1), LARGEST)[:, None]
            tl.store(p_zero + row + o_g[:, None], b_zero)
        else:
            b_scale = scale_of(clip_ratio * largest_of_pieces(b_x, PIECES), LARGEST, FLOAT)
        groups = tl.cdiv(K, SIZE) if GROUPS > 1 else 1
        tl.store(p_scale + row * groups + o_g, b_scale, mask=o_g < groups)
        # 4. Codes.
        b_scale, b_inverse = b_scale[:, None], inverse_of(b_scale)[:, None]
        b_sum = tl.zeros((GROUPS, SIZE), tl.int32)
        for j in tl.static_range(PIECES):
            o_j = j * PIECE + o_k
            b_codes = _to_codes(b_x[j], b_scale, b_inverse, b_zero, LARGEST, CLIPPED, FLOAT)
            # 5. Store.
            tl.store(p_codes + row * K + o_j, b_codes, mask=o_j < K)
            if p_sums is not None:
                b_sum += tl.where(o_j < K, b_codes, 0).to(tl.int32)
        if p_sums is not None:
            tl.store(p_sums + row, tl.sum(tl.sum(b_sum, 1), 0))


# --- what is called ---------------------------------------------------------------------------------------------------


def quantize_tokens(
    x: Tensor,
    grid: TokenGrid = TokenGrid(),  # noqa: B008
    *,
    sums: bool = False,
    config: Mapping[str, int] | None = None,
) -> Quantized:
    """Codes and a scale for each token.

    Args:
        x: float16, bfloat16 or float32 ``[M, K]``, K at most 57344; rows may be apart (a slice of columns).
        grid: the codes, and how the range of a token becomes its scale.
        sums: int32 sums of the codes too, which a zero point of the weight is multiplied with.
        config: a launch configuration, see :func:`default_config`; the measured one of this GPU if none is given.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or layout than this; see the message.
    """
    return _launch(x, grid, sums, config, "quantize/tokens")


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    grid: TokenGrid = TokenGrid(),  # noqa: B008
    *,
    eps: float,
    residual: Tensor | None = None,
    sums: bool = False,
    config: Mapping[str, int] | None = None,
) -> Quantized:
    """:func:`quantize_tokens` of RMSNorm of ``x``, or of ``x + residual``, which is returned too (``.hidden``).

    Args:
        x: as there.
        weight: of the norm, the dtype of x, ``[K]``.
        eps: added to the mean of the squares.
        residual: contiguous, dtype and shape of x.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, one number for each column of x, got {type(weight).__name__}")
    check_eps(eps)
    return _launch(x, grid, sums, config, "quantize/rmsnorm", weight=weight, eps=eps, residual=residual)


def silu_quantize(
    gate: Tensor,
    up: Tensor,
    grid: TokenGrid = TokenGrid(),  # noqa: B008
    *,
    sums: bool = False,
    config: Mapping[str, int] | None = None,
) -> Quantized:
    """:func:`quantize_tokens` of ``silu(gate) · up``, both as x there: halves of one product's output, say."""
    if not isinstance(up, Tensor):
        raise TypeError(f"up must be a tensor of the shape and dtype of gate, got {type(up).__name__}")
    return _launch(gate, grid, sums, config, "quantize/silu", up=up)


def _launch(
    x: Tensor, grid: TokenGrid, sums: bool, config: Mapping[str, int] | None, operation: str,
    *, weight: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None, up: Tensor | None = None,
) -> Quantized:  # fmt: skip
    target = check_tokens("gate" if up is not None else "x", x)
    check_grid(grid, sums, target)
    m, k = x.shape
    for name, other, shape in (("weight", weight, (k,)), ("residual", residual, (m, k)), ("up", up, (m, k))):
        if other is not None:
            _check_like(name, other, x, shape, contiguous=name != "up")
    groups = triton.cdiv(k, grid.group_size or k)
    empty = {"device": x.device}
    out = Quantized(
        torch.empty(m, k, dtype=torch.uint8, **empty).view(grid.dtype),
        torch.empty(m, groups, **empty),
        None if grid.symmetric else torch.empty(m, 1, **empty),
        torch.empty(m, 1, dtype=torch.int32, **empty) if sums else None,
        None if residual is None else torch.empty_like(residual),
    )
    if m == 0:
        return out
    check_keys(config, "piece warps stages resident")
    measured = configuration(operation, m, k, k, gpu=target.name)
    if measured is not None and not _suits(measured["piece"], k):
        measured = None
    c = config or measured or default_config(m, k, target)
    pieces = 1 if grid.group_size else triton.cdiv(k, c["piece"])
    programs = min(m, c["resident"] * target.processors) if c["resident"] else m
    _quantize_kernel[(programs,)](
        x, up, residual, weight, out.hidden, out.codes, out.scale, out.zero, out.sums,
        m, k, x.stride(0), 0 if up is None else up.stride(0), eps, grid.clip_ratio,
        PIECES=pieces, GROUPS=triton.next_power_of_2(groups), SIZE=grid.group_size or c["piece"], LARGEST=grid.largest,
        FLOAT=grid.format == "e4m3", CLIPPED=grid.clip_ratio != 1 or not grid.symmetric, STAGES=c["stages"], num_warps=c["warps"],
    )  # fmt: skip
    return out


def check_eps(eps: float) -> None:
    """What is added to a mean of squares is a number of at least 0 (TypeError, ValueError)."""
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}: take the norm's, often 1e-5 or 1e-6")


def check_grid(grid: TokenGrid, sums: bool, target: Target) -> None:
    """Refuse fields that contradict each other, and formats the GPU has no conversion for."""
    if not isinstance(grid, TokenGrid) or grid.format not in tuple(LARGEST):
        raise ValueError(f"grid must be a TokenGrid of format 'int8', 'int4' or 'e4m3', got {grid!r}")
    if grid.format == "e4m3":
        if not grid.symmetric or grid.clip_ratio != 1 or sums:
            raise ValueError(
                "grid of format 'e4m3' has no zero point, no clipping and no sums of codes: leave them out, or use 'int8'"
            )
        if target.capability < (8, 9):
            raise ValueError(
                f"grid has format 'e4m3', but a {target.name} has no FP8: use 'int8', or capability 8.9 or newer"
            )
    if not isinstance(grid.clip_ratio, (int, float)) or not 0 < grid.clip_ratio <= 1:
        raise ValueError(f"grid must have a clip_ratio above 0 and at most 1, got {grid.clip_ratio!r}")
    if grid.group_size is not None and (grid.format != "e4m3" or grid.group_size not in (32, 64, 128, 256)):
        raise ValueError(
            f"grid must have group_size None, or 32, 64, 128 or 256 with format 'e4m3', got {grid.group_size}"
        )


def check_tokens(argument: str, x: Tensor) -> Target:
    """Refuse what is not ``[M, K]`` in a floating dtype on a GPU, with rows of consecutive elements."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{argument} must be float16, bfloat16 or float32, got {str(x.dtype).removeprefix('torch.')}")
    target = target_of(x, argument)
    if x.ndim != 2 or not 0 < x.shape[1] <= LONGEST:
        raise ValueError(
            f"{argument} must have shape [M, K] with K from 1 to {LONGEST}, got {list(x.shape)}: flatten the rest"
        )
    _check_rows(argument, x)
    return target


def _check_like(argument: str, other: Tensor, x: Tensor, shape: tuple[int, ...], *, contiguous: bool) -> None:
    if not isinstance(other, Tensor) or other.dtype != x.dtype:
        got = other.dtype if isinstance(other, Tensor) else type(other).__name__
        raise TypeError(f"{argument} must be a tensor of the first argument's dtype {x.dtype}, got {got}")
    if tuple(other.shape) != shape:
        raise ValueError(f"{argument} must have shape {list(shape)}, got {list(other.shape)}")
    if other.device != x.device:
        raise ValueError(f"{argument} is on {other.device}, the first argument on {x.device}: move one of them")
    if contiguous and not other.is_contiguous():
        raise ValueError(f"{argument} is not contiguous, strides {other.stride()}: pass {argument}.contiguous()")
    _check_rows(argument, other)


def _check_rows(argument: str, x: Tensor) -> None:
    if x.numel() and x.stride(-1) != 1:
        raise ValueError(f"{argument} has elements {x.stride(-1)} apart in a row: pass {argument}.contiguous()")
