"""W8A8: INT8 activations times INT8 weights, summed exactly in int32; chapters ``08-smoothquant`` and ``19-integer-gemm``::

    y[m, n] = s_x[m] · s_w[n] · (Σ_k q_x[m, k] q_w[n, k]  −  z_x[m] Σ_k q_w[n, k])  +  b[n]

Codes are signed bytes, one a number, with the sum's index k last in both operands (tensor cores want it so)::

    q_x [M, K]   k = 0 1 2 3 4 …      q_w [N, K]   k = 0 1 2 3 4 …        nothing is packed
    token m      b b b b b …          output n     b b b b b …

The bracket is an integer and exact: a product is at most 2^14, and both sums stay below 2^31 for K < 2^16. It is rounded when it
becomes a float32, by each product with a scale, by the addition of the bias, and once to the dtype of y. A zero point of
the activations costs one multiplication an output, because the sums of the weight's rows are computed once
(:func:`row_sums`). Weights with zero points are not served: nobody stores 8-bit weights so.

Bytes: M·K + N·K + 2·M·N and the scales. Operations: 2·M·N·K. Two kernels: one for few tokens, any size and any GPU, loads
by pointers and can split K; one for many tokens keeps the tensor cores of Hopper busy with loads through descriptors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels._dense import choose, default_config, launch, search_space
from lqedu_kernels._numerics import to_dtype
from lqedu_kernels._schedule import after_previous, grouped_tile, sum_of_parts
from lqedu_kernels._tensors import Target, check_tensor, target_of
from lqedu_kernels.tuning import Config

__all__ = [
    "bytes_moved", "default_config", "operations", "row_sums", "search_space", "w8a8_matmul", "w8a8_reference",
]  # fmt: skip

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def w8a8_reference(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    *,
    x_zero: Tensor | None = None,
    w_sum: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The contract in plain torch, see :func:`w8a8_matmul`; float64 holds the integer sums exactly.

    >>> x, w = torch.tensor([[100, -3]], dtype=torch.int8), torch.tensor([[2, 1], [-1, 7]], dtype=torch.int8)
    >>> w8a8_reference(x, torch.tensor([[0.5]]), w, torch.tensor([[1.0], [0.25]]))
    tensor([[ 98.5000, -15.1250]], dtype=torch.float16)
    """
    total = x_codes.double() @ w_codes.double().T
    if x_zero is not None:
        total = total - x_zero.double() * (row_sums(w_codes) if w_sum is None else w_sum)
    y = total.float() * x_scale.float() * w_scale.float().view(1, -1)
    return (y if bias is None else y + bias.float()).to(dtype)


def row_sums(w_codes: Tensor) -> Tensor:
    """``Σ_k q_w[n, k]``, int32 ``[N]``: what a zero point of the activations is multiplied with."""
    return w_codes.sum(1, dtype=torch.int32)


def bytes_moved(m: int, n: int, k: int) -> int:
    """Fewest bytes of a call: codes and float32 scales read once, 16-bit outputs written once."""
    return m * k + n * k + 2 * m * n + 4 * (m + n)


def operations(m: int, n: int, k: int) -> int:
    """Multiplications and additions of a call."""
    return 2 * m * n * k


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_scales(p_x_scale, p_w_scale, p_x_zero, p_w_sum, p_bias, o_m, o_n, M, N, x_stride, w_stride):
    """What the sums of tokens o_m and outputs o_n need to become y; one of them is [rows, 1], the other [1, columns]."""
    m_m, m_n = o_m < M, o_n < N
    b_x_scale = tl.load(p_x_scale + o_m * x_stride, mask=m_m, other=0.0)
    b_w_scale = tl.load(p_w_scale + o_n * w_stride, mask=m_n, other=0.0).to(tl.float32)
    b_zero, b_w_sum, b_bias = 0, 0, 0.0
    if p_x_zero is not None:
        b_zero = tl.load(p_x_zero + o_m, mask=m_m, other=0).to(tl.int32)
        b_w_sum = tl.load(p_w_sum + o_n, mask=m_n, other=0)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    return b_x_scale, b_w_scale, b_zero, b_w_sum, b_bias


