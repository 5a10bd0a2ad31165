"""The command line: ``lqedu quantize | eval | compare | export | bench | methods | doctor``.

Results go to stdout, progress and errors to stderr. Exit status 0 on success, 2 on bad usage or bad input with one
sentence that says what is wrong and what to do. ``--json`` prints one JSON object and nothing else.
"""

import json
import platform
import shutil
import sys
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from lqedu import __version__
from lqedu._statistics import finite
from lqedu.errors import ExportError, LqeduError, MissingDependencyError, UsageError

_BadUsage = typer.BadParameter.__mro__[2]  # ClickException: click's own, or the copy that newer typers carry

app = typer.Typer(
    help="Quantize large language models, step by step.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

ModelArg = Annotated[str, typer.Argument(help="smollm2-135m, a Hub id, or a local folder.", show_default=False)]
CorpusOpt = Annotated[str, typer.Option(help="sotu, wikitext2, c4, or a text file.")]
WindowsOpt = Annotated[int, typer.Option(help="Calibration windows.", min=1)]
LengthOpt = Annotated[int, typer.Option(help="Tokens in a window.", min=2)]
SeedOpt = Annotated[int, typer.Option(help="Seed that draws the calibration windows.")]
BitsOpt = Annotated[int | None, typer.Option(help="Bits of a weight; by default the method's own.")]
GroupOpt = Annotated[
    str, typer.Option(help="Inputs that share a scale, where a method has groups: a number, 'channel', or 'auto'.")
]
TokensOpt = Annotated[int, typer.Option(help="Evaluation tokens.", min=2)]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
StreamOpt = Annotated[
    bool, typer.Option("--stream", help="Hold one decoder block in memory at a time, for models larger than memory.")
]
DeviceOpt = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; started by torchrun, each process takes a GPU.")]
QualityOpt = Annotated[
    str | None, typer.Option(help="Corpus to measure perplexity on, dense and quantized, for the model card.")
]
TasksOpt = Annotated[
    str | None,
    typer.Option(
        help="Accuracy instead of perplexity: piqa, arc_easy, arc_challenge, hellaswag, winogrande, lambada, boolq, openbookqa "
        "(from the Hub, or files such as data/piqa.jsonl), or tasks of lm-eval (pip install lm-eval), separated by commas."
    ),
]
ItemsOpt = Annotated[int | None, typer.Option(help="Items of each task; by default all.", min=1)]
DtypeOpt = Annotated[str, typer.Option(help="Of the weights in memory: float32, bfloat16 or float16.")]


@app.command()
def quantize(
    model: ModelArg,
    method: Annotated[str, typer.Option(help="A name from 'lqedu methods'.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.", show_default=False)],
    bits: BitsOpt = None,
    group_size: GroupOpt = "auto",
    set_: Annotated[list[str] | None, typer.Option("--set", help="A hyper-parameter, field=value; repeatable.")] = None,
    calibration: CorpusOpt = "sotu",
    windows: WindowsOpt = 32,
    length: LengthOpt = 512,
    seed: SeedOpt = 0,
    stream: StreamOpt = False,
    device: DeviceOpt = "cpu",
    dtype: DtypeOpt = "float32",
    quality: QualityOpt = None,
    tokens: TokensOpt = 32768,
    json_: JsonOpt = False,
) -> None:
    """Quantize a model and save it. Killed and started again, it goes on where it stopped.

    Started by torchrun, the processes share the calibration windows.
    """
    from lqedu.calibration.distributed import torchrun
    from lqedu.methods.base import get

    if out.exists():
        raise UsageError(f"{out} exists already; choose another --out or remove it")
    has = {field.name for field in fields(get(method))}
    if bits is not None and "bits" not in has:
        raise UsageError(f"method {method!r} has no choice of bits, so --bits says nothing; leave it out")
    if group_size != "auto" and "group_size" not in has:
        raise UsageError(f"method {method!r} has no groups, so --group-size says nothing; leave it out")
    if quality is not None and stream:
        raise UsageError("--quality needs the whole models in memory, which --stream avoids; measure with 'lqedu eval'")
    options = _parse_set(set_ or [])
    with torchrun(device) as (own, device):
        _quantize(
            model, method, out, bits, group_size, options, calibration, windows, length, seed, stream, device, dtype,
            quality, tokens,
        )  # fmt: skip
        if own.rank > 0:
            return

    summary = _summary(model, out)
    for note in summary["notes"]:
        print(f"note: {method}: {note}", file=sys.stderr)
    if json_:
        print(json.dumps(summary))
        return
    parts = summary["bytes"]
    rows = [[part.replace("_", " "), f"{size / 1e6:,.2f} MB"] for part, size in parts.items() if part != "linears_fp16"]
    title = get(method).title
    _print_table(f"{out}: {title}, {summary['bits_per_weight']:.3f} bits per weight", ["part", "size"], rows)
    print(f"quantized linears take {summary['fraction_of_fp16']:.3f} of their FP16 size")
    for name in summary["raised_damping"]:
        print(f"note: {name} needed more damping than asked for")


@app.command("eval")
def evaluate(
    model: ModelArg,
    corpus: CorpusOpt = "sotu",
    length: LengthOpt = 512,
    tokens: TokensOpt = 4096,
    tasks: TasksOpt = None,
    items: ItemsOpt = None,
    json_: JsonOpt = False,
) -> None:
    """Perplexity of a model on a text (evaluation split), with its standard error; or its accuracy on tasks."""
    from lqedu.evaluation import perplexity
    from lqedu.models import load_model

    if tasks is not None:
        _evaluate_tasks(model, [task.strip() for task in tasks.split(",") if task.strip()], items, json_)
        return
    if items is not None:
        raise UsageError("--items says how many items of --tasks; name tasks, or leave it out")
    network, tokenizer = load_model(model)
    windows = _evaluation_windows(tokenizer, corpus, length, tokens)
    result = perplexity(network, windows, progress=True)
    summary = {"model": model, "corpus": corpus, "length": length, "windows": len(windows), **_numbers(result)}
    if json_:
        print(json.dumps(summary))
    else:
        _print_table(model, ["perplexity", "NLL", "tokens"], [_perplexity_row(result)])


@app.command()
def compare(
    model: ModelArg,
    methods: Annotated[str, typer.Option(help="Names from 'lqedu methods', separated by commas.")] = "rtn,gptq",
    bits: BitsOpt = None,
    group_size: GroupOpt = "auto",
    calibration: CorpusOpt = "sotu",
    windows: WindowsOpt = 32,
    corpus: CorpusOpt = "sotu",
    length: LengthOpt = 512,
    tokens: TokensOpt = 32768,
    seed: SeedOpt = 0,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks to score too: piqa, arc_easy, hellaswag, ... or files, piqa.jsonl.")
    ] = None,
    items: ItemsOpt = None,
    json_: JsonOpt = False,
) -> None:
    """Several methods on the same calibration text, evaluation text and tasks, in one table, paired by window and item."""
    from lqedu.calibration import load_corpus, token_windows
    from lqedu.evaluation import paired, perplexity
    from lqedu.evaluation.tasks import TASKS
    from lqedu.methods.base import get
    from lqedu.methods.pipeline import quantize as run
    from lqedu.models import load_model
    from lqedu.runtime import quantized_linears

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods names no method; see 'lqedu methods'")
    fixed = [name for name in names if "bits" not in {field.name for field in fields(get(name))}]
    if bits is not None and fixed:
        has = "has" if len(fixed) == 1 else "have"
        print(f"note: --bits says nothing to {', '.join(fixed)}, which {has} no choice of bits", file=sys.stderr)
    questions = _load_tasks(tasks, items)
    dense, tokenizer = load_model(model)
    chosen = [_build(name, dense, bits, group_size, {}) for name in names]
    calibrate = None
    if any(method.uses_calibration for method in chosen):
        text = load_corpus(calibration, split="calibration")
        calibrate = token_windows(tokenizer, text, length=length, count=windows, seed=seed)
    evaluation = _evaluation_windows(tokenizer, corpus, length, tokens)

    reference = perplexity(dense, evaluation, progress=True)
    answered = _score_tasks(dense, tokenizer, questions)
    rows = [{"method": "dense", "bits_per_weight": None, **_numbers(reference), "delta_nll": 0.0, "delta_stderr": 0.0}]
    rows[0] |= _accuracies(answered, answered)
    for method in chosen:
        quantized = run(dense, method, calibrate, progress=True)
        _print_notes(quantized)
        layers = quantized_linears(quantized).values()
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        result = perplexity(quantized, evaluation, progress=True)
        difference = paired(result, reference)
        rows.append(
            {
                "method": method.name,
                "bits_per_weight": 8 * sum(layer.nbytes for layer in layers) / weights,
                **_numbers(result),
                "delta_nll": difference.delta_nll,
                "delta_stderr": finite(difference.stderr),
                **_accuracies(_score_tasks(quantized, tokenizer, questions), answered),
            }
        )
    if json_:
        about = {"model": model, "corpus": corpus, "length": length, "windows": len(evaluation)}
        print(json.dumps(about | ({"items": _counts(answered)} if questions else {}) | {"rows": rows}))
        return
    metrics = {task: "acc_norm" if TASKS[task].normalized else "acc" for task in questions}  # as the harness reports
    table = [
        [
            row["method"],
            "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}",
            f"{row['ppl']:.3f}",
            f"{row['delta_nll']:+.4f}{_plus_minus(row['delta_stderr'])}",
            *(_accuracy_cell(row["tasks"][task], metric, dense=row is rows[0]) for task, metric in metrics.items()),
        ]
        for row in rows
    ]
    headers = [f"{task} {metric}, %" for task, metric in metrics.items()]
    _print_table(
        f"{model} on {corpus}", ["method", "bits per weight", "perplexity", "NLL against dense", *headers], table
    )


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder that 'lqedu quantize' wrote.", show_default=False)],
    format: Annotated[str, typer.Option(help="compressed-tensors, gptq, awq or qserve.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.", show_default=False)],
    json_: JsonOpt = False,
) -> None:
    """Write a quantized model in the format of another tool; nothing is rounded again."""
    from lqedu.checkpoint import export as run
    from lqedu.checkpoint import exporting, open_quantized

    if out.exists():
        raise UsageError(f"{out} exists already; choose another --out or remove it")
    if format not in exporting.LAYOUTS:
        raise UsageError(f"--format is one of {', '.join(exporting.LAYOUTS)}, got {format!r}")
    model, tokenizer = open_quantized(folder)
    _print_notes(model)
    try:
        run(model, out, format, tokenizer)
    except ExportError:
        print(f"What goes where (- is refused):\n{exporting.TABLE}", file=sys.stderr)
        raise
    size = sum(file.stat().st_size for file in out.iterdir())
    summary = {"folder": str(folder), "format": format, "out": str(out), "method": model.lqedu_method, "bytes": size}
    if json_:
        print(json.dumps(summary))
    else:
        print(f"{out}: {format}, {size / 1e6:,.2f} MB; every code, scale and zero point as in {folder}")


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(help="smollm2-135m, a Hub id, or a local folder.", show_default=False)
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Instead of a model: llama-2-7b or llama-3-8b, random weights.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(help="Of a shape: fp16-transformers, fp16, w4a16, w8a8, fp8, w4a8, w4a8kv4; by default all."),
    ] = None,
    batches: Annotated[str | None, typer.Option(help="Texts at once, separated by commas.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Tokens of each text, separated by commas.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps that are timed.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:N or cpu; a GPU where there is one.")] = None,
    budget: Annotated[float, typer.Option(help="Memory of a card in GB, for the largest batch.", min=0.001)] = 80,
    seed: SeedOpt = 0,
    out: Annotated[Path | None, typer.Option(help="Result file to write, NAME.json.")] = None,
    json_: JsonOpt = False,
) -> None:
    """Tokens a second and memory, of a model or of a shape in several formats."""
    from lqedu.book.results import write_result
    from lqedu.evaluation import bench as run

    if (model is None) == (shape is None):
        raise UsageError("name a model, or a --shape to fill with random weights: one of the two")
    run.check_out(out)
    options = run.plan(shape, formats, batches, contexts, steps, device)
    if shape is not None:
        measured = run.rows_of_shape(shape, options, budget=1e9 * budget, seed=seed)
    else:
        from lqedu.models import load_model

        measured = run.rows_of_model(load_model(model)[0], options, seed=seed)
    notes = ([run.RANDOM] if shape is not None else []) + ([run.SLOW] if options["device"] == "cpu" else [])
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    about = run.configuration(shape, model, options, budget_gb=budget, seed=seed)
    rows: list[dict[str, Any]] = []

    def write() -> None:
        if out is not None and any("samples" in row for row in rows):
            title = f"Throughput and memory of {model or shape}"
            write_result(
                out, title=title, kind="measured", configuration=about, values=rows, notes="; ".join(notes) or None
            )

    try:
        for row in measured:
            if rows and row["format"] != rows[-1]["format"]:
                write()
            rows.append(row)
            print(
                " ".join(str(row[key]) for key in ("format", "name", "batch", "context") if key in row), file=sys.stderr
            )
    finally:
        write()  # a format takes minutes: what is done stays done
    if json_:
        print(json.dumps({**about, "notes": notes, "rows": rows}))
    else:
        _print_table(f"{model or shape} on {options['device']}", *run.table(rows))


