"""Figures that papers, repositories and model cards report, typed; chapter ``23-published`` reads them.

``book/results/published.csv`` holds a figure a row: ``method,model,setting,metric,value,fp16_value,source``. A row is
refused rather than repaired. Two perplexities may be compared only where the text was cut into the same windows, so that
every row knows its ``protocol``; what transfers best between protocols is :attr:`PublishedFigure.delta_nll`. Needs no torch.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lqedu.book.matrix import row_numbers, slug
from lqedu.book.results import result_folders, results
from lqedu.errors import UsageError

MODEL = "smollm2-135m"  #: whose losses stand beside the published ones
_BENCH = f"matrix/{slug(MODEL)}"
COLUMNS = ("method", "model", "setting", "metric", "value", "fp16_value", "source")
PERPLEXITIES = {"wikitext2_ppl": "WikiText-2", "c4_ppl": "C4"}
ACCURACIES = ("zeroshot_avg", "lambada_acc", "hellaswag_acc", "winogrande_acc", "piqa_acc", "mmlu_acc", "arc_c_acc",
              "truthfulqa_acc", "gsm8k_acc")  # fmt: skip
SPEEDS = ("speedup", "throughput")

WINDOWS_2048, STRIDED, WINDOWS_4096, BY_WORD, EARLY, MISPRINT = (
    "windows of 2,048", "windows of 1,024, stride 512", "windows of 4,096", "lm-eval, per word", "early SmoothQuant",
    "printed under another head",
)  # fmt: skip
FAMILIES: dict[str, tuple[str, ...]] = {
    "LLaMA-1": ("LLaMA-7B", "LLaMA-13B", "LLaMA-30B", "LLaMA-65B"),
    "Llama-2": ("Llama-2-7B", "Llama-2-13B", "Llama-2-70B"),
    "Llama-3": ("Llama-3-8B", "Llama-3-70B"),
    "Mistral": ("Mistral-7B",),
    "OPT": ("OPT-125M", "OPT-350M", "OPT-1.3B", "OPT-2.7B", "OPT-6.7B", "OPT-13B", "OPT-30B", "OPT-66B", "OPT-175B"),
}

_SPELLINGS = {"LLaMA-2-7B": "Llama-2-7B", "LLaMA-2-13B": "Llama-2-13B", "LLaMA-3-8B": "Llama-3-8B"}
_BITS = re.compile(r"\bW(?P<weights>\d+)A(?P<activations>\d+)(?:KV(?P<cache>\d+))?(?:g(?P<group>\d+))?\b")
_LIMITS = {"perplexity": (1.0, 1e7), "accuracy": (0.0, 100.0), "speed": (0.0, 1e5)}
_MARKS = (  # what names a protocol, in the setting or in the source; the first that is found
    ("AS PRINTED", MISPRINT), ("early paper version", EARLY),
    ("HQQ protocol", STRIDED), ("HQQ-style", STRIDED), ("strided", STRIDED), ("HQQ README", STRIDED),
    ("4096-window", WINDOWS_4096),
    ("lm-eval", BY_WORD),
)  # fmt: skip


@dataclass(frozen=True)
class Bits:
    """What a setting stores in how many bits; ``group`` is ``None`` per channel, and where the source does not say."""

    weights: int
    activations: int
    cache: int = 16
    group: int | None = None

    @property
    def per_weight(self) -> float:
        """Bits of a weight with a 16-bit scale and a zero point a group. A channel's scale is less than 0.01 of a bit."""
        return self.weights + ((16 + self.weights) / self.group if self.group else 0.0)

    def __str__(self) -> str:
        cache = f"KV{self.cache}" if self.cache != 16 else ""
        return f"W{self.weights}A{self.activations}{cache}" + (f" g{self.group}" if self.group else "")


