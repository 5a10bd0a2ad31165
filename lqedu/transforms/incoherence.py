"""Incoherence processing: spread weights and Hessian evenly over all coordinates, exactly and reversibly.

A weight is incoherent when its largest entry is not much above its average one, a Hessian when its eigenvectors do not
point along single inputs. Two orthogonal matrices and a diagonal one make both true without changing the layer:

    y = W x = U^T ( W' (V D^-1 x) )      W' = U W D V^T      H' = V D^-1 H D^-1 V^T

``tr(ΔW' H' ΔW'^T) = tr(ΔW H ΔW^T)``, so rounding W' under H' is the same problem as rounding W under H, on a basis in
which rounding is easier. At run time the input passes V D^-1 and the output passes U^T.

Chee et al., 2023, arXiv:2307.13304, sections 3.2 and 4. Chapter ``07-quip``.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lqedu.errors import CalibrationError
from lqedu.formats.integer import check_weight
from lqedu.linalg.orthogonal import KroneckerRotation
from lqedu.options import check_count
from lqedu.rounding.report import check_problem

_LARGEST_SCALE = 2.0**10
LARGEST_SEED = 2**62 - 1  # two generators take 2 seed and 2 seed + 1


def weight_incoherence(weight: Tensor) -> float:
    """``max|W| √(m n) / ‖W‖``: the largest entry over the root mean square one.

    1 for entries of equal size, √(m n) for a single non-zero entry, about √(2 ln(m n)) for Gaussian entries.

    >>> weight_incoherence(torch.ones(3, 4)), weight_incoherence(torch.eye(4))
    (1.0, 2.0)

    Raises:
        GridError: not a floating-point ``[out, in]``, or values that are not finite.
    """
    check_weight(weight)
    w = weight.to(torch.float64)
    return float(w.abs().max() * math.sqrt(w.numel()) / w.norm().clamp(min=torch.finfo(w.dtype).tiny))


def hessian_incoherence(hessian: Tensor) -> float:
    """``max|Q| √n`` for the eigenvectors Q of ``H [n, n]``: 1 at best, √n for a diagonal Hessian.

    >>> hessian_incoherence(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    2.0

    Raises:
        CalibrationError: not a symmetric matrix, or values that are not finite.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise CalibrationError(f"a Hessian is a square matrix, got {list(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(f"the Hessian {list(hessian.shape)} holds NaN or infinite values")
    if not torch.allclose(hessian, hessian.T, rtol=0, atol=1e-4 * float(hessian.abs().max())):
        raise CalibrationError(f"a Hessian is symmetric; this one {list(hessian.shape)} is not")
    return float(torch.linalg.eigh(hessian.to(torch.float64))[1].abs().max() * math.sqrt(len(hessian)))


def rescaling(weight: Tensor, hessian: Tensor) -> Tensor:
    """``D = (diag H / diag W^T W)^¼``, which makes the product ``‖W D‖² tr(D^-1 H D^-1)`` as small as it can be.

    Only ratios matter, so the geometric mean is set to 1; that keeps float16 in its range. An input that is dead in
    the weight or in the Hessian keeps scale 1, and no scale leaves [1/1024, 1024].

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``.

    Returns:
        float16 ``[in]``, positive: rounded to the dtype in which it is stored before anything is multiplied by it.

    >>> rescaling(torch.tensor([[1.0, 4.0]]), torch.diag(torch.tensor([16.0, 1.0])))
    tensor([2.0000, 0.5000], dtype=torch.float16)
    """
    power, size = hessian.diagonal().to(torch.float64), weight.to(torch.float64).square().sum(0)
    live = (power > 0) & (size > 0)
    logs = torch.where(live, (power.clamp(min=1e-300) / size.clamp(min=1e-300)).log() / 4, 0.0)
    mean = logs.sum() / live.sum().clamp(min=1)
    scale = torch.where(live, (logs - mean).exp(), 1.0)
    return scale.clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE).to(torch.float16)


@cache
def gaussian_range(bits: int) -> float:
    """The half-width, in standard deviations, of the evenly spaced grid with the least squared error on a Gaussian.

    Rotated weights are nearly Gaussian, so one number for each bit width serves every layer. The published grid takes
    2.4 at every width. Max, 1960, doi:10.1109/TIT.1960.1057548, table II.

    >>> [round(gaussian_range(bits), 2) for bits in (2, 3, 4)]
    [1.49, 2.05, 2.51]
    """
    half = torch.linspace(1, 5, 4001, dtype=torch.float64)[:, None]
    levels = half * torch.linspace(-1, 1, 2**bits, dtype=torch.float64)  # [4001, 2**bits]
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    outer = torch.full_like(half, 40.0)  # far enough to be infinity, and finite where it is multiplied by a density
    lo, hi = torch.cat([-outer, middle], 1), torch.cat([middle, outer], 1)

    def density(x: Tensor) -> Tensor:
        return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)

    # the integral of (x - level)² over the cell of each level
    mass = torch.special.ndtr(hi) - torch.special.ndtr(lo)
    error = (1 + levels.square()) * mass + lo * density(lo) - hi * density(hi)
    error += 2 * levels * (density(hi) - density(lo))
    return float(half[error.sum(1).argmin(), 0])


