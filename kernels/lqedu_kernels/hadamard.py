"""Orthonormal Walsh-Hadamard transforms at the speed of a copy, alone or with the quantization behind; ``20-hadamard-kv``::

    y = x H^T / √n,   n = m · 2^k,   H = H_m ⊗ H_2^k        on runs of n consecutive elements, or of n elements `stride` apart

H_2^k is Sylvester's, H_m (m = 12, 20, 28, …, 172) a table of signs; nothing is padded with zeros that change the result. A
vector is the matrix X of its elements, row after row, and H ⊗ H' splits into a product from each side::

    n = left · pieces · columns       Y = L X R        L = H_left,  R = I_pieces ⊗ H_columns after a butterfly of the pieces

         piece 0    piece 1                            14336 = 56 · 4 · 64: L is 56 x 56, R 64 x 64, and tensor cores do
    row 0  0 …  63   64 … 127  128 …                   2 · (64 + 64) operations an element of the 2 · 14336 that H would ask for;
    row 1  256 …                                       signs times 16-bit numbers are exact, and sums are float32
    …

Short vectors share a tile: L is then block-diagonal. The product L X reads X as it comes from memory, its sums stay in
registers, and are the first operand of the product with R: X crosses shared memory once.

What rounds: L X (after the butterfly) once to the dtype of x, 2^-11 or, in bfloat16, 2^-8 of each element at most; then y to
that dtype too, or to codes: these are made of the float32 y. Tables hold ± powers of two near 1/√left and 1/√columns, so
in float16 no sum overflows that is not √2 · 65504 or more as an element of L X / √(left · pieces) itself.

Bytes: 2 read and 2 (codes: 1) written an element. Operations of the transform itself: n log2 n additions a vector.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels._numerics import INTERPRET, to_dtype, to_float8_e4m3
from lqedu_kernels._tensors import Target, check_keys, check_tensor, target_of
from lqedu_kernels.hadamard_tables import Split, factors, operands, split, table
from lqedu_kernels.quantize import (
    Quantized,
    TokenGrid,
    check_grid,
    largest_along,
    largest_of,
    largest_of_pieces,
    low_byte,
    quantize_reference,
    quantize_tokens,
)
from lqedu_kernels.tuning import configuration

__all__ = [
    "bytes_moved",
    "default_config",
    "hadamard_quantize",
    "hadamard_quantize_reference",
    "hadamard_reference",
    "hadamard_transform",
    "operations",
    "search_space",
]

_DTYPES = (torch.float16, torch.bfloat16)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def hadamard_reference(x: Tensor, length: int | None = None, stride: int = 1) -> Tensor:
    """The contract in plain torch, in float32 (float64 for float64): butterflies, then the table.

    >>> hadamard_reference(torch.tensor([[1.0, 2.0, 3.0, 4.0] * 4]))[0, :4]
    tensor([10., -2., -4.,  0.])
    """
    length = x.shape[-1] // stride if length is None else length
    m, power = factors(length)
    y = x if x.dtype == torch.float64 else x.float()
    y = y.unflatten(-1, (-1, length, stride)).transpose(-1, -2)  # [..., runs, stride, length]
    half = 1
    while half < power:
        y = y.unflatten(-1, (-1, 2, half))
        y = torch.stack((y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]), -2).flatten(-3)
        half *= 2
    y = (table(m).to(y) @ y.unflatten(-1, (m, power))).flatten(-2)
    return (y * length**-0.5).transpose(-1, -2).reshape(x.shape).to(x.dtype)


def hadamard_quantize_reference(
    x: Tensor,
    grid: TokenGrid = TokenGrid(),  # noqa: B008
    *,
    length: int | None = None,
    stride: int = 1,
    sums: bool = False,
) -> Quantized:
    """Codes of the transform, of its float32 values."""
    return quantize_reference(hadamard_reference(x.float(), length, stride), grid, sums=sums)


def bytes_moved(m: int, k: int, *, quantized: bool = False) -> int:
    """Fewest bytes of a call on ``[m, k]``: 16-bit elements read once, elements or codes and scales written once."""
    return m * (3 * k + 4) if quantized else 4 * m * k


def operations(m: int, k: int, length: int | None = None) -> int:
    """Additions of the transforms by butterflies and tables; what tensor cores do instead is in :class:`Split`."""
    factor, power = factors(length or k)
    return m * k * (factor - 1 + power.bit_length() - 1)


# --- launch configurations --------------------------------------------------------------------------------------------


def default_config(
    m: int, length: int, target: Target, *, stride: int = 1, quantized: bool = False
) -> dict[str, int | bool | None]:
    """Where nothing was measured: four warps for 64 rows; programs that keep their tables where those are large.

    Keys: ``pieces`` (see :func:`split`; None: as few as leave 64 rows), ``warps``, ``stages`` of loads in flight, ``resident``
    programs a processor that share the tiles and keep their tables (0: one program a tile), ``ahead``: rows of the next
    tile are loaded to registers, where shared memory has no room for them.
    """
    s = split(length, stride)
    if s is None:
        return dict(pieces=None, warps=4, stages=1, resident=0)
    pieces = None
    if target.capability < (9, 0) and s.pieces == 4 and split(length, pieces=2) is not None:
        pieces, s = 2, split(length, pieces=2)  # the products of Ampere and Ada hold both operands in registers
    if s.more == 0 and s.rows == 64:
        return dict(pieces=pieces, warps=4, stages=1, resident=6 if quantized and s.pieces == 1 else 0)
    hopper = target.capability >= (9, 0)
    if s.elements >= 16384 and hopper:
        return dict(pieces=pieces, warps=8, stages=4 if s.elements == 16384 else 2, resident=1)
    if s.more and hopper:
        return dict(pieces=pieces, warps=4, stages=1, resident=2, ahead=True)
    return dict(pieces=pieces, warps=8, stages=1, resident=2)


def search_space(m: int, length: int, target: Target) -> list[dict[str, int | bool | None]]:
    """Configurations worth timing, the likely best first; see :func:`default_config` for the keys."""
    space = [default_config(m, length, target), default_config(m, length, target, quantized=True)]
    for pieces in (1, 2, 4):
        s = split(length, pieces=pieces)
        if s is None or not _fits(s, 1, target):
            continue
        warps = 4 if s.rows == 64 or (s.more and s.pieces == 1) else 8
        most = max(1, 24576 // s.elements if warps == 4 else 32768 // s.elements)
        for stages, resident in ((1, 0), (1, most), (2, most), (3, most - 1), (4, 1), (2, most // 2)):
            if resident > 0 or stages == 1:
                space.append(dict(pieces=pieces, warps=warps, stages=stages, resident=resident))
        space.append(dict(pieces=pieces, warps=warps, stages=1, resident=max(1, most - 1), ahead=True))
    return list({str(c): c for c in space}.values())


def _fits(s: Split, stride: int, target: Target) -> bool:
    """Whether the tile and the tables fit shared memory, and the sums the registers."""
    ampere = target.capability in ((8, 0), (8, 7))
    shared = 166912 if ampere else 232448 if (9, 0) <= target.capability < (12, 0) else 101376
    return s.shared(stride) <= shared and s.elements <= (32768 if target.capability >= (9, 0) else 16384)


# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, c=None):
    """Sums in float32; the interpreter cannot multiply bfloat16."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c)


