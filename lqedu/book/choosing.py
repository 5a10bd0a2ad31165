"""Which method for which job: recorded numbers behind a few questions, and an answer that names its rows; ``24-choose``.

A request, and what answers it::

    advice = recommend(Situation(hardware="hopper", batch=64, context=1024, loss=0.1))
    advice.best.option.name, advice.best.sources

An option is a method at settings that this site measured. It is a candidate where it keeps every limit of a request: the
hardware multiplies its numbers, weights and cache fit, its loss is within the budget, its effort is allowed and its layout is
asked for. Limits only filter, so a looser one never takes a candidate away. Among the candidates speed decides, then loss.

Loss was measured on one small model, on the bench of all methods (``22-side-by-side``) where that has the option's settings;
speed and memory on models of 7 and 8 billion weights with random weights, on one kind of GPU. What was not measured has no
number here, and is said to have none.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, get_args

from lqedu import methods
from lqedu.book.matrix import row_numbers, slug
from lqedu.book.results import results
from lqedu.errors import UsageError
from lqedu.evaluation.memory import largest_batch, page_bytes, step_bytes, weight_bytes
from lqedu.evaluation.random_models import FORMATS, SHAPES, Format
from lqedu.evaluation.roofline import ModelShape
from lqedu.options import check_count
from lqedu.runtime.paged import pages_of

Hardware = Literal["cpu", "ampere", "hopper"]
Work = Literal["decode", "prefill"]
Effort = Literal["none", "calibration", "training"]  # each allows those before it

HARDWARE: tuple[str, ...] = get_args(Hardware)
EFFORTS: tuple[str, ...] = get_args(Effort)
LAYOUTS = ("any", "compressed-tensors", "gptq", "awq", "qserve")  # of lqedu.checkpoint.exporting
MODEL = "smollm2-135m"  #: whose losses were measured
MEASURED_ON: Hardware = "hopper"  #: the only hardware whose speed was measured
TIE = 0.05  #: speeds that differ by less count as equal, and loss decides


@dataclass(frozen=True, eq=False)  # each is itself: settings are no key
class Option:
    """A method at settings.

    Attributes:
        name: short, unique.
        method: in the registry of methods; ``None`` is the dense model.
        settings: as :func:`lqedu.methods.build` takes them, for a model of a size that is served.
        evidence: where its loss is recorded: a row of the matrix (``lqedu.book.matrix.ROWS``), or where that has none of these
            settings the stem of a result file and the fields that single out its row there.
        form: the format in which whole models were timed and their memory measured; ``None``: none was.
        hardware: what multiplies its numbers directly.
        layouts: of other tools, which hold it.
    """

    name: str
    method: str | None
    settings: dict[str, Any]
    evidence: str | tuple[str, dict[str, Any]]
    form: str | None = None
    hardware: tuple[str, ...] = HARDWARE
    layouts: tuple[str, ...] = ()

    @cached_property
    def effort(self) -> Effort:
        """What quantizing takes: no data, calibration text, or gradients through the whole model."""
        if self.method is None:
            return "none"
        method = methods.build(self.method, self.settings)
        if not method.learns_from_blocks:
            return "training"
        return "calibration" if method.uses_calibration else "none"

    @property
    def chapter(self) -> str:
        """Where it is derived and its loss is shown."""
        return "01-memory-wall" if self.method is None else methods.get(self.method).chapter


_GPUS = ("ampere", "hopper")  # INT8 tensor cores
_CT, _GPTQ, _AWQ, _QSERVE = LAYOUTS[1:]
_TOKEN = {"activation_bits": 8, "activation": "token", "kv_bits": None}
_W8A8 = {"bits": 8, "group_size": None, "symmetric": True} | _TOKEN
_ORDER = {"order": "activation"}

#: What the guide chooses from. Groups are of 128 inputs where speed was measured, of 64 where loss was: 128 does not divide the
#: linears of the small model. SmoothQuant takes the strength that its paper takes for Llama, as the matrix does.
OPTIONS: tuple[Option, ...] = (
    Option("FP16", None, {}, "fp", "fp16", layouts=LAYOUTS[1:]),
    Option("RTN W8A16", "rtn", {"bits": 8}, "rtn_w8_g64", layouts=(_CT, _GPTQ)),
    Option("RTN W4A16", "rtn", {}, "rtn_w4_g64", "w4a16", layouts=(_CT, _GPTQ, _AWQ)),
    Option("HQQ W4A16", "hqq", {}, "hqq_w4_g64"),
    Option("GPTQ W4A16", "gptq", _ORDER, "gptq_w4_g64", "w4a16", layouts=(_CT, _GPTQ, _AWQ)),
    Option("AWQ W4A16", "awq", {}, "awq_w4_g64", "w4a16", layouts=(_CT, _GPTQ, _AWQ)),
    Option("QuIP W4A16", "quip", {"bits": 4}, "quip_w4"),
    Option("AWQ W3A16", "awq", {"bits": 3}, "awq_w3_g64", layouts=(_CT, _GPTQ)),
    Option("GPTQ W3A16", "gptq", {"bits": 3} | _ORDER, "gptq_w3_g64", layouts=(_CT, _GPTQ)),
    Option("QuIP W3A16", "quip", {"bits": 3}, "quip_w3"),
    Option("QuIP W2A16", "quip", {}, "quip_w2"),
    Option("RTN W8A8", "rtn", _W8A8, "rtn_w8a8", "w8a8", _GPUS, (_CT,)),
    Option("SmoothQuant W8A8", "smoothquant", {"alpha": 0.8}, "smoothquant_w8a8", "w8a8", _GPUS, (_CT,)),
    Option("QuaRot W8A8", "quarot", {"bits": 8} | _TOKEN,
           ("quarot_smollm2", {"name": "W8A8", "method": "quarot", "rounding": "gptq"}), None, _GPUS),
    Option("FP8", "fp8", {}, "fp8_channel_token", "fp8", ("hopper",), (_CT,)),
    Option("QQQ W4A8", "qqq", {}, "qqq_w4a8_g64", None, _GPUS),
    Option("QoQ W4A8", "qoq", {"kv_bits": None}, ("qoq_smollm2", {"name": "KV16", "method": "qoq", "group_size": 64}), "w4a8",
           _GPUS, (_QSERVE,)),
    Option("QoQ W4A8KV4", "qoq", {}, "qoq_w4a8kv4_g64", "w4a8kv4", _GPUS, (_QSERVE,)),
    Option("QuaRot W4A4", "quarot", {"kv_bits": None}, ("quarot_smollm2", {"name": "W4A4", "method": "quarot", "rounding": "gptq"}),
           hardware=()),
    Option("SpinQuant W4A4", "spinquant", {"kv_bits": None},
           ("spinquant_smollm2", {"name": "W4A4", "method": "spinquant", "steps": 100}), hardware=()),
)  # fmt: skip


# --- the three sources ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredLoss:
    """Loss of an option, and what else was measured with it.

    Attributes:
        loss: nats a token of ``sotu`` more than the dense model, paired by window.
        stderr: its standard error.
        bits: of a weight.
        source: whence.
        other: the row of the matrix, with the columns of :meth:`lqedu.book.matrix.Matrix.summary`: another text, tasks. Evidence
            that decides nothing here; ``None`` where the matrix has no such row.
    """

    loss: float
    stderr: float
    bits: float
    source: str
    other: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def at_most(self) -> float:
        """Two standard errors above: what a budget is compared with."""
        return self.loss + 2 * self.stderr


def quality(option: Option) -> MeasuredLoss:
    """Loss of an option. The only function here that knows where losses are recorded.

    Raises:
        UsageError: the matrix has no such row; or no row of the result file is this option's, or several are.
    """
    if isinstance(option.evidence, str):
        row = row_numbers(MODEL, option.evidence)
        bits = 16.0 if option.method is None else row["bits_per_weight"]
        source = f"matrix/{slug(MODEL)}/{option.evidence}: sotu"
        return MeasuredLoss(row["sotu_delta"], row["sotu_delta_stderr"], bits, source, row)
    stem, where = option.evidence
    rows = _rows(stem, tuple(where.items()))
    if len(rows) != 1:
        raise UsageError(f"{stem} must hold one row of {option.name}, with {where}; it holds {len(rows)}")
    (row,) = rows
    return MeasuredLoss(row["delta_nll"], row["delta_stderr"], row["bits_per_weight"], f"{stem}: {_say(where)}")


@cache
def _file(stem: str) -> dict[str, Any]:
    return results(stem)


@cache
def _rows(stem: str, where: tuple[tuple[str, Any], ...]) -> list[dict[str, Any]]:
    values = _file(stem)["values"]
    return [row for row in values if all(row.get(key, _ABSENT) == value for key, value in where)]


_ABSENT = object()


def _say(where: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in where.items())


def memory(option: Option, shape: ModelShape, *, batch: int, context: int) -> float:
    """Bytes of weights, cache and step for ``batch`` texts of up to ``context`` tokens; chapters ``01`` and ``21``.

    Formats that were timed are counted in their kernels' layouts, others at the bits a weight that were recorded.
    """
    form = Format() if option.form is None else FORMATS[option.form]
    return _weights(option, shape) + batch * pages_of(context) * page_bytes(shape, form) + step_bytes(shape, batch)


def _weights(option: Option, shape: ModelShape) -> float:
    if option.form is not None:
        return weight_bytes(shape, FORMATS[option.form])
    return weight_bytes(shape, Format()) - shape.linear_weights * (16 - quality(option).bits) / 8


@dataclass(frozen=True)
class Speed:
    """Tokens a second, recorded at a batch and a context, and over those of FP16 there: on this engine, in transformers."""

    tokens: float
    batch: int
    context: int
    ratio: float | None
    ratio_transformers: float | None
    source: str


def speed(form: str | None, shape: str, *, work: Work, batch: int, context: int) -> Speed | None:
    """Recorded speed of a format at the point nearest to a batch and a context; ``None`` where it was not measured.

    Nearest on logarithmic axes, the same point for every format. Prompts were read one at a time.
    """
    stem = f"throughput_{shape.replace('-', '_')}"
    found = _points(stem, work)
    point = min(
        {(b, c) for _, b, c in found},
        key=lambda at: (abs(math.log(at[1] / context)), abs(math.log(at[0] / batch)), at),
    )
    tokens = None if form is None else found.get((form, *point))
    if tokens is None:
        return None
    own, other = found.get(("fp16", *point)), found.get(("fp16-transformers", *point))
    ratios = (None if base is None else tokens / base for base in (own, other))
    return Speed(tokens, *point, *ratios, f"{stem}: {work} {form}, batch {point[0]}, context {point[1]}")


@cache
def _points(stem: str, work: str) -> dict[tuple[str, int, int], float]:
    rows = [row for row in _file(stem)["values"] if row["name"] == work]
    return {(row["format"], row["batch"], row["context"]): row["tokens_per_s"] for row in rows}


# --- the questions and the answer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Situation:
    """What somebody has and wants.

    Attributes:
        hardware: "cpu", "ampere" (GPUs with INT8 but no FP8 units) or "hopper".
        shape: a model of ``lqedu.evaluation.random_models.SHAPES``.
        memory: bytes for weights, cache and step.
        batch, context: texts at once, and tokens to which each may grow.
        work: what takes the time: "decode" writes tokens, "prefill" reads prompts.
        loss: nats a token that may be lost.
        effort: the most that quantizing may take.
        layout: "any", or the format that another tool must load.
    """

    hardware: Hardware = "hopper"
    shape: str = "llama-3-8b"
    memory: float = 80e9
    batch: int = 1
    context: int = 1024
    work: Work = "decode"
    loss: float = 0.15
    effort: Effort = "calibration"
    layout: str = "any"

    def __post_init__(self) -> None:
        known = {
            "hardware": HARDWARE,
            "shape": tuple(SHAPES),
            "work": get_args(Work),
            "effort": EFFORTS,
            "layout": LAYOUTS,
        }
        for key, words in known.items():
            if getattr(self, key) not in words:
                raise UsageError(f"{key} is one of {', '.join(words)}, got {getattr(self, key)!r}")
        check_count("batch", self.batch, least=1)
        check_count("context", self.context, least=1)
        if not (self.memory > 0 and math.isfinite(self.memory)):
            raise UsageError(f"memory is a number of bytes above 0, got {self.memory!r}")
        if not (self.loss >= 0 and math.isfinite(self.loss)):
            raise UsageError(f"loss is a number of nats, at least 0, got {self.loss!r}")


@dataclass(frozen=True)
class Estimate:
    """An option under a request.

    Attributes:
        quality: loss, and whence.
        bytes: of weights, cache and step.
        speed: recorded; ``None`` where it was not measured.
        score: what is ranked: tokens a second, or where the hardware was not measured and tokens are written, the bytes of an
            FP16 step over the bytes of this one (a bound, counted). 0 where there is neither.
        broken: the limits that it does not keep, in the order of the questions.
        why: a sentence for each of them.
    """

    option: Option
    quality: MeasuredLoss
    bytes: float
    speed: Speed | None
    score: float
    broken: tuple[str, ...] = ()
    why: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The rows that its numbers are read from."""
        return (self.quality.source, *([] if self.speed is None else [self.speed.source]))


