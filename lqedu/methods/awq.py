"""AWQ: scale up the channels that activations make important, so that rounding hurts them less; chapter ``05-awq``.

Grid: INT4 or INT3 per group. Move: a per-channel scale, then clipping. Round: nearest. Run: W4A16.
Lin et al., 2023, arXiv:2306.00978 (reference: mit-han-lab/llm-awq, commit d6e797a). Where this file differs, and why:

- a stage with one linear is judged through its Hessian, which is the same mean squared error on all search tokens at the
  price of one small product; q, k, v and gate, up are judged by the output of ``self_attn`` and ``mlp``, as there;
- under grouped-query attention the reference leaves ``o_proj`` unscaled; here its scale is tied within the heads that
  share a value head, so that ``v_proj`` can absorb it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lqedu.calibration.capture import first_windows, run_block
from lqedu.calibration.distributed import all_sum
from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.formats import IntGrid, QTensor, ScaleConvention
from lqedu.linalg import HessianAccumulator
from lqedu.methods.base import Answers, WeightOnly
from lqedu.models.anatomy import Stage
from lqedu.models.modes import inference
from lqedu.options import check_count, check_number
from lqedu.rounding import RoundingReport, nearest
from lqedu.transforms.clipping import clip_weight
from lqedu.transforms.folding import fold_scale, tie_heads

_SMALLEST = 1e-4  # of a scale before it is normalised, as in the reference
_NEVER_CLIPPED = ("q_proj", "k_proj")  # the reference leaves them: their products go through a softmax


@dataclass(frozen=True)
class ScaleSearch:
    """What a search over α found.

    Attributes:
        scale: the best scale, ``[in]``, float32.
        alpha: its exponent.
        losses: the loss of each exponent tried, in order.
    """

    scale: Tensor
    alpha: float
    losses: tuple[float, ...]


def channel_scale(activation: Tensor, alpha: float, weight: Tensor | None = None) -> Tensor:
    """``s = a^α``, normalised so that its largest and smallest entry have the product 1.

    Args:
        activation: mean ``|x|`` of each channel, ``[in]``.
        alpha: from 0 (no scaling) to 1.
        weight: mean normalised ``|w|`` of each channel (:func:`weight_magnitude`), for the variant
            ``s = a^α / w^(1 - α)`` of AutoAWQ and llm-compressor, "duo scaling".

    Returns:
        float32 ``[in]``, positive. A channel that never was active keeps the scale 1: calibration says nothing of it.
        (The reference gives it the smallest scale allowed, which rounds its weights to zero, asleep or not.)

    Raises:
        CalibrationError: magnitudes that are negative or not finite.
        UsageError: an exponent outside [0, 1], or a weight's magnitude of another shape.

    >>> channel_scale(torch.tensor([4.0, 1.0, 0.25]), alpha=0.5)
    tensor([2.0000, 1.0000, 0.5000])
    """
    if not bool((torch.isfinite(activation) & (activation >= 0)).all()):
        raise CalibrationError("mean magnitudes of activations are finite and at least 0")
    check_number("alpha", alpha, least=0, most=1)
    if weight is not None and weight.shape != activation.shape:
        raise UsageError(f"{len(activation)} channels need as many weight magnitudes, got {list(weight.shape)}")
    alive = activation > 0
    scale = activation.float().pow(alpha)
    if weight is not None:
        scale = scale / (weight.float().pow(1 - alpha) + _SMALLEST)
    scale = torch.where(alive, scale.clamp(min=_SMALLEST), torch.ones_like(scale))
    largest, smallest = scale.where(alive, -torch.inf).max(), scale.where(alive, torch.inf).min()
    return torch.where(alive, scale / (largest * smallest).sqrt(), scale)


def weight_magnitude(weights: Sequence[Tensor], group_size: int | None) -> Tensor:
    """Mean over rows of ``|w|`` relative to the largest of its group, ``[in]``: how full each channel's groups are.

    Raises:
        UsageError: no weight, or a group size that does not divide the inputs.
    """
    if not weights or weights[0].shape[1] % (group_size or 1):
        raise UsageError(f"weights whose inputs the group size {group_size} divides are needed")
    w = torch.cat([weight.float().abs() for weight in weights])
    grouped = w.view(len(w), -1, group_size or w.shape[1])
    return (grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-6)).view(w.shape).mean(0)


def search_scales(
    activation: Tensor, loss: Callable[[Tensor], float], *, alphas: int = 20, weight: Tensor | None = None
) -> ScaleSearch:
    """Try ``α = 0, 1/alphas, …, (alphas - 1)/alphas`` and keep the scale with the least loss.

    Args:
        activation, weight: as :func:`channel_scale`.
        loss: of a scale ``[in]``; it quantizes with the scale and measures the output error. A scale that carries the
            weights out of their dtype (GridError), as can happen in float16, counts as infinitely bad.
        alphas: number of exponents. 1.0 is never tried, as in the reference.

    Raises:
        CalibrationError: activations that are not finite, or a loss that is not finite for any exponent.
        UsageError: no exponents.
    """
    check_count("alphas", alphas, least=1)
    if not bool(torch.isfinite(activation).all()):
        raise CalibrationError("the calibration activations hold NaN or infinite values")
    grid = [i / alphas for i in range(alphas)]
    losses = [_loss_or_infinity(loss, channel_scale(activation, alpha, weight)) for alpha in grid]
    best = min(range(alphas), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    if not math.isfinite(losses[best]):
        raise CalibrationError("no scale gives a finite loss; check the calibration activations")
    return ScaleSearch(channel_scale(activation, grid[best], weight), grid[best], tuple(losses))


def _loss_or_infinity(loss: Callable[[Tensor], float], scale: Tensor) -> float:
    try:
        return loss(scale)
    except GridError:
        return math.inf


def _output_error(error: Tensor, hessian: Tensor) -> float:
    """``tr(ΔW H ΔW^T)`` in the Hessian's float32: enough to rank twenty candidates, at half the price of float64."""
    error = error.to(hessian.dtype)
    return float(((error @ hessian) * error).sum())


