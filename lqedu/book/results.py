"""Result files: rows of recorded numbers, as JSON in ``book/results`` that says where it is from.

:func:`write_result` is their only writer and :func:`results` their only reader; both validate. Needs no torch.
"""

import datetime
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lqedu.atomic import atomic_file
from lqedu.errors import UsageError

SCHEMA = 1
KINDS = ("measured", "simulated", "theoretical")

_TYPES: dict[str, type] = {  # of the fields at the top level; all but "notes" are required
    "schema": int, "name": str, "title": str, "kind": str, "date": str, "commit": str, "dirty": bool, "command": str,
    "host": dict, "configuration": dict, "values": list, "notes": str,
}  # fmt: skip
_HOST = ("cpu", "cores", "gpu", "driver", "os", "python", "torch", "triton", "transformers")
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[a-z0-9_]+")
_RELATIVE = 1e-6  # between stored medians and those of the stored samples: decimal digits, not physics


def results(stem: str) -> dict[str, Any]:
    """The validated result file ``book/results/<stem>.json``.

    It is looked for upwards from the working directory (a notebook in a checkout), then upwards from this package (an
    editable install), then among the files installed with the package.

    Returns:
        The file as a dict; its rows are ``["values"]``, its origin in one line is :func:`lqedu.book.provenance`.

    Raises:
        UsageError: no such file (the sentence lists those there are), or one that breaks the schema.
    """
    if not _NAME.fullmatch(stem):
        raise UsageError(f"a result file is named by its stem of lower-case letters, digits and _, got {stem!r}")
    folders = result_folders()
    for folder in folders:
        path = folder / f"{stem}.json"
        if path.is_file():
            return read_result(path)
    found = sorted({file.stem for folder in folders for file in folder.glob("*.json")} - {"schema"})
    if not folders:
        raise UsageError("no folder book/results above this one nor with the package; run from a checkout of lqedu")
    raise UsageError(f"no result file {stem!r}; there are: {', '.join(found) or 'none yet'}")


def result_folders() -> list[Path]:
    """The folders that may hold result files, in the order in which they are searched."""
    here = Path(__file__).resolve()
    candidates = [above / "book" / "results" for above in (Path.cwd(), *Path.cwd().parents)]
    candidates += [above / "book" / "results" for above in here.parents[2:]]
    candidates.append(here.parents[1] / "_results")  # book/results, as the wheel carries it
    return list(dict.fromkeys(folder for folder in candidates if folder.is_dir()))


