"""SmoothQuant: move the outliers of activations into the weights, then quantize both to 8 bits; ``08-smoothquant``.

Grid: INT8 weights and activations. Move: a per-channel scale. Round: nearest. Run: W8A8, int32 accumulation.
Xiao et al., 2023, arXiv:2211.10438 (reference: mit-han-lab/smoothquant, commit c61476d).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lqedu.calibration.capture import run_block
from lqedu.calibration.distributed import all_max
from lqedu.errors import UsageError
from lqedu.formats import IntGrid, QTensor, ScaleConvention
from lqedu.methods.base import Answers, QuantizedActivations
from lqedu.models.anatomy import Stage
from lqedu.options import check_number
from lqedu.rounding import RoundingReport, nearest
from lqedu.transforms.folding import fold_scale, tie_heads
from lqedu.transforms.smoothing import channel_max, smoothing_scales


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(QuantizedActivations):
    """SmoothQuant with the defaults of its reference.

    The paper's three levels are ``granularity="tensor"`` with ``activation="token"`` (O1), ``"tensor"`` (O2) and
    ``"static"`` (O3); its code quantizes weights per channel.

    Attributes:
        bits: of the weights, symmetric, the largest weight on the largest code.
        granularity: of the weights' scales, "channel" (one for each output) or "tensor".
        alpha: migration strength; the reference's 0.5 is for OPT, for Llama models it takes about 0.85.
        folds: "norms" smooths the linears behind a norm, as the reference does; "all" folds into ``v_proj`` and
            ``up_proj`` too, so that ``o_proj`` and ``down_proj`` are smoothed as well.
    """

    name: ClassVar[str] = "smoothquant"
    title: ClassVar[str] = "SmoothQuant"
    chapter: ClassVar[str] = "08-smoothquant"
    citation: ClassVar[str] = "xiao2023smoothquant"
    answers: ClassVar[Answers] = Answers(
        grid="INT8 weights per channel, INT8 activations per token",
        move="scale channels of activations into weights",
        round="nearest",
        run="W8A8: INT8 GEMM, int32 accumulation, scales in the epilogue",
        calibration="largest magnitude of each channel",
        online=("quantize inputs",),
    )
    quantizes: ClassVar[tuple[str, ...]] = ("weights", "activations")
    needs_calibration: ClassVar[bool] = True
    calibrates_on: ClassVar[str] = "dense"

    bits: int = 8
    granularity: str = "channel"
    alpha: float = 0.5
    folds: str = "norms"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in ("channel", "tensor"):
            raise UsageError(f"granularity is 'channel' or 'tensor', got {self.granularity!r}")
        self.grid()  # contradictions die here
        check_number("alpha", self.alpha, least=0, most=1)
        if self.folds not in ("norms", "all"):
            raise UsageError(f"folds is 'norms' or 'all', got {self.folds!r}")

    def grid(self) -> IntGrid:
        """The weights' grid."""
        return IntGrid(self.bits, True, self.granularity, convention=ScaleConvention.MAX_CODE)

    def prepare_block(
        self, block: nn.Module, stages: tuple[Stage, ...], hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Find the scales of the stages on the untouched block, then fold them."""
        stages = tuple(stage for stage in stages if self._smooths(stage))
        largest: dict[str, Tensor] = {}

        def visitor(name: str):
            def visit(x: Tensor) -> None:
                largest[name] = all_max(x.reshape(-1, x.shape[-1]).abs().amax(0))

            return visit

        run_block(block, hidden, kwargs, visit={stage.linears[0]: visitor(stage.linears[0]) for stage in stages})
        scales = {stage: self._scale(block, stage, largest[stage.linears[0]]) for stage in stages}
        changed: dict[str, Tensor] = {}
        for stage, scale in scales.items():
            changed |= fold_scale(block, stage, scale)
        return changed

    def quantize_linear(self, weight: Tensor, hessian: Tensor | None = None) -> tuple[QTensor, RoundingReport]:
        """Round one smoothed weight ``[out, in]`` to nearest."""
        return nearest(weight, self.grid())

    def _smooths(self, stage: Stage) -> bool:
        return stage.behind_norm or (self.folds == "all" and stage.source is not None)

    def _scale(self, block: nn.Module, stage: Stage, activation: Tensor) -> Tensor:
        weight = channel_max([block.get_submodule(name).weight.detach() for name in stage.linears])
        if stage.source.endswith("v_proj"):
            activation, weight = tie_heads(block, activation), tie_heads(block, weight)
        return smoothing_scales(activation, weight, self.alpha)
