"""The matrix of all methods, measured: ``python -m lqedu.book.measure_matrix smollm2-135m --device cuda``.

One result file a row (``book/results/matrix/<model>/<row>.json``, written when the row is done), so that an interrupted run goes
on, rows can be measured anew alone, and several GPUs share them::

    for i in 0 1 2 3; do
        CUDA_VISIBLE_DEVICES=$i python -m lqedu.book.measure_matrix smollm2-135m --device cuda --part $((i + 1))/4 &
    done; wait

``--dry-run`` says which rows are left and about how long they take. ``lqedu.book.matrix`` has the rows, and reads the files.
"""

import gc
import hashlib
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import lqedu
from lqedu.book.matrix import BATCHES, LARGEST_NLL, TASKS, MatrixRow, pack_bits, select, slug
from lqedu.book.measure import CALIBRATION, EVALUATION
from lqedu.book.results import origin, read_result, write_result
from lqedu.calibration.corpus import wikitext2_text
from lqedu.checkpoint.card import shown_name
from lqedu.errors import GridError, LqeduError, MissingDependencyError, UsageError
from lqedu.evaluation import Item, load_task, score
from lqedu.evaluation.perplexity import windows_sha256
from lqedu.evaluation.roofline import ModelShape
from lqedu.evaluation.throughput import measure_model
from lqedu.methods import Method, build
from lqedu.models import weights_sha256
from lqedu.models.anatomy import linears
from lqedu.runtime import QuantLinear
from lqedu.runtime.decoder import decoder_of
from lqedu.runtime.linear import quantized_linears
from lqedu.runtime.online import online_work
from lqedu.runtime.packed import pack_layer

LENGTHS = {"wikitext2": 2048, "sotu": EVALUATION["length"]}
COUNTS = {"wikitext2": None, "sotu": EVALUATION["windows"]}  # None: all there are
CONTEXT, STEPS = 128, 20  # of the decode columns
OUT = Path("book/results/matrix")
IDENTITY = (
    "row",
    "method",
    "options",
    "model",
    "weights_sha256",
    "dtype",
    "device",
    "calibration",
    "texts",
    "tasks",
    "decode",
)

Line = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Less than everything, to try the run out; ``None`` is all. A file says what it was measured on, and files that differ do not mix.

    Attributes:
        windows: of each text.
        items: of each task.
        length: tokens of a window.
    """

    windows: int | None = None
    items: int | None = None
    length: int | None = None


@dataclass(frozen=True, eq=False)
class Setting:
    """What all rows of a model have in common.

    Attributes:
        name: of the model, as files show it.
        model, tokenizer: dense.
        texts: windows of tokens.
        tasks: items.
        calibration_text: of which each row takes its windows.
        tokens_per_batch: read at once; sets speed and memory.
        shared: the entries of ``configuration`` that all files must agree in.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    texts: Mapping[str, Tensor]
    tasks: Mapping[str, Sequence[Item]]
    calibration_text: str
    tokens_per_batch: int
    shared: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.get_input_embeddings().weight.device

    def calibration(self, row: MatrixRow) -> dict[str, Any]:
        """What a row is calibrated on, for its file."""
        return {**CALIBRATION, "windows": row.windows, "length": self._calibration_length()}

    def windows(self, row: MatrixRow) -> Tensor:
        """The calibration windows of a row."""
        about = self.calibration(row)
        return lqedu.token_windows(
            self.tokenizer, self.calibration_text, length=about["length"], count=about["windows"], seed=about["seed"]
        )

    def configuration(self, row: MatrixRow) -> dict[str, Any]:
        """What the file of a row says of how it was measured; all of :data:`IDENTITY` and more."""
        method = method_of(row, self.model.config.model_type)
        return {
            "row": row.name,
            "title": row.title,
            "method": "dense" if method is None else method.name,
            "options": {} if method is None else method.options(),
            "baseline": row.baseline,
            **self.shared,
            "calibration": self.calibration(row) if method is not None and method.uses_calibration else None,
            "tokens_per_batch": self.tokens_per_batch,
            "threads": torch.get_num_threads(),
        }

    def _calibration_length(self) -> int:
        return min(CALIBRATION["length"], self.shared["positions"])


