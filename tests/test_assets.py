import hashlib
import multiprocessing
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

from lqedu import assets
from lqedu.assets import cache_folder, cached_folder, fetch_wheel
from lqedu.errors import MissingDependencyError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LQEDU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A wheel of data in a local wheelhouse, and pip set to look nowhere else; returns (requirement, sha256)."""
    house = tmp_path / "wheelhouse"
    house.mkdir()
    wheel = house / "lqedu_test_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("lqedu_test_data/__init__.py", "raise SystemExit('code of a wheel ran')")
        file.writestr("lqedu_test_data/one.txt", "one")
        file.writestr("lqedu_test_data/many/a.txt", "a" * 1000)
        file.writestr("lqedu_test_data/many/deep/b.txt", "b")
        info = "lqedu_test_data-1.0.dist-info"
        metadata = "Metadata-Version: 2.1\nName: lqedu-test-data\nVersion: 1.0\nRequires-Dist: no-such-thing-anywhere\n"
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(house))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "no-such-file"))
    return "lqedu-test-data==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest()


MEMBERS = ("lqedu_test_data/one.txt", "lqedu_test_data/many/")


def contents(folder):
    files = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert files.pop("lqedu-manifest.json")
    return files


EXPECTED = {
    "lqedu_test_data/one.txt": "one",
    "lqedu_test_data/many/a.txt": "a" * 1000,
    "lqedu_test_data/many/deep/b.txt": "b",
}


def test_members_are_unpacked_once(index, cache, capsys, monkeypatch):
    folder = fetch_wheel(*index, *MEMBERS)
    assert folder == cache / f"lqedu-test-data-1.0-{index[1][:12]}"
    assert contents(folder) == EXPECTED
    assert list(cache.iterdir()) == [folder]  # no temporary files stay
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lqedu: fetching lqedu-test-data==1.0 (once; ")

    monkeypatch.setattr(assets, "_download", lambda *args: pytest.fail("downloaded again"))
    assert fetch_wheel(*index, *MEMBERS) == folder
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "lqedu_test_data/one.txt").write_text("two"),  # same size
        lambda folder: (folder / "lqedu_test_data/many/a.txt").write_text("a" * 999),
        lambda folder: (folder / "lqedu_test_data/many/deep/b.txt").unlink(),
        lambda folder: (folder / "lqedu-manifest.json").unlink(),
        lambda folder: (folder / "lqedu-manifest.json").write_text('{"lqedu_test'),
        lambda folder: (folder / "lqedu-manifest.json").write_text("[1]"),
    ],
    ids=["edited", "truncated", "missing", "no manifest", "half a manifest", "foreign manifest"],
)
def test_damaged_files_are_fetched_again(index, cache, damage):
    folder = fetch_wheel(*index, *MEMBERS)
    damage(folder)
    assert contents(fetch_wheel(*index, *MEMBERS)) == EXPECTED
    assert list(cache.iterdir()) == [folder]


def test_other_bytes_are_not_unpacked(index, cache):
    with pytest.raises(MissingDependencyError, match=f"sha256 {index[1]} instead of {'0' * 64}, so nothing"):
        fetch_wheel(index[0], "0" * 64, *MEMBERS)
    assert not list(cache.iterdir())


def test_no_network_names_the_remedy(index, cache):
    with pytest.raises(MissingDependencyError, match=r"pip could not download lqedu-test-data==2.0 .*; connect to a"):
        fetch_wheel("lqedu-test-data==2.0", "0" * 64, *MEMBERS)
    assert not list(cache.iterdir())


def test_source_distributions_are_not_built(index, tmp_path, monkeypatch):
    """Building one would run its code."""
    source = tmp_path / "lqedu-test-source-1.0"
    source.mkdir()
    (source / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: lqedu-test-source\nVersion: 1.0\n")
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with tarfile.open(tmp_path / "wheelhouse" / "lqedu-test-source-1.0.tar.gz", "w:gz") as file:
        file.add(source, source.name)
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "1")
    with pytest.raises(MissingDependencyError, match="pip could not download lqedu-test-source"):
        fetch_wheel("lqedu-test-source==1.0", "0" * 64, "x")
    assert not (tmp_path / "ran").exists()


def test_the_first_to_finish_wins(cache):
    """Whoever got that folder may be reading it."""

    def build(folder):
        cached_folder("thing", lambda faster: (faster / "data").write_text("first"))
        (folder / "data").write_text("second")

    assert (cached_folder("thing", build) / "data").read_text() == "first"


@pytest.mark.parametrize("failure", [RuntimeError("build failed"), KeyboardInterrupt()])
def test_a_failed_build_leaves_nothing(cache, failure):
    def build(folder):
        (folder / "half").write_text("half")
        raise failure

    with pytest.raises(type(failure)):
        cached_folder("thing", build)
    assert not list(cache.iterdir())


def test_an_unwritable_cache_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LQEDU_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MissingDependencyError, match=r"cannot write the cache folder .*set LQEDU_CACHE"):
        cached_folder("thing", lambda folder: None)


def test_a_full_disk_names_the_remedy():
    def build(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(MissingDependencyError, match="No space left on device"):
        cached_folder("thing", build)


def fetch_in_a_process(barrier, results):
    def build(folder):
        barrier.wait(timeout=30)  # nobody finishes before everybody has begun
        (folder / "data").write_text("x" * 100_000)

    results.put(assets._is_whole(cached_folder("thing", build)))


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_at_once_agree(cache, damaged):
    if damaged:
        cached_folder("thing", lambda folder: (folder / "data").write_text("right"))
        (cache / "thing" / "data").write_text("wrong")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=fetch_in_a_process, args=(barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [True] * 4
    for process in processes:
        process.join()
    assert [path.name for path in cache.iterdir()] == ["thing"]
    assert (cache / "thing" / "data").read_text() == "x" * 100_000


def test_a_python_without_pip_gets_one(index, tmp_path, monkeypatch):
    home = tmp_path / "bare"
    venv.create(home, with_pip=False)
    python = next(path for path in home.rglob("python*") if path.name in ("python", "python.exe"))
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode != 0
    monkeypatch.setattr(sys, "executable", str(python))
    assert contents(fetch_wheel(*index, *MEMBERS)) == EXPECTED
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode != 0


def test_neither_pip_nor_ensurepip(index, monkeypatch):
    monkeypatch.setattr(assets, "_runs", lambda *args: False)
    with pytest.raises(MissingDependencyError, match=r"has neither pip nor ensurepip, .*; install pip"):
        fetch_wheel(*index, *MEMBERS)


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "{0}/lqedu"),
        ("win32", "LOCALAPPDATA", "{0}/lqedu"),
        ("linux", None, "{0}/.cache/lqedu"),
        ("darwin", None, "{0}/Library/Caches/lqedu"),
        ("win32", None, "{0}/AppData/Local/lqedu"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(tmp_path, monkeypatch, platform, variable, expected):
    for name in ("LQEDU_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(assets.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", platform)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    assert cache_folder().as_posix() == expected.format(tmp_path.as_posix())


def test_importing_fetches_nothing(cache):
    code = "import lqedu, lqedu.assets, lqedu.models, lqedu.calibration, lqedu.evaluation"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not cache.exists()