@app.command("methods")
def list_methods(json_: JsonOpt = False) -> None:
    """The methods there are: four answers each, and what they need."""
    from lqedu.methods import available

    rows = [
        {
            "name": cls.name,
            "title": cls.title,
            **asdict(cls.answers),
            "quantizes": list(cls.quantizes),
            "needs_calibration": cls.needs_calibration,
            "chapter": cls.chapter,
            "options": {field.name: field.default for field in fields(cls)},
        }
        for cls in available().values()
    ]
    if json_:
        print(json.dumps({"methods": rows}))
        return
    questions = ("grid", "move", "round", "run", "chapter")  # a line each: six columns would break words at 80
    answers = ["\n".join(f"{question}: {row[question]}" for question in questions) + "\n" for row in rows]
    _print_table("methods", ["name", ""], [[row["name"], text] for row, text in zip(rows, answers, strict=True)])


@app.command()
def doctor(json_: JsonOpt = False) -> None:
    """What this machine has: versions, a GPU, Triton, and whether the embedded model is in the cache."""
    import torch

    from lqedu.assets import cache_folder

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: kernels run as their reference"
    facts = {
        "lqedu": __version__,
        "python": platform.python_version(),
        **{package: installed(package) for package in ("torch", "transformers", "triton", "safetensors", "numpy")},
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "cache": str(cache_folder()),
        "free disk": f"{shutil.disk_usage(Path.home()).free / 1e9:.0f} GB",
    }
    if json_:
        print(json.dumps(facts))
    else:
        _print_table("lqedu doctor", ["", ""], [[key, str(value)] for key, value in facts.items()])


