"""Items of every task from both forms of its data, and every file that cannot be one; the harness's own words are in tests/parity."""

import json
import sys
import types
from pathlib import Path

import pytest

from lqedu.errors import CalibrationError, LqeduError, MissingDependencyError, UsageError
from lqedu.evaluation import Item, load_task
from lqedu.evaluation.tasks import TASKS

LABELLED = {"text": ["hot", "cold"], "label": ["A", "B"]}
FORMS = {  # rows with the Hub's columns, and what becomes of them
    "piqa": (
        {"goal": "Warm a room.", "sol1": "Light a fire.", "sol2": " Open a window.", "label": 0},
        Item(("Question: Warm a room.\nAnswer:",) * 2, ("Light a fire.", " Open a window."), 0),
    ),
    "arc_easy": (
        {"id": "x", "question": "What is ice?", "choices": LABELLED, "answerKey": "B"},
        Item(("Question: What is ice?\nAnswer:",) * 2, ("hot", "cold"), 1),
    ),
    "arc_challenge": (
        {"question": "What is ice?", "choices": {"text": ["hot", "cold"], "label": ["1", "2"]}, "answerKey": "2"},
        Item(("Question: What is ice?\nAnswer:",) * 2, ("hot", "cold"), 1),
    ),
    "hellaswag": (
        {
            "activity_label": "Making tea", "ctx_a": "[header] How to make tea [title] Boil.", "ctx_b": "THE water",
            "endings": ["boils.", " sings [step] a  song."], "label": "1",
        },
        # the brackets go before double spaces do; capitalize lowers the rest of ctx_b
        Item(("Making tea: How to make tea. Boil. The water",) * 2, ("boils.", "sings a song."), 1),
    ),
    "winogrande": (
        {"sentence": "The cup fell off the shelf as _ was wet.", "option1": "the cup", "option2": "the shelf", "answer": "2"},
        Item(("The cup fell off the shelf as the cup", "The cup fell off the shelf as the shelf"), ("was wet.",) * 2, 1),
    ),
    "lambada": ({"text": "She wrote with her  old pen"}, Item(("She wrote with her  old",), ("pen",), 0)),
    "boolq": (
        {"question": "is ice cold", "passage": "Ice -- Ice is frozen water.", "idx": 0, "label": 1},
        Item(("Ice -- Ice is frozen water.\nQuestion: is ice cold?\nAnswer:",) * 2, ("no", "yes"), 1),
    ),
    "openbookqa": (
        {"question_stem": "Ice is", "choices": LABELLED, "answerKey": " B"},
        Item(("Ice is",) * 2, ("hot", "cold"), 1),
    ),
}  # fmt: skip
LISTS = {  # the same as lists with an index
    "arc_easy": {"question": "What is ice?", "choices": ["hot", "cold"], "gold": 1},
    "arc_challenge": {"question": "What is ice?", "choices": ["hot", "cold"], "gold": "1"},
    "openbookqa": {"question_stem": "Ice is", "choices": ["hot", "cold"], "gold": 1},
    "hellaswag": {
        "query": "Making tea: How to make tea. Boil. The water", "choices": ["boils.", "sings a song."], "gold": 1,
    },
}  # fmt: skip


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_task_has_an_example_here():
    assert list(FORMS) == list(TASKS)


@pytest.mark.parametrize("name", FORMS)
def test_the_hubs_columns_and_lists_make_the_same_items(name, tmp_path):
    row, item = FORMS[name]
    assert load_task(write(tmp_path / f"{name}.jsonl", row, row)) == (item, item)
    if name in LISTS:
        assert load_task(name, path=write(tmp_path / "rows.txt", LISTS[name])) == (item,)


