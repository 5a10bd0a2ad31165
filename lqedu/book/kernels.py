"""The recorded times of the kernels, as rows a chapter can show: beside FP16, beside their peers, under their ceiling.

Reads what ``python -m lqedu_kernels.bench`` wrote (``book/results/kernels_*.json``). Only :func:`has_kernels` and
:func:`kernel_error` need torch, and the latter Triton.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lqedu.book.display import Table, table
from lqedu.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    import torch

    from lqedu.formats.activation import ActivationGrid
    from lqedu.formats.fp8 import Float8ActivationGrid
    from lqedu.formats.stored import StoredWeight

OURS = "lqedu_kernels"  #: the name of this project's kernel in the column "kernel"
FP16 = "torch.matmul FP16"  #: the baseline of every ratio of a matrix product


def has_kernels() -> bool:
    """Whether ``lqedu_kernels`` can be imported here; where not, says in a line what that takes.

    Chapters show recorded times everywhere, and run the kernels' references where Triton is installed.
    """
    from lqedu.runtime.backend import kernels

    try:
        kernels("tuning")
    except MissingDependencyError as error:
        print(f"{error} The kernel's own checks are skipped.")
        return False
    return True


def ceilings(result: Mapping[str, Any]) -> dict[str, float]:
    """Bytes or operations a second that the GPU of a result file reached: name of the ceiling -> rate."""
    return {row["kernel"]: row["rate"] for row in result["values"] if row["op"] == "ceiling"}


def times(result: Mapping[str, Any], operation: str) -> dict[str, dict[tuple[int, ...], float]]:
    """Median seconds: kernel -> sizes of the case, in the order the rows give them -> seconds.

    Raises:
        UsageError: the file has no row of this operation; the sentence lists those it has.
    """
    found: dict[str, dict[tuple[int, ...], float]] = {}
    for row in result["values"]:
        if row["op"] == operation:
            found.setdefault(row["kernel"], {})[tuple(row["sizes"].values())] = row["median"]
    if not found:
        known = sorted({row["op"] for row in result["values"]} - {"ceiling"})
        raise UsageError(f"{result['name']} holds no operation {operation!r}; there are: {', '.join(known)}")
    return found


def kernel_rows(
    result: Mapping[str, Any], operation: str, *, baseline: str = FP16, **sizes: int
) -> list[dict[str, Any]]:
    """One row a measured case of our kernel: time, the baseline's time and their ratio, the best peer, share of the floor.

    Args:
        result: a file of ``python -m lqedu_kernels.bench``, as :func:`lqedu.book.results` reads it.
        operation: operation and variant, ``"w4a16/group128"``.
        baseline: the kernel whose time is divided by ours.
        sizes: only cases of these sizes, ``n=11008, k=4096``.

    Returns:
        Rows with the case's sizes, ``us``, ``baseline_us``, ``ratio`` (above 1: ours is faster), ``peer`` and
        ``peer_us`` (the fastest other kernel of the same format; ``None`` without one), ``floor_us`` and ``share``: the
        floor is the larger of bytes over the copy's rate and operations over that of the largest matrix product, both
        measured in the same process, and the share is floor over time.

    Raises:
        UsageError: no such operation, or no case of these sizes.
    """
    times(result, operation)  # refuses an unknown operation
    rates = ceilings(result)
    cases: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for row in result["values"]:
        if row["op"] == operation and all(row["sizes"].get(key) == value for key, value in sizes.items()):
            cases.setdefault(tuple(row["sizes"].values()), {})[row["kernel"]] = row
    if not cases:
        raise UsageError(f"{result['name']} holds no case of {operation} with {sizes}")
    rows = []
    for kernels in cases.values():
        ours = kernels[OURS]
        floor = ours["bytes"] / rates["copy, read and write"]
        if ours.get("ceiling"):
            floor = max(floor, ours["operations"] / rates[ours["ceiling"]])
        peers = {name: row["median"] for name, row in kernels.items() if name not in (OURS, baseline)}
        peer = min(peers, key=peers.__getitem__, default=None)
        base = kernels[baseline]["median"] if baseline in kernels else None
        rows.append(
            ours["sizes"]
            | {
                "us": 1e6 * ours["median"],
                "baseline_us": None if base is None else 1e6 * base,
                "ratio": None if base is None else base / ours["median"],
                "peer": peer,
                "peer_us": None if peer is None else 1e6 * peers[peer],
                "floor_us": 1e6 * floor,
                "share": floor / ours["median"],
            }
        )
    return rows


def kernel_table(rows: Sequence[Mapping[str, Any]], caption: str) -> Table:
    """The rows of :func:`kernel_rows` as a page shows them: sizes that differ, time, baseline, ratio, share of the floor."""
    sizes = [key for key in rows[0] if key not in _MEASURED]
    changing = [key for key in sizes if len({row[key] for row in rows}) > 1] or sizes[:1]
    columns = {key: _NAMES.get(key, key) for key in changing} | {"us": "kernel, µs"}
    if rows[0]["baseline_us"] is not None:
        columns |= {"baseline_us": "baseline, µs", "ratio": "times faster"}
    columns["share"] = "of the floor"
    formats = {"us": ".1f", "share": ".0%"}
    formats |= {"baseline_us": ".1f", "ratio": ".2f"} if "ratio" in columns else {}
    return table(rows, columns=columns, formats=formats, caption=caption)


_MEASURED = ("us", "baseline_us", "ratio", "peer", "peer_us", "floor_us", "share")
_NAMES = {"m": "rows", "n": "outputs", "k": "features", "batch": "sequences", "context": "tokens each"}


def kernel_error(
    weight: "StoredWeight",
    grid: "ActivationGrid | Float8ActivationGrid | None" = None,
    *,
    generator: "torch.Generator",
    tokens: int = 5,
) -> float | None:
    """Relative error of a stored weight's product through its kernel, against float64; ``None`` without Triton.

    The inputs are normal, in float16, on ``grid`` where the kernel multiplies codes. On a GPU this runs the kernel,
    elsewhere the reference that defines it; either way the weight passes through the kernel's own layout.
    """
    if not has_kernels():
        return None
    import torch

    from lqedu.formats.qtensor import QTensor
    from lqedu.runtime.backend import kernel_linear, kernel_weight

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(tokens, weight.codes.shape[1], generator=generator).half()
    integer = {"integer_inputs": True} if grid is not None and isinstance(weight, QTensor) else {}
    y = kernel_linear(x.to(device), kernel_weight(weight, **integer).to(device), grid).cpu().double()
    if grid is not None:
        scale, zero = grid.fit(x)
        x = grid.decode(grid.encode(x, scale, zero), scale, zero, torch.float64)
    want = x.double() @ weight.dequantize(torch.float64).T
    return float((y - want).norm() / want.norm())