@dataclass(frozen=True)
class PublishedFigure:
    """One published figure.

    Attributes:
        method, model, setting, metric, source: as in the file; three spellings of model names are made one.
        value: of the quantized model.
        fp16: of the unquantized model in the same source; ``None`` where the source has none.
    """

    method: str
    model: str
    setting: str
    metric: str
    value: float
    fp16: float | None
    source: str

    @cached_property
    def protocol(self) -> str:
        """How it was evaluated: rows of one metric may be compared where this is equal.

        Perplexities name their windows. Average accuracies are of 4 to 12 tasks in several versions, so that each
        source is a protocol of its own.
        """
        if self.metric in PERPLEXITIES:
            text = f"{self.setting} {self.source}"
            return next((name for mark, name in _MARKS if mark in text), WINDOWS_2048)
        found = re.search(r"\[eval: (.+)\]", self.setting)
        return f"{self.source.split(' ')[0]}: {found[1]}" if found else self.source

    @cached_property
    def bits(self) -> Bits | None:
        """Bits as the setting spells them, ``W4A8KV4g128``; ``None`` where it does not."""
        found = _BITS.search(self.setting)
        if found is None:
            return None
        w, a, kv, g = (int(part) if part else None for part in found.groups())
        return Bits(w, a, 16 if kv is None else kv, g)

    @property
    def difference(self) -> float | None:
        """``value - fp16``, in the units of the metric."""
        return None if self.fp16 is None else self.value - self.fp16

    @property
    def delta_nll(self) -> float | None:
        """``ln(value / fp16)`` of a perplexity: what quantization adds to the loss, in nats a token (or a word)."""
        if self.fp16 is None or self.metric not in PERPLEXITIES:
            return None
        return math.log(self.value / self.fp16)


# --- reading ----------------------------------------------------------------------------------------------------------


def published() -> tuple[PublishedFigure, ...]:
    """All rows of ``published.csv``, found where :func:`lqedu.book.results` finds result files.

    Raises:
        UsageError: no such file, or rows that :func:`read_rows` refuses.
    """
    for folder in result_folders():
        path: Path = folder / "published.csv"
        if path.is_file():
            return read_rows(path.read_text(encoding="utf-8"), path.name)
    raise UsageError("no book/results/published.csv above this folder nor with the package; run from a checkout")


def read_rows(text: str, name: str = "published.csv") -> tuple[PublishedFigure, ...]:
    """Rows of a CSV text.

    Raises:
        UsageError: another header, a row with a missing or unknown entry, a value out of range, or a figure that stands
            twice; the sentence names the file, the line and the remedy.

    >>> read_rows(",".join(COLUMNS) + "\\nGPTQ,Llama-2-7B,W4A16g128,wikitext2_ppl,5.61,5.47,a paper\\n")[0].bits
    Bits(weights=4, activations=16, cache=16, group=128)
    """
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise UsageError(f"{name}: the first line must be {','.join(COLUMNS)}")
    rows, seen = [], {}
    for record in reader:
        where = f"{name}, line {reader.line_num}"
        row = _row(record, where)
        key = (row.method, row.model, row.setting, row.metric, row.source)
        if key in seen:
            raise UsageError(f"{where}: stands in line {seen[key]} already; one source states a figure once")
        seen[key] = reader.line_num
        rows.append(row)
    if not rows:
        raise UsageError(f"{name}: no row")
    return tuple(rows)


def _row(record: Mapping[str | None, Any], where: str) -> PublishedFigure:
    if None in record or None in record.values():
        raise UsageError(f"{where}: a row has {len(COLUMNS)} entries; quote those that hold a comma")
    for column in COLUMNS:
        if column != "fp16_value" and not record[column].strip():
            raise UsageError(f"{where}: {column} is empty; a figure without it cannot be used")
    kind = _kind(record["metric"], where)
    value, fp16 = (_number(record[c], c, kind, where) for c in ("value", "fp16_value"))
    model = _SPELLINGS.get(record["model"], record["model"])
    return PublishedFigure(record["method"], model, record["setting"], record["metric"], value, fp16, record["source"])


def _kind(metric: str, where: str) -> str:
    for kind, names in (("perplexity", PERPLEXITIES), ("accuracy", ACCURACIES), ("speed", SPEEDS)):
        if metric in names:
            return kind
    raise UsageError(
        f"{where}: unknown metric {metric!r}; known are {', '.join([*PERPLEXITIES, *ACCURACIES, *SPEEDS])}"
    )


def _number(text: str, column: str, kind: str, where: str) -> float | None:
    if column == "fp16_value" and not text.strip():
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise UsageError(f"{where}: {column} is no number: {text!r}") from error
    low, high = _LIMITS[kind]
    if not low <= value <= high:  # also refuses NaN
        raise UsageError(f"{where}: {column} is {text}, and one of {kind} lies between {low:g} and {high:g}")
    return value


