"""The bench's file obeys the book's schema, and launch data are found by shape and rows."""

import json
from pathlib import Path

import pytest
import torch
import typer

from lqedu.book.results import read_result
from lqedu_kernels import tuning
from lqedu_kernels.bench import __main__ as bench
from lqedu_kernels.bench import record, steps


def test_the_file_obeys_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LQEDU_COMMIT", "0" * 40 + "-dirty")
    monkeypatch.setattr(record, "_gpu", lambda: "NVIDIA H100 80GB HBM3, 580.0")
    rows = [{"op": "x", "kernel": "y", "sizes": {"m": 1}, "samples": [1.23456789e-5, 2e-5, 4e-5], "unit": "s"}]
    record.write(tmp_path / "kernels_test.json", title="A test", configuration={"op": "x"}, rows=rows)
    result = read_result(tmp_path / "kernels_test.json")
    assert result["dirty"] and result["host"]["gpu"].startswith("NVIDIA H100")
    assert result["values"][0]["samples"][0] == 1.235e-05 and result["values"][0]["median"] == 2e-5
    assert not list(tmp_path.glob("*.unfinished"))


def test_without_a_commit_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LQEDU_COMMIT", raising=False)

    def no_git(*command: str) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(record, "_output", no_git)
    with pytest.raises(RuntimeError, match="LQEDU_COMMIT"):
        record.write(tmp_path / "kernels_test.json", title="A test", configuration={}, rows=[])
    assert not list(tmp_path.iterdir())


def test_what_would_fail_at_the_end_fails_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ceilings", lambda device: pytest.fail("timed"))
    with pytest.raises(typer.BadParameter, match="no operation 'w4'; there are: w4a16"):
        bench.main(op="w4", out=tmp_path / "x.json")
    with pytest.raises(typer.BadParameter, match=r"there is no folder .*none to write to"):
        bench.main(op="all", out=tmp_path / "none" / "x.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def unknown() -> tuple[str, bool]:
        raise RuntimeError("set LQEDU_COMMIT")

    monkeypatch.setattr(bench, "state_of_code", unknown)
    with pytest.raises(typer.BadParameter, match="set LQEDU_COMMIT"):
        bench.main(op="all", out=tmp_path / "x.json")


def test_teaching_kernels_refuse_what_their_tiles_do_not_cover() -> None:
    x, scale = torch.zeros(100, 256, dtype=torch.float16), torch.zeros(2, 192, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"\[192, 256\], but for 100 rows it must be a multiple of \[128, 128\]"):
        steps.step_matmul("naive", x, torch.zeros(32, 192, dtype=torch.int32), scale, scale)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        {"m": m, "n": n, "k": k, "us": 1.0, "config": {"block": f"{n}x{k} at {m}"}}
        for n, k in ((4096, 4096), (11008, 4096))
        for m in (1, 16, 1024)
    ]
    monkeypatch.setattr(tuning, "_table", lambda file: {"op": entries})


@pytest.mark.parametrize(
    ("m", "n", "k", "found"),
    [
        (1, 4096, 4096, "4096x4096 at 1"),
        (2, 4096, 4096, "4096x4096 at 16"),
        (17, 11008, 4096, "11008x4096 at 1024"),
        (8192, 11008, 4096, "11008x4096 at 1024"),  # more rows than were measured: the most that were
        (16, 14336, 4096, "11008x4096 at 16"),  # the nearest shape, in ratios
        (16, 6144, 4096, "4096x4096 at 16"),
    ],
)
def test_the_nearest_shape_and_the_next_larger_number_of_rows(table: None, m: int, n: int, k: int, found: str) -> None:
    assert tuning.configuration("op", m, n, k, gpu="NVIDIA H100 80GB HBM3") == {"block": found}


def test_shapes_unlike_all_measured_ones_take_the_default(table: None) -> None:
    assert tuning.configuration("op", 16, 576, 576, gpu="NVIDIA H100 80GB HBM3") is None
    assert tuning.configuration("op", 16, 4096, 11008, gpu="NVIDIA H100 80GB HBM3") is None


def test_nothing_is_known_of_other_gpus_and_operations(table: None) -> None:
    assert tuning.configuration("op", 1, 4096, 4096, gpu="NVIDIA L40S") is None
    assert tuning.configuration("other", 1, 4096, 4096, gpu="NVIDIA H100 80GB HBM3") is None


def test_the_shipped_configurations_are_whole() -> None:
    for file in Path(tuning.__file__).parent.joinpath("configs").glob("*.json"):
        for operation, entries in json.loads(file.read_text(encoding="utf-8")).items():
            assert entries, operation
            for entry in entries:
                assert entry["config"], operation
