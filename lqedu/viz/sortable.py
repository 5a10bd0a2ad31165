"""Long tables that a reader can sort, on a page without a kernel or a network.

The table is complete HTML. A few lines of script put a button into each head of a column; they set ``aria-sort`` and say
what they did, so that a keyboard and a screen reader get the same. Cells carry no styles of their own: a table of a hundred
rows stays small.
"""

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from lqedu.book.display import Formats, table

_CSS = """
.lqedu-sortable { max-height: 26rem; overflow: auto; border: 1px solid var(--pst-color-border, var(--jp-border-color1, #8888)); border-radius: .3rem; }
.lqedu-sortable table { border-collapse: collapse; margin: 0; width: 100%; color: inherit; font-size: .9em; }
.lqedu-sortable caption { caption-side: top; text-align: left; padding: .5em .7em; color: inherit; position: sticky; left: 0; max-width: min(100vw - 2.5rem, 44rem); }
.lqedu-sortable :is(th, td) { text-align: left; padding: .25em .7em; background: none; font-weight: normal; border-bottom: 1px solid var(--pst-color-border, var(--jp-border-color1, #8888)); }
.lqedu-sortable :is(th, td).n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.lqedu-sortable thead th { position: sticky; top: 0; font-weight: 600; background: var(--pst-color-surface, var(--jp-layout-color2, #f3f4f5)); }
.lqedu-sortable td.wide { min-width: 16rem; }
.lqedu-sortable button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: .3em 0; min-height: 2rem; text-align: inherit; cursor: pointer; text-decoration: underline dotted; text-underline-offset: .25em; }
.lqedu-sortable button:focus-visible, .lqedu-sortable:focus-visible { outline: 3px solid var(--pst-color-accent, var(--jp-brand-color1, #0072b2)); outline-offset: -2px; }
.lqedu-sortable th[aria-sort="ascending"] button::after { content: " ▲" / ""; }
.lqedu-sortable th[aria-sort="descending"] button::after { content: " ▼" / ""; }
.lqedu-sorted { font-size: .85em; margin: .3em 0; min-height: 1.4em; }
html[data-theme="dark"] .text_html:has(.lqedu-sortable) { background: none !important; color: inherit !important; padding: 0 !important; }
@media print { .lqedu-sortable { max-height: none; } }
"""
_WIDE = 40  # characters from which a column of text keeps a width in which its lines stay readable


class SortableTable:
    """A table with sortable columns. Made by :func:`sortable`."""

    def __init__(self, headers: list[str], cells: list[list[str]], numeric: list[bool], caption: str) -> None:
        self.headers, self.cells, self.numeric, self.caption = headers, cells, numeric, caption

    def __repr__(self) -> str:
        return f"{self.caption}: {len(self.cells)} rows of {', '.join(self.headers)}"

    def _repr_html_(self) -> str:
        label = html.escape(self.caption)
        wide = [max(map(len, column)) >= _WIDE for column in zip(*self.cells, strict=True)]
        marks = [' class="n"' if n else ' class="wide"' if w else "" for n, w in zip(self.numeric, wide, strict=True)]
        head = "".join(f'<th scope="col"{m}>{html.escape(h)}</th>' for h, m in zip(self.headers, marks, strict=True))
        body = ""
        for first, *rest in self.cells:
            others = "".join(f"<td{m}>{html.escape(c)}</td>" for c, m in zip(rest, marks[1:], strict=True))
            body += f'<tr><th scope="row"{marks[0]}>{html.escape(first)}</th>{others}</tr>\n'
        script = files("lqedu.viz").joinpath("_sortable.mjs").read_text(encoding="utf-8")
        return (  # a region that scrolls must be reachable by keyboard, hence tabindex
            f'<div><style>{_CSS}</style><div class="lqedu-sortable" role="region" tabindex="0" aria-label="{label}">\n'
            f"<table><caption>{label}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
            f'<p class="lqedu-sorted" role="status" aria-live="polite"></p></div>\n'
            f'<script type="module">\n{{\n{script}}}\n</script>'
        )


def sortable(
    rows: Sequence[Mapping[str, Any]],
    *,
    caption: str,
    columns: Sequence[str] | Mapping[str, str] | None = None,
    formats: Formats | None = None,
) -> SortableTable:
    """A table that a reader can sort by any column; the arguments are those of :func:`lqedu.book.table`.

    Raises:
        UsageError: no rows, or a column or format for a key that no row has.

    >>> sortable([{"grid": "INT4", "ppl": 28.1}, {"grid": "FP32", "ppl": 22.5}], caption="Perplexity")
    Perplexity: 2 rows of grid, ppl
    """
    made = table(rows, columns=columns, caption=caption, formats=formats)
    return SortableTable(made.headers, made.cells, made.numeric, caption)
