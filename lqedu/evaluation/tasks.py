"""Multiple-choice tasks as items to score: PIQA, ARC, HellaSwag, WinoGrande, LAMBADA, BoolQ, OpenBookQA; ``22-side-by-side``.

Prompts, splits and the order of items are those of lm-evaluation-harness 0.4 (``lm_eval/tasks/*/*.yaml``), zero-shot and
without a chat template. Data come from the Hugging Face Hub, from the parquet files that it makes of every data set
(pip install pyarrow), or from JSONL files: one object a line, with the Hub's columns. ARC and OpenBookQA may instead give
their ``choices`` as a list with ``gold``, its index; HellaSwag the finished ``query`` with ``choices`` and ``gold``.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lqedu.errors import CalibrationError, MissingDependencyError, UsageError
from lqedu.options import check_count

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One question: the model is to find ``continuations[gold]`` more likely than the others.

    Attributes:
        contexts: what is read before each continuation; they differ in WinoGrande only, which fills the blank with each
            option and scores the same rest of the sentence.
        continuations: what is scored, written after its context and one space, as in all these tasks. An item with one
            continuation (LAMBADA's last word) is right where the model would write it greedily.
        gold: index of the right one.

    Raises:
        UsageError: at construction; no continuation or an empty one, not one context for each, or ``gold`` out of range.

    >>> Item(("The capital of France is",) * 2, ("Paris", "Rome"), 0).continuations[0]
    'Paris'
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int

    def __post_init__(self) -> None:
        if not self.continuations or len(self.contexts) != len(self.continuations):
            raise UsageError(
                f"{len(self.continuations)} continuations and {len(self.contexts)} contexts: give one of each a choice"
            )
        if "" in self.continuations:
            raise UsageError(f"continuation {self.continuations.index('')} is empty; leave the item out")
        if not 0 <= self.gold < len(self.continuations):
            raise UsageError(f"the right answer is {self.gold}, of {len(self.continuations)} choices counted from 0")


def load_task(
    name_or_path: str | Path, *, path: str | Path | None = None, limit: int | None = None
) -> tuple[Item, ...]:
    """Items of a task, in the order of its data set.

    Args:
        name_or_path: ``piqa``, ``arc_easy``, ``arc_challenge``, ``hellaswag``, ``winogrande``, ``lambada``, ``boolq`` or
            ``openbookqa``, from the Hub unless ``path`` is given; or a JSONL file with such a name, ``data/piqa.jsonl``.
        path: the task's JSONL file, whatever its name.
        limit: take the first items only.

    Raises:
        UsageError: an unknown task, no such file, or a limit below 1.
        CalibrationError: a file that is no JSONL, lacks a column or has an answer out of range (file, line and column are
            named), or that holds no item.
        MissingDependencyError: a Hub that cannot be reached, or no pyarrow to read its files.
    """
    name, file = str(name_or_path), path
    if path is None and name.endswith(".jsonl"):
        name, file = Path(name).stem, name
    if name not in TASKS:
        raise UsageError(f"no task {name!r}; there are {', '.join(TASKS)}, or a JSONL file with such a name")
    if limit is not None:
        check_count("limit", limit, least=1)
    task = TASKS[name]
    rows = _lines(Path(file)) if file is not None else _from_hub(name, task)
    items = []
    for where, row in islice(rows, limit):
        try:
            items.append(task.read(row))
        except UsageError as error:
            raise CalibrationError(f"{where}: {error}") from error
    if not items:
        raise CalibrationError(f"{file} holds no items; pass a file with one JSON object a line")
    return tuple(items)


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut inside a string, at U+2028
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{where} is not JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{where} is no JSON object; write one object with the task's columns a line")
        yield where, row


def _from_hub(name: str, task: "_Task") -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise MissingDependencyError(
            f"the Hub keeps {name} as parquet, which needs pyarrow: pip install pyarrow; or pass a JSONL file, {name}.jsonl"
        ) from error
    from huggingface_hub import hf_hub_download

    file = f"{task.config}/{task.split}/0000.parquet"
    try:
        local = hf_hub_download(task.repository, file, repo_type="dataset", revision="refs/convert/parquet")
    except OSError as error:  # all errors of the Hub's client and of the network are
        raise MissingDependencyError(
            f"cannot fetch {name} from the Hub ({task.repository}, {file}); go online, or pass a JSONL file, {name}.jsonl"
        ) from error
    for number, row in enumerate(read_table(local).to_pylist(), 1):
        yield f"{task.repository}, {file}, row {number}", row


def _get(row: Row, column: str, kind: type, what: str) -> Any:
    if column not in row:
        raise UsageError(f"there is no column {column!r}, only {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[column], kind):
        raise UsageError(f"column {column!r} holds {row[column]!r}, not {what}")
    return row[column]


def _text(row: Row, column: str) -> str:
    return _get(row, column, str, "a text")


def _texts(row: Row, column: str) -> list[str]:
    texts = _get(row, column, list, "a list of texts")
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"column {column!r} holds {texts!r}, not texts only")
    return texts


def _index(row: Row, column: str) -> int:
    value = _get(row, column, int | str, "an index")
    if isinstance(value, str) and not value.isdecimal():  # HellaSwag writes labels as texts
        raise UsageError(f"column {column!r} holds {value!r}, not an index")
    return int(value)


def _choose(context: str, choices: list[str], gold: int) -> Item:
    return Item((context,) * len(choices), tuple(choices), gold)


def _piqa(row: Row) -> Item:
    context = f"Question: {_text(row, 'goal')}\nAnswer:"
    return _choose(context, [_text(row, "sol1"), _text(row, "sol2")], _index(row, "label"))


def _labelled(row: Row) -> tuple[list[str], int]:
    """Choices of ARC and OpenBookQA and the right one: ``{"text": …, "label": …}`` with ``answerKey``, or a list."""
    if isinstance(row.get("choices"), list):
        return _texts(row, "choices"), _index(row, "gold")
    choices, key = _get(row, "choices", dict, "a list, or texts and labels"), _text(row, "answerKey").strip()
    labels = _texts(choices, "label")
    if key not in labels:
        raise UsageError(f"column 'answerKey' holds {key!r}, which is none of the labels {', '.join(labels)}")
    return _texts(choices, "text"), labels.index(key)


def _arc(row: Row) -> Item:
    return _choose(f"Question: {_text(row, 'question')}\nAnswer:", *_labelled(row))


def _openbookqa(row: Row) -> Item:
    return _choose(_text(row, "question_stem"), *_labelled(row))


def _without_brackets(text: str) -> str:
    """The harness's ``preprocess``: what stands in brackets is left from WikiHow's pages."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag(row: Row) -> Item:
    if "query" in row:
        return _choose(_text(row, "query"), _texts(row, "choices"), _index(row, "gold"))
    context = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    endings = [_without_brackets(ending) for ending in _texts(row, "endings")]
    return _choose(_without_brackets(context), endings, _index(row, "label"))