@dataclass(frozen=True, eq=False)
class Incoherence:
    """The transforms of one layer; a part that is ``None`` is the identity.

    Attributes:
        u: rotation of the outputs.
        v: rotation of the inputs.
        channel_scale: ``D``, float16 ``[in]``.
    """

    u: KroneckerRotation | None = None
    v: KroneckerRotation | None = None
    channel_scale: Tensor | None = None

    def weight(self, w: Tensor) -> Tensor:
        """``U W D V^T``, float32 (computed in float64, rounded once) or float64 for float64."""
        x = w.to(torch.float64)
        x = x if self.channel_scale is None else x * self.channel_scale.to(x.dtype)
        x = x if self.v is None else self.v.apply(x)
        x = x if self.u is None else self.u.apply(x.T).T
        return x.contiguous().to(_working(w))

    def undo(self, w: Tensor) -> Tensor:
        """``U^T W' V D^-1``, the inverse of :meth:`weight`, in the same dtypes."""
        x = w.to(torch.float64)
        x = x if self.u is None else self.u.undo(x.T).T
        x = x if self.v is None else self.v.undo(x)
        x = x if self.channel_scale is None else x / self.channel_scale.to(x.dtype)
        return x.contiguous().to(_working(w))

    def hessian(self, h: Tensor) -> Tensor:
        """``V D^-1 H D^-1 V^T``, the Hessian of the transformed inputs, exactly symmetric; dtypes as :meth:`weight`."""
        x = h.to(torch.float64)
        if self.channel_scale is not None:
            d = self.channel_scale.to(x.dtype)
            x = x / d / d[:, None]
        x = x if self.v is None else self.v.apply(self.v.apply(x).T)
        return ((x + x.T) / 2).to(_working(h))

    def input(self, x: Tensor) -> Tensor:
        """``V D^-1 x`` for inputs ``x [..., in]``, in their dtype: what runs before the product."""
        x = x if self.channel_scale is None else x / self.channel_scale.to(x.dtype)
        return x if self.v is None else self.v.apply(x)

    def output(self, y: Tensor) -> Tensor:
        """``U^T y`` for products ``y [..., out]``, in their dtype: what runs after the product."""
        return y if self.u is None else self.u.undo(y)


def incoherent(
    weight: Tensor, hessian: Tensor, *, seed: int = 0, rescale: bool = True, rotate: bool = True
) -> tuple[Incoherence, Tensor, Tensor]:
    """Draw the transforms of a layer and apply them.

    The rotations depend on the seed and on the layer's shape only, so layers of one shape share them and a run that is
    repeated finds the same ones. Inputs and outputs are drawn from different seeds.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``, on the same device.
        seed: of the rotations.
        rescale: balance the input channels with a diagonal first.
        rotate: rotate inputs and outputs.

    Returns:
        The transforms, and the weight and Hessian in the new basis.

    Raises:
        GridError: a weight that is not finite.
        CalibrationError: a Hessian of the wrong shape or not finite.
        UsageError: a seed that is not a whole number.
    """
    check_problem(weight, hessian, damping=0.0)
    check_count("seed", seed, most=LARGEST_SEED)
    weight = weight.detach()  # a layer's weight may be a parameter
    u = v = None
    if rotate:
        outputs, inputs = (torch.Generator().manual_seed(2 * seed + side) for side in (0, 1))
        u = KroneckerRotation.random(weight.shape[0], outputs).to(weight.device)
        v = KroneckerRotation.random(weight.shape[1], inputs).to(weight.device)
    transforms = Incoherence(u, v, rescaling(weight, hessian) if rescale else None)
    return transforms, transforms.weight(weight), transforms.hessian(hessian)


def _working(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
