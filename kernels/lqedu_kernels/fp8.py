"""FP8 E4M3 times FP8 E4M3, summed in float32 by the tensor cores; chapter ``16-fp8``::

    y[m, n] = s_x[m] · s_w[n] · Σ_k q_x[m, k] q_w[n, k]  +  b[n]                              scales of tokens and channels
    y[m, n] = Σ_j s_x[m, j] · s_w[n/128, j] · Σ_{k in block j} q_x[m, k] q_w[n, k]  +  b[n]   scales of blocks of 128

One code is one byte, a sign, four bits of exponent and three of mantissa, with the sum's index k last in both operands::

    7 6 5 4 3 2 1 0      value (-1)^s 2^(e-7) (1 + m/8), and (-1)^s 2^-6 m/8 where e = 0; e = 15, m = 7 is NaN
    s e e e e m m m

Every product is exact. The sum is not: Hopper's FP8 tensor cores align the products of an instruction to the largest one
and keep some 14 bits, so the error of a long sum is that of its largest partial sums (``lqedu.runtime.float8`` has the
bound). Scales of blocks repair this on the way: after each 128 products the partial sum leaves the tensor cores and is
added in float32 (*promotion*, DeepSeek-V3, arXiv:2412.19437, section 3.3). Then float32 products with the scales, a
float32 addition of the bias, one rounding to the dtype of y.

Bytes: M·K + N·K + 2·M·N and the scales. Operations: 2·M·N·K, and 2·M·N·K/128 outside the tensor cores for blocks.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqedu_kernels import _dense
from lqedu_kernels._numerics import to_dtype
from lqedu_kernels._schedule import after_previous, grouped_tile, sum_of_parts
from lqedu_kernels._tensors import Target, check_tensor, target_of
from lqedu_kernels.tuning import Config

__all__ = ["bytes_moved", "default_config", "fp8_matmul", "fp8_reference", "operations", "search_space"]

#: Inputs, and outputs of a weight, that share a scale.
BLOCK = 128
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def fp8_reference(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The contract in plain torch, see :func:`fp8_matmul`; sums in float64.

    >>> x = torch.tensor([[1.0, -0.5, 240.0]]).to(torch.float8_e4m3fn)
    >>> fp8_reference(x, torch.tensor([[2.0]]), x, torch.tensor([[0.25]]))
    tensor([[28800.]], dtype=torch.float16)
    """
    k, n = x_codes.shape[1], w_codes.shape[0]
    x, w = x_codes.float().double(), w_codes.float().double()
    if _by_block(w_scale, n, k):
        w_scale = w_scale.repeat_interleave(BLOCK, 0)[:n]
    y = x.new_zeros(x.shape[0], n)
    for j in range(-(-k // BLOCK)):
        part = slice(j * BLOCK, (j + 1) * BLOCK)
        s_x, s_w = x_scale[:, min(j, x_scale.shape[1] - 1)], w_scale[:, min(j, w_scale.shape[1] - 1)]
        y += (x[:, part] @ w[:, part].T) * s_x.double().view(-1, 1) * s_w.double().view(1, -1)
    return (y if bias is None else y + bias.double()).to(dtype)


def _by_block(scale: Tensor, rows: int, k: int) -> bool:
    """Whether scales of a weight are of blocks; one block that is the whole tensor counts as a tensor."""
    return tuple(scale.shape) == (-(-rows // BLOCK), -(-k // BLOCK)) and tuple(scale.shape) not in ((1, 1), (rows, 1))


def bytes_moved(m: int, n: int, k: int, *, blocks: bool = False) -> int:
    """Fewest bytes of a call: codes and float32 scales read once, 16-bit outputs written once."""
    scales = (m + -(-n // BLOCK)) * -(-k // BLOCK) if blocks else m + n
    return m * k + n * k + 2 * m * n + 4 * scales


def operations(m: int, n: int, k: int) -> int:
    """Multiplications and additions of a call in the tensor cores."""
    return 2 * m * n * k


# --- launch configurations --------------------------------------------------------------------------------------------


def default_config(m: int, n: int, k: int, target: Target, *, blocks: bool = False) -> dict[str, int | str]:
    """As for INT8; for blocks, tiles of one block of outputs and steps of one of inputs.

    Two programs a processor, of four warps each: one adds up outside the tensor cores while the other multiplies inside.
    """
    c = _dense.default_config(m, n, k, target)
    if not blocks:
        return c
    if c["kernel"] == "tiles":
        return _dense.tiles_config(64, BLOCK, BLOCK, 4, 4 if m <= 512 else 3, per_processor=2, flatten=False)
    block_m, stages = (min(c["block_m"], 32), 6) if k % 16 == 0 else (16, 2)
    return _dense.split_config(block_m, 64, BLOCK, 4, stages, _dense.splits_for(m, n, k, block_m, 64, target))


def search_space(m: int, n: int, k: int, target: Target, *, blocks: bool = False) -> list[dict[str, int | str]]:
    """Configurations worth timing at a shape, the likely best first."""
    if not blocks:
        return _dense.search_space(m, n, k, target)
    space = [default_config(m, n, k, target, blocks=True)]
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    for block_n, stages in ((64, 6), (64, 8), (64, 10), (128, 5), (128, 6)) if m <= 64 else ():
        most = _dense.splits_for(m, n, k, block_m, block_n, target)
        for splits in sorted({1, most, 2 * most}):
            if splits <= max(most, target.processors // _dense.tiles_of(m, n, block_m, block_n)):
                space.append(_dense.split_config(block_m, block_n, BLOCK, 4, stages, splits))
    if m > 16 and _dense.has_descriptors(n, k, target):
        shapes = [(64, 128, 4, 4, 2), (64, 128, 4, 3, 2), (64, 128, 4, 6, 1), (64, 64, 4, 6, 2)]
        for block_m, block_n, warps, stages, programs in shapes + ([(128, 128, 8, 4, 1)] if m > 256 else []):
            for flatten in (False, True):
                space.append(
                    _dense.tiles_config(block_m, block_n, BLOCK, warps, stages, per_processor=programs, flatten=flatten)
                )
    return [config for i, config in enumerate(space) if config not in space[:i]]


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_scales(p_x_scale, p_w_scale, p_bias, o_m, o_n, M, N, x_stride, w_stride, BLOCKS: tl.constexpr):
    """What the sums of tokens o_m and outputs o_n still need to become y; one is [rows, 1], the other [1, columns]."""
    m_m, m_n = o_m < M, o_n < N
    b_x_scale, b_w_scale, b_bias = 1.0, 1.0, 0.0
    if not BLOCKS:
        b_x_scale = tl.load(p_x_scale + o_m * x_stride, mask=m_m, other=0.0)
    if p_w_scale is not None:
        b_w_scale = tl.load(p_w_scale + o_n * w_stride, mask=m_n, other=0.0)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    return b_x_scale, b_w_scale, b_bias


@triton.jit
def _block_scale(p_x_block, p_w_block, step, end, x_stride_k):
    """Scales of the blocks of a step, ``[BLOCK_M]``; behind the last step, those of the last."""
    step = tl.minimum(step, end - 1)
    b_s = tl.load(p_x_block + step * x_stride_k)
    if p_w_block is not None:
        b_s *= tl.load(p_w_block + step)
    return b_s


@triton.jit
def _finish(b_sum, scales, dtype: tl.constexpr):
    b_x_scale, b_w_scale, b_bias = scales
    return to_dtype(b_sum * b_x_scale * b_w_scale + b_bias, dtype)


@triton.jit(do_not_specialize=["M"])
def _split_kernel(
    p_x, p_w, p_y, p_x_scale, p_w_scale, p_w_blocks, p_bias, p_partial, p_counter,
    M, N, K, x_stride, x_stride_k, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCKS: tl.constexpr,
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
    p_x_block, p_w_block = p_x_scale + tl.minimum(o_m, M - 1) * x_stride, p_w_blocks
    if p_w_blocks is not None:
        p_w_block += tile_n * BLOCK_N // 128 * steps
    o_m, o_n = o_m[None, :], o_n[:, None]
    after_previous(OVERLAP)
    # 2. Load: codes beyond K are 0. Scales come first, so that nobody waits for them in the end.
    scales = _load_scales(p_x_scale, p_w_scale, p_bias, o_m, o_n, M, N, x_stride, w_stride, BLOCKS)
    b_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin, end = part * steps // SPLITS, (part + 1) * steps // SPLITS
    if BLOCKS:  # loaded a step early, because nothing else hides how long it takes
        b_s = _block_scale(p_x_block, p_w_block, begin, end, x_stride_k)
    for step in range(begin, end):
        m_k = o_k < K - step * BLOCK_K
        # [BLOCK_N, BLOCK_K], read once: leaves the cache first
        b_w = tl.load(p_w_rows + step * BLOCK_K, mask=m_k[None, :], other=0.0, eviction_policy="evict_first")
        # [BLOCK_K, BLOCK_M]
        b_x = tl.load(p_x_rows + step * BLOCK_K, mask=m_k[:, None] & (o_m < M), other=0.0)
        # 3. Multiply; of blocks, scale and add outside the tensor cores.
        if BLOCKS:
            b_next = _block_scale(p_x_block, p_w_block, step + 1, end, x_stride_k)
            b_sum += tl.dot(b_w, b_x) * b_s[None, :]
            b_s = b_next
        else:
            b_sum = tl.dot(b_w, b_x, b_sum)
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
    d_x, d_w, d_y, p_x_scale, p_w_scale, p_w_blocks, p_bias, M, N, K, x_stride, x_stride_k, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, FLATTEN: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Each program walks over whole tiles; FLATTEN makes the loops one: a tile's loads start while the last one is stored."""
    tiles_m, tiles_n, steps = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    after_previous(OVERLAP)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        # 1. Place.
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        p_x_block, p_w_block = p_x_scale + tl.minimum(o_m, M - 1) * x_stride, p_w_blocks
        if p_w_blocks is not None:
            p_w_block += tile_n * BLOCK_N // 128 * steps
        b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if BLOCKS:
            b_s = _block_scale(p_x_block, p_w_block, 0, steps, x_stride_k)
        for step in range(steps):
            # 2. Load: descriptors give 0 outside.
            b_x = d_x.load([tile_m * BLOCK_M, step * BLOCK_K])  # [BLOCK_M, BLOCK_K]
            b_w = d_w.load([tile_n * BLOCK_N, step * BLOCK_K])  # [BLOCK_N, BLOCK_K]
            # 3. Multiply; of blocks, scale and add outside the tensor cores.
            if BLOCKS:
                b_next = _block_scale(p_x_block, p_w_block, step + 1, steps, x_stride_k)
                b_sum += tl.dot(b_x, b_w.T) * b_s[:, None]
                b_s = b_next
            else:
                b_sum = tl.dot(b_x, b_w.T, b_sum)
        # 4. Halve: two stores of half a tile need half the shared memory, which buys a stage of the loop.
        HALF: tl.constexpr = BLOCK_N // 2
        b_left, b_right = tl.split(tl.permute(tl.reshape(b_sum, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        # 5. Scale and store.
        o_m = o_m[:, None]
        o_n = (tile_n * BLOCK_N + tl.arange(0, HALF))[None, :]
        scales = _load_scales(p_x_scale, p_w_scale, p_bias, o_m, o_n, M, N, x_stride, w_stride, BLOCKS)
        d_y.store([tile_m * BLOCK_M, tile_n * BLOCK_N], _finish(b_left, scales, d_y.dtype))
        o_n += HALF
        scales = _load_scales(p_x_scale, p_w_scale, p_bias, o_m, o_n, M, N, x_stride, w_stride, BLOCKS)
        d_y.store([tile_m * BLOCK_M, tile_n * BLOCK_N + HALF], _finish(b_right, scales, d_y.dtype))


# --- what is called ---------------------------------------------------------------------------------------------------


def fp8_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    config: Config | None = None,
) -> Tensor:
    """``y = s_x s_w (q_x q_w^T) + b``, with scales inside the sum where they are of blocks.

    Args:
        x_codes: float8_e4m3fn ``[M, K]`` (codes kept as uint8: ``.view(torch.float8_e4m3fn)``).
        x_scale: float32 ``[1, 1]`` (per tensor), ``[M, 1]`` (per token) or ``[M, ceil(K/128)]`` (per token and 128 inputs).
        w_codes: float8_e4m3fn ``[N, K]``.
        w_scale: float32 ``[1, 1]`` (per tensor), ``[N, 1]`` (per channel) or ``[ceil(N/128), ceil(K/128)]`` (blocks). Any of
            them goes with any ``x_scale``.
        bias: float16, bfloat16 or float32 ``[N]``.
        dtype: of y, float16 or bfloat16.
        config: a launch configuration, see :func:`default_config`; the measured one of this GPU if none is given.

    Returns:
        ``[M, N]`` in ``dtype``.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or layout than this, or a GPU without FP8 (compute
            capability below 8.9); see the message.
    """
    target = _check(x_codes, x_scale, w_codes, w_scale, bias, dtype)
    (m, k), n = x_codes.shape, w_codes.shape[0]
    if m == 0:
        return x_codes.new_empty((0, n), dtype=dtype)
    by_block = _by_block(w_scale, n, k)
    blocks = by_block or x_scale.shape[1] > 1
    operation = "fp8/block" if blocks else "fp8/token" if x_scale.numel() + w_scale.numel() > 2 else "fp8/tensor"
    c = _dense.choose(config, operation, m, n, k, target, functools.partial(default_config, blocks=blocks))
    if c["kernel"] == "hopper":
        from lqedu_kernels import hopper_dense  # Gluon, which only this version of Triton can import

        return hopper_dense.matmul(x_codes, x_scale, w_codes, w_scale, bias=bias, dtype=dtype, config=c)
    block_n, block_k = c["block_n"], c["block_k"]
    if blocks and (block_k != BLOCK or block_n > BLOCK):
        raise ValueError(
            f"config has block_k {block_k}, block_n {block_n}, but blocks of 128 need 128, and at most 128"
        )
    scales = (x_scale, None if by_block else w_scale, w_scale if by_block else None, bias)
    x_strides = (x_scale.shape[1] if x_scale.shape[0] > 1 else 0, int(x_scale.shape[1] > 1))
    sizes = (m, n, k, *x_strides, int(w_scale.numel() > 1))
    y = torch.empty((m, n), dtype=dtype, device=x_codes.device)
    kernels = (_split_kernel, _tiles_kernel)
    _dense.launch(kernels, c, target, x_codes, w_codes, y, scales, sizes, sums=torch.float32, BLOCKS=blocks)
    return y


def _check(x_codes, x_scale, w_codes, w_scale, bias, dtype) -> Target:
    e4m3, device = torch.float8_e4m3fn, getattr(x_codes, "device", None)
    check_tensor(
        "x_codes", x_codes, dtype=e4m3, shape=(None, None), device=device, what="codes: .view(torch.float8_e4m3fn)"
    )
    target = target_of(x_codes, "x_codes")
    if target.capability < (8, 9):
        raise ValueError(
            f"x_codes is on a {target.name}, which has no FP8 tensor cores (compute capability 8.9 and later have): "
            "decode the codes and multiply in 16 bits, or use w8a8_matmul"
        )
    m, k = x_codes.shape
    check_tensor("w_codes", w_codes, dtype=e4m3, shape=(None, k), device=device, what="[N, K], K as x_codes")
    n = w_codes.shape[0]
    if k == 0 or n == 0:
        raise ValueError(f"w_codes has shape {[n, k]}, but N and K must be at least 1")
    runs, tiles = -(-k // BLOCK), -(-n // BLOCK)
    _check_scale("x_scale", x_scale, ((1, 1), (m, 1), (m, runs)), device)
    _check_scale("w_scale", w_scale, ((1, 1), (n, 1), (tiles, runs)), device)
    if bias is not None:
        check_tensor("bias", bias, dtype=_FLOATS, shape=(n,), device=device)
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype}")
    return target


def _check_scale(argument: str, scale: Tensor, shapes: tuple[tuple[int, int], ...], device: torch.device) -> None:
    """A scale of one of three shapes; of another, the message names the three."""
    if isinstance(scale, Tensor) and tuple(scale.shape) not in shapes:
        one, row, block = (list(shape) for shape in shapes)
        raise ValueError(f"{argument} must have shape {one}, {row} or (blocks of 128) {block}, got {list(scale.shape)}")
    check_tensor(argument, scale, dtype=torch.float32, shape=tuple(getattr(scale, "shape", ())), device=device)