def main() -> None:
    """Entry point of the ``lqedu`` command."""
    try:
        status = app(standalone_mode=False)
        if status == 130:  # some versions of click return what others raise
            raise KeyboardInterrupt
    except LqeduError as error:
        sys.exit(_fail(str(error)))
    except _BadUsage as error:  # a misspelt command or option; its own text says which
        sys.exit(_fail(error.format_message()))
    except (KeyboardInterrupt, typer.Abort):
        resumes = "; the same command goes on where it stopped" if "quantize" in sys.argv[1:2] else ""
        print(f"\nlqedu: interrupted{resumes}", file=sys.stderr)
        sys.exit(130)
    sys.exit(status or 0)


def _fail(message: str) -> int:
    print(f"lqedu: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _quantize(
    model: str, method: str, out: Path, bits: int | None, group_size: str, options: dict[str, Any],
    calibration: str, windows: int, length: int, seed: int, stream: bool, device: Any, dtype: str,
    quality: str | None, tokens: int,
) -> None:  # fmt: skip
    """Load, quantize and save as :func:`quantize` was asked to; of several processes the first one saves."""
    from dataclasses import replace

    from lqedu.calibration import load_corpus, token_windows
    from lqedu.calibration.distributed import processes
    from lqedu.checkpoint import save
    from lqedu.checkpoint.card import Calibration, Facts, shown_name
    from lqedu.methods.base import get
    from lqedu.methods.pipeline import quantize as run
    from lqedu.methods.streaming import check_streamable, quantize_folder
    from lqedu.models import load_model
    from lqedu.models.load import weights_sha256
    from lqedu.models.streamed import StreamedModel

    kind = _dtype(dtype)
    if stream:
        check_streamable(get(method))
    text = load_corpus(calibration, split="calibration") if get(method).needs_calibration else None
    if stream:
        dense = StreamedModel(model, dtype=kind, device=device)
        network, tokenizer = dense.model, dense.tokenizer
    else:
        network, tokenizer = load_model(model, dtype=kind, device=device)
    chosen = _build(method, network, bits, group_size, options)
    if text is None and chosen.uses_calibration:  # known only now: static scales are an option
        text = load_corpus(calibration, split="calibration")
    seen = None if text is None else token_windows(tokenizer, text, length=length, count=windows, seed=seed)
    evaluation = None if quality is None else _evaluation_windows(tokenizer, quality, length, tokens)
    first = processes().rank == 0
    facts = Facts(
        base_model=shown_name(model), calibration=None if seen is None else Calibration.of(calibration, seen, seed)
    )
    if stream:
        quantize_folder(dense, chosen, seen, out, progress=first, facts=facts)
        return
    unfinished = out.with_name(out.name + ".unfinished")
    quantized = run(network, chosen, seen, progress=first, resume_dir=unfinished)
    if first:
        facts = replace(facts, base_sha256=weights_sha256(network))
        if quality is not None:
            facts = replace(facts, quality=(_measured(quality, evaluation, network, quantized),))
        save(quantized, out, tokenizer, facts=facts)
        shutil.rmtree(unfinished)


