"""The style of all figures: colour-blind-safe, with a second cue, white, and readable when a phone shrinks it.

Sizes follow from where a figure ends up. A page is about 740 CSS pixels wide, a phone shows 345 of them; a figure 6.4
inches wide is 614 CSS pixels, so text of 11.5 points has that size on the page and 6.5 points on the phone.
"""

from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal

from lqedu.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, safe for the common kinds of colour blindness, in the order in which lines take them.
#: Their yellow is left out: it is too pale on white.
PALETTE = {
    "blue": "#0072B2",
    "red": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "grey": "#6E6E6E",
    "black": "#000000",
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 2)), (0, (1, 1)), (0, (8, 2)))

_WIDTHS = {"page": 6.4, "half": 3.4}  # inches
_PANEL_HEIGHT = {"page": 2.9, "half": 2.4}
_FONT = {"page": 11.5, "half": 9.5}  # a half figure is not shrunk by a phone

_DPI = 96  # one CSS pixel is 1/96 inch, so a figure has the size on the page that it was designed for
_GRID = "#DDDDDD"


def use_style() -> None:
    """Set the style for this process; :func:`lqedu.book.setup` calls it.

    Inside a notebook, figures become PNGs of two pixels a CSS pixel; draw them with :func:`figure`.

    Raises:
        MissingDependencyError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingDependencyError('figures need matplotlib; pip install "lqedu[notebook]"') from error
    mpl.rcParams.update(_rc())
    shell = _notebook_shell()
    if shell is not None:
        from matplotlib.figure import Figure
        from matplotlib_inline import backend_inline  # noqa: F401  (when first loaded, it sets a formatter of its own)

        shell.display_formatter.formatters["image/png"].for_type(Figure, _png)


def series(i: int) -> dict[str, Any]:
    """Colour, marker and dashes of the ``i``-th line of a plot, for ``ax.plot(x, y, **series(i))``.

    >>> series(1)
    {'color': '#D55E00', 'marker': 's', 'linestyle': '--'}
    """
    n = len(_MARKERS)
    return {"color": list(PALETTE.values())[i % n], "marker": _MARKERS[i % n], "linestyle": _DASHES[i % n]}


def figure(
    width: Literal["page", "half"] = "page",
    rows: int = 1,
    cols: int = 1,
    *,
    height: float | None = None,
    **subplots: Any,
) -> "tuple[Figure, Any]":
    """A figure of the book and its axes, as ``plt.subplots`` returns them.

    Args:
        width: "page", or "half" for a small one.
        rows: panels above each other.
        cols: panels side by side; at most two stay readable on a phone.
        height: of one panel, in inches.
        subplots: passed to ``plt.subplots``, such as ``sharex=True``.

    Raises:
        UsageError: another width, or more than two columns.
    """
    if width not in _WIDTHS:
        raise UsageError(f"a figure's width is 'page' or 'half', got {width!r}")
    if not 1 <= cols <= 2 or rows < 1:
        raise UsageError(f"a figure has one or two columns of panels, got {rows} x {cols}; stack them instead")
    use_style()
    import matplotlib.pyplot as plt

    size = (_WIDTHS[width], rows * (height or _PANEL_HEIGHT[width] * (1 if cols == 1 else 0.9)))
    with plt.rc_context(_font_sizes(_FONT[width])):
        return plt.subplots(rows, cols, figsize=size, layout="constrained", **subplots)


def _rc() -> dict[str, Any]:
    """Parameters of matplotlib."""
    from cycler import cycler

    lines = [series(i) for i in range(len(_MARKERS))]
    cycles = cycler(**{key: [line[key] for line in lines] for key in ("color", "linestyle", "marker")})
    return {
        "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
        "figure.dpi": _DPI, "figure.figsize": (_WIDTHS["page"], _PANEL_HEIGHT["page"]),
        "axes.prop_cycle": cycles, "lines.linewidth": 1.8, "lines.markersize": 5,
        "axes.grid": True, "grid.color": _GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#444444",
        "xtick.color": "#222222", "ytick.color": "#222222", "text.color": "black", "axes.labelcolor": "black",
        "axes.titlelocation": "left", "axes.titleweight": "bold", "legend.frameon": False,
        "image.cmap": "viridis", "font.family": "DejaVu Sans",
        "svg.hashsalt": "lqedu",
    } | _font_sizes(_FONT["page"])  # fmt: skip


def _font_sizes(size: float) -> dict[str, float]:
    keys = ("font.size", "axes.labelsize", "axes.titlesize", "figure.titlesize")
    small = ("xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    return dict.fromkeys(keys, size) | dict.fromkeys(small, max(size - 0.5, 9.0))


def colours(n: int) -> list[str]:
    """The first ``n`` colours of the palette, again from its start where it has fewer."""
    return list(islice(cycle(PALETTE.values()), n))


def _notebook_shell() -> Any:
    """The shell of a notebook's kernel, or None elsewhere."""
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    shell = get_ipython()
    return shell if getattr(shell, "kernel", None) is not None else None


def _png(fig: "Figure") -> tuple[str, dict[str, int]]:
    """A PNG of two pixels a CSS pixel, and the width to show it at.

    No height, which IPython's own "retina" adds: a phone narrows the picture, and a fixed height would distort it.
    """
    from IPython.core.pylabtools import retina_figure

    data, size = retina_figure(fig, base64=True, bbox_inches="tight")
    return data, {"width": size["width"]}
