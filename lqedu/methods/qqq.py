"""QQQ: 4-bit weights that an int8 product can read, 8-bit activations; ``13-qqq``.

Grid: INT4 weights per channel, or per group with a second rounding to INT8. Move: smooth outlier channels, or rotate.
Round: GPTQ. Run: W4A8. Zhang et al., 2024, arXiv:2406.09904 (reference: HandH1998/QQQ, commit 54c5c99). Where this file
differs, and why:

- thresholds of the smoothing lie at equal ratios, 50 of them, not at equal distances, 100 or more: the same range in
  fewer steps;
- a layer's smoothing is judged by the error of its own output, also for queries and keys (the reference goes on through
  the attention) and for gate and up (it goes on through their product);
- a block is smoothed and rounded behind blocks that are rounded already; the reference smooths the whole model first;
- per channel, error feedback may use the code -8, which the high nibble holds as -128;
- every group size that divides is allowed; the reference's kernel knows 128.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lqedu.calibration.capture import run_block
from lqedu.calibration.distributed import all_max, all_sum, tokens_of_all
from lqedu.errors import UsageError
from lqedu.formats import IntGrid, QTensor, ScaleConvention
from lqedu.formats.requantized import RequantizedGrid, RequantizedTensor, requantize
from lqedu.methods.base import Answers, QuantizedActivations
from lqedu.methods.quarot import offline_rotation, rotation_notes
from lqedu.models.anatomy import Stage
from lqedu.options import check_count, check_number
from lqedu.rounding import RoundingReport, gptq
from lqedu.rounding.gptq import check_schedule
from lqedu.rounding.report import proxy_loss
from lqedu.transforms.folding import fold_scale, tie_heads
from lqedu.transforms.moves import Move
from lqedu.transforms.threshold import ThresholdSearch, search_threshold


@dataclass(frozen=True, kw_only=True)
class QQQ(QuantizedActivations):
    """QQQ with the settings of its paper; ``move="rotate"`` is what its repository recommends since August 2024.

    Attributes:
        group_size: inputs that share a group scale, requantized to INT8 behind it, or ``None`` for one scale a row.
        move: "smooth" (a threshold for each group of linears, searched), "rotate" (residual stream and values, all of it
            offline) or "none".
        search: of the weights' ranges, "mse" or "none"; "auto" is the reference's choice, "mse" behind a rotation.
        damping, block_size, order: see :class:`lqedu.methods.GPTQ`.
        thresholds: tried for each smoothing.
        search_tokens: tokens, drawn from the calibration text, on which a threshold is judged; their ranges are those of
            all tokens.
        seed: of the drawn tokens and of the rotation's signs.
    """

    name: ClassVar[str] = "qqq"
    title: ClassVar[str] = "QQQ"
    chapter: ClassVar[str] = "13-qqq"
    citation: ClassVar[str] = "zhang2024qqq"
    answers: ClassVar[Answers] = Answers(
        grid="INT4 weights per channel, or per group requantized to INT8; INT8 activations per token",
        move="smooth the channels above a searched threshold, or rotate",
        round="GPTQ",
        run="W4A8: INT4 to INT8 in registers, INT8 GEMM",
        calibration="largest magnitude of each channel, outputs of a few tokens, a Hessian of each linear's inputs",
        online=("unpack weights to 8 bits", "quantize inputs"),
    )
    quantizes: ClassVar[tuple[str, ...]] = ("weights", "activations")
    needs_calibration: ClassVar[bool] = True
    needs_hessian: ClassVar[bool] = True

    group_size: int | None = 128
    move: str = "smooth"
    search: str = "auto"
    damping: float = 0.01
    block_size: int = 128
    order: str = "activation"
    thresholds: int = 50
    search_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.move not in ("smooth", "rotate", "none"):
            raise UsageError(f"move is 'smooth', 'rotate' or 'none', got {self.move!r}")
        if self.search not in ("auto", "mse", "none"):
            raise UsageError(f"search is 'auto', 'mse' or 'none', got {self.search!r}")
        check_schedule(self.grid(), self.block_size, self.order)
        check_number("damping", self.damping, above=0)
        check_count("thresholds", self.thresholds, least=2)
        check_count("search_tokens", self.search_tokens, least=1)
        check_count("seed", self.seed, most=2**63 - 1)

    def grid(self) -> IntGrid:
        """The 4-bit grid, the first level where there are two."""
        search = self.search if self.search != "auto" else {"rotate": "mse"}.get(self.move, "none")
        if self.group_size is not None:
            return RequantizedGrid(self.group_size).groups(search)
        # float32 scales, because the kernel reads a 16th of them
        return IntGrid(4, True, convention=ScaleConvention.MAX_CODE, scale_dtype=torch.float32, search=search)

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Refuse a weight whose inputs the group size does not divide (GridError)."""
        self.grid().scale_shape(shape)

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        """Rotations that fall back to blocks."""
        return rotation_notes(model) if self.move == "rotate" else ()

    def model_move(self, model: nn.Module, learned: Mapping[str, Tensor]) -> Move:
        """Rotate the residual stream and the values offline, where ``move`` says so."""
        return offline_rotation(model, self.seed) if self.move == "rotate" else Move()

    def prepare_block(
        self, block: nn.Module, stages: tuple[Stage, ...], hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Search the thresholds of all stages on the untouched block, then fold their scales, where ``move`` says so."""
        if self.move != "smooth":
            return {}
        changed: dict[str, Tensor] = {}
        for stage, found in self.search_block(block, stages, hidden, kwargs).items():
            changed |= fold_scale(block, stage, found.scale.to(hidden.dtype))
        return changed

    def search_block(
        self, block: nn.Module, stages: tuple[Stage, ...], hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[Stage, ThresholdSearch]:
        """The searched threshold of every stage that something before it can absorb; the block is not changed."""
        found: dict[Stage, ThresholdSearch] = {}

        def visitor(stage: Stage):
            def visit(x: Tensor) -> None:
                found[stage] = self._search(block, stage, x.reshape(*hidden.shape[:2], x.shape[-1]))

            return visit

        run_block(block, hidden, kwargs, visit={s.linears[0]: visitor(s) for s in stages if s.source is not None})
        return found

    def quantize_linear(
        self, weight: Tensor, hessian: Tensor | None
    ) -> tuple[QTensor | RequantizedTensor, RoundingReport]:
        """Round one weight ``[out, in]`` with the Hessian ``[in, in]`` of its inputs; both levels count in the report."""
        quantized, report = gptq(
            weight, hessian, self.grid(), damping=self.damping, block_size=self.block_size, order=self.order
        )
        if self.group_size is None:
            return quantized, report
        stored = requantize(quantized)
        error = weight.detach().to(torch.float32) - stored.dequantize()
        return stored, replace(report, proxy_loss=proxy_loss(error, hessian))

    def _search(self, block: nn.Module, stage: Stage, x: Tensor) -> ThresholdSearch:
        largest = all_max(x.abs().amax((0, 1)))
        tokens = int(all_sum(torch.tensor(x.shape[0] * x.shape[1])))
        if stage.source.endswith("v_proj"):
            largest = tie_heads(block, largest, torch.amax)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(tokens, generator=generator)[: self.search_tokens].to(x.device)
        few = tokens_of_all(x, drawn)
        weight = torch.cat([block.get_submodule(name).weight.detach() for name in stage.linears])
        return search_threshold(weight, few, largest, self.grid(), self.activation_grid(), count=self.thresholds)
