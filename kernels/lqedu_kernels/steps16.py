"""The steps between the products that stay in 16 bits: RMSNorm, SiLU, RoPE; chapter ``21-serving``::

    rmsnorm     h = RMSNorm(x + residual) · weight                     the input of a product that is not quantized
    silu_mul    h = silu(gate) · up
    rope        q, k, v = heads of one product's output, q and k turned by the positions of their tokens

What :mod:`lqedu_kernels.quantize` does with codes at the end, for the layers that have none. One launch a step: at one token
a step moves some kilobytes and costs what a launch costs, and a decoder layer written in torch operations has thirty of them.

Everything is computed in float32 and rounded to the dtype of x where transformers rounds a *tensor* that it stores between two
modules (norm, activation); inside RoPE transformers rounds three times, and this once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels._numerics import to_dtype
from lqedu_kernels._schedule import after_previous, overlapped
from lqedu_kernels._tensors import check_tensor, target_of
from lqedu_kernels.quantize import reciprocal, rmsnorm_reference, silu_reference

__all__ = ["rmsnorm", "rmsnorm_reference", "rope", "rope_reference", "silu_mul", "silu_reference"]

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
def _rope_kernel(
    p_x, p_cos, p_sin, p_positions, p_q_norm, p_k_norm, p_q, p_k, p_v, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF2: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of one token a program, as its two halves."""
    after_previous(OVERLAP)
    dtype: tl.constexpr = p_q.dtype.element_ty
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    o_d = tl.arange(0, HALF2)
    m_d = o_d < HALF
    p_in = p_x + (token * (HEADS + 2 * KV) + head) * D + o_d
    b_low, b_high = (
        tl.load(p_in, mask=m_d, other=0.0).to(tl.float32),
        tl.load(p_in + HALF, mask=m_d, other=0.0).to(tl.float32),
    )
    if head >= HEADS + KV:
        p_out = p_v + (token * KV + head - HEADS - KV) * D + o_d
        tl.store(p_out, to_dtype(b_low, dtype), mask=m_d)
        tl.store(p_out + HALF, to_dtype(b_high, dtype), mask=m_d)
        return
    if p_q_norm is not None:
        inverse = tl.rsqrt((tl.sum(b_low * b_low, 0) + tl.sum(b_high * b_high, 0)) / D + eps)
        p_norm = p_q_norm + o_d
        if head >= HEADS:
            p_norm = p_k_norm + o_d
        b_low = to_dtype(b_low * inverse, dtype).to(tl.float32) * tl.load(p_norm, mask=m_d, other=0.0).to(tl.float32)
        b_high = to_dtype(b_high * inverse, dtype).to(tl.float32) * tl.load(p_norm + HALF, mask=m_d, other=0.0).to(
            tl.float32
        )
        b_low, b_high = to_dtype(b_low, dtype).to(tl.float32), to_dtype(b_high, dtype).to(tl.float32)
    o_p = tl.load(p_positions + token).to(tl.int64) * D + o_d
    cos_low, cos_high = tl.load(p_cos + o_p, mask=m_d, other=0.0), tl.load(p_cos + o_p + HALF, mask=m_d, other=0.0)
    sin_low, sin_high = tl.load(p_sin + o_p, mask=m_d, other=0.0), tl.load(p_sin + o_p + HALF, mask=m_d, other=0.0)
    p_out = p_q + (token * HEADS + head) * D + o_d
    if head >= HEADS:
        p_out = p_k + (token * KV + head - HEADS) * D + o_d
    tl.store(p_out, to_dtype(b_low * cos_low - b_high * sin_low, dtype), mask=m_d)
    tl.store(p_out + HALF, to_dtype(b_high * cos_high + b_low * sin_high, dtype), mask=m_d)


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
    check_tensor("cos", cos, dtype=torch.float32, shape=(None, None), device=getattr(qkv, "device", None))
    size = cos.shape[1]
    check_tensor("qkv", qkv, dtype=_FLOATS, shape=(None, (heads + 2 * kv_heads) * size), device=cos.device)
    target = target_of(qkv, "qkv")
    check_tensor("sin", sin, dtype=torch.float32, shape=tuple(cos.shape), device=cos.device)
    check_tensor("positions", positions, dtype=torch.int32, shape=(len(qkv),), device=cos.device)
    if size % 2:
        raise ValueError(f"cos has {size} columns, but a head is turned in pairs of features: take an even head size")
    for name, norm in zip(("norms[0]", "norms[1]"), norms or (), strict=norms is not None):
        check_tensor(name, norm, dtype=qkv.dtype, shape=(size,), device=qkv.device)
    m = len(qkv)
    q, k, v = (torch.empty(m, n, size, dtype=qkv.dtype, device=qkv.device) for n in (heads, kv_heads, kv_heads))
    if m:
        _rope_kernel[(m, heads + 2 * kv_heads)](
            qkv, cos, sin, positions, *(norms or (None, None)), q, k, v, eps,
            HEADS=heads, KV=kv_heads, D=size, HALF2=triton.next_power_of_2(size // 2), num_warps=1, **overlapped(target),
        )  # fmt: skip
    return q, k, v