@triton.jit
def _finish(b_sum, scales, dtype: tl.constexpr):
    b_x_scale, b_w_scale, b_zero, b_w_sum, b_bias = scales
    total = (b_sum - b_zero * b_w_sum).to(tl.float32)
    return to_dtype(total * b_x_scale * b_w_scale + b_bias, dtype)


@triton.jit(do_not_specialize=["M"])
def _split_kernel(
    p_x, p_w, p_y, p_x_scale, p_w_scale, p_x_zero, p_w_sum, p_bias, p_partial, p_counter,
    M, N, K, x_stride, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Weights are the first operand, so that outputs fill the 64 rows of a tensor core's product and tokens may be few."""
    # 1. Place: a tile, and the steps of one part of K.
    tile, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    tile_m, tile_n = grouped_tile(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    steps = tl.cdiv(K, BLOCK_K)
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    p_x_rows = p_x + o_m.to(tl.int64)[None, :] * K + o_k[:, None]
    # Outputs beyond the end read the last row; what it gives is not stored.
    p_w_rows = p_w + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * K + o_k[None, :]
    o_m, o_n = o_m[None, :], o_n[:, None]
    after_previous(OVERLAP)
    # 2. Load: codes beyond K are 0. Scales come first, so that nobody waits for them in the end.
    scales = _load_scales(p_x_scale, p_w_scale, p_x_zero, p_w_sum, p_bias, o_m, o_n, M, N, x_stride, w_stride)
    b_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(part * steps // SPLITS, (part + 1) * steps // SPLITS):
        m_k = o_k < K - step * BLOCK_K
        # [BLOCK_N, BLOCK_K], read once: leaves the cache first
        b_w = tl.load(p_w_rows + step * BLOCK_K, mask=m_k[None, :], other=0, eviction_policy="evict_first")
        # [BLOCK_K, BLOCK_M]
        b_x = tl.load(p_x_rows + step * BLOCK_K, mask=m_k[:, None] & (o_m < M), other=0)
        # 3. Multiply: int32, exact in any order.
        b_sum = tl.dot(b_w, b_x, b_sum, out_dtype=tl.int32)
    # 4. Share: parts are handed in, and the last program gets the sum.
    whole = True
    if SPLITS > 1:
        b_sum, whole = sum_of_parts(b_sum, p_partial, p_counter, tile, part, SPLITS)
    # 5. Scale and store.
    if whole:
        b_y = _finish(b_sum, scales, p_y.dtype.element_ty)
        tl.store(p_y + o_m.to(tl.int64) * N + o_n, b_y, mask=(o_m < M) & (o_n < N))


@triton.jit(do_not_specialize=["M"])
def _tiles_kernel(
    d_x, d_w, d_y, p_x_scale, p_w_scale, p_x_zero, p_w_sum, p_bias, M, N, K, x_stride, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, FLATTEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program walks over whole tiles; FLATTEN makes the loops one: a tile's loads start while the last one is stored."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    after_previous(OVERLAP)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        # 1. Place.
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for k in range(0, K, BLOCK_K):
            # 2. Load: descriptors give 0 outside.
            b_x = d_x.load([tile_m * BLOCK_M, k])  # [BLOCK_M, BLOCK_K]
            b_w = d_w.load([tile_n * BLOCK_N, k])  # [BLOCK_N, BLOCK_K]
            # 3. Multiply.
            b_sum = tl.dot(b_x, b_w.T, b_sum, out_dtype=tl.int32)
        # 4. Halve: two stores of half a tile need half the shared memory, which buys a stage of the loop.
        HALF: tl.constexpr = BLOCK_N // 2
        b_left, b_right = tl.split(tl.permute(tl.reshape(b_sum, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        # 5. Scale and store.
        o_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        o_n = (tile_n * BLOCK_N + tl.arange(0, HALF))[None, :]
        scales = _load_scales(p_x_scale, p_w_scale, p_x_zero, p_w_sum, p_bias, o_m, o_n, M, N, x_stride, w_stride)
        d_y.store([tile_m * BLOCK_M, tile_n * BLOCK_N], _finish(b_left, scales, d_y.dtype))
        o_n += HALF
        scales = _load_scales(p_x_scale, p_w_scale, p_x_zero, p_w_sum, p_bias, o_m, o_n, M, N, x_stride, w_stride)
        d_y.store([tile_m * BLOCK_M, tile_n * BLOCK_N + HALF], _finish(b_right, scales, d_y.dtype))


# --- what is called ---------------------------------------------------------------------------------------------------


def w8a8_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    *,
    x_zero: Tensor | None = None,
    w_sum: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    config: Config | None = None,
) -> Tensor:
    """``y = s_x s_w (q_x q_w^T - z_x Σ q_w) + b``, the sums in exact int32.

    Args:
        x_codes: int8 ``[M, K]``, K below 65536.
        x_scale: float32 ``[M, 1]`` (per token) or ``[1, 1]`` (per tensor).
        w_codes: int8 ``[N, K]``.
        w_scale: float16, bfloat16 or float32, ``[N, 1]`` (per channel) or ``[1, 1]`` (per tensor).
        x_zero: zero points of the tokens, whole numbers from -128 to 127, int32 or float32 ``[M, 1]``.
        w_sum: int32 ``[N]``, :func:`row_sums` of the weight; needed with ``x_zero``, computed once a weight.
        bias: float16, bfloat16 or float32 ``[N]``.
        dtype: of y, float16 or bfloat16.
        config: a launch configuration, see :func:`default_config`; the measured one of this GPU if none is given.

    Returns:
        ``[M, N]`` in ``dtype``.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or layout than this; see the message.
    """
    target = _check(x_codes, x_scale, w_codes, w_scale, x_zero, w_sum, bias, dtype)
    (m, k), n = x_codes.shape, w_codes.shape[0]
    if m == 0:
        return x_codes.new_empty((0, n), dtype=dtype)
    c = choose(config, "w8a8", m, n, k, target, default_config)
    if c["kernel"] == "hopper":
        from lqedu_kernels import hopper_dense  # Gluon, which only this version of Triton can import

        return hopper_dense.matmul(
            x_codes, x_scale, w_codes, w_scale, x_zero=x_zero, w_sum=w_sum, bias=bias, dtype=dtype, config=c
        )
    y = torch.empty((m, n), dtype=dtype, device=x_codes.device)
    scales = (x_scale, w_scale, x_zero, w_sum if x_zero is not None else None, bias)
    sizes = (m, n, k, int(x_scale.numel() > 1), int(w_scale.numel() > 1))
    launch((_split_kernel, _tiles_kernel), c, target, x_codes, w_codes, y, scales, sizes, sums=torch.int32)
    return y


def _check(x_codes, x_scale, w_codes, w_scale, x_zero, w_sum, bias, dtype) -> Target:
    check_tensor("x_codes", x_codes, dtype=torch.int8, shape=(None, None), device=getattr(x_codes, "device", None))
    target = target_of(x_codes, "x_codes")
    (m, k), device = x_codes.shape, x_codes.device
    check_tensor("w_codes", w_codes, dtype=torch.int8, shape=(None, k), device=device, what="[N, K], K as x_codes")
    n = w_codes.shape[0]
    if not 0 < k < 1 << 16 or n == 0:
        raise ValueError(
            f"w_codes has shape {[n, k]}, but N must be at least 1 and K from 1 to 65535: int32 sums overflow beyond"
        )
    _check_scale("x_scale", x_scale, m, torch.float32, device, "one a token, or one")
    _check_scale("w_scale", w_scale, n, _FLOATS, device, "one an output, or one")
    if x_zero is not None:
        check_tensor("x_zero", x_zero, dtype=(torch.int32, torch.float32), shape=(m, 1), device=device)
        if w_sum is None:
            raise ValueError(
                "x_zero needs the sums of the weight's rows too: pass w_sum=row_sums(w_codes), computed once"
            )
        check_tensor("w_sum", w_sum, dtype=torch.int32, shape=(n,), device=device, what="row_sums(w_codes)")
    if bias is not None:
        check_tensor("bias", bias, dtype=_FLOATS, shape=(n,), device=device)
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype}")
    return target


def _check_scale(argument: str, scale: Tensor, rows: int, dtype: object, device: torch.device, what: str) -> None:
    single = isinstance(scale, Tensor) and scale.numel() == 1 and rows != 1
    check_tensor(argument, scale, dtype=dtype, shape=(1, 1) if single else (rows, 1), device=device, what=what)