def _winogrande(row: Row) -> Item:
    before, blank, after = _text(row, "sentence").partition("_")
    if not blank:
        raise UsageError("column 'sentence' has no blank, which is written _")
    contexts = (before + _text(row, "option1"), before + _text(row, "option2"))
    return Item(contexts, (after.strip(),) * 2, _index(row, "answer") - 1)


def _lambada(row: Row) -> Item:
    context, _, word = _text(row, "text").rpartition(" ")
    return Item((context,), (word,), 0)


def _boolq(row: Row) -> Item:
    context = f"{_text(row, 'passage')}\nQuestion: {_text(row, 'question')}?\nAnswer:"
    return _choose(context, ["no", "yes"], _index(row, "label"))


@dataclass(frozen=True)
class _Task:
    repository: str
    config: str
    split: str
    read: Callable[[Row], Item]
    normalized: bool = True  # whether the harness reports acc_norm


TASKS = {
    "piqa": _Task("ybisk/piqa", "plain_text", "validation", _piqa),
    "arc_easy": _Task("allenai/ai2_arc", "ARC-Easy", "test", _arc),
    "arc_challenge": _Task("allenai/ai2_arc", "ARC-Challenge", "test", _arc),
    "hellaswag": _Task("Rowan/hellaswag", "default", "validation", _hellaswag),
    "winogrande": _Task("allenai/winogrande", "winogrande_xl", "validation", _winogrande, normalized=False),
    "lambada": _Task("EleutherAI/lambada_openai", "default", "test", _lambada, normalized=False),
    "boolq": _Task("aps/super_glue", "boolq", "validation", _boolq, normalized=False),
    "openbookqa": _Task("allenai/openbookqa", "main", "test", _openbookqa),
}
