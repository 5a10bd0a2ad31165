"""QoQ, "quattuor-octo-quattuor": 4-bit weights, 8-bit activations, 4-bit keys and values, made for a kernel; ``14-qoq``.

Grid: INT4 in INT8 weights with a protective range, or INT4 per channel; INT8 activations; 4-bit keys and values. Move:
rotate block inputs, reorder, smooth block outputs and keys, clip. Round: GPTQ. Run: W4A8KV4.
Lin et al., 2024, arXiv:2405.04532 (reference: mit-han-lab/lmquant, later deepcompressor, commits bf52c1e and 69f3473).
Everything is done offline, in the reference's order. Where this file differs, and why:

- the Hadamard matrices get random signs (the reference's have none), so that no channel of the stream is its mean;
- layers are rounded behind rounded ones, as everywhere in this package; the reference calibrates each on dense inputs;
- with groups, the reference's settings search no weight ranges; the paper does, and so does ``clip``;
- a range is one of 20 factors down to 0.525 of the largest weight, the reference's one of 80 down to 0.2.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lqedu.calibration.capture import first_windows, run_block
from lqedu.errors import UsageError
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.progressive import ProgressiveGrid, ProgressiveTensor
from lqedu.methods.base import Answers, QuantizedActivations
from lqedu.methods.quarot import offline_rotation, rotation_notes
from lqedu.models.anatomy import Stage
from lqedu.options import check_count, check_number
from lqedu.rounding import RoundingReport, gptq, nearest
from lqedu.rounding.gptq import check_schedule
from lqedu.rounding.progressive import affine_grid, progressive_gptq, progressive_nearest
from lqedu.transforms.clipping import fit_clipped
from lqedu.transforms.folding import fold_scale, tie_heads
from lqedu.transforms.moves import Move
from lqedu.transforms.reorder import find_orders, reorder_move
from lqedu.transforms.smooth_attention import (
    attention_heads,
    attention_scales,
    fold_attention,
    has_head_norms,
    search_attention,
)
from lqedu.transforms.smoothing import channel_max, smoothing_scales

_CLIP_POINTS, _CLIP_MOST = 40, 0.5


@dataclass(frozen=True, kw_only=True)
class QoQ(QuantizedActivations):
    """QoQ with the settings of its reference, each part of which can be switched off.

    Attributes:
        group_size: inputs that share an integer group scale on a progressive grid, or ``None`` for INT4 per channel.
        rotate: the residual stream, and each value head, by randomized Hadamard matrices.
        reorder: which input channels are sorted by their largest ``|x|``: "blocks" those of ``o_proj`` (within heads) and
            ``down_proj``, as the reference does, "all" the residual stream too, or "none". Nothing without groups.
        smooth: block outputs, "down" (the input of ``down_proj``, as the reference does since it rotates values), "outputs"
            (of ``o_proj`` too, as the paper does) or "none".
        smooth_alpha: migration strength; ``None`` is the reference's, 0.3 with groups and 0.1 without.
        smooth_attention: the strength for keys: "fixed", "search", or "none"; "auto" is the reference's choice, "fixed" with
            groups and "search" without. Nothing where keys are not rounded.
        attention_alpha: the fixed strength for keys.
        clip: search the range of each group, or row, of a weight for the least output error.
        rounding: of the weights, "gptq" or "nearest".
        damping, block_size, order: see :class:`lqedu.methods.GPTQ`.
        search_tokens: calibration tokens, in whole windows, that find orders, smoothing scales and the strength for keys.
            Weight ranges and GPTQ see all.
        seed: of the random signs.
    """

    name: ClassVar[str] = "qoq"
    title: ClassVar[str] = "QoQ"
    chapter: ClassVar[str] = "14-qoq"
    citation: ClassVar[str] = "lin2024qserve"
    answers: ClassVar[Answers] = Answers(
        grid="INT4 in INT8 per group (or INT4 per channel), INT8 activations per token, KV4 per head",
        move="rotate block inputs, reorder, smooth block outputs and keys, clip",
        round="GPTQ, or nearest",
        run="W4A8KV4: INT4 to INT8 in registers, INT8 GEMM, KV4 attention",
        calibration="largest magnitude of each channel and of keys, a Hessian of each linear's inputs",
        online=("unpack weights to 8 bits", "quantize inputs", "quantize keys and values"),
    )
    quantizes: ClassVar[tuple[str, ...]] = ("weights", "activations", "KV cache")
    needs_calibration: ClassVar[bool] = True

    group_size: int | None = 128
    kv_bits: int | None = 4
    rotate: bool = True
    reorder: str = "blocks"
    smooth: str = "down"
    smooth_alpha: float | None = None
    smooth_attention: str = "auto"
    attention_alpha: float = 0.5
    clip: bool = True
    rounding: str = "gptq"
    damping: float = 0.01
    block_size: int = 128
    order: str = "activation"
    search_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "reorder": ("blocks", "all", "none"),
            "smooth": ("down", "outputs", "none"),
            "smooth_attention": ("auto", "fixed", "search", "none"),
            "rounding": ("gptq", "nearest"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        grid = self.grid()
        check_schedule(grid if isinstance(grid, IntGrid) else affine_grid(grid), self.block_size, self.order)
        if self.smooth_alpha is not None:
            check_number("smooth_alpha", self.smooth_alpha, least=0, most=1)
        check_number("attention_alpha", self.attention_alpha, least=0, most=1)
        check_number("damping", self.damping, above=0)
        check_count("search_tokens", self.search_tokens, least=1)
        check_count("seed", self.seed, most=2**63 - 1)

    @property
    def needs_hessian(self) -> bool:
        """GPTQ looks at it, and so does the search for ranges."""
        return self.rounding == "gptq" or self.clip

    @property
    def uses_calibration(self) -> bool:
        """Without a part that reads text, rounding to nearest on dynamic scales needs none."""
        moves = self.smooth != "none" or self.key_strategy() != "none" or self.reorders()
        return moves or self.needs_hessian or self.activation == "static"

    def grid(self) -> IntGrid | ProgressiveGrid:
        """The weights' grid: INT4 asymmetric per channel, or progressive."""
        return IntGrid(4) if self.group_size is None else ProgressiveGrid(self.group_size)

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Refuse a weight whose inputs the group size does not divide (GridError)."""
        self.grid().scale_shape(shape)

    def key_strategy(self) -> str:
        """How the strength for keys is found: "fixed", "search" or "none"."""
        if self.kv_bits is None or self.smooth_attention == "none":
            return "none"
        if self.smooth_attention == "auto":
            return "search" if self.group_size is None else "fixed"
        return self.smooth_attention

    def reorders(self) -> bool:
        """Whether channels are sorted: a row without groups knows no order."""
        return self.reorder != "none" and self.group_size is not None

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        """Rotations that fall back to blocks."""
        return rotation_notes(model) if self.rotate else ()

    def learn(
        self,
        model: nn.Module,
        calibration: Tensor | None,
        *,
        progress: bool = False,
        blocks: Iterable[nn.Module] | None = None,
    ) -> dict[str, Tensor]:
        """Find the orders of channels in the rotated model."""
        if not self.reorders():
            return {}
        rotate = self._rotation(model)
        model, blocks = (rotate(model), None) if blocks is None else rotate.begun(model, blocks)
        count = min(len(calibration), -(-self.search_tokens // calibration.shape[1]))
        return find_orders(model, calibration[:count], residual=self.reorder == "all", blocks=blocks)

    def model_move(self, model: nn.Module, learned: Mapping[str, Tensor]) -> Move:
        """Rotate, then reorder."""
        rotate = self._rotation(model)
        return rotate.then(reorder_move(model, learned)) if learned else rotate

    def prepare_block(
        self, block: nn.Module, stages: tuple[Stage, ...], hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Smooth block outputs and keys, by what the search tokens show of the untouched block."""
        few, kwargs = first_windows(hidden, kwargs, self.search_tokens)
        stages = tuple(stage for stage in stages if self._smooths(stage))
        key_scale = self._key_scale(block, few, kwargs)
        scales = self._output_scales(block, stages, few, kwargs)
        changed = {} if key_scale is None else fold_attention(block, key_scale)
        for stage, scale in scales.items():
            changed |= fold_scale(block, stage, scale)
        return changed

    def quantize_linear(
        self, weight: Tensor, hessian: Tensor | None
    ) -> tuple[QTensor | ProgressiveTensor, RoundingReport]:
        """Round one weight ``[out, in]``; ``hessian`` is that of its inputs, ``None`` where no part reads it."""
        grid, fitted = self.grid(), None
        progressive = isinstance(grid, ProgressiveGrid)
        if self.clip:
            fitted = fit_clipped(weight.detach(), hessian, grid, points=_CLIP_POINTS, most=_CLIP_MOST)
        if self.rounding == "nearest":
            return (progressive_nearest if progressive else nearest)(weight, grid, hessian=hessian, fitted=fitted)
        schedule = {"damping": self.damping, "block_size": self.block_size, "order": self.order}
        return (progressive_gptq if progressive else gptq)(weight, hessian, grid, fitted=fitted, **schedule)

    def _rotation(self, model: nn.Module) -> Move:
        return offline_rotation(model, self.seed) if self.rotate else Move()

    def _smooths(self, stage: Stage) -> bool:
        """Stages that write the residual stream and whose input something in the block can absorb."""
        if stage.source is None or stage.behind_norm or self.smooth == "none":
            return False
        return self.smooth == "outputs" or not stage.source.endswith("v_proj")

    def _key_scale(self, block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        strategy = self.key_strategy()
        if strategy == "none":
            return None
        heads, shared = attention_heads(block, hidden, kwargs), has_head_norms(block)
        if strategy == "fixed":
            return attention_scales(heads.key_max(), self.attention_alpha, shared=shared)
        grid, mask = self.attention_path().key, kwargs.get("attention_mask")
        return search_attention(heads, grid, shared=shared, mask=mask).scale

    def _output_scales(
        self, block: nn.Module, stages: tuple[Stage, ...], hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[Stage, Tensor]:
        if not stages:
            return {}
        alpha = self.smooth_alpha if self.smooth_alpha is not None else (0.1 if self.group_size is None else 0.3)
        scales: dict[Stage, Tensor] = {}

        def visitor(stage: Stage):
            def visit(x: Tensor) -> None:
                activation = x.reshape(-1, x.shape[-1]).abs().amax(0)
                weight = channel_max([block.get_submodule(name).weight.detach() for name in stage.linears])
                if stage.source.endswith("v_proj"):
                    activation, weight = (tie_heads(block, t, torch.amax) for t in (activation, weight))
                scales[stage] = smoothing_scales(activation, weight, alpha)

            return visit

        run_block(block, hidden, kwargs, visit={stage.linears[0]: visitor(stage) for stage in stages})
        return scales
