"""A method is one answer to each of four questions; the registry of methods is the book's summary table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from lqedu.errors import GridError, UsageError
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid
from lqedu.formats.kv import KVInt
from lqedu.models.anatomy import Stage
from lqedu.options import check_count
from lqedu.rounding import RoundingReport
from lqedu.transforms.moves import Move

if TYPE_CHECKING:
    from lqedu.runtime.attention import AttentionPath

_REGISTRY: dict[str, type["Method"]] = {}


@dataclass(frozen=True)
class Answers:
    """The four questions of chapter ``01-memory-wall``, answered in a few words each, and what the answers cost.

    Attributes:
        grid: which values can be stored.
        move: where the difficulty goes before rounding.
        round: which grid point each weight gets.
        run: what the hardware executes.
        calibration: what is taken from a calibration text at the method's defaults; "none" reads none.
        online: what runs beside the product while a model runs, at the method's defaults, in the words of
            :func:`lqedu.runtime.online.online_work`, which finds them in a quantized model.
    """

    grid: str
    move: str
    round: str
    run: str
    calibration: str
    online: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method: frozen hyper-parameters with the published defaults, plus what the table says of it.

    A subclass names itself and is found by :func:`available`; its dataclass fields are its hyper-parameters.

    ``needs_calibration`` asks for token windows and ``needs_hessian`` for each linear's Hessian as well. With
    ``calibrates_on="quantized"`` a block sees what the quantized blocks before it put out, with "dense" what the dense
    ones would. Without ``learns_from_blocks``, :meth:`learn` needs the whole model in memory and gradients through it, so the
    method can neither be streamed nor calibrated by several processes.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    chapter: ClassVar[str]
    citation: ClassVar[str]
    answers: ClassVar[Answers]
    quantizes: ClassVar[tuple[str, ...]] = ("weights",)
    needs_calibration: ClassVar[bool]
    needs_hessian: ClassVar[bool] = False
    calibrates_on: ClassVar[Literal["quantized", "dense"]] = "quantized"
    learns_from_blocks: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):  # abstract bases such as WeightOnly carry no name
            _REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        """Refuse a value that is not of its field's type (UsageError); ranges are each method's own matter."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not any(_is_a(value, kind) for kind in get_args(field.type) or (field.type,)):
                wanted = getattr(field.type, "__name__", str(field.type))
                raise UsageError(f"option {field.name!r} of method {self.name!r} must be {wanted}, got {value!r}")

    @property
    def uses_calibration(self) -> bool:
        """Whether this instance reads token windows: every instance of its class does, or its input scales are static."""
        grid = self.activation_grid()
        return self.needs_calibration or (grid is not None and grid.static)

    def activation_grid(self) -> ActivationGrid | Float8ActivationGrid | None:
        """The grid of the linears' inputs; ``None`` leaves them in floating point."""
        return None

    def kept_names(self) -> tuple[str, ...]:
        """The names that an option lists for :meth:`keeps`; the pipeline refuses those that no linear of a model has."""
        return ()

    def keeps(self, linear: str) -> bool:
        """Whether a linear, named relative to its block, stays as it is. The output head is in no block: it always does.

        For methods without :meth:`prepare_block`, which may change the weights of all linears.
        """
        return False

    def attention_path(self) -> "AttentionPath | None":
        """How keys and values are stored; ``None`` leaves the attention of transformers alone."""
        return None

    def learn(
        self,
        model: nn.Module,
        calibration: Tensor | None,
        *,
        progress: bool = False,
        blocks: Iterable[nn.Module] | None = None,
    ) -> dict[str, Tensor]:
        """Find what :meth:`model_move` needs; an interrupted run keeps it and does not search or train again.

        Args:
            model: the dense model. Not changed.
            calibration: token ids ``[windows, length]``, or ``None`` where the method reads none.
            progress: show a progress bar on stderr.
            blocks: the dense blocks, in order, where they come one at a time; of ``model`` only the embeddings are in memory
                then. Their parameters may be replaced.
        """
        return {}

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        """What this method does otherwise than its name says because of this dense model: a sentence each."""
        return ()

    def model_move(self, model: nn.Module, learned: Mapping[str, Tensor]) -> Move:
        """How the difficulty is moved across a whole dense model, before calibration; its function must not change.

        Args:
            model: whose shapes are read, and where its embedding is.
            learned: what :meth:`learn` returned.

        Returns:
            The same each time it is called (an interrupted run calls it again).
        """
        return Move()

    def prepare_model(self, model: nn.Module, learned: Mapping[str, Tensor]) -> nn.Module:
        """A model in memory behind :meth:`model_move`: a copy that shares its tensors, or itself where nothing moves."""
        return self.model_move(model, learned)(model)

    def prepare_block(
        self, block: nn.Module, stages: tuple[Stage, ...], hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Move the difficulty inside a dense block, before its linears are rounded; its function must not change.

        Args:
            block: a decoder block whose parameters may be replaced, but not changed in place.
            stages: its linears, in the order they run.
            hidden, kwargs: the block's calibration inputs, see :func:`lqedu.calibration.capture.run_block`.

        Returns:
            The parameters that were replaced, by name relative to the block, the weights of its linears left out.
        """
        return {}

    def quantize_linear(self, weight: Tensor, hessian: Tensor | None) -> tuple[Any, RoundingReport]:
        """Quantize one linear layer ``[out, in]``; ``hessian`` is ``None`` unless ``needs_hessian``.

        Returns:
            A stored weight of one of the kinds in ``lqedu.runtime.kinds``, and a report.
        """
        raise NotImplementedError

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Refuse a weight ``[out, in]`` that this method's grid does not fit (GridError)."""

    def options(self) -> dict[str, Any]:
        """Hyper-parameters by name, as JSON can store them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class WeightOnly(Method):
    """What weight-only methods on an integer grid share.

    Attributes:
        bits: 2 to 8.
        group_size: inputs that share a scale, or ``None`` for one scale per output channel.
    """

    bits: int = 4
    group_size: int | None = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grid()  # contradictions die here

    def grid(self) -> IntGrid:
        """The grid these hyper-parameters describe (GridError where they contradict each other)."""
        raise NotImplementedError

    @property
    def granularity(self) -> Literal["channel", "group"]:
        """Of the scales, as :class:`lqedu.formats.IntGrid` names it."""
        return "channel" if self.group_size is None else "group"

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Refuse a weight whose inputs the group size does not divide (GridError)."""
        self.grid().scale_shape(shape)


@dataclass(frozen=True, kw_only=True)
class AnyGrid(WeightOnly):
    """Weight-only methods that round on whatever integer grid they are given.

    Attributes:
        symmetric: a grid without zero points.
        zero_point: "integer", or "float" for zero points in FP16.
        search: "none", or "mse" for the range with the least sum of |error|^2.4.
    """

    symmetric: bool = False
    zero_point: str = "integer"
    search: str = "none"

    def grid(self) -> IntGrid:
        """The grid these hyper-parameters describe."""
        return IntGrid(
            self.bits,
            self.symmetric,
            self.granularity,
            self.group_size,
            zero_point=self.zero_point,
            search=self.search,
        )


@dataclass(frozen=True, kw_only=True)
class QuantizedActivations(Method):
    """What methods share that may quantize the inputs of linears, and keys and values.

    Attributes:
        activation_bits: 2 to 8, or ``None`` to leave the inputs in floating point.
        activation: which inputs share a scale: "token" (each token its own, fitted as it comes), "tensor" (all tokens of
            a call, fitted as they come) or "static" (one constant, fitted to the calibration text).
        kv_bits: 2 to 8 for keys and values, each token of a head on an asymmetric grid of its own; ``None`` leaves them.
    """

    activation_bits: int | None = 8
    activation: str = "token"
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("activation_bits", "kv_bits"):  # before the grids, which know them as "bits"
            if getattr(self, name) == 16:
                raise GridError(f"{name}=None leaves floating point; use it instead of 16")
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=2, most=8, error=GridError)
        if self.activation not in ("token", "tensor", "static"):
            raise UsageError(f"activation is 'token', 'tensor' or 'static', got {self.activation!r}")
        self.activation_grid()  # contradictions die here
        self.attention_path()

    def activation_grid(self) -> ActivationGrid | None:
        """The grid of the linears' inputs, symmetric."""
        if self.activation_bits is None:
            return None
        granularity = "token" if self.activation == "token" else "tensor"
        return ActivationGrid(self.activation_bits, granularity=granularity, static=self.activation == "static")

    def attention_path(self) -> "AttentionPath | None":
        """Keys and values as they are, rounded where ``kv_bits`` says so."""
        return kv_path(self.kv_bits)