def scaled_rounding(weight: Tensor, scale: Tensor, grid: IntGrid) -> Tensor:
    """``Q(w · s) / s``: what a weight ``[out, in]`` becomes if it is rounded while scaled, seen by unscaled inputs.

    Raises:
        GridError: a scale ``[in]`` that is not finite and positive in the weight's dtype, or carries the weight out of it.
        UsageError: a scale of another shape.
    """
    if scale.shape != weight.shape[1:]:
        raise UsageError(f"a weight {list(weight.shape)} takes a scale [{weight.shape[-1]}], got {list(scale.shape)}")
    scale = scale.to(weight.dtype)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise GridError(f"a scale is not finite and positive in {weight.dtype}")
    return nearest(weight * scale, grid)[0].dequantize(weight.dtype) / scale


@dataclass(frozen=True, kw_only=True)
class AWQ(WeightOnly):
    """AWQ with the defaults of its reference.

    Attributes:
        alphas: exponents tried.
        duo_scaling: divide by the weights' magnitude too, see :func:`channel_scale`; llm-compressor's default.
        clip: search a clipping range for every group afterwards, q and k excepted.
        search_tokens: calibration tokens, in whole windows, on which scales and ranges are judged. The mean activation
            is that of all tokens.
    """

    name: ClassVar[str] = "awq"
    title: ClassVar[str] = "AWQ"
    chapter: ClassVar[str] = "05-awq"
    citation: ClassVar[str] = "lin2024awq"
    answers: ClassVar[Answers] = Answers(
        grid="INT2-8 per group",
        move="scale channels by their activation, clip",
        round="nearest",
        run="W4A16: dequantize, then FP16 GEMM",
        calibration="mean magnitude of each channel; block outputs and Hessians of a few windows",
        online=("dequantize weights",),
    )
    needs_calibration: ClassVar[bool] = True
    calibrates_on: ClassVar[str] = "dense"

    alphas: int = 20
    duo_scaling: bool = False
    clip: bool = True
    search_tokens: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("alphas", self.alphas, least=1)
        check_count("search_tokens", self.search_tokens, least=1)

    def grid(self) -> IntGrid:
        """The grid these hyper-parameters describe: zero is not forced into a group's range."""
        return IntGrid(
            self.bits,
            granularity=self.granularity,
            group_size=self.group_size,
            convention=ScaleConvention.MINMAX,
        )

    def prepare_block(
        self, block: nn.Module, stages: tuple[Stage, ...], hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Search the scales of all stages on the untouched block, fold them, then clip."""
        seen = {stage: _Inputs() for stage in stages}
        run_block(block, hidden, kwargs, visit={stage.linears[0]: seen[stage].add_magnitude for stage in stages})
        few, few_kwargs = first_windows(hidden, kwargs, self.search_tokens)
        calls = _record_calls(block, few, few_kwargs, seen)
        found = {stage: self._search(block, stage, seen[stage], calls) for stage in stages if stage.source is not None}
        changed: dict[str, Tensor] = {}
        for stage, search in found.items():
            changed |= fold_scale(block, stage, search.scale)
        if self.clip:
            for stage in stages:
                scale = found[stage].scale if stage in found else None
                self._clip(block, stage, seen[stage].hessian.result(), scale)
        return changed

    def quantize_linear(self, weight: Tensor, hessian: Tensor | None = None) -> tuple[QTensor, RoundingReport]:
        """Round one scaled and clipped weight ``[out, in]`` to nearest."""
        return nearest(weight, self.grid())

    def _search(self, block: nn.Module, stage: Stage, seen: "_Inputs", calls: "dict[str, _Call]") -> ScaleSearch:
        weights = [block.get_submodule(name).weight.detach() for name in stage.linears]
        activation = seen.magnitude()
        if stage.source.endswith("v_proj"):
            activation = tie_heads(block, activation)
        magnitude = weight_magnitude(weights, self.group_size) if self.duo_scaling else None
        if magnitude is not None and stage.source.endswith("v_proj"):
            magnitude = tie_heads(block, magnitude)
        if len(weights) == 1:
            hessian, grid = seen.hessian.result(), self.grid()
            return search_scales(
                activation,
                lambda scale: _output_error(weights[0] - scaled_rounding(weights[0], scale, grid), hessian),
                alphas=self.alphas,
                weight=magnitude,
            )
        call = calls[stage.linears[0].rpartition(".")[0]]
        linears = [block.get_submodule(name) for name in stage.linears]
        return search_scales(
            activation, lambda scale: call.loss(linears, scale, self.grid()), alphas=self.alphas, weight=magnitude
        )

    def _clip(self, block: nn.Module, stage: Stage, hessian: Tensor, scale: Tensor | None) -> None:
        """Clamp the weights of a stage whose input has been divided by ``scale``."""
        if scale is not None:
            hessian = hessian / torch.outer(scale, scale)
        for name in stage.linears:
            if not name.endswith(_NEVER_CLIPPED):
                linear = block.get_submodule(name)
                clipped, _ = clip_weight(linear.weight.detach(), hessian, self.grid())
                linear.weight = nn.Parameter(clipped, requires_grad=False)


class _Inputs:
    """What a stage's input looks like: mean magnitude of each channel over all tokens, Hessian over the search tokens."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0
        self.hessian: HessianAccumulator | None = None

    def add_magnitude(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        total = x.abs().sum(0, dtype=torch.float32)
        self._sum = total if self._sum is None else self._sum + total
        self._tokens += len(x)

    def add_hessian(self, x: Tensor) -> None:
        self.hessian = self.hessian or HessianAccumulator(x.shape[-1])
        self.hessian.add(x)

    def magnitude(self) -> Tensor:
        return all_sum(self._sum) / int(all_sum(torch.tensor(self._tokens)))


@dataclass(frozen=True)
class _Call:
    """A call of a module of the block, to be repeated with other weights."""

    module: nn.Module
    arguments: tuple
    kwargs: dict[str, Any]
    output: Tensor

    def loss(self, linears: Sequence[nn.Linear], scale: Tensor, grid: IntGrid) -> float:
        """Mean squared error of the output if these linears of the module were rounded while scaled."""
        dense = [linear.weight for linear in linears]
        try:
            for linear, weight in zip(linears, dense, strict=True):
                rounded = scaled_rounding(weight.detach(), scale, grid)
                linear.weight = nn.Parameter(rounded, requires_grad=False)
            with inference(self.module):
                output = _tensor(self.module(*self.arguments, **self.kwargs))
        finally:
            for linear, weight in zip(linears, dense, strict=True):
                linear.weight = weight
        return float((output - self.output).float().square().mean())


def _record_calls(
    block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], seen: "dict[Stage, _Inputs]"
) -> dict[str, _Call]:
    """One pass over the search windows: Hessians of all stages, and the calls of modules that hold several linears."""
    calls: dict[str, _Call] = {}
    parents = {stage.linears[0].rpartition(".")[0] for stage in seen if len(stage.linears) > 1}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: tuple, kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = _Call(module, arguments, kwargs, _tensor(output))

        return record

    hooks = [
        block.get_submodule(name).register_forward_hook(recorder(name), with_kwargs=True) for name in sorted(parents)
    ]
    try:
        run_block(block, hidden, kwargs, visit={stage.linears[0]: seen[stage].add_hessian for stage in seen})
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
