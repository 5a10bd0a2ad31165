"""Every method on one bench: which rows there are, and one table from the result files of a model; ``22-side-by-side``.

``python -m lqedu.book.measure_matrix MODEL`` writes a result file a row into ``book/results/matrix/<model>/<row>.json``. They hold
what was measured and no difference of two rows: the loss of every window of text and, as bits, whether each item of a task was
answered right. Differences and their standard errors are computed here, window by window and item by item. Needs no torch.
"""

import fnmatch
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lqedu._statistics import finite, mean_and_error
from lqedu.book.display import Table, table
from lqedu.book.results import read_result, result_folders
from lqedu.errors import UsageError

TEXTS = {"wikitext2": "WikiText-2", "sotu": "sotu"}
TASKS = {"piqa": "PIQA", "arc_easy": "ARC-E", "arc_challenge": "ARC-C", "hellaswag": "HellaSwag"}
BATCHES = (1, 16)  # texts at once, of the decode columns
DENSE = "fp"

#: What all files of a table must agree in: entries of ``configuration``.
SHARED = ("model", "weights_sha256", "dtype", "device", "texts", "tasks", "decode")

_EXACT = 2e-6  # samples are stored with six digits


@dataclass(frozen=True)
class MatrixRow:
    """One method at one setting.

    Attributes:
        name: of the row and of its file.
        title: for people.
        method: as the registry names it; ``None`` is the model as it is.
        options: hyper-parameters.
        opt_options: those that OPT takes instead.
        baseline: the row that does the least with the same bits.
        windows: of calibration text.
    """

    name: str
    title: str
    method: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    opt_options: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = DENSE
    windows: int = 32

    def options_for(self, model_type: str) -> dict[str, Any]:
        """The hyper-parameters for a model of this type."""
        return {**self.options, **(self.opt_options if model_type == "opt" else {})}


def _rows() -> Iterator[MatrixRow]:
    yield MatrixRow(DENSE, "FP", None)
    sizes = {"g64": 64, "channel": None}
    for method, title, more in (
        ("rtn", "RTN", {}),
        ("gptq", "GPTQ", {"order": "activation"}),  # chapter 04: better at every width
        ("awq", "AWQ", {}),
        ("hqq", "HQQ", {}),
    ):
        for bits in (8, 4, 3, 2):
            for size, group_size in sizes.items():
                options = {"bits": bits, "group_size": group_size, **more}
                baseline = DENSE if method == "rtn" else f"rtn_w{bits}_{size}"
                yield MatrixRow(
                    f"{method}_w{bits}_{size}", f"{title} W{bits} {size}", method, options, baseline=baseline
                )
    for bits in (8, 4, 3, 2):
        yield MatrixRow(f"quip_w{bits}", f"QuIP W{bits}", "quip", {"bits": bits}, baseline=f"rtn_w{bits}_channel")

    naive = {"group_size": None, "symmetric": True}
    yield MatrixRow("rtn_w8a8", "RTN W8A8", "rtn", {"bits": 8, **naive, "activation_bits": 8})
    static = {"activation": "static"}
    yield MatrixRow("rtn_w8a8_static", "RTN W8A8 static", "rtn", {"bits": 8, **naive, "activation_bits": 8, **static})
    for kv, kv_bits in (("", None), ("kv4", 4)):
        for size, group_size in sizes.items():
            options = {"bits": 4, **naive, "group_size": group_size, "activation_bits": 8, "kv_bits": kv_bits}
            yield MatrixRow(f"rtn_w4a8{kv}_{size}", f"RTN W4A8{kv.upper()} {size}", "rtn", options)
    yield MatrixRow("rtn_w4a4kv4", "RTN W4A4KV4", "rtn", {"bits": 4, **naive, "activation_bits": 4, "kv_bits": 4})

    alpha = {"alpha": 0.8}, {"alpha": 0.5}  # the paper's for Llama and its default, for OPT
    yield MatrixRow("smoothquant_w8a8", "SmoothQuant W8A8", "smoothquant", *alpha, baseline="rtn_w8a8")
    yield MatrixRow(
        "smoothquant_w8a8_static", "SmoothQuant W8A8 static", "smoothquant", {**alpha[0], **static}, alpha[1],
        baseline="rtn_w8a8_static",
    )  # fmt: skip
    w4a4 = {"baseline": "rtn_w4a4kv4"}
    yield MatrixRow("quarot_w4a4kv4_nearest", "QuaRot W4A4KV4, nearest", "quarot", {"rounding": "nearest"}, **w4a4)
    yield MatrixRow("quarot_w4a4kv4", "QuaRot W4A4KV4", "quarot", **w4a4)
    yield MatrixRow(
        "spinquant_w4a4kv4", "SpinQuant W4A4KV4", "spinquant", {"windows_per_step": 16}, windows=256, **w4a4
    )  # tokens a step: half the paper's
    for size, group_size in sizes.items():
        for move, words in (("smooth", ""), ("rotate", ", rotated")):
            suffix = "" if move == "smooth" else "_rotated"
            yield MatrixRow(
                f"qqq_w4a8_{size}{suffix}", f"QQQ W4A8 {size}{words}", "qqq", {"group_size": group_size, "move": move},
                baseline=f"rtn_w4a8_{size}",
            )  # fmt: skip
        yield MatrixRow(
            f"qoq_w4a8kv4_{size}", f"QoQ W4A8KV4 {size}", "qoq", {"group_size": group_size},
            baseline=f"rtn_w4a8kv4_{size}",
        )  # fmt: skip
    yield MatrixRow("fp8_tensor_static", "FP8 tensor, static", "fp8", {"granularity": "tensor", **static})
    yield MatrixRow("fp8_channel_token", "FP8 channel, token", "fp8")
    yield MatrixRow("fp8_block_group", "FP8 block, group", "fp8", {"granularity": "block", "activation": "group"})


