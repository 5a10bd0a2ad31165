"""``python -m lqedu_kernels.bench --op all --out results.json``: every kernel beside its peers, on this GPU.

Each row is one kernel at one size: raw samples in seconds of CUDA-graph replays over copies of the weights that exceed the
L2 cache. The ceilings (copy and matrix products) and every baseline are measured in the same process.
"""

import statistics
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from lqedu_kernels.bench import families
from lqedu_kernels.bench.cases import OURS, Case
from lqedu_kernels.bench.ceilings import ceilings
from lqedu_kernels.bench.record import state_of_code, write
from lqedu_kernels.bench.timing import ROTATION_BYTES, time_calls

#: No speed is reported of a result whose worst column is further from the reference. 16-bit results are off by 2^-11 of
#: themselves; FP8 tensor cores keep about 14 bits of a sum, so a single output may be off by 2^-6 of a typical one.
LARGEST_ERROR = 2.0**-5


def main(
    op: Annotated[
        str, typer.Option(help=f"One of {', '.join(families.FAMILIES)}, a variant such as w4a8/channel, or all.")
    ] = "all",
    out: Annotated[Path, typer.Option(help="The result file, JSON.")] = Path("results.json"),
    replays: Annotated[int, typer.Option(min=3, help="Samples of each kernel and size.")] = 20,
) -> None:
    """Time the kernels on this machine's GPU and write a result file."""
    if op != "all" and op.split("/")[0] not in families.FAMILIES:
        raise typer.BadParameter(
            f"no operation {op!r}; there are: {', '.join(families.FAMILIES)}, and all", param_hint="--op"
        )
    if not out.absolute().parent.is_dir():  # all that follows takes minutes: what would fail at its end fails now
        raise typer.BadParameter(f"there is no folder {out.parent} to write to: make it first", param_hint="--out")
    if not torch.cuda.is_available():
        raise typer.BadParameter(
            "there is no CUDA GPU here; the kernels run on the CPU only in Triton's interpreter, which has no speed"
        )
    try:
        state_of_code()
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from None
    device = torch.device("cuda", torch.cuda.current_device())
    rows: list[dict[str, object]] = ceilings(device)
    for row in rows:
        print(f"{row['kernel']:28} {row['rate'] / 1e12:9.1f} T{row['rate_unit']}", file=sys.stderr)
    ceiling_rows = len(rows)
    for name, family in families.FAMILIES.items():
        if op == "all" or op.split("/")[0] == name:
            for case in family(device, op if "/" in op else None):
                rows += _measure(case, replays)
    if len(rows) == ceiling_rows:
        raise typer.BadParameter(
            f"{op!r} is no variant of {op.split('/')[0]}; the result files name those there are", param_hint="--op"
        )
    configuration = {"op": op, "replays": replays, "rotation_bytes": ROTATION_BYTES, "device": "cuda"}
    write(
        out,
        title="Times of the low-bit kernels, their peers and their ceilings",
        configuration=configuration,
        rows=rows,
    )


def _error(case: Case) -> float:
    """Error of our result's worst column against the reference, over the norm of a typical column; codes count as numbers."""
    got, want = (_first(call()) for call in (case.kernels[OURS][0], case.reference))
    got, want = (t.double().reshape(-1, t.shape[-1]) for t in (got, want))
    typical = want.norm() / want.shape[1] ** 0.5  # of a column: with one row, single results may be near 0
    return float((got - want).norm(dim=0).max() / typical)


def _first(result: object) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def _measure(case: Case, replays: int) -> list[dict[str, object]]:
    error = _error(case)
    if not error < LARGEST_ERROR:  # NaN too
        raise RuntimeError(
            f"{case.operation} {dict(case.sizes)} is wrong: its worst column is off by {error:.2g}; no time is reported"
        )
    rows, medians = [], {}
    for name, calls in case.kernels.items():
        for call in calls:
            call()  # compiles, and brings every copy into being
        torch.cuda.synchronize()
        samples = time_calls(calls, replays=replays)
        medians[name] = statistics.median(samples)
        row = {"op": case.operation, "kernel": name, "sizes": dict(case.sizes), "samples": samples, "unit": "s"}
        if name == OURS:
            row |= {"error": error, "bytes": case.nbytes, "operations": case.operations, "ceiling": case.ceiling}
        rows.append(row)
    ours = medians[OURS]
    others = ", ".join(f"{name} {1e6 * t:.1f} ({t / ours:.2f}x)" for name, t in medians.items() if name != OURS)
    sizes = " ".join(f"{key}={value}" for key, value in case.sizes.items())
    print(
        f"{case.operation:16} {sizes:28} {1e6 * ours:8.1f} us, {case.nbytes / ours / 1e12:.2f} TB/s; {others}",
        file=sys.stderr,
    )
    return rows


if __name__ == "__main__":
    typer.run(main)
