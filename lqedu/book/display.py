"""What notebook pages show besides figures: numbers glued into sentences, tables, and where a result came from."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lqedu.errors import UsageError

_GLUE_PREFIX = "application/papermill.record/"  # what MyST-NB looks for in a notebook's outputs
_NOTHING = "–"

Formats = Mapping[str, "str | Callable[[Any], str]"]


# --- glue -------------------------------------------------------------------------------------------------------------


def glue(name: str, value: Any) -> None:
    """Record ``value`` under ``name``, for a sentence of the page to show: ``{glue:text}`name:.2f```.

    It stores what ``myst_nb.glue(name, value, display=False)`` stores, without importing MyST-NB, which a reader on
    Colab does not have. Outside a notebook it does nothing.

    Args:
        name: unique in its notebook.
        value: a number (also a tensor or array of one element), a string, or anything with a rich display, such as a
            figure or a :func:`table`. Glue numbers, and let the sentence format them.

    Raises:
        UsageError: the name is empty or holds one of ``: ` "`` or a line break, which the role cannot refer to.
    """
    if not name or any(character in name for character in ':`"\n'):
        raise UsageError(f"a glued name is not empty and holds none of : ` or quotes or line breaks, got {name!r}")
    ipython = _ipython()
    if ipython is None:
        return
    value = plain(value)
    if value is None or isinstance(value, bool | int | float | str):
        bundle, details = {"text/plain": repr(value)}, {}
    else:
        bundle, details = ipython.display_formatter.format(value)
    details["scrapbook"] = {"name": name, "mime_prefix": _GLUE_PREFIX}
    ipython.display_pub.publish({_GLUE_PREFIX + mime: data for mime, data in bundle.items()}, metadata=details)


def plain(value: Any) -> Any:
    """The Python number inside a tensor, array or numpy scalar of one element; anything else as it is.

    >>> import torch
    >>> plain(torch.tensor([2.5])), plain("a")
    (2.5, 'a')
    """
    is_array = hasattr(value, "item") and hasattr(value, "dtype") and hasattr(value, "shape")
    return value.item() if is_array and all(size == 1 for size in value.shape) else value


def _ipython() -> Any:
    """The running IPython shell, or None."""
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


# --- tables -----------------------------------------------------------------------------------------------------------


class Table:
    """A table that shows itself as HTML on a page and as text in a terminal. Made by :func:`table`."""

    def __init__(self, headers: list[str], cells: list[list[str]], numeric: list[bool], caption: str | None) -> None:
        self.headers, self.cells, self.numeric, self.caption = headers, cells, numeric, caption

    def __repr__(self) -> str:
        lines = [self.headers, *self.cells]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]

        def row(line: list[str]) -> str:
            cells = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, self.numeric, strict=True))
            return "  ".join(cells).rstrip()

        rule = "  ".join("-" * width for width in widths)
        caption = [self.caption] if self.caption else []
        return "\n".join([*caption, row(self.headers), rule, *(row(line) for line in self.cells)])

    def _repr_html_(self) -> str:
        line = "1px solid var(--pst-color-border, var(--jp-border-color1, #8888))"
        caption, label = "", "Table"
        if self.caption:
            label = html.escape(self.caption)
            caption = f'<caption style="caption-side:top;text-align:left;padding:0 0 .4em">{label}</caption>'

        def cell(tag: str, text: str, numeric: bool, scope: str = "") -> str:
            # Inline styles, because a notebook carries no style sheet to Colab; the colours are the theme's.
            side = "right;font-variant-numeric:tabular-nums" if numeric else "left"
            weight = ";font-weight:600" if scope == ' scope="col"' else ";font-weight:normal" if scope else ""
            together = ";white-space:nowrap" if "±" in text else ""  # a value and its error stay on one line
            style = f"text-align:{side};padding:.3em .7em;border-bottom:{line};background:none{weight}{together}"
            return f'<{tag}{scope} style="{style}">{html.escape(text)}</{tag}>'

        pairs = list(zip(self.headers, self.numeric, strict=True))
        head = "".join(cell("th", text, numeric, ' scope="col"') for text, numeric in pairs)
        body = ""
        for first, *rest in self.cells:
            name = cell("th", first, self.numeric[0], ' scope="row"')
            others = "".join(cell("td", c, n) for c, n in zip(rest, self.numeric[1:], strict=True))
            body += f"<tr>{name}{others}</tr>\n"
        # A region that can scroll must be reachable by keyboard, hence tabindex.
        return (
            f'<div class="lqedu-table" role="region" tabindex="0" aria-label="{label}" style="overflow-x:auto">\n'
            '<table style="border-collapse:collapse;margin:.5em 0;color:inherit">'
            f"{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>"
        )


