"""Scales of tensors that change at every step: from the tensor at hand, or from the steps before it.

    x ≈ s · q,    q on an 8-bit float grid,    s = amax · 2^margin / FP8_MAX

Transformer Engine and torchao store 1 / s and call that the scale. Derived in chapter ``17-fp8-training``; formats and
recipe: Micikevicius et al., 2022, arXiv:2209.05433.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lqedu.errors import UsageError
from lqedu.formats.fp8 import decode, encode
from lqedu.formats.smallfloat import E4M3, E5M2, FloatFormat, check_floating
from lqedu.options import check_count

_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_LARGEST_MARGIN = 16


@dataclass(frozen=True)
class Recipe:
    """Which formats a linear layer multiplies while it is trained, and where their scales come from.

    >>> Recipe().gradient.name, Recipe(gradient=E4M3, scaling="current").gradient.name
    ('E5M2', 'E4M3')

    Attributes:
        forward: format of inputs and weights, in all three products.
        gradient: format of the output's gradient. E4M3 forward and E5M2 here is what Transformer Engine calls hybrid.
        scaling: "current" takes the largest magnitude of the tensor itself, "delayed" that of the ``history`` steps
            before it, "none" multiplies by nothing.
        history: steps that delayed scaling remembers.
        margin: powers of two that delayed and current scaling leave free above the largest magnitude.
        interval: steps between two updates of a delayed scale; more than one keeps an old scale on purpose.
    """

    forward: FloatFormat = E4M3
    gradient: FloatFormat = E5M2
    scaling: Literal["current", "delayed", "none"] = "delayed"
    history: int = 1024
    margin: int = 0
    interval: int = 1

    def __post_init__(self) -> None:
        for name in ("forward", "gradient"):
            fmt = getattr(self, name)
            if not isinstance(fmt, FloatFormat) or fmt.specials == "none":
                raise UsageError(f"{name} must be a float format that has a NaN, such as E4M3 or E5M2, got {fmt!r}")
        if not isinstance(self.scaling, str) or self.scaling not in SCALINGS:
            raise UsageError(f"scaling must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")
        check_count("history", self.history, least=1)
        check_count("interval", self.interval, least=1)
        check_count("margin", self.margin, most=_LARGEST_MARGIN)  # beyond it most of the format is empty


# --- one tensor -------------------------------------------------------------------------------------------------------


def largest(x: Tensor) -> Tensor:
    """Largest magnitude of ``x`` (its *amax*), a float32 scalar tensor; 0 of no values, NaN or infinite where ``x`` is.

    Raises:
        UsageError: not a floating tensor.
    """
    check_floating(x, "what is scaled")
    return x.detach().abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


def scale_of(amax: Tensor, fmt: FloatFormat, margin: int = 0) -> Tensor:
    """The scale that puts ``amax`` at ``FP8_MAX / 2^margin``; 1 where ``amax`` is zero.

    Args:
        amax: largest magnitudes, any shape, finite and not negative.
        fmt: the format; its largest value is ``FP8_MAX``.
        margin: powers of two to leave free.

    Returns:
        float32 of the same shape, never zero or infinite.

    Raises:
        UsageError: an ``amax`` that is no floating tensor, NaN, infinite or negative; a margin that is not from 0 to 16.
    """
    check_floating(amax, "what is scaled")
    check_count("margin", margin, most=_LARGEST_MARGIN)
    if not bool((torch.isfinite(amax) & (amax >= 0)).all()):
        raise UsageError(
            "a scale needs a finite amax; the tensor holds NaN or infinities, look for the first such step"
        )
    return _scale(amax, fmt, margin)


def _scale(amax: Tensor, fmt: FloatFormat, margin: int) -> Tensor:
    s = (amax.float() * (2.0**margin / fmt.max)).clamp(_TINY, _HUGE)
    return torch.where(amax == 0, 1.0, s)


def fp8_round(x: Tensor, scale: Tensor, fmt: FloatFormat) -> Tensor:
    """``x / scale`` rounded to the nearest value of a format, ties to even; multiply by ``scale`` to get ``x`` back.

    Finite values beyond the format's largest become the largest, also where ``x / scale`` overflows. NaN stays NaN and an
    infinity becomes NaN: neither may turn into a number that looks like any other.

    Args:
        x: any floating dtype and shape.
        scale: positive, finite, float32, a scalar or broadcastable.
        fmt: the format.

    Returns:
        float32 of the shape of ``x``: values that the format has.

    Raises:
        UsageError: ``x`` or ``scale`` is not a floating tensor, or a scale is not positive and finite.
    """
    check_floating(x, "what is scaled")
    check_floating(scale, "what is scaled")
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise UsageError(
            "a scale is positive and finite; make it with scale_of, or look at the checkpoint it came from"
        )
    inside = (x.float() / scale).clamp(-fmt.max, fmt.max)
    inside = torch.where(torch.isfinite(x), inside, math.nan)  # asked of x: a finite quotient may overflow
    return decode(encode(inside, fmt), fmt)


def out_of_range(x: Tensor, scale: Tensor | float, fmt: FloatFormat) -> tuple[float, float]:
    """Which shares of a tensor a format cannot hold: of the values that are not zero, those that round to zero; of all,
    those beyond the largest value.

    Raises:
        UsageError: ``x`` is not a floating tensor, has no values, or holds NaN or infinities.
    """
    check_floating(x, "what is scaled")
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if not x.numel() or not bool(torch.isfinite(largest(x))):
        raise UsageError("shares out of range need a tensor of finite values")
    present = x != 0
    lost = present & (fp8_round(x, scale, fmt) == 0)
    return float(lost.sum() / present.sum().clamp(min=1)), float((x.abs() > fmt.max * scale).float().mean())


# --- where a scale comes from -----------------------------------------------------------------------------------------


class NoScaling(nn.Module):
    """Every scale is 1: the format's own range, and what loss scaling has to work with."""

    def __init__(self, fmt: FloatFormat, recipe: Recipe) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """The scale for ``x``, a scalar tensor."""
        return torch.ones((), device=x.device)