@dataclass(frozen=True)
class Advice:
    """An answer.

    Attributes:
        best: the recommendation; ``None`` where no option keeps every limit.
        frontier: candidates that no other beats or equals in everything, best first.
        candidates: options that keep every limit.
        closest: where nothing does, the option that misses by least, with its reasons in ``why``.
        notes: what the numbers cannot decide.
    """

    best: Estimate | None
    frontier: tuple[Estimate, ...]
    candidates: tuple[Estimate, ...]
    closest: Estimate | None = None
    notes: tuple[str, ...] = field(default=())


def estimate(option: Option, request: Situation) -> Estimate:
    """All numbers of an option under a request, and the limits that it breaks."""
    shape, loss = SHAPES[request.shape], quality(option)
    held = memory(option, shape, batch=request.batch, context=request.context)
    recorded = None
    if request.hardware == MEASURED_ON:
        at = {"work": request.work, "batch": request.batch, "context": request.context}
        recorded = speed(option.form, request.shape, **at)
    checks = {
        "hardware": (request.hardware in option.hardware, _no_units(option, request.hardware)),
        "memory": (held <= request.memory, f"needs {held / 1e9:.1f} GB of {request.memory / 1e9:.1f}"),
        "loss": (
            loss.at_most <= request.loss,
            f"loses {loss.loss:.4f} nats, at most {loss.at_most:.4f}, of a budget of {request.loss:g}",
        ),
        "effort": (
            EFFORTS.index(option.effort) <= EFFORTS.index(request.effort),
            f"needs {option.effort}, where {request.effort} is allowed",
        ),
        "layout": (request.layout in ("any", *option.layouts), f"{request.layout} cannot hold it"),
    }
    broken = tuple(key for key, (kept, _) in checks.items() if not kept)
    if recorded is not None:
        score = recorded.tokens
    else:
        score = _bound(option, request) if request.hardware != MEASURED_ON and request.work == "decode" else 0.0
    return Estimate(option, loss, held, recorded, score, broken, tuple(checks[key][1] for key in broken))


