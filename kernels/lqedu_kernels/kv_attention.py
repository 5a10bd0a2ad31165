"""Attention of a few new tokens over a cache of quantized keys and values (decode), split over the cache; ``20-hadamard-kv``.

With keys ``s (c - z)`` and values ``s' (c' - z')`` of token t, scores S and weights P of a query q are::

    S_t = s_t (q . c_t - z_t sum(q)) / sqrt(D)      P = softmax(S)      y = sum_t P_t s'_t c'_t - sum_t P_t s'_t z'_t

so that scale and zero point cost a few operations a token, and the tensor cores work on bare codes. Three things make that
exact and cheap:

- A code c in the lowest bits of a float16 whose other bits are 0 *is* c 2^-24, a subnormal number, exactly, and tensor cores
  multiply subnormal numbers at full speed. One AND takes a pair of codes out of two words (``lqedu_kernels.kv_pages``
  has the layout); 16 c 2^-24 for the odd fields, which saves their shift. E4M3 bits moved one place are the value 2^-8.
- A value's scale joins the softmax as a bias: ``P_t s'_t = 2^(S_t + log2 s'_t)``, so the products with the codes are of
  numbers up to 1, which float16 holds whatever the scales are; the denominator takes the bias back, token by token.
- Queries that share a head are columns of the second operand (8 of them, not 16 rows), codes are the first, which the
  tensor cores read from registers.

Each program handles one head of one sequence, ``pages_per_split`` pages of it, and the result of a program is a triple
(m, l, o) of a running maximum, denominator and output; a second kernel adds the triples of all splits in a fixed order,
so the result is the same at every run; with the same configuration it does not change with the rest of the batch either.

Exact: codes, scales, zero points, queries. Rounded: weights to float16 before the product with the values (relative error
2^-11), sums in float32, the output once. Bytes of a call: ``D b/8 + 4`` a token, head and tensor; operations 4 D a token and
query head. At 4 bits a register of eight codes costs 5 instructions to unpack and 2 products.
"""

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels._numerics import INTERPRET, to_dtype
from lqedu_kernels._tensors import check_keys, check_tensor, target_of
from lqedu_kernels.kv_pages import BITS, PAGE, Pages, check_pages, check_scaling, check_table, page_values

__all__ = ["bytes_moved", "default_config", "kv_attention", "kv_attention_reference", "operations", "search_space"]