def open_setting(
    model: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    limits: Limits = Limits(),
    wikitext2: Path | None = None,
    tasks_folder: Path | None = None,
    tokens_per_batch: int | None = None,
    name: str | None = None,
) -> Setting:
    """Load a model, both texts and all tasks.

    Args:
        model: as :func:`lqedu.load_model` takes it.
        device, dtype: of the model.
        limits: to try the run out.
        wikitext2: a local ``wiki.test.raw`` in place of the Hub's.
        tasks_folder: with ``piqa.jsonl`` and so on, in place of the Hub's.
        tokens_per_batch: read at once; by default what suits the device.
        name: of the model in the files, where it is a folder of this machine.

    Raises:
        UsageError, MissingDependencyError: as the loaders; a task without a file in the folder.
    """
    texts = {
        "wikitext2": lqedu.load_corpus("wikitext2", split="evaluation")
        if wikitext2 is None
        else wikitext2_text(wikitext2),
        "sotu": lqedu.load_corpus("sotu", split="evaluation"),
    }
    tasks = {
        task: load_task(task, path=None if tasks_folder is None else tasks_folder / f"{task}.jsonl", limit=limits.items)
        for task in TASKS
    }
    network, tokenizer = lqedu.load_model(model, dtype=dtype, device=device)
    return make_setting(
        name or shown_name(model), network, tokenizer, texts, tasks, lqedu.load_corpus("sotu", split="calibration"),
        limits=limits, tokens_per_batch=tokens_per_batch,
    )  # fmt: skip


