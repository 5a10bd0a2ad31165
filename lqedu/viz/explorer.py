"""Explorers: small interactive pictures that move in a rendered page, without a kernel, a network or a library.

An explorer is one ES module beside this file, written once for two hosts. :class:`Explorer` inlines it with its data
into HTML, where it works from a file; :meth:`Explorer.widget` gives the same module to anywidget for a live kernel. A
module may use all of ``_kit.mjs``, which the host puts in front of it; ``grid.mjs`` is the one to learn from.
"""

import hashlib
import html
import json
import math
import re
from functools import cache
from importlib.resources import files
from typing import Any

from lqedu.errors import MissingDependencyError, UsageError

MAX_DATA = 200_000  # bytes of JSON: a page stays light, and a notebook below its limit
MAX_LINES = 200  # of a module

_KIT = "_kit"
_DEFAULT = re.compile(r"^export default \{", re.MULTILINE)
_DIGITS = ".9g"  # enough to tell all float32 numbers apart

_SHIM = """
const state = DATA;
const listeners = {};
const model = {
  get: (key) => state[key],
  set: (key, value) => {
    const changed = state[key] !== value;
    state[key] = value;
    if (changed) for (const f of listeners[`change:${key}`] ?? []) f();
  },
  on: (event, f) => { (listeners[event] ??= []).push(f); },
  save_changes: () => {},
};
"""

_PAGE = """<figure class="lqedu-explorer" data-explorer="KEY" aria-label="TITLE">
<style>
CSS</style>
<figcaption><strong>TITLE</strong><span>DESCRIPTION</span></figcaption>
<div class="lq-body"><p class="live">It moves where scripts run: in the book, Colab and Jupyter.</p></div>
</figure>
<script type="module">
MODULE
for (const figure of document.querySelectorAll('[data-explorer="KEY"]:not([data-ready])')) {
figure.dataset.ready = "";
const el = figure.querySelector(".lq-body");
SHIM
el.replaceChildren();
try {
  explorer.render({ model, el });
} catch (error) {
  el.textContent = `This picture failed to start: ${error.message}`;
  console.error(error);
}
}
</script>
"""

_WIDGET = """
export default {
  render({ model, el }) {
    const body = h("div", { class: "lq-body" });
    const [title, description] = [model.get("_title"), model.get("_description")];
    el.append(h("figure", { class: "lqedu-explorer", "aria-label": title },
      h("figcaption", {}, h("strong", {}, title), h("span", {}, description)), body));
    return explorer.render({ model, el: body });
  },
};
"""


