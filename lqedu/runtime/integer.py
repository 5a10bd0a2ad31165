"""Integer matrix products with exact int32 results; chapter ``08-smoothquant``."""

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats import QTensor

_EXACT = 1 << 24  # float32 holds every integer up to here


def int_matmul(x: Tensor, w: Tensor) -> Tensor:
    """``x w^T`` of int8 codes, accumulated in int32.

    On a GPU this is the tensor cores' int8 product. Elsewhere the codes are multiplied in float32, a few columns at a
    time: a partial sum of at most ``2**24 / (max|x| max|w|)`` products stays below 2**24, where every float32 operation
    on integers is exact, and the partial sums are added as int32.

    Args:
        x: int8 ``[tokens, in]``.
        w: int8 ``[out, in]``, on the same device.

    Returns:
        int32 ``[tokens, out]``. Exact as long as ``in`` < 2**17, which int8 products cannot overflow.

    Raises:
        TypeError: codes that are not int8.
        ValueError: shapes that do not fit, or more than 2**17 - 1 inputs.

    >>> int_matmul(torch.tensor([[127, -128]], dtype=torch.int8), torch.tensor([[127, -128]], dtype=torch.int8))
    tensor([[32513]], dtype=torch.int32)
    """
    if x.dtype != torch.int8 or w.dtype != torch.int8:
        raise TypeError(f"int_matmul multiplies int8 by int8, got {x.dtype} and {w.dtype}")
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or x.shape[1] >= 1 << 17:
        raise ValueError(f"int_matmul needs [tokens, in] and [out, in], in < {1 << 17}; got {x.shape} and {w.shape}")
    if x.is_cuda:
        return _tensor_cores(x, w)
    step = _EXACT // (128 * 128)
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        total += (x[:, part].float() @ w[:, part].float().T).to(torch.int32)
    return total


def _tensor_cores(x: Tensor, w: Tensor) -> Tensor:
    """``torch._int_mm``, which wants more than 16 rows and multiples of 8: zeros fill up what is missing."""
    tokens, outs = x.shape[0], w.shape[0]
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8, 0, max(0, 17 - tokens)))
    w = torch.nn.functional.pad(w, (0, -w.shape[1] % 8, 0, -outs % 8))
    return torch._int_mm(x, w.T)[:tokens, :outs]


def integer_linear(codes: Tensor, scale: Tensor, zero: Tensor | None, weight: QTensor) -> Tensor:
    """``x w^T`` from the codes of both, exact until the scales are applied.

    With ``x = s_x (q_x - z_x)`` and, in group ``k`` of ``g`` inputs, ``w = s_k (q_w - z_k)``,

        y = s_x Σ_k s_k [ Σ q_x q_w - z_x Σ q_w - z_k Σ q_x + g z_x z_k ]     (sums over the inputs of group k)

    so zero points cost one sum a token and one a row, not one subtraction an element.

    Args:
        codes: int8 activations ``[..., in]``.
        scale, zero: of the activations, float32, ``[..., 1]`` or ``[1]``; the zero point holds integers or is ``None``.
        weight: per tensor, channel or group along the inputs, with integer zero points.

    Returns:
        float32 ``[..., out]``.

    Raises:
        GridError: a weight with float zero points or with groups along the outputs.
    """
    grid = weight.grid
    if not grid.symmetric and grid.zero_point == "float":
        raise GridError("an integer product needs integer zero points; use zero_point='integer'")
    size = grid.columns_per_scale(weight.shape[1])
    offset = 0 if grid.symmetric else grid.levels // 2  # unsigned codes move into int8, and their zero point with them
    w = (weight.codes.to(torch.int16) - offset).to(torch.int8)
    x = codes.reshape(-1, codes.shape[-1])
    z_x = None if zero is None else zero.reshape(-1, 1)
    y = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)
    for k in range(weight.shape[1] // size):
        part = slice(k * size, (k + 1) * size)
        term = int_matmul(x[:, part], w[:, part]).to(torch.float32)
        z_w = None if weight.zero is None else weight.zero[:, k].to(torch.float32) - offset
        if z_x is not None:
            term -= z_x * w[:, part].sum(1, dtype=torch.int32)
        if z_w is not None:
            term -= z_w * x[:, part].sum(1, keepdim=True, dtype=torch.int32)
        if z_x is not None and z_w is not None:
            term += size * z_x * z_w
        y += term * weight.scale[:, k].to(torch.float32)
    return (y.view(*codes.shape[:-1], -1)) * scale
