"""``python -m lqedu_kernels.bench.tune --op w4a8 --out configs/h100.json``: the fastest launch configurations, as data.

Candidates come from each operation's ``search_space``. They are compiled by several processes first, then timed one after
another; a candidate that does not run (too much shared memory, say) is left out and counted.
"""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer

from lqedu_kernels.bench import families
from lqedu_kernels.bench.cases import Case
from lqedu_kernels.bench.timing import median_time


def main(
    op: Annotated[str, typer.Option(help="A family or one variant, as for the bench; several with commas.")],
    out: Annotated[Path, typer.Option(help="The configuration file; entries of other operations are kept.")],
    replays: Annotated[int, typer.Option(min=3)] = 7,
    processes: Annotated[int, typer.Option(min=1, help="That compile at once.")] = min(14, os.cpu_count() or 1),
) -> None:
    """Time every candidate at every size and keep the fastest."""
    wanted = op.split(",")
    if unknown := [part for part in wanted if part.split("/")[0] not in families.FAMILIES]:
        raise typer.BadParameter(
            f"no operation {unknown[0]!r}; there are: {', '.join(families.FAMILIES)}", param_hint="--op"
        )
    if not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {out.parent} to write to: make it first", param_hint="--out")
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA GPU here to tune for")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        list(pool.map(_compile, [(part, i, processes) for part in wanted for i in range(processes)]))
    table = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    device = torch.device("cuda", torch.cuda.current_device())
    found: dict[str, list[dict[str, object]]] = {}
    for part in wanted:
        for case in _cases(part, device):
            times, failed = _times(case, replays)
            if not times:
                raise RuntimeError(f"no candidate of {case.operation} runs at {dict(case.sizes)}")
            best = min(times, key=times.__getitem__)
            config = case.candidates[best]
            found.setdefault(case.operation, []).append(
                dict(zip("mnk", case.lookup, strict=True)) | {"us": round(1e6 * times[best], 2), "config": dict(config)}
            )
            print(
                f"{case.operation} {dict(case.sizes)}: {1e6 * times[best]:.1f} us, {len(times)} ran, {failed} did not: {dict(config)}",
                file=sys.stderr,
            )
            table |= {name: sorted(entries, key=lambda e: (e["n"], e["k"], e["m"])) for name, entries in found.items()}
            _write(out, table)


def _cases(op: str, device: torch.device) -> list[Case]:
    name = op.split("/")[0]
    return families.FAMILIES[name](device, op if "/" in op else None)


def _compile(part: tuple[str, int, int]) -> None:
    """This process's share of the candidates, each launched once on one copy: what it compiles is cached on disk."""
    op, mine, processes = part
    number = 0
    for case in _cases(op, torch.device("cuda", 0)):
        for config in case.candidates:
            if number % processes == mine:
                try:
                    case.configured(config)[0]()
                    torch.cuda.synchronize()
                except Exception:  # counted where it is timed
                    pass
            number += 1


def _times(case: Case, replays: int) -> tuple[dict[int, float], int]:
    times, failed = {}, 0
    for i, config in enumerate(case.candidates):
        try:
            calls = case.configured(config)
            for call in calls:
                call()
            torch.cuda.synchronize()
            times[i] = median_time(calls, replays=replays)
        except Exception as error:  # any failure of a candidate only means that it is not a candidate
            failed += 1
            print(f"  {dict(config)}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
    return times, failed


def _write(path: Path, table: dict[str, list[dict[str, object]]]) -> None:
    """One line an entry, so that a diff of two tunings shows which changed."""
    parts = []
    for name, entries in sorted(table.items()):
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        parts.append(f" {json.dumps(name)}: [\n{lines}\n ]")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