def kv_attention_reference(
    query: Tensor, keys: Pages, values: Pages, table: Tensor, lengths: Tensor, *, scaling: float | None = None
) -> Tensor:
    """:func:`kv_attention` in plain torch, sequence by sequence, in float32 (float64 for a float64 query)."""
    _, heads, new, size = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    group, y = heads // keys.codes.shape[1], torch.zeros_like(query)
    for i, length in enumerate(lengths.tolist()):
        pages = table[i, : -(-length // PAGE)].long()
        k, v = (
            page_values(Pages(p.kind, p.codes[pages], p.numbers[pages]), role)  # [pages, kv_heads, 64, D]
            .to(dtype).transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(group, 0)  # [heads, length, D]
            for p, role in ((keys, "key"), (values, "value"))
        )  # fmt: skip
        scores = query[i].to(dtype) @ k.mT * (size**-0.5 if scaling is None else scaling)
        seen = (
            torch.arange(length, device=query.device)
            <= torch.arange(length - new, length, device=query.device)[:, None]
        )
        p = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)  # a query that may read nothing gets 0
        y[i] = (p @ v).to(query.dtype)
    return y


def bytes_moved(tokens: int, kv_heads: int, head_dim: int, key: str, value: str, *, queries: int = 0) -> int:
    """Fewest bytes of a call: ``tokens`` of all sequences with their numbers once, 2 bytes for each feature of q and y.

    >>> bytes_moved(1, 8, 128, "kv4", "kv4"), 2 * 2 * 8 * 128      # of a token, beside FP16
    (1088, 4096)
    """
    return tokens * kv_heads * (head_dim * (BITS[key] + BITS[value]) // 8 + 8) + 4 * queries * head_dim


def operations(tokens: int, heads: int, head_dim: int) -> int:
    """Multiplications and additions of the two products, of one new token a sequence."""
    return 4 * tokens * heads * head_dim


def default_config(
    programs: int, pages: int, *, processors: int, page_bytes: int = 8704, columns: int = 8
) -> dict[str, int]:
    """One warp on each of the four schedulers of a processor: the best of every sweep on an H100, from 1 to 64 sequences.

    Two warps of a program halve what the second kernel adds up; four add up more between themselves than that saves.

    Args:
        programs: sequences times key heads (times blocks of columns).
        pages: of the longest sequence.
        processors: of the GPU.
        page_bytes: of keys, values and numbers of one page and head; two steps of a program should fit into 80 KB.
        columns: queries of a program; 16 leave a warp no registers for what several warps need.
    """
    schedulers = 4 * processors
    two = columns == 8 and pages > 1 and programs <= 3 * processors and page_bytes <= 20_000  # 3/4 of them is enough
    warps = 2 if two else 1
    splits = max(1, min(schedulers // (programs * warps), -(-pages // warps)))
    per_split = -(-pages // splits)
    return {"pages_per_split": -(-per_split // warps) * warps, "num_warps": warps, "num_stages": 3}


def search_space(programs: int, pages: int, *, processors: int = 132, page_bytes: int = 8704) -> list[dict[str, int]]:
    """Configurations worth timing, the default first: 2 to 12 warps for each processor, fewer where there are few pages."""
    found = [default_config(programs, pages, processors=processors, page_bytes=page_bytes)]
    fewest = min(2 * processors, programs * pages // 8)
    for warps, stages in ((1, 3), (2, 3), (4, 3), (1, 4), (2, 4), (4, 2)):
        for size in (warps * 2**i for i in range(10)):
            if size < 2 * pages and fewest <= programs * -(-pages // size) * warps <= 12 * processors:
                found.append({"pages_per_split": size, "num_warps": warps, "num_stages": stages})
    return [config for i, config in enumerate(found) if config not in found[:i]]


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _exp2(x):
    if INTERPRET:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x):
    if INTERPRET:
        return tl.where(x > 0.0, tl.log2(tl.maximum(x, 1e-30)), float("-inf"))
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _fields(words, KIND: tl.constexpr):
    """The fields of 16-bit words, lowest first, as float16: 2^-24 times a code (odd fields of kv4: 2^-20), or E4M3 / 2^8."""
    if INTERPRET:
        w = words.to(tl.int32) & 0xFFFF
        if KIND == "kv4":
            fields = (_half(w & 0x0F), _half(w & 0xF0), _half((w >> 8) & 0x0F), _half((w >> 8) & 0xF0))
        elif KIND == "kv8":
            fields = (_half(w & 0xFF), _half(w >> 8))
        else:
            fields = (_half(((w << 8) & 0x8000) | ((w << 7) & 0x3F80)), _half((w & 0x8000) | ((w >> 1) & 0x3F80)))
    elif KIND == "kv4":
        fields = tl.inline_asm_elementwise(
            """{ .reg .b32 h;
            and.b32 $0, $4, 0x000f000f;
            and.b32 $1, $4, 0x00f000f0;
            shr.u32 h, $4, 8;
            and.b32 $2, h, 0x000f000f;
            and.b32 $3, h, 0x00f000f0; }""",
            "=r,=r,=r,=r,r", [words], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    elif KIND == "kv8":
        fields = tl.inline_asm_elementwise(
            "and.b32 $0, $2, 0x00ff00ff; prmt.b32 $1, $2, 0, 0x4341;",
            "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:  # the sign stays the top bit, exponent and mantissa move one place down
        fields = tl.inline_asm_elementwise(
            """{ .reg .b32 h, t;
            shl.b32 h, $2, 8;
            shr.u32 t, h, 1;
            and.b32 t, t, 0x3f803f80;
            lop3.b32 $0, h, 0x80008000, t, 0xea;
            shr.u32 t, $2, 1;
            and.b32 t, t, 0x3f803f80;
            lop3.b32 $1, $2, 0x80008000, t, 0xea; }""",
            "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return fields


@triton.jit
def _half(w):
    return w.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _numbers(pair):
    """Scale and zero point, float32, out of the 32-bit words that hold both."""
    scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    zero = ((pair >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def _by_field(p, FIELDS: tl.constexpr):
    """Weights ``[P, 64, R]`` by the field of a value's word that holds the token: FIELDS of ``[P, 64/FIELDS, R]``."""
    P: tl.constexpr = p.shape[0]
    R: tl.constexpr = p.shape[2]
    fields = p.reshape(P, 2, 32, R).permute(0, 2, 3, 1).split()
    if FIELDS == 4:
        p0, p1 = fields[0].reshape(P, 2, 16, R).permute(0, 2, 3, 1).split()
        p2, p3 = fields[1].reshape(P, 2, 16, R).permute(0, 2, 3, 1).split()
        fields = (p0, p1, p2, p3)
    return fields


@triton.jit
def _over_pages(y):
    """Sum over the pages ``[P, D, R]``: each thread gets all P of its elements at once, which ``tl.sum`` would not do."""
    P: tl.constexpr = y.shape[0]
    y = y.permute(1, 2, 0)
    if P > 1:
        y = _halved(y)
    if P > 2:
        y = _halved(y)
    if P > 4:
        y = _halved(y)
    return y.reshape(y.shape[0], y.shape[1])


@triton.jit
def _halved(y):
    a, b = y.reshape(y.shape[0], y.shape[1], y.shape[2] // 2, 2).split()
    return a + b


@triton.jit(do_not_specialize=["heads", "table_width", "pages_per_split"])  # one compilation for all of them
def _split_kernel(
    p_query, p_key_codes, p_key_numbers, p_value_codes, p_value_numbers, p_table, p_lengths, p_y, p_partial, p_state,
    scaling, heads, table_width, pages_per_split,
    ROWS: tl.constexpr, NEW: tl.constexpr, R: tl.constexpr, P: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, WHOLE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One split of one head of one sequence, for R of the ROWS = group * NEW queries that share the head.

    P pages at a time, one a warp: the products are batches of P, and the warps meet only behind the last page.
    """
    FK: tl.constexpr = 4 if KEY == "kv4" else 2  # fields of a word
    FV: tl.constexpr = 4 if VALUE == "kv4" else 2
    W: tl.constexpr = D // FK  # words of a key
    W2: tl.constexpr = 16 if D2 // FK < 16 else D2 // FK
    J: tl.constexpr = 64 // FV  # words of a dimension of the values
    LIFT_K: tl.constexpr = 16.0 if KEY == "kv4" else 1.0  # an odd field is this much too large
    LIFT_V: tl.constexpr = 4.0 if VALUE == "kv4" else 0.0  # the same as a power of two
    UNIT_K: tl.constexpr = 256.0 if KEY == "fp8" else 16777216.0  # what a field is multiplied by to be its code
    UNIT_V: tl.constexpr = 256.0 if VALUE == "fp8" else 16777216.0
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()  # the sum's programs may take their places and wait there
    # 1. Place; lengths and queries are asked for at once.
    place = tl.program_id(0)  # sequence * heads + head
    head = place % heads
    sequence = place // heads
    length = tl.load(p_lengths + sequence)
    first = tl.program_id(1) * pages_per_split
    o_p = tl.arange(0, P)
    p_page = p_table + sequence * table_width + o_p
    page = tl.load(p_page + first, mask=first + o_p < table_width, other=0)
    o_r = tl.program_id(2) * R + tl.arange(0, R)
    m_r = o_r < ROWS
    o_w = tl.arange(0, W2)
    m_q = (o_w < W)[None, :, None] & m_r[None, None, :]
    p_q = p_query + (place.to(tl.int64) * ROWS + o_r)[None, None, :] * D + o_w[None, :, None] + o_p[:, None, None] * 0
    x0 = tl.load(p_q, mask=m_q, other=0.0)  # [P, W, R], the same for each page
    x1 = tl.load(p_q + W, mask=m_q, other=0.0)
    if FK == 4:
        x2 = tl.load(p_q + 2 * W, mask=m_q, other=0.0)
        x3 = tl.load(p_q + 3 * W, mask=m_q, other=0.0)
    last = tl.minimum(first + pages_per_split, tl.cdiv(length, 64))
    if not WHOLE and first >= last:
        return
    # 2. Queries as columns, scaled by a power of two so that the largest lies in 2^8 .. 2^9 and float16 holds all exactly.
    x0 = x0.to(tl.float32)
    x1 = x1.to(tl.float32)
    largest = tl.maximum(tl.abs(x0), tl.abs(x1))
    total = tl.sum(x0 + x1, 1)
    if FK == 4:
        x2 = x2.to(tl.float32)
        x3 = x3.to(tl.float32)
        largest = tl.maximum(largest, tl.maximum(tl.abs(x2), tl.abs(x3)))
        total += tl.sum(x2 + x3, 1)
    exponent = tl.max(tl.max(largest, 1), 1).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 20), 250)  # [P]
    up = ((262 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^(262 - 127 - exponent)
    down = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
    even = up[:, None, None]
    q = ((x0 * even).to(tl.float16), (x1 * (even / LIFT_K)).to(tl.float16))
    if FK == 4:
        q = (q[0], q[1], (x2 * even).to(tl.float16), (x3 * (even / LIFT_K)).to(tl.float16))
    total = total * (up / UNIT_K)[:, None]
    scaling = scaling * 1.4426950408889634 * UNIT_K * down[:, None]  # scores are exponents of 2 from here on
    # 3. Pages: scores, running maximum m and denominator l, weights times codes, weights times zero points.
    o_t = tl.arange(0, 64)
    o_d = tl.arange(0, D2)
    o_j = tl.arange(0, J)
    odd = ((o_t // J % 2).to(tl.float32) * LIFT_V)[None, :]
    seen = length - NEW + o_r % NEW  # last token that a query reads
    m = tl.full([P, R], -1e30, tl.float32)  # finite: a page that a query may not read leaves it as it is
    l = tl.zeros([P, R], tl.float32)  # noqa: E741
    offset = tl.zeros([P, R], tl.float32)
    y = tl.zeros([P, D2, R], tl.float32)
    for i in range(first, last, P):
        m_p = i + o_p < last
        following = tl.load(p_page + i + P, mask=i + P + o_p < last, other=0)
        page = page.to(tl.int64) * heads + head
        token = (i + o_p)[:, None] * 64 + o_t[None, :]
        o_n = page[:, None] * 64 + o_t[None, :]
        key_numbers = tl.load(p_key_numbers + o_n, mask=token < length, other=0)  # [P, 64]
        value_numbers = tl.load(p_value_numbers + o_n, mask=token < length, other=0)
        o_k = page[:, None, None] * (64 * W) + o_t[None, :, None] * W + o_w[None, None, :]
        m_k = m_p[:, None, None] & (o_w < W)[None, None, :]
        key_words = tl.load(p_key_codes + o_k, mask=m_k, other=0)  # [P, 64, W]
        o_v = page[:, None, None] * (D * J) + o_d[None, :, None] * J + o_j[None, None, :]
        m_v = m_p[:, None, None] & (o_d < D)[None, :, None]
        value_words = tl.load(p_value_codes + o_v, mask=m_v, other=0)  # [P, D, J]
        k = _fields(key_words, KEY)
        s = tl.zeros([P, 64, R], tl.float32)
        for n in tl.static_range(FK):
            s = tl.dot(k[n], q[n], s)
        scale, zero = _numbers(key_numbers)
        if KEY != "fp8":
            s = s - zero[:, :, None] * total[:, None, :]
        value_scale, value_zero = _numbers(value_numbers)
        bias = _log2(value_scale) - odd  # -inf for tokens beyond the last
        s = s * (scale * scaling)[:, :, None] + bias[:, :, None]
        if NEW > 1:
            s = tl.where(token[:, :, None] <= seen[None, None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        shrink = _exp2(m - top)
        p = _exp2(s - top[:, None, :]).to(tl.float16)  # weights times value scales, at most 1
        rounded = p.to(tl.float32)  # the same weights everywhere: what rounding moves is moved in all three sums
        l = l * shrink + tl.sum(rounded * _exp2(tl.minimum(-bias, 100.0))[:, :, None], 1)  # noqa: E741
        if VALUE != "fp8":
            offset = offset * shrink + tl.sum(rounded * (value_zero * _exp2(odd))[:, :, None], 1)
        m = top
        y = y * shrink[:, None, :]
        weights = _by_field(p, FV)
        v = _fields(value_words, VALUE)
        for n in tl.static_range(FV):
            y = tl.dot(v[n], weights[n], y)
        page = following
    # 4. The warps' results as one, as the splits' below.
    y = y * UNIT_V - offset[:, None, :]
    top = tl.max(m, 0)
    shrink = _exp2(m - top[None, :])
    l = tl.sum(l * shrink, 0)  # noqa: E741
    y = _over_pages(y * shrink[:, None, :])  # [D, R]
    # 5. Store the result, or this split's share of it.
    m_y = (o_d < D)[:, None] & m_r[None, :]
    if WHOLE:
        y = y / tl.where(l == 0.0, 1.0, l)[None, :]  # no token read: 0
        p_out = p_y + (place.to(tl.int64) * ROWS + o_r)[None, :] * D + o_d[:, None]
        tl.store(p_out, to_dtype(y, p_y.dtype.element_ty), mask=m_y)
    else:
        row = (place.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * ROWS + o_r
        tl.store(p_partial + row[None, :] * D + o_d[:, None], y, mask=m_y)
        tl.store(p_state + row * 2, top, mask=m_r)
        tl.store(p_state + row * 2 + 1, l, mask=m_r)


@triton.jit(do_not_specialize=["heads", "splits", "pages_per_split"])
def _sum_kernel(
    p_y, p_partial, p_state, p_lengths, heads, splits, pages_per_split,
    ROWS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, SPLITS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Add the shares of all splits of one query, SPLITS at a time, in order."""
    place = tl.program_id(0) // ROWS
    length = tl.load(p_lengths + place // heads)
    used = tl.cdiv(tl.cdiv(length, 64), pages_per_split)
    o_s = tl.arange(0, SPLITS)
    o_d = tl.arange(0, D2)
    m = -1e30
    l = 0.0  # noqa: E741
    y = tl.zeros([D2], tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()  # all shares are there
    for first in range(0, used, SPLITS):
        m_s = first + o_s < used
        row = (place.to(tl.int64) * splits + first + o_s) * ROWS + tl.program_id(0) % ROWS  # [SPLITS]
        m_split = tl.load(p_state + row * 2, mask=m_s, other=-1e30)
        l_split = tl.load(p_state + row * 2 + 1, mask=m_s, other=0.0)
        p = p_partial + row[:, None] * D + o_d[None, :]
        share = tl.load(p, mask=m_s[:, None] & (o_d < D)[None, :], other=0.0)  # [SPLITS, D]
        top = tl.maximum(m, tl.max(m_split, 0))
        shrink = tl.exp2(m - top)
        weight = tl.exp2(m_split - top)
        l = l * shrink + tl.sum(weight * l_split, 0)  # noqa: E741
        y = y * shrink + tl.sum(weight[:, None] * share, 0)
        m = top
    y = y / tl.where(l == 0.0, 1.0, l)
    tl.store(p_y + tl.program_id(0).to(tl.int64) * D + o_d, to_dtype(y, p_y.dtype.element_ty), mask=o_d < D)


# --- wrapper ----------------------------------------------------------------------------------------------------------


def kv_attention(
    query: Tensor,
    keys: Pages,
    values: Pages,
    table: Tensor,
    lengths: Tensor,
    *,
    scaling: float | None = None,
    longest: int | None = None,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """Attention of the last tokens of each sequence over its quantized keys and values.

    Args:
        query: float16 or bfloat16 ``[batch, heads, new, D]``, behind RoPE (and the Hadamard transform, if keys had one);
            heads is a multiple of the pages' heads. Query i of the ``new`` reads all tokens but the last new - 1 - i.
        keys, values: pages of keys and of values, whose kinds may differ; scales above 0.
        table: int32 ``[batch, pages]``, the pages of each sequence in order; entries beyond its last page are not read.
        lengths: int32 ``[batch]``, tokens of each sequence with the new ones, at most 64 times the table's width. With 0
            tokens the result is 0.
        scaling: of the scores; ``None`` is ``D ** -0.5``.
        longest: what no length exceeds, for a better split; ``None`` is what the table has room for.
        config: pages_per_split, num_warps (that many pages are read at a time) and num_stages; ``None`` takes the
            default ones.

    Returns:
        ``[batch, heads, new, D]`` in the dtype of ``query``; the same bits at every call.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.
    """
    floats = (torch.float16, torch.bfloat16)
    check_tensor("query", query, dtype=floats, shape=(None, None, None, None), device=getattr(query, "device", None))
    batch, heads, new, size = query.shape
    kv_heads = keys.codes.shape[1] if isinstance(keys, Pages) and getattr(keys.codes, "ndim", 0) == 4 else 0
    check_pages("keys", keys, "key", kv_heads, size, query.device)
    check_pages("values", values, "value", kv_heads, size, query.device)
    check_table(table, lengths, batch, query.device)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads, which is not a multiple of the {kv_heads} heads of keys")
    if not 1 <= new <= 64:
        raise ValueError(
            f"query has {new} new tokens, but this kernel is for 1 to 64: pass a long prompt to flash attention"
        )
    target = target_of(query, "query")
    y = torch.empty_like(query)
    if not query.numel():
        return y
    check_scaling(scaling)
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise ValueError(f"longest must be a number of tokens of at least 1, or None, got {longest!r}")
    check_keys(config, "pages_per_split num_warps num_stages")
    rows = heads // kv_heads * new
    columns = 16 if rows > 8 and size <= 128 else 8  # more would not fit the registers of one warp
    blocks = -(-rows // columns)
    pages = max(1, min(table.shape[1], -(-longest // PAGE) if longest else table.shape[1]))
    if config is None:
        page_bytes = bytes_moved(PAGE, 1, triton.next_power_of_2(size), keys.kind, values.kind)
        config = default_config(
            batch * kv_heads * blocks, pages, processors=target.processors, page_bytes=page_bytes, columns=columns
        )
    per_split = config["pages_per_split"]
    if per_split % config["num_warps"]:
        raise ValueError(
            f"config has {per_split} pages a split for {config['num_warps']} warps: take a multiple of the warps"
        )
    splits = -(-pages // per_split)
    whole = splits == 1
    partial = (
        y if whole else torch.empty(batch * kv_heads, splits, rows, size, dtype=torch.float32, device=query.device)
    )
    state = y if whole else torch.empty(batch * kv_heads, splits, rows, 2, dtype=torch.float32, device=query.device)
    dependent = (
        not whole and not INTERPRET.value and target.capability >= (9, 0)
    )  # the sum is launched while splits still run
    common = {"ROWS": rows, "D": size, "D2": triton.next_power_of_2(size), "DEPENDENT": dependent}
    _split_kernel[(batch * kv_heads, splits, blocks)](
        query, keys.codes, keys.numbers.view(torch.int32), values.codes, values.numbers.view(torch.int32), table, lengths,
        y, partial, state, size**-0.5 if scaling is None else scaling, kv_heads, table.shape[1], per_split,
        NEW=new, R=columns, P=config["num_warps"], KEY=keys.kind, VALUE=values.kind, WHOLE=whole,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
        maxnreg=255, **common,  # without a limit the compiler rather spills than lets registers cost it a block
    )  # fmt: skip
    if not whole:
        _sum_kernel[(batch * kv_heads * rows,)](
            y, partial, state, lengths, kv_heads, splits, per_split,
            SPLITS=min(32, triton.next_power_of_2(splits)), num_warps=4, **common,
            **({"launch_pdl": True} if dependent else {}),
        )  # fmt: skip
    return y
