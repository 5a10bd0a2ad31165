"""The plots that several chapters draw."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lqedu.errors import UsageError
from lqedu.viz.style import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PRINTED = 12  # rows and columns up to which a matrix shows its values
_DIGIT = 0.68  # width of a digit over the size of its font, with a little room
_SMALLEST = 9.0  # points; smaller values are not printed


def matrix(
    ax: "Axes",
    m: Any,
    *,
    title: str = "",
    fmt: str = ".2f",
    symmetric: bool = True,
    limit: float | None = None,
    rows: str = "",
    cols: str = "",
) -> None:
    """A matrix as colours, with its values printed if it has at most twelve rows and columns and they fit.

    Args:
        ax: axes to draw on.
        m: tensor or array ``[rows, cols]``.
        title: of the panel.
        fmt: format of the printed values.
        symmetric: colours from blue (negative) over white (zero) to red; otherwise from white (smallest) to blue.
        limit: value of the strongest colour; the largest magnitude by default. Give two panels the same one.
        rows: label of the rows.
        cols: label of the columns.
    """
    a = _array(m)
    if a.ndim != 2 or not a.size:
        raise UsageError(f"a matrix has two dimensions of at least 1, got {list(a.shape)}")
    top = limit if limit is not None else float(abs(a).max()) if symmetric else max(float(a.max()), 0.0)
    top = top or 1.0  # a matrix of zeros has no largest value to scale by
    low = -top if symmetric else min(float(a.min()), 0.0)
    ax.imshow(a, cmap="RdBu_r" if symmetric else "Blues", vmin=low, vmax=top, aspect="equal", interpolation="nearest")
    ax.grid(False)
    ax.set(title=title, xlabel=cols, ylabel=rows, xticks=[], yticks=[])
    size = _value_size(ax, a, fmt)
    if size is None:
        return
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            strength = abs(a[i, j]) / top if symmetric else (a[i, j] - low) / (top - low)
            colour = "white" if strength > 0.6 else "black"
            ax.text(j, i, format(a[i, j], fmt), ha="center", va="center", color=colour, fontsize=size)


def bars(
    ax: "Axes",
    labels: Sequence[str],
    values: Sequence[float],
    *,
    errors: Sequence[float] | None = None,
    fmt: str | Callable[[float], str] = ".2f",
    highlight: int | None = None,
) -> None:
    """Horizontal bars from top to bottom, with their values at their ends, so that they are read without the axis.

    Args:
        ax: axes to draw on.
        labels: one a bar.
        values: not negative.
        errors: half-widths of error bars.
        fmt: format of the values, or a function.
        highlight: index of the bar that the text is about; it is drawn solid, the others hatched and grey.
    """
    numbers = [float(value) for value in values]
    if len(labels) != len(numbers):
        raise UsageError(f"bars need a label each, got {len(labels)} labels for {len(numbers)} values")
    strong = range(len(numbers)) if highlight is None else [highlight]
    places = range(len(numbers))
    drawn = ax.barh(places, numbers, xerr=errors, height=0.66, error_kw={"ecolor": "black", "capsize": 3, "lw": 1.2})
    for i, bar in enumerate(drawn):
        bar.set_facecolor(PALETTE["blue"] if i in strong else "#C9C9C9")
        if i not in strong:
            bar.set_hatch("//")
            bar.set_edgecolor("white")
        end = numbers[i] + (float(errors[i]) if errors is not None else 0.0)
        text = fmt(numbers[i]) if callable(fmt) else format(numbers[i], fmt)
        ax.annotate(text, (end, i), xytext=(4, 0), textcoords="offset points", va="center")
    ax.set_yticks(places, labels)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.margins(x=0.14)
    ax.set_xlim(left=0)


def histogram_with_grid(
    ax: "Axes",
    values: Any,
    points: Any,
    *,
    bins: int = 60,
    labels: tuple[str, str] = ("weights", "grid points"),
) -> None:
    """How weights are spread, over the grid points they can be rounded to.

    Args:
        ax: axes to draw on.
        values: tensor or array of any shape.
        points: the grid points.
        bins: of the histogram.
        labels: of the two in the legend.
    """
    ax.hist(_array(values).ravel(), bins=bins, color=PALETTE["sky"], edgecolor="white", linewidth=0.4, label=labels[0])
    below = ax.get_xaxis_transform()  # y as a fraction of the axes
    points = _array(points).ravel()
    ax.vlines(points, 0, 1, transform=below, color=PALETTE["red"], linewidth=0.9, linestyle="--", alpha=0.8)
    ax.plot(points, [1.0] * len(points), "v", color=PALETTE["red"], transform=below, clip_on=False, label=labels[1])
    ax.set(xlabel="value", ylabel="count")
    ax.grid(False, axis="x")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.6)


def _value_size(ax: "Axes", a: Any, fmt: str) -> float | None:
    """Font size in which the values of a matrix fit their cells, before the layout is known; None if they do not."""
    if max(a.shape) > _PRINTED:
        return None
    place = ax.get_subplotspec()
    panels = place.get_gridspec().ncols if place is not None else 1
    cell = 72 * ax.figure.get_figwidth() / panels * 0.9 / a.shape[1]  # points
    size = cell / (_DIGIT * max(len(format(value, fmt)) for value in a.ravel()))
    return min(10.0, size) if size >= _SMALLEST else None


def _array(values: Any) -> Any:
    """A numpy array from a tensor on any device, an array or a list."""
    import numpy as np

    if hasattr(values, "detach"):
        values = values.detach().to("cpu")
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)
