"""Pages of a quantized key-value cache: their layout, and new tokens quantized straight into them; ``20-hadamard-kv``.

A page holds 64 tokens of one head; a block table says which pages are a sequence's, in order. A token x of a head is stored
as codes c with two FP16 numbers, as ``lqedu.formats.kv`` defines it and with the same bits::

    kv4, kv8    s = fp16((max(x, 0) - min(x, 0)) / (2^b - 1))     z = fp16(-min(x, 0) / s)    c = round(x / s + z)
    fp8         s = fp16(max|x| / 448)                            z = 0                       c = E4M3(x / s)

and stands for ``s (c - z)``. Codes are packed into 16-bit words whose fields lie a part of the row apart, so that one AND
of a 32-bit register (two words) takes a neighbouring pair of codes out, where a tensor core wants it::

    keys    codes [page, head, 64, D b/16]     word j of a token:    dimensions  j, j + D/4, j + D/2, j + 3D/4    (kv4)
    values  codes [page, head, D, 64 b/16]     word j of a dimension:    tokens  j, j + 16,  j + 32,  j + 48      (kv4)
            numbers [page, head, 64, 2]        (s, z) of a token                        two halves instead of four: 8 bits

       bit 15         12 11          8 7           4 3           0
          +-------------+-------------+-------------+-------------+
          | field 3     | field 2     | field 1     | field 0     |          kv4; kv8 and fp8 have two fields of 8 bits
          +-------------+-------------+-------------+-------------+

Keys are multiplied along their dimensions, values along their tokens, so values lie transposed. Appending one token of a
head reads 4 D bytes and writes D/2 + 8 bytes of keys and values and, with kv4, D words of the values, one nibble each.
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels._numerics import float8_e4m3_bits, round_half_even
from lqedu_kernels._tensors import check_tensor, target_of

__all__ = [
    "PAGE",
    "Pages",
    "empty_pages",
    "kv_append",
    "kv_append_reference",
    "pack_pages",
    "page_codes",
    "page_values",
    "quantize_reference",
    "unpack_pages",
]

#: Tokens of a page.
PAGE = 64
#: Programs on the second axis of a grid, at most: heads of all sequences that one launch appends to.
MOST_PLACES = 65535
BITS = {"kv4": 4, "kv8": 8, "fp8": 8}
Role = Literal["key", "value"]


class Pages(NamedTuple):
    """The pages of one layer's keys, or of its values.

    Attributes:
        kind: "kv4", "kv8" or "fp8".
        codes: int16 ``[pages, kv_heads, 64, D b/16]`` of keys, ``[pages, kv_heads, D, 64 b/16]`` of values.
        numbers: float16 ``[pages, kv_heads, 64, 2]``, scale and zero point (0 for fp8) of each token.
    """

    kind: str
    codes: Tensor
    numbers: Tensor


def empty_pages(
    kind: str, role: Role, pages: int, kv_heads: int, head_dim: int, *, device: torch.device | str
) -> Pages:
    """Pages that hold no token yet, filled with zeros.

    >>> empty_pages("kv4", "key", 10, 8, 128, device="cpu").codes.shape      # 64 bytes a token and head
    torch.Size([10, 8, 64, 32])
    """
    _check_kind(kind, head_dim)
    _check_role(role)
    fields = 16 // BITS[kind]
    shape = (PAGE, head_dim // fields) if role == "key" else (head_dim, PAGE // fields)
    codes = torch.zeros(pages, kv_heads, *shape, dtype=torch.int16, device=device)
    return Pages(kind, codes, torch.zeros(pages, kv_heads, PAGE, 2, dtype=torch.float16, device=device))


def pack_pages(records: Tensor, kind: str, role: Role) -> Pages:
    """Pages from records: codes as one little-endian bit stream, then the scale and, but for fp8, the zero point.

    Args:
        records: uint8 ``[pages, kv_heads, 64, record bytes]``, as ``lqedu.formats.kv`` writes them.
        kind: "kv4", "kv8" or "fp8".
        role: whether they are keys or values; it decides along which axis words are packed.

    Raises:
        TypeError, ValueError: records of another dtype or shape, no such kind or role.
    """
    if not isinstance(records, Tensor) or records.dtype != torch.uint8 or records.ndim != 4:
        raise TypeError("records must be uint8 [pages, kv_heads, 64, bytes of a record]")
    _check_kind(kind, 64)
    _check_role(role)
    bits, width = BITS[kind], records.shape[-1] - (2 if kind == "fp8" else 4)
    codes = records[..., :width].to(torch.int32)
    codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2) if bits == 4 else codes
    _check_kind(kind, codes.shape[-1])
    if role == "value":
        codes = codes.mT
    words = sum(field << (bits * i) for i, field in enumerate(codes.chunk(16 // bits, -1)))
    numbers = records[..., width:].contiguous().view(torch.float16)
    if kind == "fp8":
        numbers = torch.cat([numbers, torch.zeros_like(numbers)], -1)
    return Pages(kind, words.to(torch.int16).contiguous(), numbers)


def unpack_pages(pages: Pages, role: Role) -> Tensor:
    """Inverse of :func:`pack_pages`.

    >>> records = torch.arange(64 * 36).remainder(256).to(torch.uint8).view(1, 1, 64, 36)      # heads of 64, kv4
    >>> torch.equal(unpack_pages(pack_pages(records, "kv4", "value"), "value"), records)
    True
    """
    codes = page_codes(pages, role)
    packed = codes if BITS[pages.kind] == 8 else codes[..., ::2] | codes[..., 1::2] << 4
    numbers = pages.numbers[..., :1] if pages.kind == "fp8" else pages.numbers
    return torch.cat([packed, numbers.contiguous().view(torch.uint8)], -1)


def page_codes(pages: Pages, role: Role) -> Tensor:
    """Codes, one a byte: uint8 ``[pages, kv_heads, 64, D]``."""
    _check_role(role)
    bits = BITS[pages.kind]
    words = pages.codes.to(torch.int32)
    codes = torch.cat([(words >> (bits * i)) & ((1 << bits) - 1) for i in range(16 // bits)], -1).to(torch.uint8)
    return (codes.mT if role == "value" else codes).contiguous()


def page_values(pages: Pages, role: Role) -> Tensor:
    """What pages stand for: float32 ``[pages, kv_heads, 64, D]``."""
    codes = page_codes(pages, role)
    codes = (codes.view(torch.float8_e4m3fn) if pages.kind == "fp8" else codes).to(torch.float32)
    scale, zero = pages.numbers.to(torch.float32).split(1, -1)
    return scale * (codes - zero)


def quantize_reference(
    x: Tensor, kind: str, *, clip_ratio: float = 1.0, zero_point: str = "float", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and numbers of tokens: the only definition of what :func:`kv_append` stores.

    Args:
        x: keys or values ``[..., D]``.
        kind, clip_ratio, zero_point: as :func:`kv_append`.
        scale: float16 ``[..., 1]`` instead of the token's own (fp8).

    Returns:
        uint8 ``[..., D]`` and float16 ``[..., 2]``.
    """
    x = x.to(torch.float32)
    if kind == "fp8":
        s = _half(x.abs().amax(-1, keepdim=True) / 448) if scale is None else scale.to(torch.float32)
        codes = (x / s).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        return codes, torch.cat([s, torch.zeros_like(s)], -1).to(torch.float16)
    top = (1 << BITS[kind]) - 1
    lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    s = _half(clip_ratio * (hi - lo) / top)
    z = (clip_ratio * lo.abs() / s).clamp(max=top)
    z = torch.round(z) if zero_point == "integer" else z.to(torch.float16).to(torch.float32)
    return torch.round(x / s + z).clamp(0, top).to(torch.uint8), torch.cat([s, z], -1).to(torch.float16)