ROWS: dict[str, MatrixRow] = {row.name: row for row in _rows()}


def select(patterns: str) -> list[MatrixRow]:
    """Rows by name, in the order of the table; patterns as a shell has them, separated by commas, ``-`` for ``_`` if one likes.

    Raises:
        UsageError: a pattern that fits no row.

    >>> [row.name for row in select("fp,quip-w?")]
    ['fp', 'quip_w8', 'quip_w4', 'quip_w3', 'quip_w2']
    """
    words = [word.strip().replace("-", "_") for word in patterns.split(",") if word.strip()]
    unknown = [word for word in words if not fnmatch.filter(ROWS, word)]
    if unknown or not words:
        raise UsageError(f"no row is called {', '.join(unknown) or 'nothing'}; there are {', '.join(ROWS)}")
    return [row for row in ROWS.values() if any(fnmatch.fnmatchcase(row.name, word) for word in words)]


def slug(model: str) -> str:
    """The folder of a model's files, from its Hub id or name.

    >>> slug("meta-llama/Llama-2-7b-hf"), slug("smollm2-135m")
    ('llama_2_7b_hf', 'smollm2_135m')
    """
    return re.sub(r"[^a-z0-9]+", "_", model.rstrip("/").rpartition("/")[2].lower()).strip("_")


# --- whether each item was answered right -----------------------------------------------------------------------------