def make_setting(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, str],
    tasks: Mapping[str, Sequence[Item]],
    calibration_text: str,
    *,
    limits: Limits,
    tokens_per_batch: int | None = None,
) -> Setting:
    """The setting of a model and texts that are loaded already."""
    device = model.get_input_embeddings().weight.device
    positions = getattr(model.config, "max_position_embeddings", None) or max(LENGTHS.values())
    windows, about = {}, {}
    for text, raw in texts.items():
        length = min(limits.length or LENGTHS[text], positions)
        windows[text] = lqedu.token_windows(tokenizer, raw, length=length, count=limits.windows or COUNTS[text])
        about[text] = {
            "text_sha256": hashlib.sha256(raw.encode()).hexdigest(), "length": length, "windows": len(windows[text]),
            "windows_sha256": windows_sha256(windows[text]),
        }  # fmt: skip
    shared = {
        "model": name,
        "weights_sha256": weights_sha256(model),
        "dtype": _name(next(model.parameters()).dtype),
        "device": device.type,
        "texts": about,
        "tasks": {task: {"items": len(items), "items_sha256": _items_sha256(items)} for task, items in tasks.items()},
        "decode": {"batches": list(BATCHES), "context": min(CONTEXT, positions // 2), "steps": STEPS},
        "positions": positions,
    }
    tokens_per_batch = tokens_per_batch or (16384 if device.type == "cuda" else 2048)
    return Setting(name, model, tokenizer, windows, tasks, calibration_text, tokens_per_batch, shared)


def method_of(row: MatrixRow, model_type: str) -> Method | None:
    """The method of a row, for a model of this type; ``None`` for the dense model."""
    return None if row.method is None else build(row.method, row.options_for(model_type))


# --- one row ----------------------------------------------------------------------------------------------------------


def measure_row(setting: Setting, row: MatrixRow, say: Callable[[str], None] = lambda text: None) -> list[Line]:
    """All numbers of a row: the lines of its result file. A number that cannot be had is a ``reason``, never an exception.

    Raises:
        MissingDependencyError: this machine lacks what the row needs.
    """
    method = method_of(row, setting.model.config.model_type)
    model, lines = setting.model, []
    if method is not None:
        say("quantizing")
        try:
            model, line = _quantized(setting, method, row)
        except MissingDependencyError:
            raise
        except LqeduError as error:
            return [{"name": "refused", "reason": _sentence(error)}]
        except torch.cuda.OutOfMemoryError as error:
            return [{"name": "refused", "reason": f"out of memory: {_sentence(error)}", "again": True}]
        lines.append(line)
    lines.append(_storage(model))
    for text, windows in setting.texts.items():
        say(text)
        batch = max(1, setting.tokens_per_batch // windows.shape[1])
        lines.append(_guarded(text, _text_line, model, windows, batch))
    for task, items in setting.tasks.items():
        say(task)
        lines.append(_guarded(task, _task_line, model, setting, items))
    say("decoding")
    lines += decode_lines(model, setting.shared["decode"], only_fast=True)
    return lines


def decode_lines(model: nn.Module, about: Mapping[str, Any], *, only_fast: bool) -> list[Line]:
    """Tokens a second of a step on the engine, a line for each batch, or the reason why there is none.

    Args:
        model: dense or quantized.
        about: ``batches``, ``context`` and ``steps``.
        only_fast: a machine without a GPU, and layers that no kernel reads, are a reason; else their references are timed.
    """
    device = model.get_input_embeddings().weight.device

    def none(reason: str) -> list[Line]:
        return [{"name": "decode", "batch": batch, "reason": reason} for batch in about["batches"]]

    if only_fast and device.type != "cuda":
        return none("no GPU: the kernels' references say nothing of a format's speed")
    if only_fast and (reason := _unread(model)):
        return none(reason)
    try:
        decoder, shape = decoder_of(model), ModelShape.from_config(model.config)
        rows = list(
            measure_model(
                decoder, shape, batches=about["batches"], contexts=[about["context"]], steps=about["steps"]
            )
        )  # fmt: skip
    except LqeduError as error:
        return none(_sentence(error))
    except torch.cuda.OutOfMemoryError as error:
        return none(f"out of memory: {_sentence(error)}")
    lines = []
    for found in rows:
        if found["name"] == "decode":
            kept = {key: found[key] for key in ("batch", "context", "tokens_per_s", "samples", "unit")}
            lines.append({"name": "decode", **kept, "dtype": _name(decoder.dtype), "weights_bytes": decoder.nbytes})
        elif "samples" not in found:
            lines.append({"name": "decode", "batch": found["batch"], "reason": found["name"]})
    return lines


def _unread(model: nn.Module) -> str | None:
    """Why kernels do not read a model's quantized layers, in the words of the first that they do not."""
    for name, layer in quantized_linears(model).items():
        try:
            pack_layer(layer)
        except GridError as error:
            return f"{name}: {_sentence(error)}"
    return None


def _quantized(setting: Setting, method: Method, row: MatrixRow) -> tuple[nn.Module, Line]:
    calibration = setting.windows(row) if method.uses_calibration else None
    with _measured(setting.device) as found:
        model = lqedu.quantize(setting.model, method, calibration)
    reports = model.lqedu_reports.values()
    line = {
        "name": "quantize", **found, "samples": [found["seconds"]], "unit": "s",
        "max_attempts": max(report.attempts for report in reports), "notes": list(model.lqedu_notes),
    }  # fmt: skip
    return model, line


def _storage(model: nn.Module) -> Line:
    layers = list(linears(model).values())
    stored = sum(layer.nbytes if isinstance(layer, QuantLinear) else layer.weight.nbytes for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return {
        "name": "storage", "bits_per_weight": 8 * stored / weights, "linear_bytes": stored, "weights": weights,
        "online": list(online_work(model)),
    }  # fmt: skip


def _text_line(model: nn.Module, windows: Tensor, batch: int) -> Line:
    found = lqedu.perplexity(model, windows, batch_size=batch)
    return {
        "ppl": None if found.nll >= LARGEST_NLL else found.ppl,
        "nll": found.nll,
        "stderr": found.stderr if len(windows) > 1 else None,
        "samples": [round(loss, 6) for loss in found.window_nll],
        "unit": "nats per token, by window",
    }


def _task_line(model: nn.Module, setting: Setting, items: Sequence[Item]) -> Line:
    found = score(model, setting.tokenizer, items, tokens_per_batch=setting.tokens_per_batch)
    alone = found.count == 1
    return {
        "acc": found.acc,
        "acc_stderr": None if alone else found.acc_stderr,
        "acc_norm": found.acc_norm,
        "acc_norm_stderr": None if alone else found.acc_norm_stderr,
        "items": found.count,
        "truncated": found.truncated,
        "gold_nll": found.gold_nll,
        "correct": pack_bits(found.correct),
        "correct_norm": pack_bits(found.correct_norm),
        "items_sha256": found.items_sha256,
    }


def _guarded(name: str, measure: Callable[..., Line], *arguments: Any) -> Line:
    """A line, its seconds with it, or the reason why there is none; the others are still measured."""
    began = time.perf_counter()
    try:
        return {"name": name, **measure(*arguments), "seconds": round(time.perf_counter() - began, 3)}
    except MissingDependencyError:
        raise
    except LqeduError as error:
        return {"name": name, "reason": _sentence(error)}
    except torch.cuda.OutOfMemoryError as error:
        return {"name": name, "reason": f"out of memory: {_sentence(error)}", "again": True}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _measured(device: torch.device) -> Iterator[Line]:
    """Seconds, and the largest memory meanwhile: what torch allocated on a GPU, elsewhere the process's resident set.

    ``held_bytes`` were there before: the dense model, and on the CPU everything else. Where a system cannot count its largest
    resident set anew, both are ``None``.
    """
    found: Line = {}
    gpu = device.type == "cuda"
    _collect()
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held: int | None = torch.cuda.memory_allocated(device)
    else:
        held = _resident(anew=True)
    began = time.perf_counter()
    yield found
    if gpu:
        torch.cuda.synchronize(device)
    found["seconds"] = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if gpu else (None if held is None else _resident())
    found |= {"peak_bytes": peak, "held_bytes": held, "memory": "allocator" if gpu else "resident set"}


def _resident(*, anew: bool = False) -> int | None:
    """The largest resident set of this process so far, or since it was last counted ``anew``; ``None`` where nobody counts it."""
    try:
        if anew:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return None


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _items_sha256(items: Sequence[Item]) -> str:
    """As :class:`lqedu.evaluation.TaskScore` has it, before anything was scored."""
    return hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()


# --- a run ------------------------------------------------------------------------------------------------------------


def is_done(path: Path, configuration: Mapping[str, Any]) -> bool:
    """Whether the file of a row is there, measured as it would be now; one that ran out of memory is tried again.

    Raises:
        UsageError: it was measured otherwise, or it is no result file.
    """
    if not path.is_file():
        return False
    try:
        result = read_result(path)
    except UsageError as error:
        raise UsageError(f"{error}; remove it and measure again") from error
    wanted = json.loads(json.dumps(configuration))
    if other := [key for key in IDENTITY if result["configuration"].get(key) != wanted[key]]:
        raise UsageError(
            f"{path.name} in {path.parent.name} differs in {', '.join(other)} from what would be measured now; "
            "choose another --out, or remove the file"
        )
    return not any(line.get("again") for line in result["values"])


def split(rows: Sequence[MatrixRow], part: str, cost: Callable[[MatrixRow], float]) -> list[MatrixRow]:
    """The rows of one of several processes, ``"1/4"`` to ``"4/4"``, with about the same cost each.

    Raises:
        UsageError: anything else.

    >>> rows = [MatrixRow(name, name, None) for name in "abcd"]
    >>> [[row.name for row in split(rows, part, lambda row: 3 if row.name == "d" else 1)] for part in ("1/2", "2/2")]
    [['d'], ['a', 'b', 'c']]
    """
    one, _, many = part.partition("/")
    if not (one.isdecimal() and many.isdecimal() and 1 <= int(one) <= int(many)):
        raise UsageError(f"--part is 1/4, 2/4 and so on, got {part!r}")
    shares: list[list[MatrixRow]] = [[] for _ in range(int(many))]
    for row in sorted(rows, key=cost, reverse=True):
        min(shares, key=lambda share: sum(map(cost, share))).append(row)
    mine = {row.name for row in shares[int(one) - 1]}
    return [row for row in rows if row.name in mine]


def run(
    setting: Setting,
    rows: Sequence[MatrixRow],
    out: Path,
    command: Callable[[MatrixRow], str],
    *,
    minutes: float | None = None,
    cost: Callable[[MatrixRow], float] = lambda row: 0.0,
) -> list[MatrixRow]:
    """Measure rows and write a file each; those that are there are kept.

    Args:
        setting: from :func:`open_setting`.
        rows: to measure.
        out: folder of the models' folders.
        command: of a row, which its file records.
        minutes: begin no row that is not expected to be done by then.
        cost: expected seconds of a row.

    Returns:
        The rows that are left: no time was left for them, or they failed in a way that is no :class:`LqeduError`; the error is
        printed, and the others are measured.
    """
    folder, began = out / slug(setting.name), time.perf_counter()
    done = [row for row in rows if is_done(folder / f"{row.name}.json", setting.configuration(row))]
    left = [row for row in rows if row not in done]
    print(f"{setting.name}: {len(done)} rows are there, {len(left)} to measure", file=sys.stderr, flush=True)
    total = len(left)
    for number, row in enumerate(list(left), 1):
        if minutes is not None and time.perf_counter() - began + cost(row) > 60 * minutes:
            break
        started, about = time.perf_counter(), setting.configuration(row)
        head = f"[{number}/{total}] {row.name}"
        try:
            lines = measure_row(
                setting, row, lambda text, head=head: print(f"{head}: {text}", file=sys.stderr, flush=True)
            )
        except LqeduError:
            raise
        except Exception:  # a defect of one row; hours of others need not end with it
            traceback.print_exc()
            print(f"{head}: failed, and is left", file=sys.stderr, flush=True)
            continue
        path = write_result(
            folder / f"{row.name}.json",
            title=f"{row.title} of {setting.name} on the bench of all methods",
            kind="measured", configuration=about, values=lines, command=command(row),
        )  # fmt: skip
        left.remove(row)
        print(
            f"{head}: {_told(lines)}; {time.perf_counter() - started:.0f} s, {path.name}", file=sys.stderr, flush=True
        )
    return left


def _told(lines: Sequence[Line]) -> str:
    words = []
    for line in lines:
        if line["name"] == "refused":
            words.append(f"refused: {line['reason']}")
        elif line.get("ppl") is not None:
            words.append(f"{line['name']} {line['ppl']:.3f}")
        elif "acc_norm" in line:
            words.append(f"{line['name']} {100 * line['acc_norm']:.1f}")
    return ", ".join(words)


def command_of(
    model: str, row: MatrixRow, *, device: str, dtype: str, limits: Limits, tokens_per_batch: int | None
) -> str:
    """The command by which anybody measures a row again, with texts and tasks from the Hub; nothing of this machine."""
    words = ["python", "-m", "lqedu.book.measure_matrix", model, "--rows", row.name, "--device", device.split(":")[0]]
    options = {
        "--dtype": dtype if dtype != "float32" else None, "--windows": limits.windows, "--items": limits.items,
        "--length": limits.length, "--tokens-per-batch": tokens_per_batch,
    }  # fmt: skip
    words += [str(word) for option, value in options.items() if value is not None for word in (option, value)]
    return shlex.join(words)


# --- how long it takes ------------------------------------------------------------------------------------------------

# Tokens of everything that a row reads, padding included: 148 and 256 windows (of SmolLM2's tokens), and the texts of all choices.
_TEXT_TOKENS = {"wikitext2": 303_104, "sotu": 131_000}
_TASK_TOKENS = {
    "piqa": (1838, 2 * 42),
    "arc_easy": (2376, 4 * 34),
    "arc_challenge": (1172, 4 * 40),
    "hellaswag": (10042, 4 * 100),
}
# Operations a second of a forward pass, of what a GPU or two cores reach on large products.
_RATE = {
    ("cuda", "float32"): 35e12,
    ("cuda", "float16"): 350e12,
    ("cuda", "bfloat16"): 350e12,
    ("cpu", "float32"): 6e10,
}
# Seconds for a hundred million weights: measured for the chapters on an H100, and what two cores take.
_QUANTIZE = {
    "rtn": 1, "gptq": 30, "awq": 11, "hqq": 2, "quip": 45, "smoothquant": 4, "quarot": 40, "spinquant": 100, "qqq": 35,
    "qoq": 49, "fp8": 4,
}  # fmt: skip
_SLOWER_ON_CPU = 12
_START, _DECODE = 60.0, 15.0  # imports, model, texts; compiling and timing steps


def estimate(
    row: MatrixRow, linear_weights: int, head_weights: int, *, device: str, dtype: str, limits: Limits
) -> float:
    """About how many seconds a row takes: operations over a rate, and quantization by the weight.

    Layers with quantized inputs are read at half the rate of dense ones (in groups a fifth), keys and values cost as much again.
    """
    kind = device.split(":")[0]
    rate = _RATE.get((kind, dtype), _RATE[(kind, "float32")])
    text = sum(
        tokens if limits.windows is None else min(tokens, limits.windows * (limits.length or LENGTHS[name]))
        for name, tokens in _TEXT_TOKENS.items()
    )
    task = sum(
        each * (items if limits.items is None else min(items, limits.items)) for items, each in _TASK_TOKENS.values()
    )
    factor = 1.3
    if row.method is None:
        factor = 1.0
    elif row.options.get("activation_bits") or row.method in (
        "smoothquant",
        "quarot",
        "spinquant",
        "qqq",
        "qoq",
        "fp8",
    ):
        factor = 5.0 if row.method == "rtn" and row.options.get("group_size") else 2.0
        if row.method in ("quarot", "spinquant", "qoq") or row.options.get("kv_bits"):
            factor += 1.0
    # the head reads every position of a text, and of a task those of continuations: about a third
    work = 2 * ((text + task) * linear_weights * factor + (text + task / 3) * head_weights)
    seconds = work / rate
    if row.method is not None:
        seconds += _QUANTIZE[row.method] * (_SLOWER_ON_CPU if kind == "cpu" else 1) * linear_weights / 1e8
    return seconds + (_DECODE if kind == "cuda" else 0.0)


def weights_of(model: str) -> tuple[int, int]:
    """Weights of a model's linear layers and of its head, from its configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lqedu.models.load import EMBEDDED, check_source, local_folder

    check_source(model)
    source = str(local_folder(model)) if model == EMBEDDED or Path(model).is_dir() else model
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"no configuration of {model!r}: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    head = empty.get_output_embeddings()
    return sum(linear.weight.numel() for linear in linears(empty).values()), head.weight.numel()


# --- the command ------------------------------------------------------------------------------------------------------


def main(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a Hub id (facebook/opt-125m), or a folder.")],
    rows: Annotated[str, typer.Option(help="Names or patterns, separated by commas: gptq-*,awq-w4-*.")] = "*",
    out: Annotated[Path, typer.Option(help="Folder of the models' folders.")] = OUT,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the dense model: float32, bfloat16 or float16.")] = "float32",
    part: Annotated[
        str | None, typer.Option(help="Share of the rows for one of several processes: 1/4 to 4/4.")
    ] = None,
    wikitext2: Annotated[Path | None, typer.Option(help="A local wiki.test.raw instead of the Hub's.")] = None,
    tasks_folder: Annotated[Path | None, typer.Option(help="Local piqa.jsonl, ... instead of the Hub's.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of each text, to try the run out.", min=1)] = None,
    items: Annotated[int | None, typer.Option(help="Items of each task, to try the run out.", min=1)] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window, to try the run out.", min=2)] = None,
    tokens_per_batch: Annotated[int | None, typer.Option(help="Tokens read at once: speed and memory.", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no row that would end later.", min=0)] = None,
    name: Annotated[str | None, typer.Option(help="Of a model in a folder: the Hub id it is a copy of.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the rows and about how long they take.")] = False,
) -> None:
    """Measure every method on one model, a result file a row; the same command goes on where it stopped."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype is float32, bfloat16 or float16, got {dtype!r}")
    if not dry_run:
        origin(out)  # now, rather than when the first row was measured
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"no results can be written to {out}: {error.strerror}; choose another --out") from error
    chosen, limits = select(rows), Limits(windows, items, length)
    linear_weights, head_weights = weights_of(model)

    def cost(row: MatrixRow) -> float:
        return estimate(row, linear_weights, head_weights, device=device, dtype=dtype, limits=limits)

    if part is not None:
        chosen = split(chosen, part, cost)
    shown = name or shown_name(model)
    if dry_run:
        for row in chosen:
            there = "  there" if (out / slug(shown) / f"{row.name}.json").is_file() else ""
            print(f"{row.name:28} {cost(row):8.0f} s{there}")
        left = [row for row in chosen if not (out / slug(shown) / f"{row.name}.json").is_file()]
        total = _START + sum(map(cost, left)) if left else 0
        print(f"{len(left)} of {len(chosen)} rows to measure, about {total / 60:.0f} min on one {device}")
        return
    setting = open_setting(
        model, device=device, dtype=getattr(torch, dtype), limits=limits, wikitext2=wikitext2, tasks_folder=tasks_folder,
        tokens_per_batch=tokens_per_batch, name=name,
    )  # fmt: skip
    options = {"device": device, "dtype": dtype, "limits": limits, "tokens_per_batch": tokens_per_batch}
    left = run(setting, chosen, out, lambda row: command_of(shown, row, **options), minutes=minutes, cost=cost)
    if left:
        print(f"left: {','.join(row.name for row in left)}; the same command goes on with them", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except LqeduError as error:
        sys.exit(f"measure_matrix: {error}")