def _evaluate_tasks(model: str, tasks: list[str], items: int | None, json_: bool) -> None:
    """Names that lqedu scores itself, and files, need no lm-eval; any other name is a task of lm-eval's."""
    from lqedu.evaluation import load_task, score
    from lqedu.evaluation.tasks import TASKS
    from lqedu.integrations import lm_eval

    if not tasks:
        raise UsageError("--tasks names no task, for example piqa,hellaswag")
    theirs = [task for task in tasks if task not in TASKS and not task.endswith(".jsonl")]
    if theirs:
        try:
            lm_eval.register()  # refuses now, rather than after the others were scored
        except MissingDependencyError as error:
            known = f"{theirs[0]!r} is no task of ours ({', '.join(TASKS)}, or a JSONL file with such a name)"
            raise MissingDependencyError(f"{known}; for those of lm-eval, {error}") from error
    questions = {Path(task).stem: load_task(task, limit=items) for task in tasks if task not in theirs}
    scores: dict[str, dict[str, Any]] = {}
    if questions:
        network, tokenizer = lm_eval.load(model)
        scores = {task: _accuracy(task, score(network, tokenizer, q, progress=True)) for task, q in questions.items()}
    if theirs:
        scores |= lm_eval.evaluate(model, theirs, **({} if items is None else {"limit": items}))
    if json_:
        print(json.dumps({"model": model, "tasks": scores}))
        return
    rows = [
        [task, name, f"{value:.4f}" if isinstance(value, float) else str(value)]
        for task, found in scores.items()
        for name, value in found.items()
        if value is not None and not name.endswith("sha256")
    ]
    _print_table(model, ["task", "metric", "value"], rows)