def read_result(path: Path) -> dict[str, Any]:
    """Read and validate one result file.

    Raises:
        UsageError: not readable as JSON, or breaking the schema; the sentence names the file and the problems.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the result file {path.name}: {error}") from error
    if problems := validate(result):
        raise UsageError(f"the result file {path.name} breaks the schema: {'; '.join(problems)}")
    if result["name"] != path.stem:
        raise UsageError(f"the result file {path.name} calls itself {result['name']!r}; rename one of the two")
    return result


def write_result(
    path: str | Path,
    *,
    title: str,
    kind: str,
    configuration: Mapping[str, Any],
    values: Sequence[Mapping[str, Any]],
    command: str | None = None,
    commit: str | None = None,
    notes: str | None = None,
) -> Path:
    """Write a result file with its provenance: host, commit, date and command are collected here.

    Args:
        path: ``book/results/<stem>.json``.
        title: one line, what was measured.
        kind: "measured", "simulated" (a number computed by a model of the hardware) or "theoretical" (counted).
        configuration: everything a reader needs to measure it again: model, weights_sha256, corpus, length, windows...
        values: rows. A row with raw ``samples`` and their ``unit`` gets its ``median`` and ``spread`` (the median
            absolute deviation) here.
        command: exact command; this process's own if it is not given.
        commit: 40 hex digits, with ``-dirty`` appended if files differed from it. By default asked from git, or from
            the environment variable ``LQEDU_COMMIT`` on a machine that has a copy without the repository.
        notes: what else a reader should know.

    Returns:
        The path written.

    Raises:
        UsageError: the result breaks the schema, the commit cannot be found out, or the command names a path of this
            machine.
    """
    path = Path(path)
    commit, dirty = origin(path, commit)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "name": path.stem,
        "title": title,
        "kind": kind,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "dirty": dirty,
        "command": own_command() if command is None else command,
        "host": host(),
        "configuration": dict(configuration),
        "values": [_summarised(row) for row in values],
    }
    if notes is not None:
        result["notes"] = notes
    if problems := validate(result):
        raise UsageError(f"the result {path.name} breaks the schema: {'; '.join(problems)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(_text(result), encoding="utf-8")
    return path


def origin(path: str | Path, commit: str | None = None) -> tuple[str, bool]:
    """The commit that a result file at ``path`` would name, and whether files differed from it.

    Ask before a long measurement: what would be refused at its end is refused now.

    Args:
        path: of a result file, or of a folder that will hold some; it need not exist.
        commit: as for :func:`write_result`.

    Raises:
        UsageError: the path is outside a git repository, and neither the argument nor ``LQEDU_COMMIT`` gives a commit;
            or what they give is none.
    """
    path, stated = Path(path), commit or os.environ.get("LQEDU_COMMIT")
    if stated:
        commit = stated.removesuffix("-dirty")
        if not _COMMIT.fullmatch(commit):
            raise UsageError(f"commit must be 40 hex digits, got {commit!r}; pass another commit= or LQEDU_COMMIT")
        return commit, stated.endswith("-dirty")
    resolved = path.resolve()
    folder = next((place for place in (resolved, *resolved.parents) if place.is_dir()), Path.cwd())
    try:
        commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
        changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(
            f"{path} is outside a git repository, so a result file there could not name a commit; "
            "set LQEDU_COMMIT to the commit of this code, or choose a folder inside the clone"
        ) from error
    # A result file that is being replaced says nothing about the code that measured it.
    return commit, any("book/results/" not in line for line in changed.splitlines())


def validate(result: object) -> list[str]:
    """All the ways in which a result breaks the schema; empty if it is sound.

    >>> validate({"schema": 1})[0]
    'missing fields: command, commit, configuration, date, dirty, host, kind, name, title, values'
    """
    if not isinstance(result, dict):
        return ["a result is a JSON object"]
    required = set(_TYPES) - {"notes"}
    problems = []
    if missing := required - set(result):
        problems.append(f"missing fields: {', '.join(sorted(missing))}")
    if unknown := set(result) - set(_TYPES):
        problems.append(f"unknown fields: {', '.join(sorted(unknown))}")
    for key, expected in _TYPES.items():
        if key in result and type(result[key]) is not expected:
            problems.append(f"{key} must be {expected.__name__}, got {type(result[key]).__name__}")
    if problems:
        return problems  # the rest would only repeat them
    if result["schema"] != SCHEMA:
        problems.append(f"schema must be {SCHEMA}, got {result['schema']}")
    if result["kind"] not in KINDS:
        problems.append(f"kind must be one of {', '.join(KINDS)}, got {result['kind']!r}")
    if not _NAME.fullmatch(result["name"]):
        problems.append(f"name must be lower-case letters, digits and _, got {result['name']!r}")
    if not result["title"].strip():
        problems.append("title is empty")
    if not _DATE.fullmatch(result["date"]):
        problems.append(f"date must be UTC as 2025-01-31T12:00:00Z, got {result['date']!r}")
    if not _COMMIT.fullmatch(result["commit"]):
        problems.append(f"commit must be 40 hex digits, got {result['commit']!r}")
    if foreign := _machine_paths(result["command"]):
        problems.append(f"command names a path of one machine: {foreign[0]}")
    if not result["command"].strip():
        problems.append("command is empty")
    if set(result["host"]) != set(_HOST):
        problems.append(f"host must have exactly {', '.join(_HOST)}")
    return problems + _numbers(result["configuration"], "configuration") + _rows(result)


def host() -> dict[str, Any]:
    """What this machine is: processor, GPU, driver and versions; ``None`` for what it does not have."""
    gpu, driver = _gpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu(), "cores": cores, "gpu": gpu, "driver": driver, "os": platform.system(),
        "python": platform.python_version(), "torch": _version("torch"), "triton": _version("triton"),
        "transformers": _version("transformers"),
    }  # fmt: skip


def own_command() -> str:
    """The command line of this process; paths become relative, and outside the working directory only names."""
    here = f"{Path.cwd()}{os.sep}"

    def portable(word: str) -> str:
        option, equals, value = word.rpartition("=")
        path = value.removeprefix(here)
        return f"{option}{equals}{Path(path).name if _machine_paths(shlex.quote(path)) else path}"

    return shlex.join(["python", *map(portable, sys.orig_argv[1:])])


# --- the parts of a result --------------------------------------------------------------------------------------------


def _rows(result: dict[str, Any]) -> list[str]:
    rows, problems = result["values"], []
    if not rows:
        problems.append("values holds no row")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not row:
            problems.append(f"values[{i}] must be a non-empty object")
            continue
        problems += _numbers(row, f"values[{i}]")
        if "samples" in row:
            problems += _samples(row, f"values[{i}]")
        elif {"median", "spread"} & set(row):
            problems.append(f"values[{i}] has a median or spread but no samples")
    told = any("samples" in row or "reason" in row for row in rows if isinstance(row, dict))
    if result["kind"] == "measured" and not told:
        problems.append("a measured result needs raw samples in at least one row, or a reason why there are none")
    return problems


def _samples(row: dict[str, Any], where: str) -> list[str]:
    samples = row["samples"]
    if not isinstance(samples, list) or not samples or not all(_is_number(x) and math.isfinite(x) for x in samples):
        return [f"{where}.samples must be a non-empty list of finite numbers"]
    problems = []
    for key, value in zip(("median", "spread"), _median_and_spread(samples), strict=True):
        if not _is_number(row.get(key)) or not math.isclose(row[key], value, rel_tol=_RELATIVE, abs_tol=1e-300):
            problems.append(f"{where}.{key} must be {value:.6g}, got {row.get(key)!r}")
    if not isinstance(row.get("unit"), str):
        problems.append(f"{where}.unit must name the unit of the samples")
    return problems


def _numbers(value: Any, where: str) -> list[str]:
    """Places where a value is not JSON or a number is not finite."""
    if isinstance(value, dict):
        wrong_keys = [f"{where} has the key {key!r}, not a string" for key in value if not isinstance(key, str)]
        return wrong_keys + [p for key, item in value.items() for p in _numbers(item, f"{where}.{key}")]
    if isinstance(value, list | tuple):
        return [p for i, item in enumerate(value) for p in _numbers(item, f"{where}[{i}]")]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{where} is {value}"]
    if value is None or isinstance(value, bool | int | float | str):
        return []
    return [f"{where} is of type {type(value).__name__}, which JSON does not have"]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _median_and_spread(samples: Sequence[float]) -> tuple[float, float]:
    """Median, and the median absolute deviation from it."""
    median = statistics.median(samples)
    return median, statistics.median(abs(x - median) for x in samples)


def _summarised(row: Mapping[str, Any]) -> dict[str, Any]:
    row = dict(row)
    if "samples" in row:
        row["samples"] = list(row["samples"])
        if row["samples"] and all(_is_number(x) for x in row["samples"]):
            row["median"], row["spread"] = _median_and_spread(row["samples"])
    return row


def _text(result: Mapping[str, Any]) -> str:
    """JSON with one line a field and one line a row, so that a diff of two runs shows which rows changed."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    fields = [f" {line(key)}: {line(value)}" for key, value in result.items() if key != "values"]
    fields.append(' "values": [\n' + ",\n".join(f"  {line(row)}" for row in result["values"]) + "\n ]")
    return "{\n" + ",\n".join(fields) + "\n}\n"


# --- where it came from -----------------------------------------------------------------------------------------------


def _machine_paths(command: str) -> list[str]:
    """Absolute paths of a command, also behind ``option=``: they mean nothing to whoever wants to measure again."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return [word for word in words if re.search(r"(^|=)(/|~|[A-Za-z]:\\)", word)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _gpu() -> tuple[str | None, str | None]:
    """Name of the GPU (with their number where there are several) and its driver's version."""
    try:
        lines = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None, None
    if not lines:
        return None, None
    name, driver = (part.strip() for part in lines[0].rsplit(",", 1))
    return (name if len(lines) == 1 else f"{len(lines)} x {name}"), driver


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