def table(
    rows: Sequence[Mapping[str, Any]],
    *,
    columns: Sequence[str] | Mapping[str, str] | None = None,
    caption: str | None = None,
    formats: Formats | None = None,
) -> Table:
    """A table of rows.

    Args:
        rows: dicts; a key that a row lacks, or whose value is None, shows as a dash.
        columns: keys to show, in order, or ``{key: header}``. By default all keys, as headers too.
        caption: above the table.
        formats: a format specification (``".2f"``) or a function for the values of a key. By default whole numbers show
            as they are and others with four significant digits.

    Raises:
        UsageError: no rows, or a column or format for a key that no row has.

    >>> table([{"grid": "INT4", "ppl": 28.123}, {"grid": "FP32", "ppl": 22.5}], formats={"ppl": ".1f"})
    grid   ppl
    ----  ----
    INT4  28.1
    FP32  22.5
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not keys:
        raise UsageError("a table needs at least one row with at least one value")
    headers = {key: key for key in keys} if columns is None else _headers(columns)
    formats = formats or {}
    if unknown := [key for key in (*headers, *formats) if key not in keys]:
        raise UsageError(f"no row has {', '.join(map(repr, unknown))}; the rows have {', '.join(map(repr, keys))}")
    values = [[plain(row.get(key)) for key in headers] for row in rows]
    cells = [[_format(v, formats.get(key)) for v, key in zip(line, headers, strict=True)] for line in values]
    numeric = [all(_is_number(v) or v is None for v in column) for column in zip(*values, strict=True)]
    return Table(list(headers.values()), cells, numeric, caption)


def _headers(columns: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    return dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}


def _format(value: Any, how: "str | Callable[[Any], str] | None") -> str:
    if value is None:
        return _NOTHING
    if callable(how):
        return str(how(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value  # a word among numbers ("per channel" as a group size) takes no number format
    if how is not None:
        return format(value, how)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- provenance -------------------------------------------------------------------------------------------------------


class Caption(str):
    """A line of text that a page shows in small print."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        style = "font-size:.85em;opacity:.85;margin:.2em 0;overflow-wrap:anywhere"
        return f'<p class="lqedu-provenance" style="{style}">{html.escape(self)}</p>'


_HOW = {"measured": "Measured", "simulated": "Simulated, not measured,", "theoretical": "Counted, not measured,"}


def provenance(result: Mapping[str, Any]) -> Caption:
    """One line that says where a result file's numbers come from; the last expression of a cell, under what it drew."""
    host = result["host"]
    machine = host["gpu"] or f"{host['cpu']}, {host['cores']} core{'s' if host['cores'] != 1 else ''}"
    versions = [f"{name} {host[name]}" for name in ("torch", "triton", "transformers") if host[name]]
    if not host["gpu"]:
        versions = [text for text in versions if not text.startswith("triton")]
    commit = result["commit"][:10] + (" with local changes" if result["dirty"] else "")
    return Caption(
        f"{_HOW[result['kind']]} {result['date'][:10]} on {machine}; {', '.join(versions)}; commit {commit}; "
        f"{result['name']}.json: {result['command']}"
    )