def kv_append_reference(
    key: Tensor, value: Tensor, keys: Pages, values: Pages, table: Tensor, lengths: Tensor, **options: object
) -> None:
    """:func:`kv_append` in plain torch, token by token."""
    scales = options.pop("scales", None)
    for index, (role, x, pages) in enumerate((("key", key, keys), ("value", value, values))):
        all_codes = page_codes(pages, role)
        scale = None if scales is None else scales[index].view(1, -1, 1, 1).expand(*x.shape[:3], 1)
        codes, numbers = quantize_reference(x, pages.kind, scale=scale, **options)
        for seq, length in enumerate(lengths.tolist()):
            for new in range(max(0, x.shape[2] - length), x.shape[2]):
                token = length - x.shape[2] + new
                page, slot = table[seq, token // PAGE], token % PAGE
                all_codes[page, :, slot] = codes[seq, :, new]
                pages.numbers[page, :, slot] = numbers[seq, :, new]
        width = 1 if pages.kind == "fp8" else 2
        records = all_codes if BITS[pages.kind] == 8 else all_codes[..., ::2] | all_codes[..., 1::2] << 4
        records = torch.cat([records, pages.numbers[..., :width].contiguous().view(torch.uint8)], -1)
        pages.codes.copy_(pack_pages(records, pages.kind, role).codes)


def _half(scale: Tensor) -> Tensor:
    half = scale.clamp(max=65504).to(torch.float16)
    return torch.where(half == 0, torch.ones_like(half), half).to(torch.float32)


def _check_role(role: str) -> None:
    if role not in ("key", "value"):
        raise ValueError(f"role is 'key' or 'value', got {role!r}")


def _check_kind(kind: str, head_dim: int, argument: str = "kind") -> None:
    if kind not in tuple(BITS):
        raise ValueError(f"{argument} is one of {', '.join(BITS)}, got {kind!r}")
    if head_dim % 32 or not 32 <= head_dim <= 256:
        raise ValueError(f"head_dim is a multiple of 32 from 32 to 256, got {head_dim}: pad the heads with zeros")


def check_pages(argument: str, pages: Pages, role: Role, kv_heads: int, head_dim: int, device: torch.device) -> None:
    """Pages of the shape that heads of this size ask for (TypeError, ValueError)."""
    if not isinstance(pages, Pages):
        raise TypeError(f"{argument} must be Pages, as empty_pages makes them, got {type(pages).__name__}")
    _check_kind(pages.kind, head_dim, f"{argument}.kind")
    fields = 16 // BITS[pages.kind]
    shape = (PAGE, head_dim // fields) if role == "key" else (head_dim, PAGE // fields)
    check_tensor(f"{argument}.codes", pages.codes, dtype=torch.int16, shape=(None, kv_heads, *shape), device=device)
    shape = (pages.codes.shape[0], kv_heads, PAGE, 2)
    check_tensor(f"{argument}.numbers", pages.numbers, dtype=torch.float16, shape=shape, device=device)


def check_table(table: Tensor, lengths: Tensor, batch: int, device: torch.device) -> None:
    """A block table and lengths of a batch (TypeError, ValueError)."""
    what = "page numbers of each sequence"
    check_tensor("table", table, dtype=torch.int32, shape=(batch, None), device=device, what=what)
    what = "tokens of each sequence, new ones included"
    check_tensor("lengths", lengths, dtype=torch.int32, shape=(batch,), device=device, what=what)
    if batch and not table.shape[1]:
        raise ValueError(f"table has no page for {batch} sequences: give each at least one, of {PAGE} tokens")


def check_scaling(scaling: float | None) -> None:
    """What scores are multiplied with is a number, or left to the kernel (TypeError)."""
    if scaling is not None and not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a number, or None for D ** -0.5, got {type(scaling).__name__}")


def check_places(argument: str, batch: int, kv_heads: int) -> None:
    """Sequences times heads fit the second axis of a grid (ValueError)."""
    if batch * kv_heads > MOST_PLACES:
        raise ValueError(
            f"{argument} has {batch} sequences of {kv_heads} heads, but one launch serves {MOST_PLACES} heads at most: "
            "append some sequences at a time"
        )


@triton.jit
def _scale(s):
    """What FP16 holds of a scale; 1 where there is nothing to scale."""
    s = tl.minimum(s, 65504.0).to(tl.float16).to(tl.float32)
    return tl.where(s == 0.0, 1.0, s)


@triton.jit
def _numbers(low, high, p_scale, clip_ratio, KIND: tl.constexpr, INTEGER: tl.constexpr, FIXED: tl.constexpr):
    """Scale and zero point of tokens whose values reach from low <= 0 to high >= 0."""
    if KIND == "fp8":
        if FIXED:
            return tl.zeros_like(low) + tl.load(p_scale).to(tl.float32), tl.zeros_like(low)
        return _scale(tl.div_rn(tl.maximum(-low, high), 448.0)), tl.zeros_like(low)
    top: tl.constexpr = 15.0 if KIND == "kv4" else 255.0
    s = _scale(tl.div_rn(clip_ratio * (high - low), top))
    z = tl.minimum(tl.div_rn(clip_ratio * tl.abs(low), s), top)
    if INTEGER:
        return s, round_half_even(z)
    return s, z.to(tl.float16).to(tl.float32)


@triton.jit
def _codes(x, s, z, KIND: tl.constexpr):
    """Codes of values, int32; divisions round once, as torch's do."""
    ratio = tl.div_rn(x, s)
    if KIND == "fp8":
        return float8_e4m3_bits(tl.minimum(tl.maximum(ratio, -448.0), 448.0)).to(tl.int32)
    top: tl.constexpr = 15.0 if KIND == "kv4" else 255.0
    return tl.minimum(tl.maximum(round_half_even(ratio + z), 0.0), top).to(tl.int32)


@triton.jit
def _pair(s, z):
    """Two FP16 numbers as the 32-bit word that holds them, scale first."""
    low = s.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = z.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def _append_keys(
    p_key, p_codes, p_numbers, p_scale, row, slot, m_new, clip_ratio,
    D: tl.constexpr, D2: tl.constexpr, KIND: tl.constexpr, INTEGER: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Quantize the tokens of a program, put the fields of a word together, store."""
    FIELDS: tl.constexpr = 4 if KIND == "kv4" else 2
    W: tl.constexpr = D // FIELDS  # words of a key
    o_f = tl.arange(0, FIELDS)
    o_w = tl.arange(0, D2 // FIELDS)
    o_x = row[:, None, None] + o_f[None, :, None] * W + o_w[None, None, :]
    m_x = m_new[:, None, None] & (o_w < W)[None, None, :]
    x = tl.load(p_key + o_x, mask=m_x, other=0.0).to(tl.float32)  # [TOKENS, FIELDS, W]
    low = tl.minimum(tl.min(tl.min(x, 2), 1), 0.0)  # [TOKENS]
    high = tl.maximum(tl.max(tl.max(x, 2), 1), 0.0)
    s, z = _numbers(low, high, p_scale, clip_ratio, KIND, INTEGER, FIXED)
    codes = _codes(x, s[:, None, None], z[:, None, None], KIND)
    words = tl.sum(codes << (o_f * (16 // FIELDS))[None, :, None], 1)  # [TOKENS, W], fields do not overlap
    tl.store(p_codes + slot[:, None] * W + o_w[None, :], words.to(tl.int16), mask=m_new[:, None] & (o_w < W)[None, :])
    tl.store(p_numbers + slot, _pair(s, z), mask=m_new)


@triton.jit
def _append_values(
    p_value, p_words, p_numbers, p_scale, row, slot, field, m_new, clip_ratio,
    D: tl.constexpr, D2: tl.constexpr, KIND: tl.constexpr, INTEGER: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """The same for values; the fields of a word are tokens, and those that are not new stay."""
    BITS: tl.constexpr = 4 if KIND == "kv4" else 8
    o_d = tl.arange(0, D2)
    m_d = o_d < D
    old = tl.load(p_words + o_d * (4 * BITS), mask=m_d, other=0).to(tl.int32)
    x = tl.load(p_value + row[:, None] + o_d[None, :], mask=m_new[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    low = tl.minimum(tl.min(x, 1), 0.0)  # [TOKENS]
    high = tl.maximum(tl.max(x, 1), 0.0)
    s, z = _numbers(low, high, p_scale, clip_ratio, KIND, INTEGER, FIXED)
    codes = _codes(x, s[:, None], z[:, None], KIND)
    words = tl.sum(tl.where(m_new[:, None], codes << (field * BITS)[:, None], 0), 0)  # [D]
    fresh = tl.sum(tl.where(m_new, ((1 << BITS) - 1) << (field * BITS), 0), 0)  # bits of the new fields
    tl.store(p_words + o_d * (4 * BITS), ((old & ~fresh) | words).to(tl.int16), mask=m_d)
    tl.store(p_numbers + slot, _pair(s, z), mask=m_new)


@triton.jit(do_not_specialize=["heads", "new", "table_width"])
def _append_kernel(
    p_key, p_value, p_key_codes, p_key_numbers, p_value_codes, p_value_numbers, p_table, p_lengths,
    p_key_scale, p_value_scale, clip_ratio, heads, new, table_width,
    D: tl.constexpr, D2: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, INTEGER: tl.constexpr, FIXED: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """A program owns one column of words of the values of one page and head, or the keys of the same tokens.

    No two programs write to a word, so several tokens of one page are appended without a race.
    """
    FIELDS: tl.constexpr = 4 if VALUE == "kv4" else 2
    COLUMNS: tl.constexpr = 64 // FIELDS
    # Column j of a page holds tokens j, j + 64/FIELDS, ...; those at start .. length are new.
    place, tile = tl.program_id(1), tl.program_id(0)
    sequence = place // heads
    head = place % heads
    length = tl.load(p_lengths + sequence)
    start = length - new
    if ONE:  # few are new, no two of them in one column: one token a program
        column = (start + tile) % COLUMNS
        page = (start + tile) // 64
        field = tl.arange(0, 1) + (start + tile) % 64 // COLUMNS
    else:  # all columns of every page that is touched
        column = tile % COLUMNS
        page = tl.maximum(start, 0) // 64 + tile // COLUMNS
        field = tl.arange(0, FIELDS)
    token = page * 64 + column + field * COLUMNS  # [TOKENS]
    m_new = (token >= tl.maximum(start, 0)) & (token < length)
    if tl.max(m_new.to(tl.int32), 0) == 0:
        return
    page = tl.load(p_table + sequence * table_width + page).to(tl.int64) * heads + head
    row = (place.to(tl.int64) * new + token - start) * D
    slot = page * 64 + token % 64
    if tl.program_id(2) == 0:
        _append_keys(
            p_key, p_key_codes, p_key_numbers, p_key_scale + head, row, slot, m_new, clip_ratio, D, D2, KEY, INTEGER, FIXED
        )  # fmt: skip
    else:
        p_words = p_value_codes + page * (D * COLUMNS) + column
        _append_values(
            p_value, p_words, p_value_numbers, p_value_scale + head, row, slot, field, m_new, clip_ratio,
            D, D2, VALUE, INTEGER, FIXED,
        )  # fmt: skip


def kv_append(
    key: Tensor,
    value: Tensor,
    keys: Pages,
    values: Pages,
    table: Tensor,
    lengths: Tensor,
    *,
    clip_ratio: float = 1.0,
    zero_point: Literal["float", "integer"] = "float",
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Quantize new keys and values and write them into their pages; changes ``keys`` and ``values``.

    Args:
        key, value: float16 or bfloat16 ``[batch, kv_heads, new, D]``, as they are to be stored: keys behind RoPE, a Hadamard
            transform over the head if there is one, less their mean if it is taken off. Finite, and of a range that
            FP16 scales reach: a kernel cannot refuse what it finds on the device.
        keys, values: pages, which may differ in kind.
        table: int32 ``[batch, pages of the longest sequence]``.
        lengths: int32 ``[batch]``, tokens of each sequence with the new ones: they are its last. At most 64 times the
            table's width; a kernel cannot refuse what it finds on the device.
        clip_ratio: the range of a token is multiplied by this (kv4, kv8).
        zero_point: "float" (FP16) or "integer" (rounded to a code).
        scales: float16 ``[kv_heads]`` of keys and of values, instead of each token's own (fp8, calibrated).

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.
    """
    floats = (torch.float16, torch.bfloat16)
    check_tensor("key", key, dtype=floats, shape=(None, None, None, None), device=getattr(key, "device", None))
    batch, kv_heads, new, head_dim = key.shape
    check_tensor("value", value, dtype=key.dtype, shape=tuple(key.shape), device=key.device)
    check_pages("keys", keys, "key", kv_heads, head_dim, key.device)
    check_pages("values", values, "value", kv_heads, head_dim, key.device)
    check_table(table, lengths, batch, key.device)
    if not isinstance(clip_ratio, (int, float)) or not 0 < clip_ratio <= 1:
        raise ValueError(f"clip_ratio lies in (0, 1], got {clip_ratio!r}")
    if zero_point not in ("float", "integer"):
        raise ValueError(f"zero_point is 'float' or 'integer', got {zero_point!r}")
    if scales is not None:
        if {keys.kind, values.kind} != {"fp8"}:
            raise ValueError("scales are for fp8 pages; kv4 and kv8 take each token's own range: leave scales=None")
        if not isinstance(scales, tuple) or len(scales) != 2:
            raise TypeError("scales must be a tuple of two tensors, of keys and of values")
        for name, scale in zip(("scales[0]", "scales[1]"), scales, strict=True):
            check_tensor(name, scale, dtype=torch.float16, shape=(kv_heads,), device=key.device)
    check_places("key", batch, kv_heads)
    target_of(key, "key")
    if not key.numel():
        return
    columns = PAGE * BITS[values.kind] // 16
    whole = new > columns
    tiles = (new + 2 * PAGE - 2) // PAGE * columns if whole else new
    key_scale, value_scale = (keys.numbers, values.numbers) if scales is None else scales
    _append_kernel[(tiles, batch * kv_heads, 2)](
        key, value, keys.codes, keys.numbers.view(torch.int32), values.codes, values.numbers.view(torch.int32), table, lengths,
        key_scale, value_scale, clip_ratio, kv_heads, new, table.shape[1],
        D=head_dim, D2=triton.next_power_of_2(head_dim), KEY=keys.kind, VALUE=values.kind, INTEGER=zero_point == "integer",
        FIXED=scales is not None, ONE=not whole, num_warps=1,
    )  # fmt: skip