class CurrentScaling(nn.Module):
    """The scale follows from the tensor that it is for, which is therefore read twice: for its amax, and to be cast."""

    def __init__(self, fmt: FloatFormat, recipe: Recipe) -> None:
        super().__init__()
        self.fmt, self.margin = fmt, recipe.margin

    def forward(self, x: Tensor) -> Tensor:
        """The scale for ``x``, a scalar tensor.

        Raises:
            UsageError: ``x`` holds NaN or infinities.
        """
        return scale_of(largest(x), self.fmt, self.margin)


class DelayedScaling(nn.Module):
    """The scale follows from the amax of the steps before; that of ``x`` is recorded for the steps to come.

    After each recorded step the scale is that of the largest amax among the last ``history`` ones, as in Transformer
    Engine with its algorithm "max". An amax of zero for all of them leaves the scale as it was. An amax that is not
    finite leaves the scale and the history as they were and is counted in ``skipped``; the values themselves reach the
    product as NaN (:func:`fp8_round`).

    A step is one forward call in training mode: each micro-batch counts, and so does a call under ``torch.no_grad``.
    Before the first one the scale is 1, so the first step is rounded unscaled, and a freshly converted model that is
    evaluated before it has trained is evaluated with the scale 1.

    Buffers: ``amax`` float32 ``[history]``, newest first; ``scale`` float32 ``[]``, 1 at first; ``steps`` and
    ``skipped`` int64 ``[]``.
    """

    def __init__(self, fmt: FloatFormat, recipe: Recipe) -> None:
        super().__init__()
        self.fmt, self.margin, self.interval = fmt, recipe.margin, recipe.interval
        self.register_buffer("amax", torch.zeros(recipe.history))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """The scale for ``x``, a scalar tensor; in training mode, ``x`` counts from the next step on."""
        scale = self.scale
        if self.training:
            self.record(largest(x))
        return scale

    def record(self, amax: Tensor) -> None:
        """Take the amax of one more step into the history, and compute the scale of the next one."""
        finite = torch.isfinite(amax)
        rolled = torch.cat([amax[None].to(self.amax), self.amax[:-1]])
        self.amax = torch.where(finite, rolled, self.amax)
        top = self.amax.max()
        due = finite & (top > 0) & (self.steps % self.interval == 0)
        self.scale = torch.where(due, _scale(top, self.fmt, self.margin), self.scale)
        self.steps, self.skipped = self.steps + 1, self.skipped + ~finite


SCALINGS: dict[str, type[nn.Module]] = {"current": CurrentScaling, "delayed": DelayedScaling, "none": NoScaling}
