"""Rows that nobody beats in two numbers at once, and the data of the picture that shows them; ``22-side-by-side``.

``lqedu/viz/pareto.mjs`` draws what :func:`pareto_data` gives it, and finds the front as :func:`pareto_front` does.
Needs no torch.
"""

import math
import re
from collections.abc import Iterable
from numbers import Real
from typing import Any

from lqedu.book.matrix import BATCHES, DENSE, TASKS, TEXTS, Matrix
from lqedu.errors import UsageError

#: What may stand on the vertical axis, by its key in :meth:`~lqedu.book.matrix.Matrix.summary`; ``less`` is better or not.
QUALITIES: dict[str, dict[str, Any]] = {
    **{f"{text}_ppl": {"label": f"{title} perplexity", "less": True, "log": True} for text, title in TEXTS.items()},
    "mean_acc_norm": {"label": "mean accuracy of the tasks", "less": False, "log": False},
    **{f"{task}_acc_norm": {"label": f"{title} accuracy", "less": False, "log": False} for task, title in TASKS.items()},
}  # fmt: skip

#: What may stand on the horizontal axis.
AXES: dict[str, dict[str, Any]] = {
    "bits_per_weight": {"label": "bits per weight", "less": True, "log": False},
    "quantize_seconds": {"label": "quantization, seconds", "less": True, "log": True},
    **{f"tokens_per_s_{n}": {"label": f"tokens/s, batch {n}", "less": False, "log": False} for n in BATCHES},
}

_PARTS = {"bits_per_weight": "storage", "quantize_seconds": "quantize"} | dict.fromkeys(
    (f"tokens_per_s_{n}" for n in BATCHES), "decode"
)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[int]:
    """Positions of the points that no other point dominates, in increasing order; ``22-side-by-side`` derives it.

    A point dominates another if it is not larger in either coordinate and smaller in at least one. So points that are
    equal in both coordinates do not dominate each other: all of them are kept, or none. Of points that are equal in one
    coordinate only, the one that is smaller in the other is kept at most. Infinities compare as numbers do.

    Args:
        points: less is better in both coordinates; negate one in which more is better.

    Raises:
        UsageError: these are no pairs, or a coordinate is not a number.

    >>> pareto_front([(4.0, 26.6), (3.0, 52.4), (4.0, 28.6), (3.0, 52.4), (8.0, 26.6)])
    [0, 1, 3]
    >>> pareto_front([])
    []
    """
    try:
        pairs = [tuple(point) for point in points]
    except TypeError as error:
        raise UsageError(f"a front needs a list of pairs of numbers ({error})") from error
    for i, pair in enumerate(pairs):
        if len(pair) != 2 or not all(isinstance(value, Real) and not math.isnan(value) for value in pair):
            raise UsageError(f"point {i} is {pair}; a front needs two numbers a point, leave out what has none")
    front: list[int] = []
    last = None  # the last point that was kept; from one to the next the first coordinate grows and the second falls
    for i in sorted(range(len(pairs)), key=pairs.__getitem__):
        if last is None or pairs[i] == last or pairs[i][1] < last[1]:
            front.append(i)
            last = pairs[i]
    return sorted(front)


def signed(row: dict[str, Any], x: str, quality: str) -> tuple[float, float]:
    """A row's two numbers so that less is better in both: as they are, or negated.

    Args:
        row: of :meth:`~lqedu.book.matrix.Matrix.summary`, with both numbers.
        x: a key of :data:`AXES`.
        quality: a key of :data:`QUALITIES`.

    Raises:
        UsageError: there is no such key, or the row has no such number.

    >>> signed({"bits_per_weight": 4.25, "mean_acc_norm": 0.44}, "bits_per_weight", "mean_acc_norm")
    (4.25, -0.44)
    """
    for key, known in ((x, AXES), (quality, QUALITIES)):
        if key not in known:
            raise UsageError(f"there is no {key!r} to compare by; choose among {', '.join(known)}")
        if row.get(key) is None:
            raise UsageError(f"the row {row.get('name', '')!r} has no {key}; leave it out")
    return (
        row[x] if AXES[x]["less"] else -row[x],
        row[quality] if QUALITIES[quality]["less"] else -row[quality],
    )


def pareto_data(matrix: Matrix) -> dict[str, Any]:
    """What the explorer ``pareto`` draws: the rows of a table with their numbers, and why a number is missing.

    A page shows it with ``lqedu.viz.explorer("pareto", pareto_data(matrix) | {"row": "gptq_w4_g64"}, title=…)``.

    Args:
        matrix: with the row of the dense model.

    Returns:
        ``rows``: name, title, method (the first word of its title), kind (``"weights"``, or ``"both"`` where inputs are
        quantized as well), values by key, moved (quality -> difference to the dense model and its paired standard error;
        in nats for a perplexity), why (key -> reason). ``dense``: values of the dense model, without its bits.
        ``qualities``, ``axes``: the choices. Then the starting values of the controls, which a page may replace:
        ``quality`` and ``x`` (keys of :data:`QUALITIES` and :data:`AXES`), ``kind`` (``"all"``, ``"weights"`` or
        ``"both"``) and ``row``, the name of the row that is described.

    Raises:
        UsageError: the table lacks the dense model, or has nothing else.
    """
    if DENSE not in matrix.files or len(matrix.files) == 1:
        raise UsageError(
            f"the picture compares rows with the dense model; read the table with its row {DENSE} and others"
        )
    numbers = {row["name"]: row for row in matrix.summary()}
    keys = [*QUALITIES, *AXES]

    def moved(row: dict[str, Any], quality: str) -> list[float | None]:
        stem = quality.removesuffix("_ppl")
        return [row[f"{stem}_delta"], row[f"{stem}_delta_stderr"]]

    rows = [
        {
            "name": name,
            "title": row["title"],
            "method": row["title"].split()[0],
            "kind": "both" if "quantize inputs" in matrix.part(name, "storage").get("online", ()) else "weights",
            "values": {key: row[key] for key in keys if row[key] is not None},
            "moved": {quality: moved(row, quality) for quality in QUALITIES if row[quality] is not None},
            "why": {key: _why(matrix, name, key) for key in keys if row[key] is None},
        }
        for name, row in numbers.items()
        if name != DENSE
    ]
    dense = {key: numbers[DENSE][key] for key in keys if numbers[DENSE][key] is not None}
    dense.pop("bits_per_weight", None)  # of the data type in which it was measured, not of what a server would store
    start = {"quality": "wikitext2_ppl", "x": "bits_per_weight", "kind": "all", "row": rows[0]["name"]}
    return {"rows": rows, "dense": dense, "qualities": QUALITIES, "axes": AXES} | start


def _why(matrix: Matrix, name: str, key: str) -> str:
    """Why a row has no such number, without the layer at which that was found."""
    part = _PARTS.get(key, key.removesuffix("_ppl").removesuffix("_acc_norm"))
    wanted = {"batch": int(key.rpartition("_")[2])} if part == "decode" else {}
    reasons = [
        line["reason"]
        for line in matrix.files[name]["values"]
        if line["name"] == part and all(line.get(k) == v for k, v in wanted.items()) and "reason" in line
    ]
    text = next(iter(reasons), matrix.reason(name) or "not measured")
    return re.split(r", got |; |\. ", re.sub(r"^model\.\S+: ", "", text))[0]