def _no_units(option: Option, hardware: str) -> str:
    if not option.hardware:
        return "no kernel here multiplies 4-bit numbers by 4-bit numbers"
    return f"{hardware} has no units for its products, or no kernel here uses them"


def _bound(option: Option, request: Situation) -> float:
    """Bytes that a decoding step must read in FP16 over those of an option: chapter ``01``."""
    shape = SHAPES[request.shape]

    def read(one: Option) -> float:
        form = Format() if one.form is None else FORMATS[one.form]
        token = page_bytes(shape, form) / 64
        return _weights(one, shape) - 2 * shape.embedding_weights + request.batch * request.context * token

    return read(OPTIONS[0]) / read(option)


def candidates(request: Situation, options: Iterable[Option] = OPTIONS) -> list[Estimate]:
    """The options that keep every limit."""
    return [found for option in options if not (found := estimate(option, request)).broken]


def frontier(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Those that no other one equals or beats in speed, loss, memory and effort at once, the fastest first."""
    return sorted(
        (e for e in estimates if not any(_dominates(other, e) for other in estimates)),
        key=lambda e: (-e.score, e.quality.loss, e.bytes),
    )


def _dominates(a: Estimate, b: Estimate) -> bool:
    """Whether ``a`` is at least as good in everything and better in something."""
    one, two = ((-e.score, e.quality.loss, e.bytes, EFFORTS.index(e.option.effort)) for e in (a, b))
    return one != two and all(x <= y for x, y in zip(one, two, strict=True))


def recommend(request: Situation, options: Sequence[Option] = OPTIONS) -> Advice:
    """The fastest candidate; among those within 5 % of it the one that loses least.

    Every candidate that another one dominates is left out first. Where prompts are read on hardware that was not measured,
    all speeds are unknown and loss alone decides.
    """
    tried = [estimate(option, request) for option in options]
    kept = [e for e in tried if not e.broken]
    notes = _notes(request, tried)
    if not kept:
        return Advice(None, (), (), min(tried, key=lambda e: _excess(e, request)), notes)
    best_first = frontier(kept)
    near = [e for e in best_first if e.score >= (1 - TIE) * best_first[0].score]
    best = min(near, key=lambda e: (e.quality.loss, -e.score, e.bytes))
    if request.hardware == MEASURED_ON and best.speed is None:
        notes += ("no candidate was timed with this much memory in use: loss decides",)
    order = (best, *(e for e in best_first if e is not best))
    return Advice(best, order, tuple(kept), None, notes)


def _excess(e: Estimate, request: Situation) -> float:
    """How far an option is beyond the limits: logarithms of the factors; infinite where it cannot run at all."""
    if "hardware" in e.broken:
        return math.inf
    excess = math.log(e.bytes / request.memory) if "memory" in e.broken else 0.0
    if "loss" in e.broken:
        excess += math.log(e.quality.at_most / max(request.loss, 1e-3)) if e.quality.at_most > 1e-3 else 0.0
    return excess + 2 * ("effort" in e.broken) + 2 * ("layout" in e.broken)


def _notes(request: Situation, tried: Sequence[Estimate]) -> tuple[str, ...]:
    notes = []
    smallest = min(e.quality.stderr for e in tried if e.option.method is not None)
    if request.loss < 2 * smallest:
        notes.append(
            f"the budget of {request.loss:g} nats is below two standard errors of every measurement here "
            f"({2 * smallest:.1g} at least), so only the dense model is known to keep it; measure more windows"
        )
    if request.hardware != MEASURED_ON:
        what = "its score is counted bytes, a bound" if request.work == "decode" else "loss decides"
        notes.append(f"no speed was measured on {request.hardware}: {what}")
    return tuple(notes)


def fits(option: Option, request: Situation) -> int:
    """Texts of the request's length that fit into its memory; 0 where the weights alone do not.

    >>> fits(OPTIONS[0], Situation())
    474
    """
    shape = SHAPES[request.shape]
    if option.form is not None:
        return largest_batch(shape, FORMATS[option.form], tokens=request.context, budget=request.memory)
    one, two = (memory(option, shape, batch=b, context=request.context) for b in (1, 2))
    return max(0, int((request.memory - (2 * one - two)) // (two - one)))


def explorer_data() -> dict[str, Any]:
    """What ``lqedu/viz/choose.mjs`` computes with: bytes, losses and recorded speeds of every option."""
    options = []
    for o in OPTIONS:
        form = Format() if o.form is None else FORMATS[o.form]
        q = quality(o)
        options.append(
            {
                "name": o.name, "loss": q.loss, "at_most": q.at_most, "effort": EFFORTS.index(o.effort),
                "hardware": list(o.hardware), "layouts": ["any", *o.layouts],
                "weights": {name: _weights(o, shape) for name, shape in SHAPES.items()},
                "page": {name: page_bytes(shape, form) for name, shape in SHAPES.items()},
                "form": o.form,
            }
        )  # fmt: skip
    points = {
        name: {
            work: [
                [form, *at, tokens]
                for (form, *at), tokens in _points(f"throughput_{name.replace('-', '_')}", work).items()
                if form in FORMATS
            ]
            for work in get_args(Work)
        }
        for name in SHAPES
    }
    shapes = {
        name: {
            "step": step_bytes(shape, 1) - step_bytes(shape, 0), "library": step_bytes(shape, 0),
            "embedding": 2 * shape.embedding_weights,
        }
        for name, shape in SHAPES.items()
    }  # fmt: skip
    return {"options": options, "points": points, "shapes": shapes, "tie": TIE}