def _accuracy(task: str, found: Any) -> dict[str, float | int | str | None]:
    """The numbers of a score; ``acc_norm`` where the harness has it too."""
    from lqedu.evaluation.tasks import TASKS

    numbers: dict[str, Any] = {"acc": found.acc, "acc_stderr": finite(found.acc_stderr)}
    if TASKS[task].normalized:
        numbers |= {"acc_norm": found.acc_norm, "acc_norm_stderr": finite(found.acc_norm_stderr)}
    rest = {"gold_nll": found.gold_nll, "items": found.count, "truncated": found.truncated}
    return numbers | rest | {"items_sha256": found.items_sha256}


def _measured(corpus: str, windows: Any, dense: Any, quantized: Any) -> Any:
    from lqedu.checkpoint.card import Quality
    from lqedu.evaluation import perplexity

    before, after = (perplexity(model, windows, progress=True) for model in (dense, quantized))
    return Quality.of(corpus, after, before)


def _load_tasks(tasks: str | None, limit: int | None) -> dict[str, Any]:
    """Items by task, as ``--tasks`` names them; read before a model is, because that fails sooner."""
    from lqedu.evaluation import load_task

    if tasks is None:
        if limit is not None:
            raise UsageError("--items says how many items of --tasks; name tasks, or leave it out")
        return {}
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names no task, for example piqa,arc_easy")
    return {Path(name).stem: load_task(name, limit=limit) for name in names}


def _score_tasks(model: Any, tokenizer: Any, tasks: dict[str, Any]) -> dict[str, Any]:
    from lqedu.evaluation import score

    return {name: score(model, tokenizer, items, progress=True) for name, items in tasks.items()}