def kv_path(
    bits: int | None, *, clip_ratio: float = 1.0, zero_point: str = "float", hadamard: bool = False
) -> "AttentionPath | None":
    """Keys and values of ``bits`` bits, keys in the Hadamard basis of their head where asked; ``None`` for no bits."""
    if bits is None:
        return None
    from lqedu.runtime.attention import AttentionPath

    grid = KVInt(bits, clip_ratio, zero_point)
    return AttentionPath(hadamard=hadamard, key=grid, value=grid)


def available() -> dict[str, type[Method]]:
    """Every method by name, in alphabetical order."""
    return {name: _REGISTRY[name] for name in sorted(_REGISTRY)}


def get(name: str) -> type[Method]:
    """The method called ``name``.

    Raises:
        UsageError: no such method; the sentence lists those there are.
    """
    if name not in available():
        raise UsageError(f"unknown method {name!r}; available: {', '.join(available())}")
    return _REGISTRY[name]


def build(name: str, options: dict[str, Any]) -> Method:
    """A method from its name and hyper-parameters, as a checkpoint or the command line gives them.

    Raises:
        UsageError: an unknown method or hyper-parameter, or a value of the wrong type.

    >>> build("gptq", {"bits": 3, "group_size": 64}).bits
    3
    """
    cls = get(name)
    known = [f.name for f in fields(cls)]
    for key in options:
        if key not in known:
            raise UsageError(f"method {name!r} has no option {key!r}; it has {', '.join(known)}")
    return cls(**options)


def _is_a(value: object, kind: type) -> bool:
    """``isinstance`` for which a whole number is a float too, and a bool is no number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