# --- choosing and comparing -------------------------------------------------------------------------------------------


def select(rows: Iterable[PublishedFigure], **wanted: Any) -> list[PublishedFigure]:
    """Rows whose attributes equal the given ones, or are among them where a list, tuple or set is given.

    >>> len(select(read_rows(",".join(COLUMNS) + "\\nRTN,OPT-13B,W4A16,c4_ppl,12.3,11.2,x\\n"), model=("OPT-13B", "OPT-6.7B")))
    1
    """

    def fits(row: PublishedFigure) -> bool:
        pairs = ((getattr(row, key), value) for key, value in wanted.items())
        return all(got in value if isinstance(value, list | tuple | set) else got == value for got, value in pairs)

    return [row for row in rows if fits(row)]


def comparable(rows: Sequence[PublishedFigure]) -> list[PublishedFigure]:
    """The rows, if all are of one model, metric and protocol.

    Raises:
        UsageError: they are not; the sentence says what differs.
    """
    for attribute in ("model", "metric", "protocol"):
        kinds = sorted({getattr(row, attribute) for row in rows})
        if len(kinds) > 1:
            raise UsageError(
                f"these rows differ in their {attribute} ({'; '.join(kinds)}); select one, or compare their delta_nll"
            )
    return list(rows)


def decimals(rows: Iterable[PublishedFigure]) -> dict[tuple[str, str], int]:
    """``(source, metric)`` -> digits after the point that the source prints: the most that any of its rows has."""
    most: dict[tuple[str, str], int] = {}
    for row in rows:
        for value in filter(None, (row.value, row.fp16)):
            digits = len(f"{value:.6f}".rstrip("0").partition(".")[2])
            most[row.source, row.metric] = max(most.get((row.source, row.metric), 0), digits)
    return most


def disagreements(rows: Iterable[PublishedFigure]) -> list[list[PublishedFigure]]:
    """Rows of two or more sources for one method, model, metric, protocol and number of bits, the furthest apart first.

    Distance is the ratio of the largest value to the smallest one.
    """
    cells: dict[tuple[Any, ...], list[PublishedFigure]] = {}
    for row in rows:
        if row.bits is not None:
            cells.setdefault((row.method, row.model, row.metric, row.protocol, row.bits), []).append(row)
    several = [cell for cell in cells.values() if len({row.source for row in cell}) > 1]
    return sorted(several, key=lambda cell: min(r.value for r in cell) / max(r.value for r in cell))


def coverage(
    rows: Iterable[PublishedFigure], methods: Sequence[str], models: Sequence[str], metric: str = "wikitext2_ppl"
) -> list[dict[str, Any]]:
    """A row a model: how many figures each method has in windows of 2,048, ``"other"`` where only elsewhere, or ``None``."""
    table = []
    of_metric = select(rows, metric=metric)
    for model in models:
        line: dict[str, Any] = {"model": model}
        for method in methods:
            found = select(of_metric, model=model, method=method)
            usual = len(select(found, protocol=WINDOWS_2048))
            line[method] = usual or ("other" if found else None)
        table.append(line)
    return table


def explorer_rows(rows: Iterable[PublishedFigure], models: Sequence[str]) -> list[list[Any]]:
    """Rows as the explorer ``published`` reads them: perplexities of ``models`` with bits and an FP16 value."""
    return [
        [
            r.model,
            r.metric,
            r.protocol == WINDOWS_2048,
            r.method,
            str(r.bits),
            r.bits.per_weight,
            r.bits.activations,
            r.value,
            r.fp16,
        ]
        for model in models
        for r in select(rows, model=model, metric=list(PERPLEXITIES))
        if r.fp16 is not None and r.bits is not None
    ]


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs.

    >>> ranks([0.3, 0.1, 0.3])
    [2.5, 1.0, 2.5]
    """
    order = sorted(values)
    return [order.index(value) + (order.count(value) + 1) / 2 for value in values]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation: the correlation of the :func:`ranks`.

    Raises:
        UsageError: fewer than three pairs, unequal lengths, or values that are all equal.

    >>> rank_correlation([1, 2, 3], [10, 30, 20])
    0.5
    """
    if len(a) != len(b) or len(a) < 3:
        raise UsageError(f"a rank correlation needs two lists of one length of at least 3, got {len(a)} and {len(b)}")
    centre = (len(a) + 1) / 2
    x, y = ([rank - centre for rank in ranks(values)] for values in (a, b))
    norm = math.sqrt(math.fsum(v * v for v in x) * math.fsum(v * v for v in y))
    if norm == 0:
        raise UsageError("a rank correlation needs values that differ")
    return math.fsum(p * q for p, q in zip(x, y, strict=True)) / norm