def _accuracies(mine: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Accuracies and how they differ from the dense model's, item by item; nothing where no task was asked for."""
    from lqedu.evaluation import paired_scores

    found = {}
    for name, score in mine.items():
        moved = paired_scores(score, dense[name])
        found[name] = {
            "acc": score.acc, "acc_stderr": finite(score.acc_stderr), "delta_acc": moved.delta_acc,
            "delta_acc_stderr": finite(moved.acc_stderr), "acc_norm": score.acc_norm,
            "acc_norm_stderr": finite(score.acc_norm_stderr), "delta_acc_norm": moved.delta_acc_norm,
            "delta_acc_norm_stderr": finite(moved.acc_norm_stderr),
        }  # fmt: skip
    return {"tasks": found} if found else {}


def _counts(scores: dict[str, Any]) -> dict[str, int]:
    return {name: score.count for name, score in scores.items()}


def _accuracy_cell(found: dict[str, Any], metric: str, *, dense: bool) -> str:
    """The accuracy in percent with its own error, or with the difference from the dense model's and the paired error."""
    share = f"{100 * found[metric]:.1f}"
    error = found[f"{metric}_stderr"] if dense else found[f"delta_{metric}_stderr"]
    said = "" if error is None else f" ± {100 * error:.1f}"
    return f"{share}{said}" if dense else f"{share} ({100 * found[f'delta_{metric}']:+.1f}{said})"


def _dtype(name: str) -> Any:
    import torch

    if name not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype is float32, bfloat16 or float16, got {name!r}")
    return getattr(torch, name)


def _summary(model: str, out: Path) -> dict[str, Any]:
    """What the folder of a quantized model says of itself."""
    from lqedu.checkpoint import folder_bytes
    from lqedu.checkpoint.folder import read_record

    parts, record = folder_bytes(out), read_record(out)
    packed = parts["codes"] + parts["scales"] + parts["zeros"] + parts["transforms"]
    reports = {name: layer["report"] for name, layer in record["layers"].items()}
    return {
        "model": model,
        "method": record["method"],
        "out": str(out),
        "bytes": parts,
        "fraction_of_fp16": packed / parts["linears_fp16"],
        "bits_per_weight": 16 * packed / parts["linears_fp16"],
        "raised_damping": [name for name, report in reports.items() if report["attempts"] > 1],
        "dead_columns": sum(report["dead_columns"] for report in reports.values()),
        "notes": record["notes"],
    }


def _build(name: str, model: Any, bits: int | None, group_size: str, options: dict[str, Any]) -> Any:
    """The method with these options; ``--bits`` and ``--group-size`` apply where it has such fields."""
    from lqedu.methods.base import build, get
    from lqedu.methods.pipeline import auto_group_size

    has = {field.name for field in fields(get(name))}
    given: dict[str, Any] = {} if bits is None or "bits" not in has else {"bits": bits}
    if "group_size" in has and "group_size" not in options:
        if group_size == "auto":
            given["group_size"] = auto_group_size(model)
            print(f"group size: {given['group_size']}", file=sys.stderr)
        elif group_size == "channel":
            given["group_size"] = None
        elif group_size.isdecimal():
            given["group_size"] = int(group_size)
        else:
            raise UsageError(f"--group-size is a number, 'channel' or 'auto', got {group_size!r}")
    return build(name, given | options)


def _parse_set(pairs: list[str]) -> dict[str, Any]:
    """``["damping=0.05", "order=activation"]`` to a dict; values are JSON where they parse, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UsageError(f"--set takes field=value, got {pair!r}")
        try:
            options[key] = json.loads(value.lower() if value in ("True", "False", "None") else value)
        except ValueError:
            options[key] = None if value == "None" else value
    return options


def _evaluation_windows(tokenizer: Any, corpus: str, length: int, tokens: int) -> Any:
    from lqedu.calibration import load_corpus, token_windows

    if tokens < length:
        raise UsageError(f"--tokens {tokens} is less than one window of --length {length}")
    return token_windows(tokenizer, load_corpus(corpus, split="evaluation"), length=length, count=tokens // length)


def _numbers(result: Any) -> dict[str, float | None]:
    return {"ppl": result.ppl, "nll": result.nll, "stderr": finite(result.stderr), "tokens": result.tokens}


def _plus_minus(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.4f}"


def _perplexity_row(result: Any) -> list[str]:
    return [f"{result.ppl:.4f}", f"{result.nll:.4f}{_plus_minus(finite(result.stderr))}", f"{result.tokens:,}"]


def _print_notes(quantized: Any) -> None:
    """What a method did otherwise than its name says, a line each on stderr."""
    for note in quantized.lqedu_notes:
        print(f"note: {quantized.lqedu_method['name']}: {note}", file=sys.stderr)


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