@triton.jit
def _block(p_table, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, width):
    return tl.load(p_table + (row + tl.arange(0, ROWS))[:, None] * width + (column + tl.arange(0, COLUMNS))[None, :])


@triton.jit
def _halves(b):
    """The left and the right half of the columns; products keep both in the registers they are in."""
    return tl.split(tl.permute(tl.reshape(b, (b.shape[0], 2, b.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _parts(b, PARTS: tl.constexpr):
    """Columns in 1, 2 or 4 parts."""
    b_out = (b,)
    if PARTS > 1:
        b_out = _halves(b)
    if PARTS > 2:
        b_out = _halves(b_out[0]) + _halves(b_out[1])
    return b_out


@triton.jit
def _butterfly(b, PIECES: tl.constexpr):
    """The pieces times Sylvester's matrix of order PIECES."""
    if PIECES == 4:
        even, odd, even_2, odd_2 = b[0] + b[1], b[0] - b[1], b[2] + b[3], b[2] - b[3]
        return (even + even_2, odd + odd_2, even - even_2, odd - odd_2)
    if PIECES == 2:
        return (b[0] + b[1], b[0] - b[1])
    return b


@triton.jit
def _right(b, b_right, dtype: tl.constexpr, PIECES: tl.constexpr, RIGHT: tl.constexpr):
    """The butterfly of the pieces, and each times R, float32."""
    b = _butterfly(b, PIECES)
    if RIGHT:
        b_out = ()
        for j in tl.static_range(PIECES):
            b_out = b_out + (_dot(to_dtype(b[j], dtype), b_right),)  # noqa: RUF005
        return b_out
    return b


@triton.jit
def _store_pieces(
    p_y, o_y, m_y, b, b_factor,
    LARGEST: tl.constexpr, UNIT: tl.constexpr, CLIPPED: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y times its factor as 16-bit numbers, or as codes up to LARGEST; returns the sum of integer codes of each row."""
    b_sum = tl.zeros((b[0].shape[0],), tl.int32)
    dtype: tl.constexpr = p_y.dtype.element_ty
    for j in tl.static_range(PIECES):
        b_y = b[j] if UNIT else b[j] * b_factor
        if LARGEST == 0:
            b_out = to_dtype(b_y, dtype)
        elif dtype == tl.int8:
            if CLIPPED:
                b_y = tl.minimum(tl.maximum(b_y, -LARGEST - 1), LARGEST)
            b_out = low_byte(b_y)
            b_sum += tl.sum(b_out.to(tl.int32), 1)
        else:
            b_out = to_float8_e4m3(tl.minimum(tl.maximum(b_y, -LARGEST), LARGEST))
        tl.store(p_y + j * COLUMNS + o_y, b_out, mask=m_y)
    return b_sum


@triton.jit
def _load_rows(
    p_x, o_r, tile, tiles, all_rows, PITCH: tl.constexpr, USED: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr,
    RIGHT: tl.constexpr, RAGGED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Rows of a tile, all pieces; those beyond its vectors, or all vectors, are 0."""
    o_c = tl.arange(0, WIDE)
    first = tl.full((), USED, tl.int64) * (tile // BLOCKS)
    column = (tile % BLOCKS) * WIDE
    m_x = (o_r < USED)[:, None]
    if RAGGED:
        m_x = m_x & (first + o_r < all_rows)[:, None]
    if not RIGHT:
        m_x = m_x & (column + o_c < PITCH)[None, :]
    if AHEAD:
        m_x = m_x & (o_r < USED * (tile < tiles).to(tl.int32))[:, None]
    return tl.load(p_x + first * PITCH + column + (o_r[:, None] * PITCH + o_c[None, :]), mask=m_x, other=0.0)


@triton.jit
def _hadamard_kernel(
    p_x, p_left, p_right, p_y, p_scale, p_sums, all_rows, tiles, factor, clip_ratio,
    PITCH: tl.constexpr, LEFT: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr, VECTORS: tl.constexpr, ROWS: tl.constexpr, MORE: tl.constexpr,
    RIGHT: tl.constexpr, UNIT: tl.constexpr, TOKEN: tl.constexpr, LARGEST: tl.constexpr, CLIPPED: tl.constexpr,
    BLOCKS: tl.constexpr, RAGGED: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Y = L X R of a tile; TOKEN rows share a scale, and LARGEST is the largest code, 0 if y is not quantized."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    USED: tl.constexpr = LEFT * VECTORS
    TOKENS: tl.constexpr = USED // TOKEN if LARGEST else 0
    SIZE: tl.constexpr = ROWS + MORE
    WIDE: tl.constexpr = PIECES * COLUMNS
    # 1. Tables, once a program: [ROWS + MORE, ROWS + MORE] in parts of a power of two, and [COLUMNS, COLUMNS].
    b_left = _block(p_left, 0, 0, ROWS, ROWS, SIZE)
    if MORE:
        b_left_more = _block(p_left, 0, ROWS, ROWS, MORE, SIZE)
        b_more_left = _block(p_left, ROWS, 0, MORE, ROWS, SIZE)
        b_more_more = _block(p_left, ROWS, ROWS, MORE, MORE, SIZE)
    b_right = _block(p_right, 0, 0, COLUMNS, COLUMNS, COLUMNS)
    o_r, o_more = tl.arange(0, ROWS), ROWS + tl.arange(0, MORE if MORE else ROWS)
    o_c = tl.arange(0, COLUMNS)
    if AHEAD:  # rows of the next tile wait in registers
        b_next = _load_rows(p_x, o_r, tl.program_id(0), tiles, all_rows, PITCH, USED, WIDE, BLOCKS, RIGHT, RAGGED, True)
        if MORE:
            b_next_more = _load_rows(
                p_x, o_more, tl.program_id(0), tiles, all_rows, PITCH, USED, WIDE, BLOCKS, RIGHT, RAGGED, True
            )
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        # 2. Load [ROWS, PIECES COLUMNS], and [MORE, PIECES COLUMNS].
        if AHEAD:
            b_x, next = b_next, tile + tl.num_programs(0)
            b_next = _load_rows(p_x, o_r, next, tiles, all_rows, PITCH, USED, WIDE, BLOCKS, RIGHT, RAGGED, True)
            if MORE:
                b_xm = b_next_more
                b_next_more = _load_rows(
                    p_x, o_more, next, tiles, all_rows, PITCH, USED, WIDE, BLOCKS, RIGHT, RAGGED, True
                )
        else:
            b_x = _load_rows(p_x, o_r, tile, tiles, all_rows, PITCH, USED, WIDE, BLOCKS, RIGHT, RAGGED, False)
            if MORE:
                b_xm = _load_rows(p_x, o_more, tile, tiles, all_rows, PITCH, USED, WIDE, BLOCKS, RIGHT, RAGGED, False)
        # 3. L X, float32, one product for all pieces.
        b_y = _dot(b_left, b_x)
        if MORE:
            b_y = _dot(b_left_more, b_xm, b_y)
            b_ym = _parts(_dot(b_more_more, b_xm, _dot(b_more_left, b_x)), PIECES)
        # 4. (L X) R: rounded to 16 bits between the products.
        b_y = _right(_parts(b_y, PIECES), b_right, dtype, PIECES, RIGHT)
        if MORE:
            b_ym = _right(b_ym, b_right, dtype, PIECES, RIGHT)
        # 5. Scale and store: the factor that makes the transform orthonormal goes into the scale of a token.
        b_factor = factor
        if LARGEST:
            b_largest = largest_of_pieces(b_y, PIECES)
            if TOKENS == 1:
                b_range = largest_along(b_largest, 0)
                if MORE:
                    b_range = largest_of(b_range, largest_along(largest_of_pieces(b_ym, PIECES), 0))
                b_scale, b_factor = _scale(b_range, factor, clip_ratio, LARGEST)
                tl.store(p_scale + tile, b_scale)
            else:
                b_range = largest_along(tl.reshape(b_largest, (TOKENS, TOKEN)), 1)
                b_scale, b_codes = _scale(b_range, factor, clip_ratio, LARGEST)
                b_factor = tl.reshape(tl.broadcast_to(b_codes[:, None], (TOKENS, TOKEN)), (ROWS,))[:, None]
                o_t = tile * TOKENS + tl.arange(0, TOKENS)
                tl.store(p_scale + o_t, b_scale, mask=o_t * TOKEN < all_rows)
        first = tl.full((), USED, tl.int64) * (tile // BLOCKS)
        column = (tile % BLOCKS) * COLUMNS
        p_out = p_y + first * PITCH + column
        m_y = (o_r < USED)[:, None]
        if RAGGED:
            m_y = m_y & (first + o_r < all_rows)[:, None]
        if not RIGHT:
            m_y = m_y & (column + o_c < PITCH)[None, :]
        o_y = o_r[:, None] * PITCH + o_c[None, :]
        b_sum = _store_pieces(p_out, o_y, m_y, b_y, b_factor, LARGEST, UNIT, CLIPPED, PIECES, COLUMNS)
        if MORE:
            o_ym, m_ym = o_more[:, None] * PITCH + o_c[None, :], (o_more < USED)[:, None]
            b_sum_more = _store_pieces(p_out, o_ym, m_ym, b_ym, b_factor, LARGEST, UNIT, CLIPPED, PIECES, COLUMNS)
        if p_sums is not None:
            if TOKENS == 1:
                total = tl.sum(b_sum, 0)
                if MORE:
                    total += tl.sum(b_sum_more, 0)
                tl.store(p_sums + tile, total)
            else:
                tl.store(p_sums + o_t, tl.sum(tl.reshape(b_sum, (TOKENS, TOKEN)), 1), mask=o_t * TOKEN < all_rows)


@triton.jit
def _scale(b_range, factor, clip_ratio, LARGEST: tl.constexpr):
    """The scale of a token whose sums reach ``range``, and what turns its sums into codes."""
    b_scale = b_range * (factor * clip_ratio / LARGEST)
    b_scale = tl.where(b_scale < _TINY, 1.0, b_scale)
    return b_scale, factor / b_scale


# --- what is called ---------------------------------------------------------------------------------------------------


def hadamard_transform(
    x: Tensor, *, length: int | None = None, stride: int = 1, config: Mapping[str, int | None] | None = None
) -> Tensor:
    """Orthonormal transforms of each row of ``x``.

    Args:
        x: float16 or bfloat16 ``[M, K]``, contiguous.
        length: of a transform, 2^k or m · 2^k; the whole row if not given.
        stride: elements from one to the next of a transform: 1 transforms runs of ``length`` consecutive ones, the head size
            with ``length`` = number of heads transforms across heads. ``length · stride`` must divide K. From 2 to 8 it is
            refused: a tile's columns would be fewer than a tensor core's.
        config: a launch configuration, see :func:`default_config`; the measured one of this GPU if none is given.

    Returns:
        ``[M, K]`` in the dtype of x. Lengths beyond a tile (some 32768) take two launches.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or layout than this; see the message.
    """
    target, length = _check(x, length, stride)
    c, s = _configure("hadamard/transform", x, length, stride, target, config, None)
    y = torch.empty_like(x)
    if s is not None:
        _launch(x, y, s, length, stride, c)
        return y
    # H_length = H_a ⊗ H_b: a elements b apart, then runs of b.
    m, power = factors(length)
    a = max(1, 64 // m)
    b = power // min(power, 1 << a.bit_length() - 1)  # a power of two, as the rest of the length is
    if b == 1:
        raise ValueError(f"length {length} with stride {stride} does not fit a tile on this GPU ({target.name})")
    across = hadamard_transform(x, length=length // b, stride=b * stride)
    return hadamard_transform(across, length=b, stride=stride)


def hadamard_quantize(
    x: Tensor,
    grid: TokenGrid = TokenGrid(),  # noqa: B008
    *,
    length: int | None = None,
    stride: int = 1,
    sums: bool = False,
    config: Mapping[str, int | None] | None = None,
) -> Quantized:
    """Transform, then codes and a scale for each row, from float32 numbers that are never stored.

    One launch on a symmetric grid with one scale a token, if a tile holds a token; otherwise a transform (rounded to the
    dtype of x) and :func:`lqedu_kernels.quantize.quantize_tokens` one after the other. Arguments as there and as of
    :func:`hadamard_transform`.
    """
    target, length = _check(x, length, stride)
    check_grid(grid, sums, target)
    c, s = _configure("hadamard/int8", x, length, stride, target, config, x.shape[1])
    if config is not None and (not grid.symmetric or grid.group_size is not None):
        raise ValueError("config is for transform and codes in one launch, which this grid takes two for: leave it out")
    if s is None or not grid.symmetric or grid.group_size is not None:
        return quantize_tokens(hadamard_transform(x, length=length, stride=stride), grid, sums=sums)
    m, empty = x.shape[0], {"device": x.device}
    out = Quantized(
        torch.empty(x.shape, dtype=torch.uint8, **empty).view(grid.dtype), torch.empty(m, 1, **empty), None,
        torch.empty(m, 1, dtype=torch.int32, **empty) if sums else None,
    )  # fmt: skip
    _launch(x, out.codes, s, length, stride, c, out, grid)
    return out


def _launch(
    x: Tensor, y: Tensor, s: Split, length: int, stride: int, c: Mapping[str, int | None],
    out: Quantized | None = None, grid: TokenGrid | None = None,
) -> None:  # fmt: skip
    pitch = s.pieces * s.columns if stride == 1 else stride
    blocks = triton.cdiv(pitch, s.pieces * s.columns)
    rows = x.numel() // pitch
    tiles = triton.cdiv(rows, s.left * s.vectors) * blocks
    if tiles == 0:
        return
    b_left, b_right, factor = operands(s, stride, x.dtype, x.device)
    programs = min(tiles, c["resident"] * target_of(x, "x").processors) if c["resident"] else tiles
    _hadamard_kernel[(programs,)](
        x, b_left, b_right, y, out and out.scale, out and out.sums, rows, tiles, factor, grid.clip_ratio if grid else 1.0,
        PITCH=pitch, LEFT=s.left, PIECES=s.pieces, COLUMNS=s.columns, VECTORS=s.vectors, ROWS=s.rows, MORE=s.more,
        RIGHT=stride == 1, UNIT=factor == 1 and grid is None, TOKEN=x.shape[1] // pitch, LARGEST=grid.largest if grid else 0,
        CLIPPED=grid is not None and grid.clip_ratio != 1, BLOCKS=blocks,
        RAGGED=rows % (s.left * s.vectors) != 0, AHEAD=c.get("ahead", False),
        STAGES=c["stages"], num_warps=c["warps"],
    )  # fmt: skip


def _configure(
    operation: str,
    x: Tensor,
    length: int,
    stride: int,
    target: Target,
    config: Mapping[str, int | None] | None,
    token: int | None,
) -> tuple[Mapping[str, int | None], Split | None]:
    """The configuration and what it makes of a vector; a measured one of another length may not fit this one."""
    m, k = x.shape
    check_keys(config, "pieces warps stages resident")
    default = default_config(m, length, target, stride=stride, quantized=token is not None)
    measured = configuration(operation, m, k, k, gpu=target.name) if stride == 1 and length == k else None
    for c in (config, measured, default):
        s = split(length, stride, pieces=c["pieces"] if stride == 1 else None, token=token) if c else None
        if s is not None and _fits(s, stride, target) and s.elements <= 128 * 32 * c["warps"]:
            return c, s
        if c is config and config is not None:
            raise ValueError(
                f"config has {config['pieces']} pieces, which do not make a tile of length {length}: use None"
            )
    return default, None


def _check(x: Tensor, length: int | None, stride: int) -> tuple[Target, int]:
    check_tensor("x", x, dtype=_DTYPES, shape=(None, None), device=getattr(x, "device", None), what="[M, K]")
    target = target_of(x, "x")
    k = x.shape[1]
    for name, value in (("length", length), ("stride", stride)):
        if (value is not None or name == "stride") and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    length = k // stride if length is None else length
    if k == 0 or length == 0 or k % (length * stride):
        raise ValueError(f"x has {k} columns, which transforms of length {length} with stride {stride} do not divide")
    if 1 < stride < 9:
        raise ValueError(f"stride must be 1 or at least 9, got {stride}: use hadamard_reference, or transpose x")
    if stride == 1 and factors(length)[1] < 16:
        raise ValueError(f"length {length} is m · 2^k with 2^k below 16, which only transforms with a stride serve")
    return target, length
