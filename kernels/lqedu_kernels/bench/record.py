"""A result file: rows of measured numbers as JSON, with what is needed to judge and to repeat them.

The format is that of the book's ``book/results/schema.json``; a test holds this writer to it.
"""

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path


def write(path: Path, *, title: str, configuration: Mapping[str, object], rows: Sequence[Mapping[str, object]]) -> None:
    """Write ``rows``, each with raw ``samples`` and their ``unit``, beside host, versions, commit, date and command.

    Raises:
        RuntimeError: the commit is unknown: neither a git checkout nor the environment variable ``LQEDU_COMMIT``.
    """
    commit, dirty = state_of_code()
    fields = {
        "schema": 1,
        "name": path.stem,
        "title": title,
        "kind": "measured",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "dirty": dirty,
        "command": _command(),
        "host": _host(),
        "configuration": dict(configuration),
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
    lines.append(' "values": [\n' + ",\n".join(f"  {json.dumps(_summarised(row))}" for row in rows) + "\n ]")
    temporary = path.with_suffix(".unfinished")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    temporary.replace(path)


def _summarised(row: Mapping[str, object]) -> dict[str, object]:
    """Median and median absolute deviation, of the samples as they are stored: four digits, more than they are worth."""
    samples = [float(f"{sample:.4g}") for sample in row["samples"]]
    median = statistics.median(samples)
    return {**row, "samples": samples, "median": median, "spread": statistics.median(abs(s - median) for s in samples)}


def state_of_code() -> tuple[str, bool]:
    """The commit, and whether the checkout differs from it.

    Raises:
        RuntimeError: neither a git checkout nor ``LQEDU_COMMIT`` says so.
    """
    if stated := os.environ.get("LQEDU_COMMIT"):
        return stated.removesuffix("-dirty"), stated.endswith("-dirty")
    here = str(Path(__file__).resolve().parent)
    try:
        commit = _output("git", "-C", here, "rev-parse", "HEAD")
        changed = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError("run from a git checkout of lqedu, or set LQEDU_COMMIT to the commit of the code") from error
    # A result or configuration that is being replaced says nothing about the code that measured it.
    return commit, any("book/results/" not in line for line in changed.splitlines())


def _command() -> str:
    """This process's command line; of paths outside the working directory only the name."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.orig_argv[1:]]
    return shlex.join(["python", *words])


def _host() -> dict[str, object]:
    gpu, driver = (part.strip() for part in _gpu().rsplit(",", 1))
    return {
        "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "driver": driver, "os": platform.system(),
        "python": platform.python_version(), "torch": _version("torch"), "triton": _version("triton"),
        "transformers": None,
    }  # fmt: skip


def _gpu() -> str:
    return _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()[0]


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