class Explorer:
    """An explorer with its data, which shows itself in a notebook and on a page. Made by :func:`explorer`."""

    def __init__(self, name: str, data: dict[str, Any], title: str, description: str) -> None:
        self.name, self.data, self.title, self.description = name, data, title, description

    def __repr__(self) -> str:
        return f"{self.title}: {self.description}"

    def _repr_html_(self) -> str:
        return self.html()

    def html(self) -> str:
        """The explorer as a fragment of a page that needs nothing else. The same explorer gives the same bytes."""
        data = _script_safe(json.dumps(self.data, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
        module = _as_constant(module_source(self.name))
        # Not a random key, so that executing a notebook again changes nothing. Twice on a page, the first of the two
        # scripts to run starts both figures and the second finds none left.
        key = f"{self.name}-{hashlib.sha256((self.title + data + module).encode()).hexdigest()[:10]}"
        parts = {
            "KEY": key, "TITLE": html.escape(self.title), "DESCRIPTION": html.escape(self.description),
            "CSS": _file("explorer.css"), "MODULE": module, "SHIM": _SHIM.replace("DATA", data),
        }  # fmt: skip
        return re.sub("|".join(parts), lambda match: parts[match[0]], _PAGE)

    def widget(self) -> Any:
        """A live anywidget of the same module, with the data as synchronized traits: ``w.bits = 3`` moves the picture.

        Raises:
            MissingDependencyError: anywidget is missing.
        """
        try:
            import anywidget
            import traitlets
        except ImportError as error:
            raise MissingDependencyError("live explorers need anywidget; pip install anywidget") from error
        values = self.data | {"_title": self.title, "_description": self.description}
        traits = {key: traitlets.Any(value).tag(sync=True) for key, value in values.items()}
        source = _as_constant(module_source(self.name)) + _WIDGET
        body = {"_esm": source, "_css": _file("explorer.css"), **traits}
        return type(f"{self.name.title().replace('_', '')}Explorer", (anywidget.AnyWidget,), body)()


def explorer(name: str, data: dict[str, Any], *, title: str, description: str) -> Explorer:
    """An interactive picture; the last expression of a cell.

    Args:
        name: of the module, ``lqedu/viz/<name>.mjs``.
        data: what the module reads with ``model.get(key)``, the starting value of every control included: numbers,
            strings, truth values, lists and dicts; tensors and arrays become lists, float32 ones with nine digits.
        title: what the picture is, in a few words.
        description: what it shows and what to try, in one or two sentences; also what is left where no script runs.

    Raises:
        UsageError: no such module, or data that are too large, not finite, or of a type that JSON does not have.
    """
    if name not in names():
        raise UsageError(f"no explorer {name!r}; there are {', '.join(names())}")
    if not title.strip() or not description.strip():
        raise UsageError("an explorer needs a title and a description: they are all that some readers get")
    if not isinstance(data, dict) or not all(isinstance(key, str) and key.isidentifier() for key in data):
        raise UsageError("the data of an explorer are a dict whose keys are identifiers")
    plain = {key: _plain(value, key) for key, value in data.items()}
    size = len(json.dumps(plain, ensure_ascii=False).encode())
    if size > MAX_DATA:
        raise UsageError(f"the explorer {name!r} has {size} bytes of data, at most {MAX_DATA} fit; keep fewer values")
    return Explorer(name, plain, title, description)


def names() -> list[str]:
    """The explorers there are."""
    modules = (file.name for file in files("lqedu.viz").iterdir() if file.name.endswith(".mjs"))
    return sorted(name.removesuffix(".mjs") for name in modules if not name.startswith("_"))


def module_source(name: str) -> str:
    """The module of an explorer behind the kit: an ES module that stands by itself.

    Raises:
        UsageError: a module that breaks the contract.
    """
    source = _file(f"{name}.mjs")
    if problem := contract_problem(source):
        raise UsageError(f"the explorer {name}.mjs {problem}")
    return f"{_file(f'{_KIT}.mjs')}\n{source}"


def contract_problem(source: str) -> str | None:
    """What a module does that a host cannot work with, or None.

    >>> contract_problem("export function compute() {}")
    'must have one line that starts with "export default {"'
    """
    if len(source.splitlines()) > MAX_LINES:
        return f"has more than {MAX_LINES} lines"
    if len(_DEFAULT.findall(source)) != 1:
        return 'must have one line that starts with "export default {"'
    if not re.search(r"^export (function|const) compute\b", source, re.MULTILINE):
        return "must export compute, the numbers that a test compares with Python's"
    if re.search(r"^\s*import\b|\bimport\(|\bfetch\(|https?://", source, re.MULTILINE):
        return "must not import or fetch anything"
    if "</script" in source.lower() or "<!--" in source:
        return "must not hold what ends or comments out a script element"
    return None


def _as_constant(source: str) -> str:
    """The module with its default export under a name, because a script of a page has nobody to export to."""
    return _DEFAULT.sub("const explorer = {", source)


@cache
def _file(name: str) -> str:
    return files("lqedu.viz").joinpath(name).read_text(encoding="utf-8")


def _script_safe(text: str) -> str:
    """JSON that cannot end the script element around it; also without line separators that older scripts refuse."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON has it, or a UsageError that names the place."""
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        narrow = "float" in str(value.dtype) and "64" not in str(value.dtype)
        value = _rounded(value.tolist()) if narrow else value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"the explorer's data hold {value} at {where}; leave it out or say it in another way")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value).__name__
    raise UsageError(f"the explorer's data hold a value of type {kind} at {where}; use numbers, strings, lists, dicts")


def _rounded(value: Any) -> Any:
    """Nested lists of float32 numbers in nine digits, from which the same float32 numbers come back."""
    return [_rounded(item) for item in value] if isinstance(value, list) else float(format(value, _DIGITS))
