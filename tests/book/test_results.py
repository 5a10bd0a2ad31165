"""Result files: one writer, one reader, and every way to break the schema named."""

import json
import os
import subprocess

import pytest

from lqedu.book import provenance, results, write_result
from lqedu.book.results import host, own_command, result_folders, validate
from lqedu.errors import UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"method": "rtn", "samples": [3.0, 1.0, 2.0], "unit": "ms"}, {"method": "gptq", "ppl": 27.5}]


def _write(folder, name="speed", **changes):
    arguments = {
        "title": "Speed of nothing", "kind": "measured", "configuration": {"model": "smollm2-135m"}, "values": ROWS,
        "command": "python -m lqedu eval smollm2-135m", "commit": COMMIT,
    } | changes  # fmt: skip
    return write_result(folder / "book" / "results" / f"{name}.json", **arguments)


def _sound(tmp_path):
    return json.loads(_write(tmp_path).read_text(encoding="utf-8"))


def test_what_is_written_can_be_read(tmp_path, monkeypatch):
    _write(tmp_path)
    below = tmp_path / "book" / "chapters"
    below.mkdir()
    monkeypatch.chdir(below)
    result = results("speed")
    assert result["values"][0] | {"median": 2.0, "spread": 1.0} == result["values"][0]
    assert result["commit"] == COMMIT
    assert not result["dirty"]
    assert validate(result) == []


def test_the_writer_does_not_change_its_rows(tmp_path):
    rows = [dict(ROWS[0])]
    _write(tmp_path, values=rows)
    assert rows == [ROWS[0]]


def test_nothing_is_written_when_the_result_is_unsound(tmp_path):
    with pytest.raises(UsageError, match=r"values\[0\]\.ppl is nan"):
        _write(tmp_path, kind="simulated", values=[{"ppl": float("nan")}])
    assert not (tmp_path / "book").exists()


def test_a_row_is_a_line(tmp_path):
    lines = _write(tmp_path, notes="weights [1,  2]").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line.strip().rstrip(",")) for line in lines[-4:-2]] == _sound(tmp_path)["values"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema must be 1, got 2"),
        ({"kind": "guessed"}, "kind must be one of measured, simulated, theoretical"),
        ({"date": "yesterday"}, "date must be UTC"),
        ({"commit": "abc"}, "commit must be 40 hex digits"),
        ({"dirty": 0}, "dirty must be bool, got int"),
        ({"host": {"cpu": "x"}}, "host must have exactly"),
        ({"values": []}, "values holds no row"),
        ({"values": [{}]}, r"values[0] must be a non-empty object"),
        ({"values": [{"ppl": 3}]}, "a measured result needs raw samples"),
        ({"values": [{"samples": [1.0], "median": 1.0, "spread": 0.0}]}, "values[0].unit must name the unit"),
        ({"values": [{"samples": [1.0], "median": 2.0, "spread": 0.0, "unit": "s"}]}, "values[0].median must be 1"),
        ({"values": [{"samples": [], "unit": "s"}]}, "values[0].samples must be a non-empty list"),
        ({"values": [{"median": 2.0}]}, "values[0] has a median or spread but no samples"),
        ({"command": "python bench.py --data=/home/me/x"}, "command names a path of one machine: --data=/home/me/x"),
        ({"command": "python ~/bench.py"}, "command names a path of one machine: ~/bench.py"),
        ({"extra": 1}, "unknown fields: extra"),
        ({"title": " "}, "title is empty"),
    ],
)
def test_every_break_of_the_schema_is_named(tmp_path, change, message):
    assert any(message in problem for problem in validate(_sound(tmp_path) | change))


@pytest.mark.parametrize("field", ["schema", "date", "commit", "command", "host", "configuration", "kind", "values"])
def test_every_field_of_the_provenance_is_required(tmp_path, field):
    result = _sound(tmp_path)
    del result[field]
    assert validate(result) == [f"missing fields: {field}"]


def test_the_reader_refuses_what_breaks_the_schema(tmp_path, monkeypatch):
    path = _write(tmp_path)
    monkeypatch.chdir(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace("measured", "dreamt"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"speed\.json breaks the schema: kind must be"):
        results("speed")
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"cannot read the result file speed\.json"):
        results("speed")


def test_a_renamed_file_is_refused(tmp_path, monkeypatch):
    path = _write(tmp_path)
    path.rename(path.with_name("other.json"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="calls itself 'speed'"):
        results("other")


def test_a_missing_file_lists_those_there_are(tmp_path, monkeypatch):
    _write(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no result file 'slow'; there are: .*speed"):
        results("slow")
    with pytest.raises(UsageError, match="named by its stem"):
        results("../secrets")


def test_the_nearest_folder_wins(tmp_path, monkeypatch):
    _write(tmp_path)
    inner = tmp_path / "copy"
    _write(inner, title="Another title")
    monkeypatch.chdir(inner)
    assert results("speed")["title"] == "Another title"
    assert result_folders()[0] == inner / "book" / "results"


def _git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_commit_comes_from_git_and_result_files_do_not_make_it_dirty(tmp_path, monkeypatch):
    monkeypatch.delenv("LQEDU_COMMIT", raising=False)
    (tmp_path / "code.py").write_text("1\n", encoding="utf-8")
    _write(tmp_path)
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "first")

    def written():
        result = json.loads(_write(tmp_path, commit=None, title="Anew").read_text(encoding="utf-8"))
        return result["commit"], result["dirty"]

    commit, dirty = written()
    assert len(commit) == 40
    assert not dirty
    assert written() == (commit, False)  # the result file itself has changed by now
    (tmp_path / "code.py").write_text("2\n", encoding="utf-8")
    assert written() == (commit, True)


def test_without_git_the_commit_must_be_said(tmp_path, monkeypatch):
    monkeypatch.delenv("LQEDU_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", os.fspath(tmp_path.parent))
    with pytest.raises(UsageError, match="set LQEDU_COMMIT"):
        _write(tmp_path, commit=None)
    monkeypatch.setenv("LQEDU_COMMIT", f"{COMMIT}-dirty")
    result = json.loads(_write(tmp_path, commit=None).read_text(encoding="utf-8"))
    assert (result["commit"], result["dirty"]) == (COMMIT, True)


def test_host_and_command_describe_this_process():
    here = host()
    assert here["cores"] >= 1
    assert here["torch"]
    assert all(value is None or isinstance(value, str | int) for value in here.values())
    assert own_command().startswith("python ")


def test_the_command_names_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["/usr/bin/python3", "-m", "bench", "--out", "/far/x.json", f"--in={tmp_path}/data/a b", "--set=a=/b/c"]
    monkeypatch.setattr("sys.orig_argv", words)
    assert own_command() == "python -m bench --out x.json '--in=data/a b' --set=a=c"


def test_provenance_is_one_line_and_says_when_nothing_was_measured(tmp_path):
    result = _sound(tmp_path)
    line = provenance(result)
    assert str(line).startswith("Measured 20")
    assert f"commit {COMMIT[:10]}; speed.json: python -m lqedu eval" in line
    assert "\n" not in line
    assert "Simulated, not measured" in provenance(result | {"kind": "simulated"})
    assert provenance(result | {"command": "a <b>"})._repr_html_().endswith("a &lt;b&gt;</p>")