# --- ours beside theirs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A published configuration and the nearest one that this book measured on SmolLM2-135M.

    Attributes:
        method: as in ``published.csv``.
        setting: short, of the published side; groups of 128 there are groups of 64 here.
        settings: what the sources call it, exactly.
        ours: a row of the matrix of all methods (``lqedu.book.matrix.ROWS``); or where that has none so near, the stem of another
            result file and entries of the one row there.
        protocol: of the published rows.
    """

    method: str
    setting: str
    settings: tuple[str, ...]
    ours: str | tuple[str, Mapping[str, Any]]
    protocol: str = WINDOWS_2048

    @property
    def label(self) -> str:
        return f"{self.method} {self.setting}"

    @property
    def text(self) -> str:
        """Where ours is compared: on the text and in the windows of the sources if the matrix has it, else on ``sotu``.

        All strided pairs stay on ``sotu``, so that a comparison among them is of one text.
        """
        return "wikitext2" if isinstance(self.ours, str) and self.protocol == WINDOWS_2048 else "sotu"


_QUAROT = {"method": "quarot", "rounding": "gptq", "activation_clip": 0.9, "kv_clip": 0.95, "seed": 0}
_SPIN = {"method": "spinquant", "steps": 100, "online": True}
_STRIDE = "[eval: HQQ protocol, windows of 1024, stride 512]"
_HQQ = "axis=0, 8-bit scales(g128)+zeros " + _STRIDE
_NATURAL = {"method": "gptq", "group_size": 64, "order": "natural"}

#: Every method of the book with a published perplexity of a Llama, and what we measured that is nearest to it.
PAIRS: tuple[Pair, ...] = (
    Pair("RTN", "W4 g128", ("W4A16g128",), "rtn_w4_g64"),
    Pair("RTN", "W3 g128", ("W3A16g128",), "rtn_w3_g64"),
    Pair("RTN", "W4", ("W4A16KV16",), "rtn_w4_channel"),
    Pair("GPTQ", "W4 g128", ("W4A16g128", "W4A16g128 (GPTQ-R)"), "gptq_w4_g64"),
    Pair("GPTQ", "W3 g128", ("W3A16g128", "W3A16g128 (GPTQ-R)"), "gptq_w3_g64"),
    Pair("GPTQ", "W4", ("W4A16KV16",), "gptq_w4_channel"),
    Pair("AWQ", "W4 g128", ("W4A16g128",), "awq_w4_g64"),
    Pair("AWQ", "W3 g128", ("W3A16g128",), "awq_w3_g64"),
    Pair("SmoothQuant", "W8A8", ("W8A8", "W8A8 alpha=0.85", "W8A8 alpha=0.8"), "smoothquant_w8a8"),
    Pair("RTN", "W4A4", ("W4A4KV16",), ("quarot_smollm2", {"name": "W4A4", "method": "rtn"})),
    Pair("RTN", "W4A4KV4", ("W4A4KV4",), "rtn_w4a4kv4"),
    Pair("QuaRot", "W4A4", ("W4A4", "W4A4KV16"), ("quarot_smollm2", {"name": "W4A4"} | _QUAROT)),
    Pair("QuaRot", "W4A4KV4", ("W4A4KV4",), "quarot_w4a4kv4"),
    Pair("SpinQuant", "W4A4", ("W4A4KV16", "W4A4 (calibrated on WikiText-2)"), ("spinquant_smollm2", {"name": "W4A4"} | _SPIN)),
    Pair("SpinQuant", "W4A4KV4", ("W4A4KV4",), "spinquant_w4a4kv4"),
    Pair("QQQ", "W4A8", ("W4A8 per-channel",), "qqq_w4a8_channel"),
    Pair("QQQ", "W4A8 g128", ("W4A8g128",), "qqq_w4a8_g64"),
    Pair("QoQ", "W4A8KV4", ("W4A8KV4 per-channel",), "qoq_w4a8kv4_channel"),
    Pair("QoQ", "W4A8KV4 g128", ("W4A8KV4g128",), "qoq_w4a8kv4_g64"),
)  # fmt: skip

#: The same within the protocol in which HQQ is published, with groups of 64 on both sides.
STRIDED_PAIRS: tuple[Pair, ...] = (
    Pair("HQQ", "W8 g64", (f"W8A16g64 {_HQQ}",), "hqq_w8_g64", STRIDED),
    Pair("HQQ", "W4 g64", (f"W4A16g64 {_HQQ}",), ("hqq_smollm2", {"method": "hqq", "bits": 4, "axis": 0}), STRIDED),
    Pair("HQQ", "W3 g64", (f"W3A16g64 {_HQQ}",), ("hqq_smollm2", {"method": "hqq", "bits": 3, "axis": 0}), STRIDED),
    Pair("AWQ", "W4 g64", (f"W4A16g64 {_STRIDE}",), "awq_w4_g64", STRIDED),
    Pair("GPTQ", "W4 g64", (f"W4A16g64 sym no act-order {_STRIDE}",), ("weight_only_smollm2", {"bits": 4} | _NATURAL), STRIDED),
    Pair("GPTQ", "W3 g64", (f"W3A16g64 sym no act-order {_STRIDE}",), ("weight_only_smollm2", {"bits": 3} | _NATURAL), STRIDED),
)  # fmt: skip


@dataclass(frozen=True)
class OurFigure:
    """What a configuration adds to the loss of SmolLM2-135M.

    Attributes:
        delta_nll, stderr: nats a token, paired by window, and the standard error.
        text: "wikitext2", the full test text in windows of 2,048; or "sotu", 256 windows of 512.
        settings: of the method, as the result file has them.
        source: the file.
    """

    delta_nll: float
    stderr: float
    text: str
    settings: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class Compared:
    """A pair with its numbers: ``theirs`` are the published rows, ``ours`` is measured on the text of the pair."""

    pair: Pair
    theirs: tuple[PublishedFigure, ...]
    ours: OurFigure

    @property
    def published_nll(self) -> float:
        """Mean ΔNLL of the sources."""
        return math.fsum(row.delta_nll for row in self.theirs) / len(self.theirs)

    @property
    def our_nll(self) -> float:
        return self.ours.delta_nll


def compare(rows: Iterable[PublishedFigure], model: str, pairs: Sequence[Pair] = PAIRS) -> list[Compared]:
    """The pairs of which a model has a published perplexity on WikiText-2, with both numbers.

    Raises:
        UsageError: a pair whose row is missing from our result file, or is there more than once.
    """
    of_model = [row for row in select(rows, model=model, metric="wikitext2_ppl") if row.fp16 is not None]
    compared = []
    for pair in pairs:
        theirs = select(of_model, method=pair.method, protocol=pair.protocol, setting=pair.settings)
        if theirs:
            compared.append(Compared(pair, tuple(theirs), our_figure(pair)))
    return compared


def our_figure(pair: Pair, text: str | None = None) -> OurFigure:
    """Our side of a pair; on another text than the pair's own, if one asks.

    Raises:
        UsageError: the matrix has no such row; the result file has none or several; or it has another text only.
    """
    text = pair.text if text is None else text
    if isinstance(pair.ours, str):
        numbers = row_numbers(MODEL, pair.ours)
        return OurFigure(
            numbers[f"{text}_delta"], numbers[f"{text}_delta_stderr"], text, numbers["options"], f"{_BENCH}/{pair.ours}"
        )
    if text != "sotu":
        raise UsageError(f"{pair.label} was measured on sotu alone; the matrix has no such row")
    stem, where = pair.ours
    missing = object()
    found = [r for r in results(stem)["values"] if all(r.get(key, missing) == v for key, v in where.items())]
    if len(found) != 1:
        raise UsageError(f"{stem}.json has {len(found)} rows for {pair.label}; one is needed: {dict(where)}")
    return OurFigure(found[0]["delta_nll"], found[0]["delta_stderr"], text, found[0], stem)
