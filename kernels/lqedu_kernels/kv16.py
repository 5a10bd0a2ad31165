"""A paged cache of keys and values in 16 bits, and decode attention over it; chapter ``21-serving``.

What ``lqedu_kernels.kv_pages`` and ``lqedu_kernels.kv_attention`` do without quantization: the baseline they are judged
by, and the cache of models whose keys and values stay as they are. A page holds 64 tokens of one head, one after the other::

    keys, values    [page, head, 64, D]      float16 or bfloat16; a block table says which pages are a sequence's, in order

Attention splits a sequence over programs, each of which keeps a running maximum, denominator and output of its pages; a
second kernel adds these up in a fixed order, so the result is the same at every run. Rounded: weights to 16 bits before the
product with the values, sums in float32, the output once. Bytes: 4 D a token and head; operations 4 D a token and query head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels._numerics import INTERPRET, to_dtype
from lqedu_kernels._schedule import after_previous, overlapped
from lqedu_kernels._tensors import Target, check_keys, check_tensor, target_of
from lqedu_kernels.kv_pages import PAGE, check_places, check_scaling, check_table

__all__ = [
    "bytes_moved",
    "default_config",
    "kv16_append",
    "kv16_append_reference",
    "kv16_attention",
    "kv16_attention_reference",
]

_FLOATS = (torch.float16, torch.bfloat16)


def kv16_append_reference(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor
) -> None:
    """:func:`kv16_append` in plain torch; any floating dtype."""
    new = key.shape[2]
    token = lengths[:, None].long() - new + torch.arange(new, device=key.device)  # [batch, new]
    sequence, index = (token >= 0).nonzero(as_tuple=True)
    token = token[sequence, index]
    page, slot = table[sequence, token // PAGE].long(), token % PAGE
    keys[page, :, slot] = key[sequence, :, index]
    values[page, :, slot] = value[sequence, :, index]


def kv16_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, *, scaling: float | None = None
) -> Tensor:
    """:func:`kv16_attention` in plain torch, sequence by sequence, in float32 or higher; any floating dtype."""
    _, heads, size = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    y = torch.zeros_like(query)
    for i, length in enumerate(lengths.tolist()):
        pages = table[i, : -(-length // PAGE)].long()
        k, v = (  # [heads, length, D]
            t[pages].to(dtype).transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(heads // t.shape[1], 0)
            for t in (keys, values)
        )
        scores = (query[i, :, None].to(dtype) * k).sum(-1) * (size**-0.5 if scaling is None else scaling)
        y[i] = (scores.softmax(-1)[..., None] * v).sum(1).to(query.dtype)
    return y


def bytes_moved(tokens: int, kv_heads: int, head_dim: int, *, queries: int = 0) -> int:
    """Fewest bytes of a call: ``tokens`` of all sequences once, 2 bytes for each feature of query and result."""
    return 4 * tokens * kv_heads * head_dim + 4 * queries * head_dim


def default_config(programs: int, pages: int, target: Target) -> dict[str, int]:
    """Pages of a split: as many splits as give each processor four programs, which together have 256 KB in flight.

    Args:
        programs: sequences times key heads.
        pages: of the longest sequence.
        target: the GPU.
    """
    splits = max(1, min(pages, 4 * target.processors // max(1, programs)))
    return {"pages_per_split": -(-pages // splits), "num_warps": 4, "num_stages": 3}


@triton.jit
def _append_kernel(
    p_key, p_value, p_keys, p_values, p_table, p_lengths, heads, new, table_width,
    D: tl.constexpr, D2: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token of one head a program."""
    after_previous(OVERLAP)
    sequence = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    token = tl.load(p_lengths + sequence) - new + tl.program_id(0)
    if token < 0:
        return
    page = tl.load(p_table + sequence * table_width + token // 64).to(tl.int64)
    o_d = tl.arange(0, D2)
    m_d = o_d < D
    o_in = (tl.program_id(1).to(tl.int64) * new + tl.program_id(0)) * D + o_d
    o_out = ((page * heads + head) * 64 + token % 64) * D + o_d
    tl.store(p_keys + o_out, tl.load(p_key + o_in, mask=m_d), mask=m_d)
    tl.store(p_values + o_out, tl.load(p_value + o_in, mask=m_d), mask=m_d)


@triton.jit
def _dot(a, b, c):
    """Sums in float32; the interpreter cannot multiply bfloat16."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c)


@triton.jit(do_not_specialize=["heads", "table_width", "pages_per_split"])
def _split_kernel(
    p_query, p_keys, p_values, p_table, p_lengths, p_y, p_partial, p_state, scaling, heads, table_width, pages_per_split,
    ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One split of one head of one sequence, for the ROWS queries that share the head."""
    after_previous(OVERLAP)
    # 1. Place: [R, D] of queries.
    dtype: tl.constexpr = p_keys.dtype.element_ty
    place = tl.program_id(0)  # sequence * heads + head
    head = place % heads
    sequence = place // heads
    length = tl.load(p_lengths + sequence)
    first = tl.program_id(1) * pages_per_split
    last = tl.minimum(first + pages_per_split, tl.cdiv(length, 64))
    if not WHOLE and first >= last:
        return
    o_r, o_d, o_t = tl.arange(0, R), tl.arange(0, D2), tl.arange(0, 64)
    m_q = (o_r < ROWS)[:, None] & (o_d < D)[None, :]
    q = tl.load(p_query + (place.to(tl.int64) * ROWS + o_r)[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
    o_page = o_t[:, None] * D + o_d[None, :]
    scaling = scaling * 1.4426950408889634  # scores are exponents of 2
    m = tl.full([R], -1e30, tl.float32)
    l = tl.zeros([R], tl.float32)  # noqa: E741
    y = tl.zeros([R, D2], tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        # 2. A page of keys and values: [64, D] each, consecutive in memory.
        page = tl.load(p_table + sequence * table_width + i).to(tl.int64) * heads + head
        m_t = i * 64 + o_t < length
        m_kv = m_t[:, None] & (o_d < D)[None, :]
        k = tl.load(p_keys + page * (64 * D) + o_page, mask=m_kv, other=0.0)
        v = tl.load(p_values + page * (64 * D) + o_page, mask=m_kv, other=0.0)
        # 3. Scores, running maximum and denominator, weights times values.
        s = _dot(q, k.T, tl.zeros([R, 64], tl.float32)) * scaling
        s = tl.where(m_t[None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        shrink = tl.exp2(m - top)
        p = to_dtype(tl.exp2(s - top[:, None]), dtype)
        l = l * shrink + tl.sum(p.to(tl.float32), 1)  # noqa: E741, the rounded weights in both sums
        y = _dot(p, v, y * shrink[:, None])
        m = top
    # 4. Store the result, or this split's share of it.
    if WHOLE:
        y = y / tl.where(l == 0.0, 1.0, l)[:, None]
        tl.store(p_y + (place.to(tl.int64) * ROWS + o_r)[:, None] * D + o_d[None, :], to_dtype(y, dtype), mask=m_q)
    else:
        row = (place.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * ROWS + o_r
        tl.store(p_partial + row[:, None] * D + o_d[None, :], y, mask=m_q)
        tl.store(p_state + row * 2, m, mask=o_r < ROWS)
        tl.store(p_state + row * 2 + 1, l, mask=o_r < ROWS)


@triton.jit(do_not_specialize=["heads", "splits", "pages_per_split"])
def _sum_kernel(
    p_y, p_partial, p_state, p_lengths, heads, splits, pages_per_split,
    ROWS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add the shares of all splits of one query, SPLITS at a time, in order."""
    after_previous(OVERLAP)
    place = tl.program_id(0) // ROWS
    used = tl.cdiv(tl.cdiv(tl.load(p_lengths + place // heads), 64), pages_per_split)
    o_s, o_d = tl.arange(0, SPLITS), tl.arange(0, D2)
    m = -1e30
    l = 0.0  # noqa: E741
    y = tl.zeros([D2], tl.float32)
    for first in range(0, used, SPLITS):
        m_s = first + o_s < used
        row = (place.to(tl.int64) * splits + first + o_s) * ROWS + tl.program_id(0) % ROWS  # [SPLITS]
        m_split = tl.load(p_state + row * 2, mask=m_s, other=-1e30)
        l_split = tl.load(p_state + row * 2 + 1, mask=m_s, other=0.0)
        share = tl.load(p_partial + row[:, None] * D + o_d[None, :], mask=m_s[:, None] & (o_d < D)[None, :], other=0.0)
        top = tl.maximum(m, tl.max(m_split, 0))
        shrink = tl.exp2(m - top)
        weight = tl.exp2(m_split - top)
        l = l * shrink + tl.sum(weight * l_split, 0)  # noqa: E741
        y = y * shrink + tl.sum(weight[:, None] * share, 0)
        m = top
    y = y / tl.where(l == 0.0, 1.0, l)
    tl.store(p_y + tl.program_id(0).to(tl.int64) * D + o_d, to_dtype(y, p_y.dtype.element_ty), mask=o_d < D)


# --- what is called ---------------------------------------------------------------------------------------------------


def kv16_append(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> None:
    """Write new keys and values into their pages; changes ``keys`` and ``values``.

    Args:
        key, value: float16 or bfloat16 ``[batch, kv_heads, new, D]``.
        keys, values: pages ``[pages, kv_heads, 64, D]`` in the dtype of ``key``.
        table: int32 ``[batch, pages of the longest sequence]``.
        lengths: int32 ``[batch]``, tokens of each sequence with the new ones: they are its last.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.
    """
    check_tensor("key", key, dtype=_FLOATS, shape=(None, None, None, None), device=getattr(key, "device", None))
    batch, kv_heads, new, size = key.shape
    check_tensor("value", value, dtype=key.dtype, shape=tuple(key.shape), device=key.device)
    _check_pages(keys, values, kv_heads, size, key)
    check_table(table, lengths, batch, key.device)
    check_places("key", batch, kv_heads)
    target = target_of(key, "key")
    if key.numel():
        _append_kernel[(new, batch * kv_heads)](
            key, value, keys, values, table, lengths, kv_heads, new, table.shape[1],
            D=size, D2=triton.next_power_of_2(size), num_warps=1, **overlapped(target),
        )  # fmt: skip


def kv16_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    scaling: float | None = None,
    config: dict[str, int] | None = None,
) -> Tensor:
    """Attention of the last token of each sequence over its keys and values.

    Args:
        query: float16 or bfloat16 ``[batch, heads, D]``; heads is a multiple of the pages' heads.
        keys, values: pages ``[pages, kv_heads, 64, D]`` in the dtype of ``query``, D at most 256.
        table: int32 ``[batch, pages]``, the pages of each sequence in order; entries beyond its last page are not read.
        lengths: int32 ``[batch]``, tokens of each sequence with the new one. With 0 tokens the result is 0.
        scaling: of the scores; ``None`` is ``D ** -0.5``.
        config: pages_per_split, num_warps and num_stages; ``None`` is :func:`default_config`.

    Returns:
        ``[batch, heads, D]`` in the dtype of ``query``; the same bits at every call.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.
    """
    check_tensor("query", query, dtype=_FLOATS, shape=(None, None, None), device=getattr(query, "device", None))
    batch, heads, size = query.shape
    kv_heads = keys.shape[1] if isinstance(keys, Tensor) and keys.ndim == 4 else 0
    _check_pages(keys, values, kv_heads, size, query)
    check_table(table, lengths, batch, query.device)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads, which is not a multiple of the {kv_heads} heads of keys")
    if size > 256:
        raise ValueError(f"query has heads of {size}, but this kernel is for at most 256 features")
    target = target_of(query, "query")
    y = torch.empty_like(query)
    if not query.numel():
        return y
    rows, pages = heads // kv_heads, table.shape[1]
    check_scaling(scaling)
    check_keys(config, "pages_per_split num_warps num_stages")
    c = config or default_config(batch * kv_heads, pages, target)
    splits, empty = -(-pages // c["pages_per_split"]), dict(dtype=torch.float32, device=query.device)
    whole = splits == 1
    partial = y if whole else torch.empty(batch * kv_heads, splits, rows, size, **empty)
    state = y if whole else torch.empty(batch * kv_heads, splits, rows, 2, **empty)
    sizes = {"ROWS": rows, "D": size, "D2": max(16, triton.next_power_of_2(size)), **overlapped(target)}
    _split_kernel[(batch * kv_heads, splits)](
        query, keys, values, table, lengths, y, partial, state, size**-0.5 if scaling is None else scaling,
        kv_heads, pages, c["pages_per_split"], R=max(16, triton.next_power_of_2(rows)), WHOLE=whole, STAGES=c["num_stages"],
        num_warps=c["num_warps"], **sizes,
    )  # fmt: skip
    if not whole:
        _sum_kernel[(batch * kv_heads * rows,)](
            y, partial, state, lengths, kv_heads, splits, c["pages_per_split"],
            SPLITS=min(32, triton.next_power_of_2(splits)), num_warps=4, **sizes,
        )  # fmt: skip
    return y


def _check_pages(keys: Tensor, values: Tensor, kv_heads: int, size: int, like: Tensor) -> None:
    check_tensor("keys", keys, dtype=like.dtype, shape=(None, kv_heads, PAGE, size), device=like.device, what="pages")
    check_tensor("values", values, dtype=like.dtype, shape=tuple(keys.shape), device=like.device, what="pages")
