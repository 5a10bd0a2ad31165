"""``lqedu bench``: what it measures by default, its table, and its result file; chapter ``21-serving``."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lqedu.errors import UsageError
from lqedu.evaluation.random_models import FORMATS, SHAPES
from lqedu.evaluation.roofline import ModelShape
from lqedu.evaluation.throughput import TRANSFORMERS, Row, check_formats, measure_model, measure_shape
from lqedu.options import check_count

RANDOM = "weights, keys and values are random numbers: times and bytes are those of the shape, texts mean nothing"
SLOW = "no GPU: the kernels' references ran, which are slow, and whose times say nothing of a format"


def numbers(text: str, option: str) -> list[int]:
    """``"1,16,64"`` to its numbers (UsageError for anything else).

    >>> numbers("1,16", "--batches")
    [1, 16]
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(f"{option} takes whole numbers above 0, separated by commas, got {text!r}")
    return [int(word) for word in words]


def plan(
    shape: str | None,
    formats: str | None,
    batches: str | None,
    contexts: str | None,
    steps: int | None,
    device: str | None,
) -> dict[str, Any]:
    """The options of a run, with defaults for a GPU or for a machine without one.

    Raises:
        UsageError: an unknown shape or format, numbers that are none, or a GPU that is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") and not device.startswith("cuda:"):
        raise UsageError(f"--device is cpu, cuda or cuda:N, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError(
            f"--device {device} asks for a GPU, and torch finds none; leave it out to run the references on the CPU"
        )
    if shape is not None and shape not in SHAPES:
        raise UsageError(f"--shape is {' or '.join(SHAPES)}, got {shape!r}")
    if shape is None and formats is not None:
        raise UsageError(
            "--formats says how --shape is stored; a model is measured in the format it has, so leave it out"
        )
    names = [word.strip() for word in (formats or ",".join((*FORMATS, TRANSFORMERS))).split(",") if word.strip()]
    check_formats(names)
    fast = device != "cpu"
    chosen = steps if steps is not None else (20 if fast else 3)
    check_count("steps", chosen, least=1)
    return {
        "formats": names if shape is not None else ["model"],
        "batches": numbers(batches or ("1,4,16,64,256" if fast else "1,4"), "--batches"),
        "contexts": numbers(contexts or ("1024" if fast else "64"), "--contexts"),
        "steps": chosen,
        "device": device,
    }


def rows_of_shape(shape: str, options: Mapping[str, Any], *, budget: float, seed: int) -> Iterator[Row]:
    """See :func:`lqedu.evaluation.throughput.measure_shape`."""
    return measure_shape(
        SHAPES[shape], options["formats"], batches=options["batches"], contexts=options["contexts"],
        device=options["device"], steps=options["steps"], budget=budget, seed=seed,
    )  # fmt: skip


def rows_of_model(model: torch.nn.Module, options: Mapping[str, Any], *, seed: int) -> Iterator[Row]:
    """See :func:`lqedu.evaluation.throughput.measure_model`; the model moves to the device.

    Raises:
        UnsupportedModelError, GridError: a model that the engine does not run.
    """
    from lqedu.runtime.decoder import decoder_of

    decoder = decoder_of(model.to(options["device"]))
    return measure_model(
        decoder, ModelShape.from_config(model.config), batches=options["batches"], contexts=options["contexts"],
        steps=options["steps"], seed=seed,
    )  # fmt: skip


def configuration(shape: str | None, model: str | None, options: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What a reader needs to measure it again."""
    what = {"model": model} if shape is None else {"shape": shape, "sizes": asdict(SHAPES[shape]), "weights": "random"}
    return what | dict(options) | more


def check_out(out: Path | None) -> None:
    """Refuse, before hours of measuring, a name that no result file has (UsageError)."""
    stem = "" if out is None else out.stem
    if out is not None and (out.suffix != ".json" or not stem.replace("_", "a").isalnum() or stem != stem.lower()):
        raise UsageError(
            f"--out is a file such as throughput_llama3_8b.json, of lower-case letters, digits and _, got {out.name!r}"
        )


def table(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines for people; ``x`` compares with "fp16" of the same run, batch and context."""
    rows = list(rows)
    base = {
        (r["name"], r["batch"], r["context"]): r["tokens_per_s"]
        for r in rows
        if r["format"] == "fp16" and "samples" in r
    }
    lines = []
    for row in rows:
        if row["name"] == "memory":
            said = f"{row['largest_batch']} texts fit {row['budget_bytes'] / 1e9:.0f} GB (predicted)"
            lines.append([row["format"], "memory", str(row["context"]), "", said, "", "", ""])
            continue
        key = (row["name"], row["batch"], row["context"])
        if "samples" not in row:
            lines.append(
                [
                    row["format"],
                    *map(str, (row["name"], row["context"], row["batch"])),
                    "",
                    "",
                    _gb(row, "predicted"),
                    "",
                ]
            )
            continue
        rate, ratio = row["tokens_per_s"], row["tokens_per_s"] / base[key] if key in base else None
        lines.append(
            [row["format"], row["name"], str(row["context"]), str(row["batch"]), f"{rate:,.1f}",
             "" if ratio is None else f"{ratio:.2f}", _gb(row, "predicted"), _gb(row, "measured")]
        )  # fmt: skip
    return ["format", "", "context", "batch", "tokens/s", "x", "predicted", "measured"], lines


def _gb(row: Row, name: str) -> str:
    size = row.get(f"{name}_bytes")
    return "" if size is None else f"{size / 1e9:.2f} GB"