def test_limit_blank_lines_and_line_separators_inside_a_text(tmp_path):
    row = FORMS["lambada"][0]
    file = tmp_path / "lambada.jsonl"
    file.write_text(f"\n{json.dumps(row)}\n\n" + json.dumps({"text": "a\u2028b c\u0085d e"}, ensure_ascii=False))
    assert load_task(file, limit=1) == (FORMS["lambada"][1],)
    assert load_task(str(file))[1] == Item(("a\u2028b c\u0085d",), ("e",), 0)
    file.write_text(f"{json.dumps(row)}\nnot read")
    assert len(load_task(file, limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("piqa", {"goal": None}, "line 2: column 'goal' holds None, not a text"),
        ("piqa", {"sol2": ...}, "line 2: there is no column 'sol2', only 'goal', 'sol1', 'label'"),
        ("piqa", {"label": -1}, "line 2: the right answer is -1, of 2 choices"),
        ("piqa", {"label": 0.0}, "column 'label' holds 0.0, not an index"),
        ("piqa", {"sol1": ""}, "line 2: continuation 0 is empty"),
        ("arc_easy", {"choices": ...}, "no column 'choices'"),
        ("arc_easy", {"choices": "hot"}, "column 'choices' holds 'hot', not a list, or texts and labels"),
        ("arc_easy", {"choices": {"label": ["B"]}}, "no column 'text', only 'label'"),
        ("arc_easy", {"choices": ["hot", 3], "gold": 0}, "column 'choices' holds .*, not texts only"),
        ("arc_easy", {"choices": ["hot"]}, "no column 'gold'"),
        ("arc_easy", {"choices": ["hot"], "gold": 1}, "the right answer is 1, of 1 choices"),
        ("arc_challenge", {"answerKey": "E"}, "'answerKey' holds 'E', which is none of the labels 1, 2"),
        ("hellaswag", {"label": ""}, "column 'label' holds '', not an index"),  # the Hub's test split
        ("hellaswag", {"ctx_b": ...}, "no column 'ctx_b'"),
        ("hellaswag", {"endings": []}, "0 continuations"),
        ("winogrande", {"sentence": "no blank"}, "column 'sentence' has no blank"),
        ("winogrande", {"answer": "3"}, "the right answer is 2, of 2 choices"),
        ("lambada", {"text": "ends in a space "}, "continuation 0 is empty"),
        ("boolq", {"label": 2}, "the right answer is 2, of 2 choices"),
        ("openbookqa", {"question_stem": 4}, "column 'question_stem' holds 4, not a text"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_item_is_refused_by_file_line_and_column(name, change, match, tmp_path):
    row = {column: value for column, value in (FORMS[name][0] | change).items() if value is not ...}
    file = write(tmp_path / f"{name}.jsonl", FORMS[name][0], row)
    with pytest.raises(CalibrationError, match=match) as error:
        load_task(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (b'{"text": "a b"}\n{"text": ', CalibrationError, "line 2 is not JSON"),
        (b'["a b"]\n', CalibrationError, "line 1 is no JSON object"),
        (b"\xff\xfe", CalibrationError, "not UTF-8 text"),
        (b"\n\n", CalibrationError, "holds no items"),
    ],
)
def test_a_file_that_is_none_is_refused(content, error, match, tmp_path):
    file = tmp_path / "lambada.jsonl"
    file.write_bytes(content)
    with pytest.raises(error, match=match):
        load_task(file)


@pytest.mark.parametrize(
    ("ask", "options", "match"),
    [
        ("pica", {}, "no task 'pica'; there are piqa, arc_easy, .*openbookqa"),
        ("rows.jsonl", {}, "no task 'rows'"),
        ("piqa.jsonl", {}, "cannot read piqa.jsonl: No such file"),
        ("piqa", {"path": "nothing.jsonl"}, "cannot read nothing.jsonl"),
        ("piqa", {"limit": 0}, "limit is a whole number, at least 1"),
    ],
)
def test_what_does_not_exist_is_refused(ask, options, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=match):
        load_task(ask, **options)


@pytest.fixture
def hub(monkeypatch):
    """A Hub that has every task's two rows, and a reader of parquet; what was asked for is kept."""
    asked = []

    def download(repository: str, file: str, *, repo_type: str, revision: str) -> str:
        asked.append((repository, file, repo_type, revision))
        return next(
            name for name, task in TASKS.items() if (task.repository, task.config) == (repository, file.split("/")[0])
        )

    def read_table(name: str) -> object:
        return types.SimpleNamespace(to_pylist=lambda: [FORMS[name][0]] * 2)

    parquet = types.ModuleType("pyarrow.parquet")
    parquet.read_table = read_table
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


@pytest.mark.parametrize("name", FORMS)
def test_a_name_alone_reads_the_hubs_parquet(name, hub):
    assert load_task(name) == (FORMS[name][1],) * 2 and len(load_task(name, limit=1)) == 1
    _, file, kind, revision = hub[0]
    assert (kind, revision) == ("dataset", "refs/convert/parquet") and file.endswith("/0000.parquet")


def refused(error: type[LqeduError], match: str) -> None:
    with pytest.raises(error, match=match):
        load_task("piqa")


def test_without_pyarrow_or_without_a_hub_one_sentence_says_what_to_do(hub, monkeypatch):
    monkeypatch.setitem(FORMS, "piqa", ({"goal": "x"}, None))
    refused(CalibrationError, "ybisk/piqa, plain_text/validation/0000.parquet, row 1: there is no column 'sol1'")

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    refused(MissingDependencyError, "cannot fetch piqa from the Hub .*piqa.jsonl")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(MissingDependencyError, "pip install pyarrow; or pass a JSONL file, piqa.jsonl")