def pack_bits(flags: Sequence[bool]) -> str:
    """Flags as hexadecimal digits, four each, the first flag the highest bit; zeros fill up the last digit.

    >>> pack_bits([True, False, False, True, True]), unpack_bits("98", 5)
    ('98', [True, False, False, True, True])
    """
    digits = -(-len(flags) // 4)
    bits = "".join("1" if flag else "0" for flag in flags).ljust(4 * digits, "0")
    return f"{int(bits or '0', 2):0{digits}x}" if digits else ""


def unpack_bits(text: str, count: int) -> list[bool]:
    """Inverse of :func:`pack_bits`.

    Raises:
        UsageError: digits that do not hold so many flags.
    """
    if len(text) != -(-count // 4) or not re.fullmatch(r"[0-9a-f]*", text):
        raise UsageError(f"{len(text)} characters are no hexadecimal digits of {count} flags")
    bits = f"{int(text or '0', 16):0{4 * len(text)}b}"
    if "1" in bits[count:]:
        raise UsageError(f"flags behind the last of {count} are set")
    return [bit == "1" for bit in bits[:count]]


# --- the result files of a model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """The result files of one model.

    Attributes:
        model: its Hub id or name.
        files: a validated result file a row, in the order of the table.
    """

    model: str
    files: dict[str, dict[str, Any]]

    @property
    def folder(self) -> str:
        """Where the files are, in the repository."""
        return f"book/results/matrix/{slug(self.model)}"

    @property
    def commits(self) -> list[str]:
        """Of the code that measured, ``+`` where files differed from it; one, unless the reader allowed more."""
        return sorted({file["commit"] + ("+" if file["dirty"] else "") for file in self.files.values()})

    def part(self, row: str, name: str, **wanted: Any) -> dict[str, Any]:
        """The line ``name`` of a row's file; empty where it is missing or says why there is no number.

        Raises:
            UsageError: the table has no such row.
        """
        for line in self._lines(row):
            if line["name"] == name and all(line.get(key) == value for key, value in wanted.items()):
                return {} if "reason" in line else line
        return {}

    def reason(self, row: str) -> str | None:
        """Why a row has no numbers."""
        return next((line["reason"] for line in self._lines(row) if line["name"] == "refused"), None)

    def _lines(self, row: str) -> list[dict[str, Any]]:
        if row not in self.files:
            raise UsageError(f"no row {row!r}; the table has {', '.join(self.files)}")
        return self.files[row]["values"]

    def summary(self) -> list[dict[str, Any]]:
        """A dict of numbers a row, ``None`` where there is none.

        ``name``, ``title``, ``method``, ``options``, ``bits``, ``baseline``, ``reason``; ``bits_per_weight``, ``quantize_seconds``, ``peak_bytes``,
        ``tokens_per_s_1``, ``tokens_per_s_16``; of a text ``wikitext2_ppl``, ``_nll``, ``_stderr``, ``_delta`` and ``_delta_stderr``
        (NLL less that of the dense model, by window), ``_gain`` and ``_gain_stderr`` (less that of the baseline); of a task
        ``piqa_acc``, ``_acc_stderr``, ``_acc_delta``, ``_acc_delta_stderr``, the same with ``acc_norm``, and ``mean_acc_norm`` and so on
        over all tasks.
        """
        return [self._numbers(name) for name in self.files]

    def _numbers(self, name: str) -> dict[str, Any]:
        about, row = self.files[name]["configuration"], ROWS.get(name)
        numbers: dict[str, Any] = {
            "name": name,
            "title": name if row is None else row.title,
            "method": about["method"],
            "options": about["options"],
            "bits": about["options"].get("bits"),
            "baseline": about["baseline"],
            "reason": self.reason(name),
            "bits_per_weight": self.part(name, "storage").get("bits_per_weight"),
            "quantize_seconds": self.part(name, "quantize").get("seconds"),
            "peak_bytes": self.part(name, "quantize").get("peak_bytes"),
        }
        for batch in BATCHES:
            numbers[f"tokens_per_s_{batch}"] = self.part(name, "decode", batch=batch).get("tokens_per_s")
        for text in TEXTS:
            line = self.part(name, text)
            numbers |= {f"{text}_{key}": line.get(key) for key in ("ppl", "nll", "stderr")}
            for key, other in (("delta", DENSE), ("gain", about["baseline"])):
                moved = self._moved(line.get("samples"), other, text)
                numbers |= {f"{text}_{key}": moved[0], f"{text}_{key}_stderr": moved[1]}
        for kind in ("acc", "acc_norm"):
            for task in TASKS:
                line = self.part(name, task)
                moved = self._moved(_flags(line, kind), DENSE, task, kind)
                numbers |= {f"{task}_{kind}": line.get(kind), f"{task}_{kind}_stderr": line.get(f"{kind}_stderr")}
                numbers |= {f"{task}_{kind}_delta": moved[0], f"{task}_{kind}_delta_stderr": moved[1]}
            numbers[f"mean_{kind}"] = _mean([numbers[f"{task}_{kind}"] for task in TASKS])
            numbers[f"mean_{kind}_delta"] = _mean([numbers[f"{task}_{kind}_delta"] for task in TASKS])
            errors = [numbers[f"{task}_{kind}_delta_stderr"] for task in TASKS]  # tasks are independent
            numbers[f"mean_{kind}_delta_stderr"] = None if None in errors else math.hypot(*errors) / len(errors)
        return numbers

    def _moved(
        self, mine: Sequence[float] | None, other: str, name: str, kind: str | None = None
    ) -> tuple[float | None, float | None]:
        if mine is None or other not in self.files:
            return None, None
        line = self.part(other, name)
        theirs = line.get("samples") if kind is None else _flags(line, kind)
        if theirs is None:
            return None, None
        return _mean_and_error([float(a) - float(b) for a, b in zip(mine, theirs, strict=True)])


def read_matrix(
    model: str,
    *,
    rows: Iterable[str] | None = None,
    folder: str | Path | None = None,
    same_commit: bool = True,
) -> Matrix:
    """All result files of a model as one table.

    Args:
        model: Hub id or name; its folder is found as :func:`lqedu.book.results` finds a file.
        rows: names of the rows that the table needs; all of :data:`ROWS` by default.
        folder: where the model's files are, instead of the search.
        same_commit: refuse files that different commits measured.

    Raises:
        UsageError: a row is missing, a file breaks the schema, lacks a line, contradicts its own samples, or was measured
            on another model, text, task or device than the others, or by another commit; the sentence names it. Or the
            folder holds another model.
    """
    if isinstance(rows, str):
        raise UsageError(f"rows is a list of names, got the text {rows!r}; pass rows=[{rows!r}]")
    wanted = list(ROWS if rows is None else rows)
    place = _find(model) if folder is None else Path(folder)
    missing = [name for name in wanted if not (place / f"{name}.json").is_file()]
    if missing or not wanted:
        raise UsageError(
            f"{len(missing)} of {len(wanted)} rows of {model} are missing: {', '.join(missing) or 'none was asked for'}; "
            f"measure them with python -m lqedu.book.measure_matrix {model} --rows {','.join(missing)}"
        )
    files = {name: read_result(place / f"{name}.json") for name in wanted}
    _check_same(model, files, same_commit)
    held = files[wanted[0]]["configuration"].get("model", model)
    if slug(held) != slug(model):
        raise UsageError(f"the files in {place} are of {held}, not {model}; pass that name, or another folder")
    for name, file in files.items():
        if found := problems(file):
            raise UsageError(f"the row {name} of {model} contradicts itself: {'; '.join(found)}")
    return Matrix(model, files)


@cache
def row_numbers(model: str, name: str) -> Mapping[str, Any]:
    """One row of :meth:`Matrix.summary`, from its own file and that of the dense model alone: NLL and accuracy against FP.

    A baseline's file is not read, so that ``_gain`` is ``None`` for rows with another baseline than FP. The two files may be of
    different commits: a row whose kernel was mended is measured again alone.

    Raises:
        UsageError: as :func:`read_matrix`.
    """
    return MappingProxyType(read_matrix(model, rows=dict.fromkeys((DENSE, name)), same_commit=False).summary()[-1])


#: What a line of a row's file holds, by its name, unless it says why there is no number.
_HOLDS = {
    "storage": ("bits_per_weight",),
    "quantize": ("seconds", "median"),
    "decode": ("batch", "tokens_per_s", "samples"),
    **dict.fromkeys(TEXTS, ("nll", "stderr", "ppl", "samples")),
    **dict.fromkeys(
        TASKS,
        ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "correct", "correct_norm", "items", "items_sha256"),
    ),
}


def _missing_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines of the bench that a row's file does not have; a refused row needs none."""
    there = [(line.get("name"), line.get("batch")) for line in result["values"]]
    names = {name for name, _ in there}
    if "refused" in names:
        return []
    dense = result["configuration"]["method"] == "dense"
    wanted = [name for name in _HOLDS if name != "decode" and not (dense and name == "quantize")]
    lacks = [f"lacks the line {name}" for name in wanted if name not in names]
    return lacks + [f"lacks the line decode of batch {n}" for n in BATCHES if ("decode", n) not in there]


def problems(result: Mapping[str, Any]) -> list[str]:
    """What the schema cannot know: what a row's file lacks, and summaries that its samples and bits contradict."""
    found = []

    def same(where: str, stored: Any, computed: float | None) -> None:
        if computed is None or stored is None:
            agrees = computed is stored
        else:
            agrees = math.isclose(stored, computed, rel_tol=_EXACT, abs_tol=_EXACT)
        if not agrees:
            found.append(f"{where} is {stored}, its samples say {computed}")

    about = result["configuration"]
    if lost := [key for key in (*SHARED, "row", "method", "options", "baseline") if key not in about]:
        return [f"configuration lacks {', '.join(lost)}"]
    if about["row"] != result["name"]:
        found.append(f"the file {result['name']} holds the row {about['row']}")
    found += _missing_lines(result)
    for line in result["values"]:
        name = line.get("name")
        if "reason" in line:
            continue
        if lost := [key for key in _HOLDS.get(name, ()) if key not in line]:
            found.append(f"{name} lacks {', '.join(lost)}")
            continue
        if name in TEXTS:
            nll, stderr = _mean_and_error(line["samples"])
            same(f"{name} nll", line["nll"], nll)
            same(f"{name} stderr", line["stderr"], stderr)
            ppl = None if line["nll"] >= LARGEST_NLL else math.exp(line["nll"])
            same(f"{name} ppl", line["ppl"], ppl)
            if len(line["samples"]) != about["texts"].get(name, {}).get("windows"):
                found.append(f"{name} has {len(line['samples'])} windows, the configuration says otherwise")
        elif name in TASKS:
            for kind in ("acc", "acc_norm"):
                try:
                    mean, stderr = _mean_and_error([float(flag) for flag in _flags(line, kind)])
                except UsageError as error:
                    found.append(f"{name} {kind}: {error}")
                    continue
                same(f"{name} {kind}", line[kind], mean)
                same(f"{name} {kind}_stderr", line[f"{kind}_stderr"], stderr)
            if {key: line[key] for key in ("items", "items_sha256")} != about["tasks"].get(name):
                found.append(f"{name} was measured on {line['items']} items, the configuration names others")
        elif name == "quantize":
            same("quantize seconds", line["seconds"], line["median"])
        elif name == "decode":
            middle = sorted(line["samples"])[len(line["samples"]) // 2]  # as lqedu.evaluation.throughput takes it
            same("decode tokens_per_s", line["tokens_per_s"], line["batch"] / middle)
    return found


LARGEST_NLL = 700.0  # beyond it a perplexity is no float


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; ``None``, as JSON has it, for a single value."""
    mean, error = mean_and_error(values)
    return mean, finite(error)


def _find(model: str) -> Path:
    places = [folder / "matrix" / slug(model) for folder in result_folders()]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise UsageError(
            f"no results of {model} (book/results/matrix/{slug(model)}); measure them with "
            f"python -m lqedu.book.measure_matrix {model}"
        )
    return found


def _check_same(model: str, files: Mapping[str, Mapping[str, Any]], same_commit: bool) -> None:
    first = next(iter(files))
    for name, file in files.items():
        for key in SHARED:
            mine, theirs = file["configuration"].get(key), files[first]["configuration"].get(key)
            if mine != theirs:
                raise UsageError(
                    f"the rows {first} and {name} of {model} differ in {key}: {_short(theirs)} and {_short(mine)}; "
                    "measure one of them again"
                )
        mine, theirs = _gpu(file), _gpu(files[first])
        if mine != theirs:
            raise UsageError(
                f"the rows {first} and {name} of {model} were measured on {theirs} and {mine}; "
                "times of different machines are no table"
            )
    if same_commit:
        measured = {name: (file["commit"], file["dirty"]) for name, file in files.items()}
        if other := [name for name, commit in measured.items() if commit != measured[first]]:
            raise UsageError(
                f"the rows {first} and {other[0]} of {model} were measured by different commits; measure one of them again, "
                "or read them with same_commit=False"
            )


def _gpu(file: Mapping[str, Any]) -> str | None:
    """The GPU of a row, which uses one, however many the machine has ("4 x NVIDIA H100 80GB HBM3")."""
    name = file["host"]["gpu"]
    return None if name is None else re.sub(r"^\d+ x ", "", name)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 200 else f"{text[:200]}…"


def _flags(line: Mapping[str, Any], kind: str) -> list[bool] | None:
    if not line:
        return None
    return unpack_bits(line["correct" if kind == "acc" else "correct_norm"], line["items"])


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


# --- tables -----------------------------------------------------------------------------------------------------------


def _number(key: str, form: str, factor: float = 1.0):
    return lambda row: None if row[key] is None else format(factor * row[key], form)


def _with_error(key: str, form: str, factor: float = 1.0):
    def show(row: Mapping[str, Any]) -> str | None:
        if row[key] is None:
            return None
        error = row[f"{key}_stderr"]
        digits = form.lstrip("+")
        return format(factor * row[key], form) + ("" if error is None else f" ± {factor * error:{digits}}")

    return show


#: Columns by key: the header, and what a cell shows of a row of :meth:`Matrix.summary`.
COLUMNS = {
    "title": ("method", lambda row: row["title"]),
    "bits_per_weight": ("bits per weight", _number("bits_per_weight", ".3f")),
    **{f"{text}_ppl": (f"{title} perplexity", _number(f"{text}_ppl", ",.2f")) for text, title in TEXTS.items()},
    **{
        f"{text}_delta": (f"{title}, NLL against FP", _with_error(f"{text}_delta", "+.4f"))
        for text, title in TEXTS.items()
    },
    **{
        f"{text}_gain": (f"{title}, NLL against baseline", _with_error(f"{text}_gain", "+.4f"))
        for text, title in TEXTS.items()
    },
    **{f"{task}_acc": (f"{title} acc, %", _number(f"{task}_acc", ".1f", 100)) for task, title in TASKS.items()},
    **{
        f"{task}_acc_norm": (f"{title} acc_norm, %", _number(f"{task}_acc_norm", ".1f", 100))
        for task, title in TASKS.items()
    },
    **{
        f"{task}_acc_norm_delta": (f"{title} against FP, points", _with_error(f"{task}_acc_norm_delta", "+.1f", 100))
        for task, title in TASKS.items()
    },
    "mean_acc_norm": ("mean acc_norm, %", _number("mean_acc_norm", ".1f", 100)),
    "mean_acc_norm_delta": ("mean against FP, points", _with_error("mean_acc_norm_delta", "+.2f", 100)),
    "quantize_seconds": ("quantization, s", _number("quantize_seconds", ".1f")),
    "peak_bytes": ("peak memory, GB", _number("peak_bytes", ".2f", 1e-9)),
    **{
        f"tokens_per_s_{batch}": (f"tokens/s, batch {batch}", _number(f"tokens_per_s_{batch}", ",.0f"))
        for batch in BATCHES
    },
    "reason": ("why not", lambda row: row["reason"]),
}
_NOTHING = "–"


def matrix_table(matrix: Matrix, columns: Iterable[str], *, caption: str, rows: Iterable[str] | None = None) -> Table:
    """A table of a page; its caption says which files it is from, by which :func:`disagreements` finds them again.

    Args:
        matrix: from :func:`read_matrix`.
        columns: keys of :data:`COLUMNS`, behind the method's title.
        caption: what it shows.
        rows: names of the rows to show, in this order; all by default.

    Raises:
        UsageError: an unknown column or row.
    """
    keys = ["title", *columns]
    if unknown := [key for key in keys if key not in COLUMNS]:
        raise UsageError(f"no column {', '.join(unknown)}; there are {', '.join(COLUMNS)}")
    numbers = {row["name"]: row for row in matrix.summary()}
    names = list(numbers if rows is None else rows)
    if unknown := [name for name in names if name not in numbers]:
        raise UsageError(f"no row {', '.join(unknown)}; the table has {', '.join(numbers)}")
    cells = [[_cell(numbers[name], key) for key in keys] for name in names]
    numeric = [key not in ("title", "reason") for key in keys]
    return Table([COLUMNS[key][0] for key in keys], cells, numeric, f"{caption} ({matrix.folder})")


def disagreements(page: str, matrix: Matrix) -> list[str]:
    """Cells of a page's tables from this model's files, in HTML, that show something else than the files say now."""
    numbers = {row["title"]: row for row in matrix.summary()}
    keys = {header: key for key, (header, _) in COLUMNS.items()}
    found = []
    for caption, (headers, *lines) in _tables(page):
        if f"({matrix.folder})" not in caption:
            continue
        if unknown := [header for header in headers if header not in keys]:
            found.append(f"{caption}: no column is called {', '.join(unknown)}")
            continue
        for line in lines:
            if line[0] not in numbers:
                found.append(f"{caption}: no row is called {line[0]}")
                continue
            for header, shown in zip(headers, line, strict=True):
                if shown != (says := _cell(numbers[line[0]], keys[header])):
                    found.append(f"{caption}: {line[0]}, {header} is {shown}, the files say {says}")
    return found


def answers_table(caption: str | None = None) -> Table:
    """The summary of all methods, generated from their classes: what they quantize, their answers, and what these cost."""
    from lqedu.methods import available

    lines = [
        {
            "method": cls.title,
            "quantizes": ", ".join(cls.quantizes),
            "grid": cls.answers.grid,
            "move": cls.answers.move,
            "round": cls.answers.round,
            "run": cls.answers.run,
            "calibration": cls.answers.calibration,
            "online": ", ".join(cls.answers.online),
        }
        for cls in available().values()
    ]
    return table(lines, caption=caption)


def _cell(row: Mapping[str, Any], key: str) -> str:
    shown = COLUMNS[key][1](row)
    return _NOTHING if shown is None else shown


class _Reader(HTMLParser):
    """Captions and cells of the tables of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[tuple[list[str], list[list[str]]]] = []
        self._open: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.tables.append(([""], []))
        elif tag == "tr" and self.tables:
            self.tables[-1][1].append([])
        elif tag == "caption" and self.tables:
            self._open = self.tables[-1][0]
        elif tag in ("th", "td") and self.tables and self.tables[-1][1]:
            self._open = self.tables[-1][1][-1]
            self._open.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td", "caption"):
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._open[-1] += data


def _tables(page: str) -> list[tuple[str, list[list[str]]]]:
    reader = _Reader()
    reader.feed(page)
    return [(caption[0], lines) for caption, lines in reader.tables if lines]
