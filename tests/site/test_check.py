"""Every gate of ``make check`` lets a good chapter through, and stops one in which a single thing is wrong."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_output
from PIL import Image, ImageChops

from tests.notebooks.clean import clean, with_palette
from tests.site.check import BOOK_GATES, CHAPTER_GATES, ROOT, Book, Chapter, check_book, check_chapter
from tests.site.example import SENTENCE, good_chapter

Notebook = nbformat.NotebookNode


def _problems(notebook: Notebook, folder: Path, name: str = "04-gptq") -> list[str]:
    path = folder / f"{name}.ipynb"
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    return check_chapter(Chapter(path, "0.1.0"))


def _cell(notebook: Notebook, containing: str, kind: str = "") -> Notebook:
    return next(c for c in notebook.cells if containing in c.source and c.cell_type.startswith(kind))


def _replace(old: str, new: str, kind: str = "") -> Callable[[Notebook], None]:
    def spoil(notebook: Notebook) -> None:
        cell = _cell(notebook, old, kind)
        cell.source = cell.source.replace(old, new)

    return spoil


def _append(to: str, text: str, kind: str = "") -> Callable[[Notebook], None]:
    def spoil(notebook: Notebook) -> None:
        _cell(notebook, to, kind).source += text

    return spoil


def _set(containing: str, **values: object) -> Callable[[Notebook], None]:
    def spoil(notebook: Notebook) -> None:
        _cell(notebook, containing, "code").update(nbformat.from_dict(values))

    return spoil


def _mystnb(path: tuple[str, str], value: str) -> Callable[[Notebook], None]:
    def spoil(notebook: Notebook) -> None:
        _cell(notebook, "plot(0)").metadata["mystnb"][path[0]][path[1]] = value

    return spoil


def _output(kind: str, **values: object) -> Callable[[Notebook], None]:
    def spoil(notebook: Notebook) -> None:
        _cell(notebook, "double_3").outputs.append(new_output(kind, **values))

    return spoil


def _drop(containing: str) -> Callable[[Notebook], None]:
    def spoil(notebook: Notebook) -> None:
        notebook.cells.remove(_cell(notebook, containing))

    return spoil


def _move(containing: str) -> Callable[[Notebook], None]:
    def spoil(notebook: Notebook) -> None:
        cell = _cell(notebook, containing)
        notebook.cells.remove(cell)
        notebook.cells.insert(-1, cell)

    return spoil


def _metadata(**values: object) -> Callable[[Notebook], None]:
    def spoil(notebook: Notebook) -> None:
        notebook.metadata.update(nbformat.from_dict(values))

    return spoil


def _many_cells(notebook: Notebook) -> None:
    place = notebook.cells.index(_cell(notebook, "double_0"))
    notebook.cells[place:place] = [new_code_cell("1 + 1") for _ in range(20)]


def _same_alt_text(notebook: Notebook) -> None:
    first, second = _cell(notebook, "plot(0)"), _cell(notebook, "plot(1)")
    second.metadata["mystnb"]["image"]["alt"] = "  " + first.metadata["mystnb"]["image"]["alt"].upper()


SPOILT: dict[str, tuple[Callable[[Notebook], None], str]] = {
    # gate: what is spoilt, what the message says
    "title_cell label": (_replace("(04-gptq)=", "(gptq)="), "the first cell must begin"),
    "title_cell badge": (_replace("/blob/v0.1.0/", "/blob/main/"), "must end with"),
    "title_cell time": (_replace("about 5 s", "about 500 s"), "at most 'about 90 s'"),
    "title_cell second title": (_append("## Summary", "\n\n# Another"), "one level-1 heading"),
    "spine missing": (_replace("## When it breaks", "### When it breaks"), "'## When it breaks' is missing"),
    "spine order": (_move("## Summary"), "must stand in the order"),
    "spine unknown": (_append("## Summary", "\n\n## Conclusion"), "'## Conclusion' is not a section"),
    "glance": (_replace("**Not covered**", "Not covered"), "lacks the bold lead **Not covered**"),
    "setup_cell": (_replace("%pip install -q", "%pip install -U"), "the setup cell differs"),
    "setup_cell missing": (_drop("ctx = lqedu"), "the first code cell must be the setup cell"),
    "predict_first": (_replace(":class: predict", ":class: tip"), "predict-first"),
    "explorer": (_set("explorer", outputs=[]), "needs an executed cell that shows an explorer"),
    "explorer questions": (_replace("2. What stays?", ""), "two numbered questions"),
    "further_reading": (_replace("{cite:t}`lin2024awq`", "AWQ"), "cites nothing"),
    "further_reading items": (_replace("- {cite:t}`lin2024awq`, a line.\n", ""), "4 to 8 list items; found 3"),
    "further_reading next": (_replace("**Next:**", "Next:"), "beginning with **Next:**"),
    "exercises label": (_replace(":label: ex-04-gptq-2", ":label: ex-two"), "exercises must be labelled"),
    "exercises stub": (_replace('"04-gptq.3"', '"04-gptq.9"', "code"), "exercise 3 has no stub cell"),
    "exercises too few": (_replace("{exercise} Number 4", "{note} Number 4"), "4 to 6 exercises; found 3"),
    "exercises solution": (_set("return w\n\n\nlqedu.book.check(\"04-gptq.1\"", outputs=[]), "does not say '04-gptq.1: passed'"),
    "exercises dropdown": (_replace(":class: dropdown", ":class: open"), "must open with {solution-start}"),
    "exercises end": (_drop("{solution-end}"), "needs its {solution-end}"),
    "sizes words": (_replace(SENTENCE * 90, ""), "words of prose"),
    "sizes cells": (_many_cells, "code cells without the solutions"),
    "sizes figures": (_set("plot(0)", outputs=[]), "4 figures"),
    "sizes lines": (_append("double_0", "\n" + "1\n" * 40), "lines; a cell has at most 40"),
    "sizes bytes": (_output("display_data", data={"text/html": "x" * 900_000}), "bytes; a notebook has at most"),
    "numbered_equations label": (_replace("(eq-04-gptq-grid)", "(eq-grid)"), "must begin with eq-04-gptq-"),
    "numbered_equations many": (
        _append("### A grid", "".join(f"\n\n$$ w $$ (eq-04-gptq-{n})" for n in "abc")),
        "at most 3",
    ),
    "figures no alt": (_mystnb(("image", "alt"), ""), "mystnb.image.alt must state"),
    "figures no number": (_mystnb(("image", "alt"), "The error falls with every additional bit"), "mystnb.image.alt must state"),
    "figures markup": (_mystnb(("image", "alt"), "The error falls with $b$, from 0.4 at 2 bits to 0.01"), "no markup"),
    "figures stand-in": (
        _mystnb(("image", "alt"), "Placeholder: the error falls from 0.4 at 2 bits to 0.01"), "still a stand-in",
    ),
    "figures twice": (_same_alt_text, "is that of cell"),
    "figures name": (_mystnb(("figure", "name"), "fig-1"), "must begin with fig-04-gptq-"),
    "figures caption": (_mystnb(("figure", "caption"), ""), "caption is missing"),
    "figures markdown": (_append("## Summary", "\n\n![](a.svg)"), "an image without alt text"),
    "letters code": (_append("double_0", "\nW = 1"), "W is w in this book"),
    "letters parameter": (_replace("def double_0(w: float)", "def double_0(zero_point: float)"), "zero_point is z"),
    "letters maths": (_append("## Summary", "\n\nThe Hessian $H^{-1}$"), "H in a formula is h"),
    "tidy_code syntax": (_append("double_0", "\n)"), "not valid Python"),
    "tidy_code magic": (_append("double_0", "\n!ls"), "belong to the setup cell only"),
    "tidy_code warnings": (_append("double_0", '\nwarnings.filterwarnings("ignore")'), "a silenced warning"),
    "tidy_code seed": (_append("double_0", "\ntorch.manual_seed(0)"), "global seeds"),
    "tidy_code star": (_append("double_0", "\nfrom torch import *"), "a star import from torch"),
    "documented_functions hints": (_replace("def double_0(w: float) -> float", "def double_0(w)"), "needs type hints"),
    "documented_functions docstring": (_replace('"""Twice ``w``."""', "pass"), "needs a one-line docstring"),
    "executed order": (_set("double_3", execution_count=99), "not executed from top to bottom"),
    "executed never": (_set("double_3", execution_count=None), "not executed from top to bottom"),
    "executed error": (_output("error", ename="ValueError", evalue="no", traceback=[]), "a stored error: ValueError"),
    "executed stderr": (_output("stream", name="stderr", text="hm"), "output on stderr"),
    "executed widget": (
        _output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}),
        "widget state",
    ),
    "executed address": (_output("stream", name="stdout", text="<A object at 0x7f3a00aa10>"), "a memory address"),
    "executed empty": (_set("double_3", source=""), "an empty cell"),
    "metadata kernel": (_metadata(kernelspec={"name": "venv"}), "kernelspec must be python3"),
    "metadata notebook": (_metadata(colab={"provenance": []}), "volatile notebook metadata (colab)"),
    "metadata cell": (_set("double_3", metadata={"execution": {}}), "volatile cell metadata (execution)"),
    "metadata tags": (_set("double_3", metadata={"tags": ["skip-execution"]}), "unknown tags: skip-execution"),
    "colon_fences backticks": (_append("## Summary", "\n\n```{note}\nx\n```"), "a directive in backticks"),
    "colon_fences open": (_append("## Summary", "\n\n:::{note}\nx"), "a directive that is not closed"),
    "own_network": (_append("## Summary", "\n\n![a badge](https://example.org/a.svg)"), "loaded from another host"),
    "own_network http": (_append("## Summary", "\n\n[a](http://example.org)"), "links use https"),
}  # fmt: skip


def test_a_good_chapter_passes(tmp_path: Path) -> None:
    assert _problems(good_chapter(), tmp_path) == []


def test_hardware_is_optional(tmp_path: Path) -> None:
    notebook = good_chapter()
    _drop("## On hardware")(notebook)
    assert _problems(notebook, tmp_path) == []


@pytest.mark.parametrize("case", SPOILT)
def test_one_thing_wrong_is_found(case: str, tmp_path: Path) -> None:
    spoil, message = SPOILT[case]
    notebook = good_chapter()
    spoil(notebook)
    problems = _problems(notebook, tmp_path)
    assert any(message in problem for problem in problems), problems
    assert all(problem.startswith("04-gptq.ipynb") for problem in problems)


def test_every_gate_has_a_case() -> None:
    assert {case.partition(" ")[0] for case in SPOILT} == {one.__name__ for one in CHAPTER_GATES}


def test_the_setup_chapter_may_be_shorter(tmp_path: Path) -> None:
    notebook = good_chapter("00-setup")
    for title in ("The problem, measured", "When it breaks", "See it"):
        _replace(f"## {title}", "## Something else")(notebook)
    assert _problems(notebook, tmp_path, "00-setup") == []
    assert any("is missing" in problem for problem in _problems(notebook, tmp_path))


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_cleaning_removes_what_the_gates_refuse(tmp_path: Path) -> None:
    notebook = good_chapter()
    for case in ("metadata kernel", "metadata notebook", "metadata cell"):
        SPOILT[case][0](notebook)
    assert _problems(notebook, tmp_path)
    assert _problems(clean(notebook), tmp_path) == []
    sized = new_output(
        "display_data",
        {"image/png": _png(Image.new("RGBA", (4, 4)))},
        metadata={"image/png": {"width": 640}, "needs_background": "light"},
    )
    notebook.cells[-1] = new_code_cell("1", outputs=[sized])
    assert clean(notebook).cells[-1].outputs[0].metadata == {"image/png": {"width": 640}}


# --- gates over the repository ------------------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A repository that passes."""
    (tmp_path / "book/chapters").mkdir(parents=True)
    (tmp_path / "book/results").mkdir()
    (tmp_path / "book/api").mkdir()
    (tmp_path / "lqedu/formats").mkdir(parents=True)
    (tmp_path / "tests/notebooks").mkdir(parents=True)
    files = {
        "pyproject.toml": '[project]\nversion = "0.1.0"\n',
        "lqedu/__init__.py": '__version__ = "0.1.0"\n',
        "lqedu/formats/__init__.py": "",
        "CITATION.cff": 'version: "0.1.0"\n',
        "CHANGELOG.md": "## 0.1.0\n",
        "_toc.yml": "root: book/intro\nchapters:\n  - file: book/chapters/04-gptq\n  - file: book/glossary\n",
        "book/intro.md": "(intro)=\n# Intro\n\n{doc}`chapters/04-gptq`, {ref}`04-gptq`, {term}`scale`, [API](api/formats.md)\n",
        "book/glossary.md": "# Glossary\n\n:::{glossary}\nscale\n  A step.\n:::\n",
        "book/api/formats.md": "# F\n\n```{eval-rst}\n.. lqedu-api:: lqedu.formats\n```\n",
        "book/references.bib": (ROOT / "book/references.bib").read_text(encoding="utf-8"),
        "book/chapters/04-gptq.ipynb": nbformat.writes(good_chapter()),
        "book/results/good.json": json.dumps(GOOD_RESULT),
        "tests/notebooks/pytest.ini": "[pytest]\naddopts = --nbval-lax\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


GOOD_RESULT = {
    "schema": 1,
    "name": "good",
    "title": "A result",
    "kind": "measured",
    "date": "2026-11-24T04:00:00Z",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "command": "python -m lqedu compare smollm2-135m --methods rtn",
    "host": dict.fromkeys(("cpu", "cores", "gpu", "driver", "os", "python", "torch", "triton", "transformers")),
    "configuration": {"model": "smollm2-135m"},
    "values": [{"method": "rtn", "samples": [1.0, 2.0, 4.0], "median": 2.0, "spread": 1.0, "unit": "s"}],
}

BROKEN_BOOK = {
    # gate: file, what is written into it (or None: it goes), what the message says
    "table_of_contents missing": ("book/glossary.md", None, "book/glossary does not exist"),
    "table_of_contents unlisted": ("book/chapters/05-awq.ipynb", "chapter 05-awq", "not in _toc.yml"),
    "unique_names": ("book/chapters/05-awq.ipynb", "chapter 04-gptq", "is already used in 04-gptq.ipynb"),
    "links ref": ("book/intro.md", "{ref}`nowhere`", "nothing is labelled nowhere"),
    "links doc": ("book/intro.md", "{doc}`chapters/05-awq`", "there is no page chapters/05-awq"),
    "links cite": ("book/intro.md", "{cite:t}`nobody1999`", "no entry nobody1999"),
    "links term": ("book/intro.md", "{term}`flux`", "the glossary has no term flux"),
    "links path": ("book/intro.md", "[here](chapters/none.md)", "the link chapters/none.md leads nowhere"),
    "result_files": ("book/results/good.json", '{"schema": 1}', "missing fields"),
    "results_exist": ("book/results/other.json", None, "book/results/other.json does not exist"),
    "runs_weekly hidden": (
        "tests/notebooks/pytest.ini",
        "--ignore=book/chapters/04-gptq.ipynb",
        "nothing says that it may take long",
    ),
    "runs_weekly long": (
        "book/chapters/25-end-to-end.ipynb",
        "chapter 25-end-to-end",
        "add --ignore=book/chapters/25-end",
    ),
    "runs_weekly nowhere": (
        "book/chapters/25-end-to-end.ipynb",
        "chapter 25-end-to-end",
        "no step runs 'make execute'",
    ),
    "residue": ("book/intro.md", "TO" + "DO: more", "marks unfinished work"),
    "residue path": ("book/intro.md", "see /" + "home/someone/book", "is a path of one machine"),
    "api_is_documented": ("book/api/formats.md", "# F\n", "no page of book/api"),
    "versions_agree": ("CITATION.cff", 'version: "0.2.0"\n', "does not name version 0.1.0"),
}


def test_a_good_repository_passes(book: Path) -> None:
    assert check_book(Book(book)) == []


@pytest.mark.parametrize("case", BROKEN_BOOK)
def test_one_thing_wrong_in_the_repository_is_found(case: str, book: Path) -> None:
    name, text, message = BROKEN_BOOK[case]
    path = book / name
    if case == "results_exist":
        notebook = good_chapter()
        _append("double_0", '\nlqedu.book.results("other")')(notebook)
        (book / "book/chapters/04-gptq.ipynb").write_text(nbformat.writes(notebook), encoding="utf-8")
    elif text is None:
        path.unlink()
    elif text.startswith("chapter "):
        path.write_text(nbformat.writes(good_chapter(text.removeprefix("chapter "))), encoding="utf-8")
    else:
        path.write_text(text, encoding="utf-8")
    problems = check_book(Book(book))
    assert any(message in problem for problem in problems), problems


def test_every_repository_gate_has_a_case() -> None:
    assert {case.partition(" ")[0] for case in BROKEN_BOOK} == {one.__name__ for one in BOOK_GATES}


# --- the JSON Schema says what lqedu.book.results.validate says ----------------------------------------------------------


def _without(key: str) -> dict:
    return {k: v for k, v in GOOD_RESULT.items() if k != key}


@pytest.mark.parametrize(
    "result",
    [_without(key) for key in GOOD_RESULT]
    + [
        GOOD_RESULT | {"kind": "guessed"},
        GOOD_RESULT | {"date": "yesterday"},
        GOOD_RESULT | {"commit": "HEAD"},
        GOOD_RESULT | {"schema": 2},
        GOOD_RESULT | {"values": []},
        GOOD_RESULT | {"values": [{"ppl": 3.0}]},
        GOOD_RESULT | {"extra": 1},
        GOOD_RESULT | {"host": {}},
    ],
    ids=repr,
)
def test_schema_and_reader_refuse_the_same(result: dict) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from lqedu.book.results import validate

    schema = json.loads((ROOT / "book/results/schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(GOOD_RESULT)
    assert validate(GOOD_RESULT) == []
    assert not validator.is_valid(result)
    assert validate(result)


def test_committed_results_keep_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "book/results/schema.json").read_text(encoding="utf-8"))
    for path in sorted((ROOT / "book/results").glob("*.json")):
        if path.name != "schema.json":
            jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), schema)


def test_figures_are_kept_in_few_colours_and_stay_as_they_look():
    noise = np.random.default_rng(0).integers(0, 200, (120, 300), dtype=np.uint8)
    picture = Image.fromarray(noise).convert("RGBA")
    before = _png(picture)
    after = with_palette(before)
    seen = Image.open(io.BytesIO(base64.b64decode(after))).convert("RGB")
    assert len(after) < len(before) and seen.size == picture.size
    assert max(high for _, high in ImageChops.difference(seen, picture.convert("RGB")).getextrema()) <= 2
    assert with_palette(after) == after
