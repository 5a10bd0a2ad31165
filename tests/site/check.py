"""The book's conventions, checked in seconds: ``make check``. Needs the standard library, nbformat and lqedu.book.results.

``python tests/site/check.py [NOTEBOOK ...]`` looks at the given chapters, or at the whole repository. A gate is a function
that yields problems; each names the file, the cell (counted from 0) and the remedy. Exit status 1 if there is any.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SPINE = (
    "At a glance", "Setup", "The problem, measured", "The idea", "Build it", "Use it", "See it", "On a model",
    "On hardware", "What the real tools do", "When it breaks", "Summary", "Exercises", "Solutions", "Further reading",
)  # fmt: skip
GLANCE = ("You will be able to", "You need", "You will build", "Not covered")
SETUP = """\
try:
    import lqedu
except ImportError:  # on Colab: the release that matches this page
    %pip install -q "lqedu[notebook] @ git+https://github.com/lqedu/lqedu@v{version}"
    import lqedu

ctx = lqedu.book.setup()"""


@dataclass(frozen=True)
class Shape:
    """What a chapter must have; ranges include both ends."""

    optional: frozenset[str] = frozenset({"On hardware"})
    extra_sections: bool = False  # other level-2 headings between Setup and Summary
    words: tuple[int, int] = (2000, 3500)
    code_cells: tuple[int, int] = (18, 31)  # 30, and one for the kernel that "On hardware" records
    figures: tuple[int, int] = (5, 9)
    exercises: tuple[int, int] = (4, 6)
    seconds: int = 90  # that the title cell may state; what takes longer runs once a week, see runs_weekly below


REDUCED = {
    # A worked case from installation to tokens: a stage a cell, and whole models instead of blocks.
    "25-end-to-end": Shape(code_cells=(18, 36), seconds=600),
    "00-setup": Shape(
        optional=frozenset(SPINE[2:11]), extra_sections=True, words=(600, 3500), code_cells=(6, 30), figures=(0, 9),
        exercises=(2, 6),
    )
}  # fmt: skip

MAX_LINES, MAX_BYTES, MIN_ALT = 40, 800_000, 40
NOT_OUR_LETTERS = {
    "W": "w", "X": "x", "H": "h", "Q": "q", "S": "s", "Z": "z", "zp": "z", "zero_point": "z", "w_q": "q", "wq": "q",
    "w_deq": "w_hat", "w_dq": "w_hat",
}  # fmt: skip
TAGS = frozenset(
    [
        "hide-input",
        "hide-output",
        "hide-cell",
        "remove-input",
        "remove-output",
        "remove-cell",
        "remove-stderr",
        "scroll-output",
        "full-width",
        "margin",
        "raises-exception",
        "nbval-skip",
        "nbval-ignore-output",
        "nbval-check-output",
        "nbval-raises-exception",
        "parameters",
    ]
)
# Spelt in two halves, so that this file does not find itself.
RESIDUE = re.compile(
    r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X|TB" r"D|WI" r"P)\b|(?i:\blorem ip" r"sum|\bplace" r"holder text|\bas an AI (?:language )?model)"
)  # fmt: skip
MACHINE_PATH = re.compile(r"(?<![\w.~/:-])/(?:home|root|Users|tmp|work|mnt|content|private|var/folders)/[\w.-]+")
TEXT_FILES = {".py", ".md", ".ipynb", ".mjs", ".css", ".yml", ".toml", ".json", ".bib", ".cff", ".svg", ".txt"}

_FENCE = re.compile(r"^(?P<mark>`{3,}|~{3,}).*?^(?P=mark)`*\s*$", re.MULTILINE | re.DOTALL)
_INLINE_CODE = re.compile(r"(?<![`{}])(`+)(?!`).+?\1")
_ROLE = re.compile(r"\{[a-z:]+\}`[^`]*`")
_MATHS = re.compile(r"\$\$.+?\$\$|(?<![\\$])\$(?!\s)[^$]+?(?<!\s)\$", re.DOTALL)
_WORD = re.compile(r"[A-Za-zÀ-ÿ][\w’'-]*")


class Cell:
    """A notebook cell with its place and the section it stands in."""

    def __init__(self, index: int, data: nbformat.NotebookNode, section: str) -> None:
        self.index, self.data, self.section = index, data, section
        self.source: str = data.source
        self.is_code = data.cell_type == "code"

    @property
    def outputs(self) -> list[nbformat.NotebookNode]:
        return self.data.get("outputs", [])

    @property
    def tags(self) -> list[str]:
        return self.data.metadata.get("tags", [])

    @property
    def images(self) -> int:
        """Outputs that are pictures."""
        return sum(any(mime.startswith("image/") for mime in o.get("data", {})) for o in self.outputs)

    @property
    def figure(self) -> dict[str, object]:
        return self.data.metadata.get("mystnb", {})

    @cached_property
    def tree(self) -> ast.Module | None:
        """The code without its magics; None for prose and for code that is no Python."""
        if not self.is_code:
            return None
        lines = [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in self.source.splitlines()]
        try:
            return ast.parse("\n".join(lines))
        except SyntaxError:
            return None

    def output_text(self) -> str:
        """Everything it printed, as text."""
        parts = []
        for output in self.outputs:
            parts.append(output.get("text", ""))
            parts += [str(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
        return "\n".join(parts)


class Chapter:
    """A parsed notebook."""

    def __init__(self, path: Path, version: str) -> None:
        self.path, self.version = path, version
        self.id = path.stem
        self.shape = REDUCED.get(self.id, Shape())
        self.notebook = nbformat.read(path, as_version=4)
        self.cells: list[Cell] = []
        section = ""
        for index, data in enumerate(self.notebook.cells):
            if data.cell_type == "markdown":
                found = re.findall(r"^## +(.+?)\s*$", _FENCE.sub("", data.source), re.MULTILINE)
                section = found[0] if found else section
            self.cells.append(Cell(index, data, section))
            if data.cell_type == "markdown" and found:
                section = found[-1]

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else self.path.name

    @property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.is_code]

    @property
    def prose(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.is_code]

    def headings(self, level: int) -> list[tuple[int, str]]:
        """``(cell, title)`` of every heading of a level."""
        pattern = re.compile(rf"^{'#' * level} +(.+?)\s*$", re.MULTILINE)
        return [(cell.index, title) for cell in self.prose for title in pattern.findall(_FENCE.sub("", cell.source))]

    def section(self, title: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.section == title]

    def section_text(self, title: str) -> str:
        """The prose under a level-2 heading, wherever cells begin and end."""
        text = "\n".join(cell.source for cell in self.prose)
        match = re.search(rf"^## +{re.escape(title)}\s*$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        return match[1] if match else ""


Problem = tuple[int | None, str]  # cell, what is wrong and what to do
ChapterGate = Callable[[Chapter], Iterator[Problem]]
CHAPTER_GATES: list[ChapterGate] = []


def gate(function: ChapterGate) -> ChapterGate:
    CHAPTER_GATES.append(function)
    return function


def _plain(text: str) -> str:
    """Prose alone: no code, no maths, no directive lines, no link targets."""
    text = _MATHS.sub(" ", _FENCE.sub(" ", text))
    text = re.sub(r"^:{3,}.*$|^:[\w-]+:.*$|^\([\w-]+\)=$", " ", text, flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", _INLINE_CODE.sub(" ", _ROLE.sub(" ", text)))


def _within(value: int, limits: tuple[int, int]) -> bool:
    return limits[0] <= value <= limits[1]


# --- structure --------------------------------------------------------------------------------------------------------


@gate
def title_cell(chapter: Chapter) -> Iterator[Problem]:
    first = chapter.cells[0] if chapter.cells else None
    if first is None or first.is_code or not first.source.startswith(f"({chapter.id})=\n# "):
        yield 0, f"the first cell must begin with the label ({chapter.id})= and, on the next line, '# Title'"
        return
    if len(titles := chapter.headings(1)) != 1:
        yield titles[-1][0], f"a chapter has one level-1 heading, its title; found {len(titles)}"
    link = (
        f"https://colab.research.google.com/github/lqedu/lqedu/blob/v{chapter.version}/book/chapters/{chapter.id}.ipynb"
    )
    badge = first.source.rstrip().splitlines()[-1].split(" · ")
    if len(badge) != 3 or f"({link})" not in badge[0] or "runs on" not in badge[1].lower() or "about" not in badge[2]:
        yield 0, f"the title cell must end with '[Open in Colab]({link}) · runs on a CPU · about N s'"
    elif not (stated := re.search(r"about (\d+) s\b", badge[2])) or int(stated[1]) > chapter.shape.seconds:
        yield 0, f"the title cell must state at most 'about {chapter.shape.seconds} s' for this chapter"


@gate
def spine(chapter: Chapter) -> Iterator[Problem]:
    found = chapter.headings(2)
    titles = [title for _, title in found]
    for title in SPINE:
        if title not in titles and title not in chapter.shape.optional:
            yield None, f"the section '## {title}' is missing"
        if titles.count(title) > 1:
            yield None, f"the section '## {title}' appears {titles.count(title)} times"
    known = [title for title in titles if title in SPINE]
    if known != sorted(known, key=SPINE.index):
        yield (
            None,
            f"sections must stand in the order {', '.join(t for t in SPINE if t in known)}; found {', '.join(known)}",
        )
    for cell, title in found:
        if title in SPINE:
            continue
        place = titles.index(title)
        inside = all(t in titles for t in ("Setup", "Summary")) and titles.index("Setup") < place < titles.index(
            "Summary"
        )
        if not (chapter.shape.extra_sections and inside):
            yield cell, f"'## {title}' is not a section of a chapter; use ### below one that is"


@gate
def glance(chapter: Chapter) -> Iterator[Problem]:
    text = chapter.section_text("At a glance")
    for lead in GLANCE:
        if f"**{lead}" not in text:
            yield None, f"'At a glance' lacks the bold lead **{lead}**"


@gate
def setup_cell(chapter: Chapter) -> Iterator[Problem]:
    cells = [cell for cell in chapter.section("Setup") if cell.is_code]
    if not cells or cells[0] is not next(iter(chapter.code), None):
        yield None, "the first code cell must be the setup cell, under '## Setup'"
    elif cells[0].source.strip() != SETUP.format(version=chapter.version):
        yield cells[0].index, "the setup cell differs from the one every chapter has (SETUP in tests/site/check.py)"


@gate
def predict_first(chapter: Chapter) -> Iterator[Problem]:
    title = "The problem, measured"
    if title not in chapter.shape.optional and ":class: predict" not in chapter.section_text(title):
        yield None, f"'{title}' needs a predict-first callout (an admonition with ':class: predict')"


@gate
def explorer(chapter: Chapter) -> Iterator[Problem]:
    if "See it" in chapter.shape.optional:
        return
    if not any("lqedu-explorer" in cell.output_text() for cell in chapter.section("See it")):
        yield None, "'See it' needs an executed cell that shows an explorer (lqedu.viz.explorer)"
    if len(re.findall(r"^\s*\d+[.)] ", chapter.section_text("See it"), re.MULTILINE)) < 2:
        yield None, "'See it' needs two numbered questions that the explorer answers"


@gate
def further_reading(chapter: Chapter) -> Iterator[Problem]:
    text = chapter.section_text("Further reading")
    items = re.findall(r"^[-*] .+(?:\n {2,}.+)*", text, re.MULTILINE)
    if not 4 <= len(items) <= 8:
        yield None, f"'Further reading' holds 4 to 8 list items; found {len(items)}"
    for item in items:
        if "{cite:" not in item and "](http" not in item:
            yield None, f"this item of 'Further reading' cites nothing: {item[:60]}"
    last = chapter.cells[-1].source.strip().splitlines()[-1] if chapter.cells[-1].source.strip() else ""
    if chapter.cells[-1].is_code or not last.startswith("**Next:**"):
        yield len(chapter.cells) - 1, "the last line of a chapter names the next one, beginning with **Next:**"


@gate
def exercises(chapter: Chapter) -> Iterator[Problem]:
    labels = re.findall(r"^:{3,}\{exercise\}.*\n:label: *(\S+)", chapter.section_text("Exercises"), re.MULTILINE)
    wanted = [f"ex-{chapter.id}-{n}" for n in range(1, len(labels) + 1)]
    if labels != wanted:
        yield None, f"exercises must be labelled {', '.join(wanted)}; found {', '.join(labels)}"
    if not _within(len(labels), chapter.shape.exercises):
        yield None, "a chapter has {} to {} exercises; found {}".format(*chapter.shape.exercises, len(labels))
    solved = chapter.section_text("Solutions")
    stubs, answers = chapter.section("Exercises"), chapter.section("Solutions")
    for n in range(1, len(labels) + 1):
        call = re.compile(rf"check\(\s*['\"]{re.escape(chapter.id)}\.{n}['\"]\s*,")
        if not any(cell.is_code and call.search(cell.source) for cell in stubs):
            yield None, f'exercise {n} has no stub cell that ends in check("{chapter.id}.{n}", …)'
        solutions = [cell for cell in answers if cell.is_code and call.search(cell.source)]
        if not solutions:
            yield None, f'exercise {n} has no solution cell that passes check("{chapter.id}.{n}", …)'
        for cell in solutions:
            if f"{chapter.id}.{n}: passed" not in cell.output_text():
                yield cell.index, f"the stored output of the solution does not say '{chapter.id}.{n}: passed'"
        if not re.search(
            rf"^:{{3,}}\{{solution-start\}} *ex-{re.escape(chapter.id)}-{n}\s*\n:class: dropdown", solved, re.M
        ):
            yield (
                None,
                f"the solution of exercise {n} must open with {{solution-start}} ex-{chapter.id}-{n}, :class: dropdown",
            )
    if solved.count("{solution-start}") != solved.count("{solution-end}"):
        yield None, "every {solution-start} needs its {solution-end}"


# --- size -------------------------------------------------------------------------------------------------------------


@gate
def sizes(chapter: Chapter) -> Iterator[Problem]:
    outside = [cell for cell in chapter.cells if cell.section != "Solutions"]
    words = sum(len(_WORD.findall(_plain(cell.source))) for cell in outside if not cell.is_code)
    counts = {
        "words of prose": (words, chapter.shape.words),
        "code cells": (sum(cell.is_code for cell in outside), chapter.shape.code_cells),
        "figures": (sum(cell.images > 0 for cell in outside), chapter.shape.figures),
    }
    for what, (value, limits) in counts.items():
        if not _within(value, limits):
            yield None, f"{value} {what} without the solutions; a chapter has {limits[0]} to {limits[1]}"
    if (size := chapter.path.stat().st_size) > MAX_BYTES:
        yield None, f"{size:,} bytes; a notebook has at most {MAX_BYTES:,}: smaller figures or explorer data"
    for cell in chapter.code:
        if (lines := len(cell.source.splitlines())) > MAX_LINES:
            yield cell.index, f"{lines} lines; a cell has at most {MAX_LINES}: split it, or move code to the package"


@gate
def numbered_equations(chapter: Chapter) -> Iterator[Problem]:
    for cell in chapter.prose:
        for label in re.findall(r"\$\$ *\(([\w-]+)\)", cell.source):
            if not label.startswith(f"eq-{chapter.id}-"):
                yield cell.index, f"the equation label {label} must begin with eq-{chapter.id}-"
    for part in re.split(r"^### ", chapter.section_text("The idea"), flags=re.MULTILINE):
        if (count := len(re.findall(r"\$\$ *\([\w-]+\)", part))) > 3:
            title = part.strip().splitlines()[0]
            yield None, f"'{title}' numbers {count} equations; a subsection of 'The idea' has at most 3"


# --- figures ----------------------------------------------------------------------------------------------------------


@gate
def figures(chapter: Chapter) -> Iterator[Problem]:
    described: dict[str, int] = {}  # alt text without case and spaces, and the first cell that has it
    for cell in chapter.code:
        if not cell.images or "remove-output" in cell.tags or "remove-cell" in cell.tags:
            continue
        alt = str(cell.figure.get("image", {}).get("alt", ""))
        figure = cell.figure.get("figure", {})
        if cell.images > 1:
            yield cell.index, f"{cell.images} pictures in one cell; show one a cell, each has its own alt text"
        if len(alt) < MIN_ALT or not re.search(r"\d", alt):
            yield (
                cell.index,
                f"mystnb.image.alt must state the trend and the number that matters (≥ {MIN_ALT} characters)",
            )
        if "placeholder" in alt.lower():
            yield cell.index, "mystnb.image.alt is still a stand-in; look at the picture and write what it shows"
        if (before := described.setdefault(" ".join(alt.lower().split()), cell.index)) != cell.index and alt:
            yield cell.index, f"mystnb.image.alt is that of cell {before}; two pictures do not show the same"
        if re.search(r"[$\"<>`{}]", alt):
            yield cell.index, "mystnb.image.alt is read aloud: no markup, no quotes, no maths"
        if not str(figure.get("name", "")).startswith(f"fig-{chapter.id}-"):
            yield cell.index, f"mystnb.figure.name must begin with fig-{chapter.id}-"
        if not figure.get("caption"):
            yield cell.index, "mystnb.figure.caption is missing"
        elif figure["caption"] == alt:
            yield cell.index, "the alt text repeats the caption; say what the picture shows"
    for cell in chapter.prose:
        if re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=\"[^\"]{5,}\")", cell.source):
            yield cell.index, "an image without alt text"


# --- code -------------------------------------------------------------------------------------------------------------


@gate
def letters(chapter: Chapter) -> Iterator[Problem]:
    for cell in chapter.code:
        for node in ast.walk(cell.tree) if cell.tree else ():
            name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else ""
            bound = isinstance(node, ast.arg) or isinstance(getattr(node, "ctx", None), ast.Store)
            if bound and name in NOT_OUR_LETTERS:
                yield cell.index, f"{name} is {NOT_OUR_LETTERS[name]} in this book (see the notation page)"
    for cell in chapter.prose:
        for formula in _MATHS.findall(_INLINE_CODE.sub(" ", _FENCE.sub(" ", cell.source))):
            bare = re.sub(
                r"\\(?:text|mathrm|operatorname|mathbb|mathsf|texttt|mathcal|tag)\*?\s*\{[^{}]*\}|\\mathbb [A-Z]",
                " ",
                formula,
            )
            if letter := re.search(r"(?<![A-Za-z\\])[WXHQSZ](?![A-Za-z])", bare):
                yield cell.index, f"{letter[0]} in a formula is {letter[0].lower()} in this book: {formula[:60]}"


@gate
def tidy_code(chapter: Chapter) -> Iterator[Problem]:
    for cell in chapter.code:
        if cell.tree is None:
            yield cell.index, "this cell is not valid Python"
            continue
        is_setup = cell.section == "Setup"
        if re.search(r"^\s*[%!]", cell.source, re.MULTILINE) and not is_setup:
            yield cell.index, "shell lines and magics belong to the setup cell only"
        if re.search(r"filterwarnings\(\s*['\"]ignore|simplefilter\(\s*['\"]ignore", cell.source):
            yield cell.index, "a silenced warning: repair its cause"
        if re.search(r"\bmanual_seed\(|random\.seed\(", cell.source) and "Generator" not in cell.source:
            yield cell.index, "global seeds: draw from ctx.generator or ctx.seed(n)"
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                yield cell.index, f"a star import from {node.module}: name what you import"


@gate
def documented_functions(chapter: Chapter) -> Iterator[Problem]:
    for cell in chapter.code:
        if cell.section in ("Exercises", "Solutions") or cell.tree is None:
            continue
        for node in ast.walk(cell.tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            is_kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
            if is_kernel:  # Triton reads annotations as types of its own; pointers and blocks have none
                parameters = []
            if (node.returns is None and not is_kernel) or any(
                p.annotation is None and p.arg != "self" for p in parameters
            ):
                yield cell.index, f"{node.name}() needs type hints on its parameters and its result"
            if not ast.get_docstring(node):
                yield cell.index, f"{node.name}() needs a one-line docstring"


# --- what is stored ---------------------------------------------------------------------------------------------------


@gate
def executed(chapter: Chapter) -> Iterator[Problem]:
    counts = [cell.data.get("execution_count") for cell in chapter.code]
    if counts != list(range(1, len(counts) + 1)):
        wrong = next(
            (
                c
                for c, n in zip(chapter.code, range(1, len(counts) + 1), strict=False)
                if c.data.get("execution_count") != n
            ),
            None,
        )
        yield (
            wrong.index if wrong else None,
            "not executed from top to bottom in one go: make execute CHAPTER=" + chapter.id,
        )
    for cell in chapter.code:
        if not cell.source.strip():
            yield cell.index, "an empty cell"
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in cell.tags:
                yield cell.index, f"a stored error: {output.get('ename')}"
            if output.get("name") == "stderr":
                yield cell.index, f"output on stderr: {output.get('text', '').strip()[:60]}"
            if any("widget" in mime for mime in output.get("data", {})):
                yield cell.index, "widget state: show explorers through lqedu.viz, which carry their own data"
        if address := re.search(r"\bat 0x[0-9a-f]{6,}", cell.output_text()):
            yield cell.index, f"a memory address in the output ({address[0]}): it differs in every run"


@gate
def metadata(chapter: Chapter) -> Iterator[Problem]:
    stored = chapter.notebook.metadata
    if stored.get("kernelspec", {}).get("name") != "python3":
        yield None, "the kernelspec must be python3"
    volatile = set(stored) - {"kernelspec", "language_info"} | set(stored.get("language_info", {})) - {"name"}
    if volatile:
        yield (
            None,
            f"volatile notebook metadata ({', '.join(sorted(volatile))}): python tests/notebooks/clean.py {chapter.name}",
        )
    for cell in chapter.cells:
        if unknown := set(cell.data.metadata) - {"tags", "mystnb"}:
            yield (
                cell.index,
                f"volatile cell metadata ({', '.join(sorted(unknown))}): python tests/notebooks/clean.py {chapter.name}",
            )
        if unknown := set(cell.tags) - TAGS:
            yield cell.index, f"unknown tags: {', '.join(sorted(unknown))}"


# --- prose ------------------------------------------------------------------------------------------------------------


@gate
def colon_fences(chapter: Chapter) -> Iterator[Problem]:
    for cell in chapter.prose:
        if re.search(r"^`{3,}\{", cell.source, re.MULTILINE):
            yield cell.index, "a directive in backticks: write it with colons, which stay readable in Colab"
        depth: list[str] = []
        for line in cell.source.splitlines():
            if match := re.match(r"^(:{3,})(\{[\w:-]+\})?", line):
                if match[2]:
                    depth.append(match[1])
                elif depth:
                    depth.pop()
                else:
                    yield cell.index, "a closing ::: that closes nothing"
        if depth:
            yield cell.index, f"a directive that is not closed: {depth[-1]}"


@gate
def own_network(chapter: Chapter) -> Iterator[Problem]:
    for cell in chapter.prose:
        if re.search(
            r"!\[[^\]]*\]\(\s*(?:https?:)?//|<(?:img|script|iframe|link)[^>]*(?:src|href)=.?(?:https?:)?//", cell.source
        ):
            yield cell.index, "something loaded from another host: the page must work without a network"
        if re.search(r"\]\(http://", cell.source):
            yield cell.index, "links use https"


# --- the whole repository ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Book:
    """The repository as the gates below see it; tests point it at another folder."""

    root: Path

    @cached_property
    def version(self) -> str:
        return tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

    @cached_property
    def chapters(self) -> list[Chapter]:
        return [Chapter(path, self.version) for path in sorted(self.root.glob("book/chapters/*.ipynb"))]

    @cached_property
    def files(self) -> list[Path]:
        """Text files under version control (or, outside git, of the folder)."""
        listed = subprocess.run(
            ["git", "-C", str(self.root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True, text=True,
        )  # fmt: skip
        names = listed.stdout.split("\0") if listed.returncode == 0 else []
        paths = [self.root / n for n in names if n] or [
            p for p in self.root.rglob("*") if ".venv" not in p.parts and "_build" not in p.parts
        ]
        return sorted({p for p in paths if p.suffix in TEXT_FILES and p.is_file()})

    @cached_property
    def pages(self) -> dict[Path, list[tuple[int | None, str]]]:
        """Markdown of every page: ``(cell, text)``."""
        found: dict[Path, list[tuple[int | None, str]]] = {
            c.path: [(p.index, p.source) for p in c.prose] for c in self.chapters
        }
        for path in sorted(self.root.glob("book/**/*.md")):
            if "results" not in path.parts:
                found[path] = [(None, path.read_text(encoding="utf-8"))]
        return found


BookProblem = tuple[Path, int | None, str]
BookGate = Callable[[Book], Iterator[BookProblem]]
BOOK_GATES: list[BookGate] = []


def book_gate(function: BookGate) -> BookGate:
    BOOK_GATES.append(function)
    return function


@book_gate
def table_of_contents(book: Book) -> Iterator[BookProblem]:
    """Every chapter is in the table of contents and every entry exists."""
    toc = book.root / "_toc.yml"
    listed = re.findall(r"(?:file|root): *(\S+)", toc.read_text(encoding="utf-8"))
    for entry in listed:
        if not any((book.root / f"{entry}{suffix}").is_file() for suffix in (".md", ".ipynb")):
            yield toc, None, f"{entry} does not exist"
    for chapter in book.chapters:
        if f"book/chapters/{chapter.id}" not in listed:
            yield chapter.path, None, "this chapter is not in _toc.yml"


@book_gate
def unique_names(book: Book) -> Iterator[BookProblem]:
    """Labels and figure names are unique in the book."""
    seen: dict[str, Path] = {}
    for chapter in book.chapters:
        for cell in chapter.cells:
            names = (
                [cell.figure.get("figure", {}).get("name", "")]
                if cell.is_code
                else re.findall(r"^\(([\w-]+)\)=$", cell.source, re.M)
            )
            for name in filter(None, names):
                if name in seen:
                    yield chapter.path, cell.index, f"the label {name} is already used in {seen[name].name}"
                seen[name] = chapter.path


@book_gate
def links(book: Book) -> Iterator[BookProblem]:
    """Links and references between pages resolve."""
    text = "\n".join(part for parts in book.pages.values() for _, part in parts)
    names = [c.figure.get("figure", {}).get("name", "") for chapter in book.chapters for c in chapter.code]
    labels = {*re.findall(r"^\(([\w-]+)\)=$|\$\$ *\(([\w-]+)\)|^:(?:label|name): *([\w-]+)", text, re.MULTILINE)}
    known = {name for found in labels for name in found if name} | {*names, "genindex", "search", "modindex"}
    keys = set()
    for bib in book.root.glob("book/*.bib"):
        keys |= set(re.findall(r"^@\w+\{([^,\s]+),", bib.read_text(encoding="utf-8"), re.MULTILINE))
    terms = set()
    for glossary in book.root.glob("book/glossary.md"):
        terms = {
            line.strip().lower() for line in glossary.read_text(encoding="utf-8").splitlines() if re.match(r"^\S", line)
        }
    for path, parts in book.pages.items():
        for cell, part in parts:
            prose = _FENCE.sub(" ", part)
            for target in re.findall(r"\{(?:ref|numref|eq|prf:ref)\}`(?:[^`<]*<)?([^`>]+)>?`", prose):
                if target not in known:
                    yield path, cell, f"nothing is labelled {target}"
            for target in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", prose):
                base = book.root / target.lstrip("/") if target.startswith("/") else path.parent / target
                if not any(base.with_name(base.name + suffix).is_file() for suffix in (".md", ".ipynb")):
                    yield path, cell, f"there is no page {target}"
            for group in re.findall(r"\{cite:[pt]s?\}`([^`]+)`", prose):
                for key in group.split(","):
                    if key.strip() not in keys:
                        yield path, cell, f"book/references.bib has no entry {key.strip()}"
            for term in re.findall(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`", prose):
                if term.lower() not in terms:
                    yield path, cell, f"the glossary has no term {term}"
            for target in re.findall(r"(?<!!)\]\((?!https?:|mailto:|#|/)([^)#\s]+)", _INLINE_CODE.sub(" ", prose)):
                if not (path.parent / target).exists() and not any(
                    (path.parent / f"{target}{s}").exists() for s in (".md", ".ipynb")
                ):
                    yield path, cell, f"the link {target} leads nowhere"


@book_gate
def result_files(book: Book) -> Iterator[BookProblem]:
    """Every result file keeps the schema, also under a JSON Schema validator, where there is one."""
    from lqedu.book.results import read_result
    from lqedu.errors import UsageError

    for path in sorted(book.root.glob("book/results/**/*.json")):
        if path.name == "schema.json":
            continue
        try:
            read_result(path)
        except UsageError as error:
            yield path, None, str(error)


@book_gate
def results_exist(book: Book) -> Iterator[BookProblem]:
    """A chapter reads only result files that are there."""
    for chapter in book.chapters:
        for cell in chapter.code:
            for stem in re.findall(r"\bresults\(\s*['\"]([\w-]+)['\"]", cell.source):
                if not (book.root / "book" / "results" / f"{stem}.json").is_file():
                    yield chapter.path, cell.index, f"book/results/{stem}.json does not exist"


@book_gate
def runs_weekly(book: Book) -> Iterator[BookProblem]:
    """What `make notebooks` leaves out are the chapters that may take longer, no other; the weekly workflow runs them all."""
    settings, weekly = book.root / "tests/notebooks/pytest.ini", book.root / ".github/workflows/weekly.yml"
    text = {path: path.read_text(encoding="utf-8") if path.is_file() else "" for path in (settings, weekly)}
    long = {chapter.id for chapter in book.chapters if chapter.shape.seconds > Shape().seconds}
    ignored = set(re.findall(r"--ignore=book/chapters/([\w-]+)\.ipynb", text[settings]))
    for chapter in sorted(long - ignored):
        yield settings, None, f"{chapter} may take minutes: add --ignore=book/chapters/{chapter}.ipynb"
    for chapter in sorted(ignored - long):
        yield settings, None, f"{chapter} is left out of 'make notebooks', and nothing says that it may take long"
    if long and "run: make execute\n" not in text[weekly]:
        yield weekly, None, "no step runs 'make execute', so nothing runs the chapters that take long"


@book_gate
def residue(book: Book) -> Iterator[BookProblem]:
    """No marks of unfinished work and no path of one machine in anything that is committed."""
    for path in book.files:
        if path.name in ("constraints.txt", "LICENSE"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if len(line) > 20_000:  # pictures
                continue
            if match := RESIDUE.search(line):
                yield path, None, f"line {number}: {match[0]!r} marks unfinished work"
            if (match := MACHINE_PATH.search(line)) and "tests" not in path.relative_to(book.root).parts:
                yield path, None, f"line {number}: {match[0]} is a path of one machine"


@book_gate
def api_is_documented(book: Book) -> Iterator[BookProblem]:
    """Every public package of lqedu has its page in book/api, which lists whatever __all__ lists."""
    pages = "\n".join(p.read_text(encoding="utf-8") for p in sorted(book.root.glob("book/api/*.md")))
    for init in sorted(book.root.glob("lqedu/*/__init__.py")):
        package = f"lqedu.{init.parent.name}"
        if init.parent.name[0] != "_" and f"lqedu-api:: {package}\n" not in pages:
            yield init, None, f"no page of book/api has '.. lqedu-api:: {package}'"


@book_gate
def versions_agree(book: Book) -> Iterator[BookProblem]:
    """pyproject.toml, the package, the citation file and the changelog speak of one version."""
    for name, pattern in {
        "lqedu/__init__.py": rf'__version__ = "{re.escape(book.version)}"',
        "CITATION.cff": rf'version: "?{re.escape(book.version)}"?\s',
        "CHANGELOG.md": rf"## {re.escape(book.version)}\b",
    }.items():
        path = book.root / name
        if not path.is_file() or not re.search(pattern, path.read_text(encoding="utf-8")):
            yield path, None, f"does not name version {book.version} of pyproject.toml"


def check_chapter(chapter: Chapter) -> list[str]:
    problems = [problem for one in CHAPTER_GATES for problem in one(chapter)]
    return [f"{chapter.name}{'' if cell is None else f': cell {cell}'}: {text}" for cell, text in problems]


def check_book(book: Book, only: set[Path] | None = None) -> list[str]:
    problems = [problem for one in BOOK_GATES for problem in one(book)]
    return [
        f"{path.relative_to(book.root).as_posix()}{'' if cell is None else f': cell {cell}'}: {text}"
        for path, cell, text in problems
        if only is None or path in only
    ]


def main(arguments: list[str]) -> int:
    book = Book(ROOT)
    only = {Path(a).resolve() for a in arguments} or None
    if only and (missing := [p for p in only if not p.is_file()]):
        print(f"no such file: {missing[0]}", file=sys.stderr)
        return 2
    chapters = [c for c in book.chapters if only is None or c.path in only]
    problems = [line for chapter in chapters for line in check_chapter(chapter)] + check_book(book, only)
    print(
        "\n".join(problems)
        or f"check: {len(chapters)} chapters, {len(book.pages)} pages, {len(book.files)} files: all gates pass"
    )
    if problems:
        print(f"check: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
