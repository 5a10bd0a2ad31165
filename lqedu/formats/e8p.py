"""E8P: sixteen bits for eight weights, a codebook cut from the densest packing of spheres in eight dimensions.

A scalar grid of 2 bits holds 4^8 = 65,536 points in eight dimensions, on a cube. E8P holds as many, but near a ball, where
Gaussian vectors are, and on the lattice E8, whose cells are rounder than cubes:

    D8 = {z ∈ Z^8 : Σ z even}        E8 = D8 ∪ (D8 + ½)        E8P ⊂ E8 + ¼ = (D8 + ½ - ¼) ∪ (D8 + ½ + ¼)

What makes it cheap is that a point of D8 + ½ is a pattern of absolute values with signs. Changing one sign changes the sum
by an odd number, so of the 256 choices of signs exactly half keep it even, whatever the pattern: seven signs are free and
the eighth follows. A codeword is then

    bits 8 to 15  which of 256 patterns
    bits 1 to 7   signs of the first seven values, 1 for minus
    bit 0         the shift, 1 for + ¼ and 0 for - ¼

and decoding needs a table of 256 patterns, 1 KiB at 4 bits a value, instead of 65,536 vectors.

Tseng et al., 2024, arXiv:2402.04396 (QuIP#), section 4. Derived in chapter ``07-quip``.
"""

from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from lqedu.errors import GridError, UsageError

#: Weights of one codeword.
DIMENSION = 8
#: ``c`` for which ``c · decode(encode(x / c))`` has the least mean squared error on independent standard normal ``x``.
GAUSSIAN_SCALE = 0.97
_CHUNK = 1 << 10  # vectors compared with all patterns at once: float32 tables of 1 MiB stay in a cache


def patterns() -> Tensor:
    """The 256 patterns of absolute values, float32 ``[256, 8]``, values ½, 1½ and 2½, shortest first.

    These are all 227 patterns of squared norm up to 10, and 29 of the 224 of squared norm 12, which complete 8 bits. The
    paper lists the 29 it took; here they are the first, in the order of positions, of the 56 that hold five 1½. Codewords
    so far out are rare and all equally far, so the choice moves the error of a Gaussian by a few parts in a thousand: codes of
    another implementation decode to other vectors here, but cost the same.
    """
    return _tables(torch.device("cpu"), torch.float32)[0].clone()


def codebook() -> Tensor:
    """All codewords in the order of their codes, float32 ``[65536, 8]``: ``codebook()[c] == decode(c)``."""
    return decode(torch.arange(1 << 16, dtype=torch.int32))


def encode(x: Tensor) -> Tensor:
    """Codes of the nearest codewords in Euclidean distance, by an exact search over 256 patterns instead of 65,536 vectors.

    For one shift and one pattern ``s`` the best signs are those of ``y = x - shift``, at a squared distance of
    ``‖y‖² - 2 Σ s_i |y_i| + ‖s‖²``. Where they would make the sum odd, the sign that costs least is turned:
    ``4 min_i s_i |y_i|`` more.

    Args:
        x: ``[..., 8]``, a floating dtype, already divided by its scale (:data:`GAUSSIAN_SCALE` standard deviations).
            Distances are compared in float32, for float64 input in float64.

    Returns:
        int32 ``[...]``, 0 to 65,535; ``.to(torch.uint16)`` keeps them in 16 bits.

    Raises:
        UsageError: a last axis that is not 8, or a dtype that is not floating point.
        GridError: NaN or infinite values.

    >>> decode(encode(torch.tensor([0.3, -0.9, 1.9, 0.1, -0.2, 0.4, -0.6, 2.0])))
    tensor([ 0.2500, -0.7500,  1.2500,  0.2500, -0.7500,  0.2500, -0.7500,  2.2500])
    """
    if not isinstance(x, Tensor) or x.shape[-1:] != (DIMENSION,) or not x.is_floating_point():
        got = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(f"E8P encodes floating-point vectors of {DIMENSION} values, got {got}")
    if not bool(torch.isfinite(x).all()):
        raise GridError("the vectors to encode hold NaN or infinite values")
    flat = x.detach().reshape(-1, DIMENSION)
    flat = flat if flat.dtype == torch.float64 else flat.to(torch.float32)
    codes = [_encode_chunk(chunk) for chunk in flat.split(_CHUNK)]
    return torch.cat(codes).reshape(x.shape[:-1]) if codes else flat.new_empty(x.shape[:-1], dtype=torch.int32)


def decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codewords ``[..., 8]`` of codes: odd multiples of ¼ up to ± 2¾, exact in 16-bit dtypes too.

    Args:
        codes: any integer dtype, ``[...]``, 0 to 65,535.
        dtype: of the result.

    Raises:
        UsageError: codes that are not integers, or outside 16 bits.
    """
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise UsageError(f"E8P decodes integer codes, got {getattr(codes, 'dtype', type(codes).__name__)}")
    code = codes.to(torch.int64)
    if code.numel() and (int(code.min()) < 0 or int(code.max()) > 0xFFFF):
        raise UsageError("E8P codes have 16 bits: 0 to 65535")
    table, odd = _tables(code.device, torch.float32)
    index = code >> 8
    free = code[..., None] >> torch.arange(1, DIMENSION, device=code.device) & 1  # [..., 7], 1 where negative
    last = (free.sum(-1) + odd[index]) & 1  # an odd pattern takes an odd number of minus signs
    negative = torch.cat([free, last[..., None]], dim=-1).to(torch.bool)
    shift = (code & 1)[..., None] * 0.5 - 0.25
    return (torch.where(negative, -table[index], table[index]) + shift).to(dtype)


def _encode_chunk(x: Tensor) -> Tensor:
    """int32 codes ``[n]`` of ``[n, 8]``."""
    table, odd = _tables(x.device, x.dtype)
    norms = table.square().sum(-1)
    best_cost, best_code = None, None
    for bit, shift in ((0, -0.25), (1, 0.25)):
        y = x - shift
        magnitude, negative = y.abs(), y < 0
        turn = table[:, 0] * magnitude[:, :1]  # min_i s_i |y_i|, [n, 256], one coordinate at a time
        for i in range(1, DIMENSION):
            turn = torch.minimum(turn, table[:, i] * magnitude[:, i : i + 1])
        mismatch = (negative.sum(-1, keepdim=True) % 2 == 1) != (odd == 1)  # [n, 256]
        cost = norms - 2 * (magnitude @ table.T) + 4 * torch.where(mismatch, turn, 0.0)
        least, index = cost.min(dim=-1)
        least = least + y.square().sum(-1)  # the two shifts measure from different origins
        cheapest = (table[index] * magnitude).argmin(-1, keepdim=True)
        turned = negative.gather(-1, cheapest) ^ mismatch.gather(-1, index[:, None])
        negative = negative.scatter(-1, cheapest, turned)
        weights = 2 << torch.arange(DIMENSION - 1, device=x.device)
        code = (index << 8) + (negative[:, :-1] * weights).sum(-1) + bit
        if best_cost is None:
            best_cost, best_code = least, code
        else:
            best_code = torch.where(least < best_cost, code, best_code)
    return best_code.to(torch.int32)


@lru_cache
def _tables(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The patterns, and 1 for those whose values add up to an odd number (int64 ``[256]``)."""
    with torch.inference_mode(False):  # kept for later calls, which may want gradients around them
        rows = sorted(_short_patterns(), key=lambda s: (sum(v * v for v in s), [-v for v in s]))[:227]
        rows += [_with_threes(where) for where in combinations(range(DIMENSION), 5)][:29]
        halves = torch.tensor(rows)
        return (halves.to(dtype) / 2).to(device), (halves.sum(-1) // 2 % 2).to(device)


def _with_threes(where: tuple[int, ...]) -> list[int]:
    """Twice a pattern: 3 at these positions and 1 elsewhere."""
    return [3 if i in where else 1 for i in range(DIMENSION)]


def _short_patterns() -> list[list[int]]:
    """Twice all patterns of squared norm up to 10: ½ everywhere has 2, a 1½ adds 2, a 2½ adds 6."""
    short = [_with_threes(where) for count in range(5) for where in combinations(range(DIMENSION), count)]
    for five in range(DIMENSION):
        for threes in ((), *combinations([i for i in range(DIMENSION) if i != five], 1)):
            short.append([5 if i == five else v for i, v in enumerate(_with_threes(threes))])
    return short
