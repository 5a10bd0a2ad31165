"""Rows of recorded kernel times: ratios, the best peer, and the floor that bytes and operations set."""

import sys

import pytest

from lqedu.book import kernels
from lqedu.errors import UsageError
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.rounding import nearest
from tests import problems


def _row(op: str, kernel: str, seconds: float, sizes: dict[str, int], **more: object) -> dict:
    return {"op": op, "kernel": kernel, "sizes": sizes, "samples": [seconds], "unit": "s", "median": seconds} | more


@pytest.fixture
def result() -> dict:
    small, large = {"m": 1, "n": 10, "k": 20}, {"m": 64, "n": 10, "k": 20}
    rows = [
        {"op": "ceiling", "kernel": "copy, read and write", "rate": 1e6},
        {"op": "ceiling", "kernel": "torch.matmul FP16", "rate": 1e9},
    ]
    for sizes, ours, base, peer, work in ((small, 2e-4, 5e-4, 3e-4, 1e3), (large, 4e-4, 3e-4, 6e-4, 3e5)):
        rows += [
            _row("w4a16/group128", kernels.OURS, ours, sizes, bytes=100, operations=work, ceiling="torch.matmul FP16"),
            _row("w4a16/group128", kernels.FP16, base, sizes),
            _row("w4a16/group128", "tinygemm", peer, sizes),
            _row("w4a16/group128", "slow", 1.0, sizes),
        ]
    rows.append(_row("quantize/int8", kernels.OURS, 1e-3, {"rows": 4}, bytes=500, operations=0, ceiling=None))
    return {"name": "kernels_test", "values": rows}


def test_ratio_peer_floor_and_share(result: dict) -> None:
    small, large = kernels.kernel_rows(result, "w4a16/group128")
    assert (small["m"], small["peer"], small["ratio"]) == (1, "tinygemm", pytest.approx(2.5))
    assert small["peer_us"] == pytest.approx(300) and small["baseline_us"] == pytest.approx(500)
    assert small["floor_us"] == pytest.approx(100) and small["share"] == pytest.approx(0.5)  # 100 bytes at 1 MB/s
    assert large["floor_us"] == pytest.approx(300) and large["share"] == pytest.approx(0.75)  # 3e5 operations at 1e9
    assert kernels.kernel_rows(result, "w4a16/group128", m=64) == [large]


def test_without_a_baseline_or_a_ceiling(result: dict) -> None:
    (row,) = kernels.kernel_rows(result, "quantize/int8")
    assert row["ratio"] is row["peer"] is row["baseline_us"] is None
    assert row["share"] == pytest.approx(0.5)


def test_unknown_operations_and_sizes_are_refused(result: dict) -> None:
    with pytest.raises(UsageError, match="no operation 'w4a4'; there are: quantize/int8, w4a16/group128"):
        kernels.kernel_rows(result, "w4a4")
    with pytest.raises(UsageError, match="no case of"):
        kernels.kernel_rows(result, "w4a16/group128", n=11)


def test_the_table_shows_sizes_that_differ(result: dict) -> None:
    shown = str(kernels.kernel_table(kernels.kernel_rows(result, "w4a16/group128"), "W4A16"))
    assert "rows" in shown and "outputs" not in shown and "times faster" in shown and "75%" in shown
    alone = str(kernels.kernel_table(kernels.kernel_rows(result, "quantize/int8"), "alone"))
    assert "times faster" not in alone


def test_the_error_of_a_kernel_is_one_rounding() -> None:
    pytest.importorskip("triton")
    weight = problems.weight(40, 128, seed=0)
    q, _ = nearest(weight, IntGrid(4, granularity="group", group_size=64))
    assert 0 < kernels.kernel_error(q, generator=problems.seeded(1)) < 2**-10
    w8, _ = nearest(weight, IntGrid(8, symmetric=True))
    assert 0 < kernels.kernel_error(w8, ActivationGrid(8), generator=problems.seeded(1)) < 2**-10


def test_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "lqedu_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    assert not kernels.has_kernels()
    assert "lqedu[gpu]" in capsys.readouterr().out
    assert kernels.kernel_error(None, generator=None) is None  # nothing else is asked for
