"""The steps between the products that stay in 16 bits: RMSNorm, SiLU, RoPE; chapter ``21-serving``::

    rmsnorm     h = RMSNorm(x + residual) · weight                     the input of a product that is not quantized
    silu_mul    h = silu(gate) · up
    rope        q, k, v = heads of one product's output, q and k turned by the positions of their tokens
    rope_append the same of each sequence's last token, whose key and value go to the pages of lqedu_kernels.kv16

What ``lqedu_kernels.quantize`` does with codes at the end, for the layers that have none. One launch a step: at one token
a step moves some kilobytes and costs what a launch costs, and a decoder layer written in torch operations has thirty of them.

Everything is computed in float32 and rounded to the dtype of x where transformers rounds a *tensor* that it stores between two
modules (norm, activation); inside RoPE transformers rounds three times, and this once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels._numerics import to_dtype
from lqedu_kernels._schedule import after_previous, overlapped
from lqedu_kernels._tensors import Target, check_tensor, target_of
from lqedu_kernels.kv16 import kv16_append_reference
from lqedu_kernels.kv_pages import PAGE, check_table
from lqedu_kernels.quantize import check_eps, reciprocal, rmsnorm_reference, silu_reference

__all__ = [
    "rmsnorm", "rmsnorm_reference", "rope", "rope_append", "rope_append_reference", "rope_reference", "silu_mul",
    "silu_reference",
]  # fmt: skip

#: Longest row of a norm, in elements: it is in registers from load to store.
LONGEST = 32768
_FLOATS = (torch.float16, torch.bfloat16)


def rope_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    heads: int,
    kv_heads: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract in plain torch, see :func:`rope`."""
    size = cos.shape[1]
    q, k, v = qkv.view(len(qkv), -1, size).split([heads, kv_heads, kv_heads], 1)
    if norms is not None:
        q, k = (rmsnorm_reference(x.flatten(0, 1), w, eps)[0].view(x.shape) for x, w in zip((q, k), norms, strict=True))
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    turned = (
        x.float() * cos + torch.cat((-x[..., size // 2 :], x[..., : size // 2]), -1).float() * sin for x in (q, k)
    )
    return *(x.to(qkv.dtype) for x in turned), v.contiguous()


def rope_append_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    **options: Any,
) -> Tensor:
    """:func:`rope_append` in plain torch."""
    q, k, v = rope_reference(qkv, cos, sin, (lengths - 1).clamp(min=0), **options)
    kv16_append_reference(k[:, :, None], v[:, :, None], keys, values, table, lengths)
    return q


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _rmsnorm_kernel(p_x, p_residual, p_weight, p_y, p_hidden, K, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One row a program; the weight, which no launch before writes, is asked for before these have ended."""
    dtype: tl.constexpr = p_y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * K
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < K
    b_weight = tl.load(p_weight + o_k, mask=m_k, other=0.0, eviction_policy="evict_last").to(tl.float32)
    after_previous(OVERLAP)
    b_x = tl.load(p_x + row + o_k, mask=m_k, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_hidden = to_dtype(b_x + tl.load(p_residual + row + o_k, mask=m_k, other=0.0).to(tl.float32), dtype)
        tl.store(p_hidden + row + o_k, b_hidden, mask=m_k)
        b_x = b_hidden.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(b_x * b_x, 0) / K + eps)
    b_normal = to_dtype(b_x * inverse, dtype).to(tl.float32)
    tl.store(p_y + row + o_k, to_dtype(b_normal * b_weight, dtype), mask=m_k)


@triton.jit
def _silu_kernel(p_gate, p_up, p_y, K, gate_stride, up_stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    after_previous(OVERLAP)
    dtype: tl.constexpr = p_y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_k = o_k < K
    b_gate = tl.load(p_gate + row * gate_stride + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + row * up_stride + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_silu = to_dtype(b_gate * reciprocal(1.0 + tl.exp(-b_gate)), dtype).to(tl.float32)
    tl.store(p_y + row * K + o_k, to_dtype(b_silu * b_up, dtype), mask=m_k)


@triton.jit
def _halves(p, m_d, HALF: tl.constexpr):
    return tl.load(p, mask=m_d, other=0.0).to(tl.float32), tl.load(p + HALF, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(p, b_low, b_high, m_d, HALF: tl.constexpr):
    dtype: tl.constexpr = p.dtype.element_ty
    tl.store(p, to_dtype(b_low, dtype), mask=m_d)
    tl.store(p + HALF, to_dtype(b_high, dtype), mask=m_d)


@triton.jit
def _rope_kernel(
    p_x, p_cos, p_sin, p_positions, p_q_norm, p_k_norm, p_q, p_k, p_v, p_table, table_width, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF2: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of one token a program, as its two halves.

    With a block table, tokens are the last ones of sequences, ``p_positions`` their lengths, and keys and values go to pages.
    """
    after_previous(OVERLAP)
    dtype: tl.constexpr = p_q.dtype.element_ty
    HALF: tl.constexpr = D // 2
    # 1. Place: where the head is, and where its key or value goes.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    o_d = tl.arange(0, HALF2)
    m_d = o_d < HALF
    position = tl.load(p_positions + token).to(tl.int64)
    row = token * KV + head % KV  # HEADS is a multiple of KV: keys and values count on from 0
    if p_table is not None:
        position = tl.maximum(position - 1, 0)
        page = tl.load(p_table + token * table_width + position // 64).to(tl.int64)
        row = (page * KV + head % KV) * 64 + position % 64
    b_low, b_high = _halves(p_x + (token * (HEADS + 2 * KV) + head) * D + o_d, m_d, HALF)
    if head >= HEADS + KV:
        _store_halves(p_v + row * D + o_d, b_low, b_high, m_d, HALF)
        return
    # 2. Norm, of queries and of keys.
    if p_q_norm is not None:
        inverse = tl.rsqrt((tl.sum(b_low * b_low, 0) + tl.sum(b_high * b_high, 0)) / D + eps)
        p_norm = p_q_norm + o_d
        if head >= HEADS:
            p_norm = p_k_norm + o_d
        low, high = _halves(p_norm, m_d, HALF)
        b_low = to_dtype(to_dtype(b_low * inverse, dtype).to(tl.float32) * low, dtype).to(tl.float32)
        b_high = to_dtype(to_dtype(b_high * inverse, dtype).to(tl.float32) * high, dtype).to(tl.float32)
    # 3. Turn and store.
    cos_low, cos_high = _halves(p_cos + position * D + o_d, m_d, HALF)
    sin_low, sin_high = _halves(p_sin + position * D + o_d, m_d, HALF)
    p_out = p_q + (token * HEADS + head) * D + o_d
    if head >= HEADS:
        p_out = p_k + row * D + o_d
    _store_halves(p_out, b_low * cos_low - b_high * sin_low, b_high * cos_high + b_low * sin_high, m_d, HALF)


# --- what is called ---------------------------------------------------------------------------------------------------


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``x``, or of ``x + residual``, and that sum.

    Args:
        x: float16 or bfloat16 ``[M, K]``, K at most 32768.
        weight: ``[K]`` in the dtype of x.
        eps: added to the mean of the squares.
        residual: as x.

    Returns:
        Two ``[M, K]`` in the dtype of x; the second is x itself without a residual.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or layout than this; see the message.
    """
    check_tensor("x", x, dtype=_FLOATS, shape=(None, None), device=getattr(x, "device", None))
    check_eps(eps)
    target, (m, k) = target_of(x, "x"), x.shape
    if not 0 < k <= LONGEST:
        raise ValueError(f"x must have rows of 1 to {LONGEST} elements, got {k}")
    check_tensor("weight", weight, dtype=x.dtype, shape=(k,), device=x.device)
    if residual is not None:
        check_tensor("residual", residual, dtype=x.dtype, shape=(m, k), device=x.device)
    y, hidden = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    if m:
        block = triton.next_power_of_2(k)
        warps = max(1, min(16, block // 512))
        _rmsnorm_kernel[(m,)](
            x, residual, weight, y, hidden, k, eps, BLOCK=block, num_warps=warps, **overlapped(target)
        )
    return y, hidden


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``.

    Args:
        gate, up: float16 or bfloat16 ``[M, K]`` of one dtype; rows may be apart: halves of one product's output, say.

    Returns:
        ``[M, K]``, contiguous.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device than this; see the message.
    """
    if (
        not isinstance(gate, Tensor)
        or gate.dtype not in _FLOATS
        or not isinstance(up, Tensor)
        or up.dtype != gate.dtype
    ):
        got = [getattr(t, "dtype", type(t).__name__) for t in (gate, up)]
        raise TypeError(f"gate and up must be float16 or bfloat16 tensors of one dtype, got {got[0]} and {got[1]}")
    target = target_of(gate, "gate")
    if gate.ndim != 2 or gate.shape != up.shape or gate.device != up.device or gate.stride(1) != 1 or up.stride(1) != 1:
        raise ValueError(
            f"gate and up must be [M, K] on one device with rows of consecutive elements, got {list(gate.shape)} and {list(up.shape)}"
        )
    (m, k), y = gate.shape, gate.new_empty(gate.shape)
    if y.numel():
        _silu_kernel[(m, triton.cdiv(k, 1024))](
            gate, up, y, k, gate.stride(0), up.stride(0), BLOCK=1024, num_warps=4, **overlapped(target)
        )  # fmt: skip
    return y


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    heads: int,
    kv_heads: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one product's output, the first two normed (where asked) and turned.

    Args:
        qkv: float16 or bfloat16 ``[M, (heads + 2 kv_heads) D]``: queries, keys, values.
        cos, sin: float32 ``[positions, D]``, whose halves transformers makes equal.
        positions: int32 ``[M]``, rows of cos and sin.
        heads, kv_heads: how many there are.
        norms: weights ``[D]`` of an RMSNorm of each query and key, in the dtype of qkv.
        eps: of that norm.

    Returns:
        ``[M, heads, D]`` and two ``[M, kv_heads, D]``, contiguous.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or layout than this; see the message.
    """
    target, size = _check_rope(qkv, cos, sin, heads, kv_heads, norms, eps)
    check_tensor("positions", positions, dtype=torch.int32, shape=(len(qkv),), device=qkv.device)
    m = len(qkv)
    q, k, v = (torch.empty(m, n, size, dtype=qkv.dtype, device=qkv.device) for n in (heads, kv_heads, kv_heads))
    if m:
        _rope_kernel[(m, heads + 2 * kv_heads)](
            qkv, cos, sin, positions, *(norms or (None, None)), q, k, v, None, 0, eps,
            HEADS=heads, KV=kv_heads, D=size, HALF2=triton.next_power_of_2(size // 2), num_warps=1, **overlapped(target),
        )  # fmt: skip
    return q, k, v


def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    heads: int,
    kv_heads: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """:func:`rope` of the last token of each sequence, whose key and value go straight to their pages.

    Args:
        qkv, cos, sin, heads, kv_heads, norms, eps: as there, a row a sequence.
        keys, values: pages ``[pages, kv_heads, 64, D]`` in the dtype of qkv, see ``lqedu_kernels.kv16``; changed.
        table: int32 ``[batch, pages of the longest sequence]``.
        lengths: int32 ``[batch]``, tokens of each sequence with the new one, at least 1.

    Returns:
        Queries ``[batch, heads, D]``.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or layout than this; see the message.
    """
    target, size = _check_rope(qkv, cos, sin, heads, kv_heads, norms, eps)
    check_tensor("keys", keys, dtype=qkv.dtype, shape=(None, kv_heads, PAGE, size), device=qkv.device, what="pages")
    check_tensor("values", values, dtype=qkv.dtype, shape=tuple(keys.shape), device=qkv.device, what="pages")
    check_table(table, lengths, len(qkv), qkv.device)
    q = torch.empty(len(qkv), heads, size, dtype=qkv.dtype, device=qkv.device)
    if len(qkv):
        _rope_kernel[(len(qkv), heads + 2 * kv_heads)](
            qkv, cos, sin, lengths, *(norms or (None, None)), q, keys, values, table, table.shape[1], eps,
            HEADS=heads, KV=kv_heads, D=size, HALF2=triton.next_power_of_2(size // 2), num_warps=1, **overlapped(target),
        )  # fmt: skip
    return q


def _check_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, norms: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Target, int]:
    check_eps(eps)
    check_tensor("qkv", qkv, dtype=_FLOATS, shape=(None, None), device=getattr(qkv, "device", None))
    check_tensor("cos", cos, dtype=torch.float32, shape=(None, None), device=qkv.device)
    size = cos.shape[1]
    whole = isinstance(heads, int) and isinstance(kv_heads, int)
    if not whole or kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, both at least 1, got {heads!r} and {kv_heads!r}")
    check_tensor("qkv", qkv, dtype=_FLOATS, shape=(None, (heads + 2 * kv_heads) * size), device=cos.device)
    target = target_of(qkv, "qkv")
    check_tensor("sin", sin, dtype=torch.float32, shape=tuple(cos.shape), device=cos.device)
    if size % 2 or not size:
        raise ValueError(f"cos has {size} columns, but a head is turned in pairs of features: take an even head size")
    if norms is not None and (not isinstance(norms, tuple) or len(norms) != 2):
        raise TypeError("norms must be a tuple of two tensors, the weights for queries and for keys, or None")
    for name, norm in zip(("norms[0]", "norms[1]"), norms or (), strict=norms is not None):
        check_tensor(name, norm, dtype=qkv.dtype, shape=(size,), device=qkv.device)
    return target, size
