"""HQQ: choose zero points that minimise ``Σ |w - ŵ|^p`` with p < 1, by half-quadratic splitting and without any data.

A few weights of a group are outliers that no grid serves. A norm with p < 1 lets them be wrong and fits the rest, but it
is not convex, and rounding is a step function. Half-quadratic splitting gives the error a variable of its own, ``e``:

    minimise over z and e:   φ(e) + β/2 ‖e - (w - ŵ(z))‖²

and alternates two problems that have closed forms: ``e`` by a generalized soft threshold of the error (:func:`shrink`),
``z`` by a mean over the group, codes held fixed. ``β`` grows, so that ``e`` is drawn to the error itself. Scales stay.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023 (blog post and code, mobiusml/hqq at
e0b1d00). Chapter ``06-hqq``. Where this file differs from that code, and why:

- it returns the best iterate of each group, by mean ``|w - ŵ|``; theirs stops when the error of the whole matrix has
  risen, and returns the iterate after that one, two steps past the best;
- scales and zero points are rounded to their stored dtype before they are judged.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.integer import check_weight
from lqedu.options import check_count, check_number
from lqedu.rounding.report import RoundingReport


@dataclass(frozen=True)
class Iterate:
    """One state of the iteration, in groups ``[*scale_shape, g]``.

    Attributes:
        zero: the zero points, ``scale_shape``.
        codes: nearest codes for them, in the dtype of the computation.
        error: mean ``|w - ŵ|`` of each group, ``scale_shape``.
    """

    zero: Tensor
    codes: Tensor
    error: Tensor


def shrink(error: Tensor, beta: float, p: float) -> Tensor:
    """Generalized soft threshold, ``sign(x) · max(|x| - |x|^(p-1) / β, 0)``.

    For p = 1 it is the soft threshold, the exact minimiser of ``|e| + β/2 (e - x)²``. For p < 1 large errors are hardly
    shrunk, and small ones vanish. It is a first-order step for ``|e|^p / p``: the minimiser of ``|e|^p`` itself would
    subtract ``p |e|^(p-1) / β`` at its own ``e``, so small values are cut off later here than the norm asks for.

    >>> shrink(torch.tensor([-0.5, 0.2, 1.0]), beta=10, p=1.0)
    tensor([-0.4000,  0.1000,  0.9000])
    """
    magnitude = error.abs()
    return error.sign() * (magnitude - magnitude.pow(p - 1) / beta).clamp_(min=0)


def iterates(
    weight: Tensor, grid: IntGrid, *, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iterations: int = 20
) -> Iterator[Iterate]:
    """The start and what each of ``iterations`` steps makes of it; arguments and errors as :func:`hqq`."""
    x, s, z, _ = _start(weight, grid, p, beta, kappa, iterations)
    for _ in range(iterations + 1):
        error, after = step(x, s, z, beta, p, grid)
        yield Iterate(z.squeeze(-1), grid.nearest_code(x, s, z), error.squeeze(-1))
        z, beta = after, beta * kappa


def step(x: Tensor, s: Tensor, z: Tensor, beta: float, p: float, grid: IntGrid) -> tuple[Tensor, Tensor]:
    """One step of all groups: how wrong ``z`` is, and the zero point that comes after it.

    The next zero point minimises the quadratic with the codes and the shrunk error held fixed: the group's mean of
    ``q - (x - e) / s``.

    Args:
        x: weights in groups, ``[..., g]``.
        s, z: scale and zero point, ``[..., 1]``.
        beta, p: as :func:`hqq`.
        grid: its rounding rule and its ``scale_dtype``, to which the next zero point is rounded.

    Returns:
        ``(error, after)``: mean ``|x - s (q - z)|`` and the next zero point, both ``[..., 1]``.
    """
    q = grid.nearest_code(x, s, z)
    error = x - s * (q - z)
    after = (q - (x - shrink(error, beta, p)) / s).mean(-1, keepdim=True)
    return error.abs().mean(-1, keepdim=True), after.to(grid.scale_dtype).to(x.dtype)


def hqq(
    weight: Tensor,
    grid: IntGrid,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    compiled: bool = False,
) -> tuple[QTensor, RoundingReport]:
    """Round a weight with zero points optimised by half-quadratic splitting.

    Args:
        weight: ``[out, in]``; computed in float32, or float64 if it is float64. The result is not invariant to scaling
            it: errors below ``beta ** (-1 / (2 - p))``, 0.17 by default, are shrunk to zero.
        grid: an asymmetric grid with float zero points; its scales are fitted once and kept.
        p: exponent of the norm, in (0, 1].
        beta: weight of the quadratic, positive; it is multiplied by ``kappa`` ≥ 1 after each step.
        iterations: steps, at least 0.
        compiled: run :func:`step` through ``torch.compile``: one pass over the weight a step, where eager PyTorch makes
            about ten. The first call of a shape compiles for some seconds. Sums may round differently.

    Returns:
        The quantized weight, of each group the iterate with the least mean ``|w - ŵ|`` (the start counts), and a report
        without a proxy loss.

    Raises:
        GridError: a weight that is not finite, or a grid that does not fit it or has integer zero points.
        UsageError: a hyper-parameter outside its range.

    >>> w = torch.tensor([[0.1, 0.2, 0.3, 3.0]])
    >>> grid = IntGrid(bits=2, zero_point="float")
    >>> best, nearest = hqq(w, grid)[0], hqq(w, grid, iterations=0)[0]
    >>> bool((w - best.dequantize()).abs().sum() < (w - nearest.dequantize()).abs().sum())
    True
    """
    x, s, z, scale = _start(weight, grid, p, beta, kappa, iterations)
    advance = _compiled_step() if compiled else step
    best, least = z, torch.full_like(z, torch.inf)
    strength = torch.tensor(beta, dtype=x.dtype, device=x.device)  # a number would be compiled in, anew at each step
    for _ in range(iterations + 1):
        error, after = advance(x, s, z, strength, p, grid)
        better = error < least  # decided on the device: no step waits for the host
        best, least = torch.where(better, z, best), torch.where(better, error, least)
        z, strength = after, strength * kappa
    codes = grid.ungrouped(grid.nearest_code(x, s, best).to(grid.code_dtype), tuple(weight.shape))
    return QTensor(codes, scale, best.squeeze(-1).to(grid.zero_dtype), grid), RoundingReport(proxy_loss=None)


@lru_cache
def _compiled_step() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(step)


def _start(
    weight: Tensor, grid: IntGrid, p: float, beta: float, kappa: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups, scales and zero points to begin with, ready to compute with, and the scales as they are stored."""
    check_weight(weight)
    if grid.zero_point != "float":
        raise GridError("HQQ moves zero points by fractions of a step; use a grid with zero_point='float'")
    check_options(p, beta, kappa, iterations)
    w = weight.detach()
    w = w if w.dtype == torch.float64 else w.to(torch.float32)
    scale, zero = grid.fit(w)
    return grid.grouped(w), scale.to(w.dtype).unsqueeze(-1), zero.to(w.dtype).unsqueeze(-1), scale


def check_options(p: float, beta: float, kappa: float, iterations: int) -> None:
    """Refuse hyper-parameters outside their range (UsageError), before any weight is looked at."""
    check_number("p", p, above=0, most=1)
    check_number("beta", beta, above=0)
    check_number("kappa", kappa, least=1)
    check_count("iterations", iterations)
