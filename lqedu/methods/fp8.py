"""FP8: 8-bit floats for weights, activations, keys and values; ``16-fp8``.

Grid: E4M3. Move: nothing. Round: nearest. Run: W8A8 on FP8 tensor cores. Formats: Micikevicius et al., 2022,
arXiv:2209.05433. The recipes that serving engines read are choices of these options (names of compressed-tensors):

    FP8          granularity="tensor",  activation="static"
    FP8_DYNAMIC  granularity="channel", activation="token"      the default
    FP8_BLOCK    granularity="block",   activation="group"      128 x 128 and 1 x 128, DeepSeek-V3's
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lqedu.errors import UsageError
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Grid, Float8Tensor, float8_quantize
from lqedu.formats.kv import KVFloat8
from lqedu.methods.base import Answers, Method
from lqedu.rounding import RoundingReport
from lqedu.rounding.report import proxy_loss

if TYPE_CHECKING:
    from lqedu.runtime.attention import AttentionPath


@dataclass(frozen=True, kw_only=True)
class FP8(Method):
    """FP8 weights, and where asked FP8 inputs of the linears, keys and values.

    Attributes:
        granularity: which weights share a scale: "channel" (an output row), "tensor" or "block" (128 x 128).
        activation: which inputs share a scale: "token", "group" (128 features of a token), "tensor" (all tokens of a call),
            "static" (one constant, fitted to the calibration text), or "none" to leave them in floating point.
        kv: "fp8" stores each token of each head in E4M3 with its own scale, "none" leaves keys and values.
        format: "E4M3" or "E5M2"; two bits of mantissa are too few here, E5M2 is for gradients.
        search: "mse" takes the scale of each tile with the least squared error over one octave.
        keep: last names of linears that stay in floating point, separated by commas: "down_proj,o_proj". A name
            that no linear of the model has is refused when the model is quantized.
    """

    name: ClassVar[str] = "fp8"
    title: ClassVar[str] = "FP8"
    chapter: ClassVar[str] = "16-fp8"
    citation: ClassVar[str] = "micikevicius2022fp8"
    answers: ClassVar[Answers] = Answers(
        grid="E4M3 weights per channel, E4M3 activations per token",
        move="nothing",
        round="nearest",
        run="W8A8: FP8 GEMM, FP32 accumulation, scales in the epilogue",
        calibration="none",
        online=("quantize inputs",),
    )
    quantizes: ClassVar[tuple[str, ...]] = ("weights", "activations")
    needs_calibration: ClassVar[bool] = False

    granularity: str = "channel"
    activation: str = "token"
    kv: str = "none"
    format: str = "E4M3"
    search: str = "none"
    keep: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ("token", "group", "tensor", "static", "none"):
            raise UsageError(f"activation is 'token', 'group', 'tensor', 'static' or 'none', got {self.activation!r}")
        if self.kv not in ("fp8", "none"):
            raise UsageError(f"kv is 'fp8' or 'none', got {self.kv!r}")
        self.grid()  # contradictions die here
        self.activation_grid()

    def grid(self) -> Float8Grid:
        """The weights' grid (GridError where the options make none)."""
        return Float8Grid(self.granularity, format=self.format, search=self.search)

    def activation_grid(self) -> Float8ActivationGrid | None:
        """The grid of the linears' inputs."""
        if self.activation == "none":
            return None
        static = self.activation == "static"
        return Float8ActivationGrid("tensor" if static else self.activation, static, format=self.format)

    def attention_path(self) -> "AttentionPath | None":
        """Keys and values as they are, rounded to E4M3 where ``kv`` says so."""
        if self.kv == "none":
            return None
        from lqedu.runtime.attention import AttentionPath

        return AttentionPath(key=KVFloat8(), value=KVFloat8())

    def kept_names(self) -> tuple[str, ...]:
        """The names in ``keep``."""
        return tuple(name.strip() for name in self.keep.split(",") if name.strip())

    def keeps(self, linear: str) -> bool:
        """Whether ``keep`` names it."""
        return linear.rpartition(".")[2] in self.kept_names()

    def quantize_linear(self, weight: Tensor, hessian: Tensor | None = None) -> tuple[Float8Tensor, RoundingReport]:
        """Round one weight ``[out, in]`` to nearest; a Hessian only serves the report."""
        stored = float8_quantize(weight, self.grid())
        if hessian is None:
            return stored, RoundingReport(proxy_loss=None)
        error = weight.detach() - stored.dequantize(weight.dtype)
        return stored, RoundingReport(proxy_loss(error, hessian))
