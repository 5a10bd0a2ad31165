"""Memory of a streamed run: the formula against counts by hand, and against a run in a process of its own."""

from pathlib import Path

import pytest
import torch

import lqedu
from lqedu.book import measure as measurements
from lqedu.errors import UsageError
from lqedu.evaluation.streaming import (
    LLAMA_2_70B,
    LLAMA_3_70B,
    Shape,
    measure,
    resident_peak,
    streamed_peak,
    write_random,
)

TINY = Shape(2, 128, 256, 2, 1, 1000)


def test_weights_are_those_of_the_model(tmp_path: Path) -> None:
    write_random(TINY, tmp_path / "a")
    write_random(TINY, tmp_path / "b")
    model, _ = lqedu.load_model(tmp_path / "a")
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert sum(p.numel() for p in model.parameters()) == TINY.weights + norms
    assert sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2) == TINY.block_weights
    again = lqedu.load_model(tmp_path / "b")[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert float(model.lm_head.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert LLAMA_2_70B.weights == pytest.approx(69e9, rel=0.01) and LLAMA_3_70B.weights == pytest.approx(
        70.6e9, rel=0.01
    )


def test_depth_is_not_in_the_streamed_peak_and_is_in_the_other() -> None:
    deep = Shape(20, *(128, 256, 2, 1, 1000))
    sizes = {"tokens": 64, "itemsize": 4}
    assert streamed_peak(TINY, **sizes) == streamed_peak(deep, **sizes)
    more = resident_peak(deep, **sizes) - resident_peak(TINY, **sizes)
    assert more == int(18 * TINY.block_weights * (4 + 4.5 / 8))


@pytest.mark.parametrize("shape", [LLAMA_2_70B, LLAMA_3_70B])
def test_a_70b_model_fits_a_gpu_of_80_gb_and_64_gb_of_memory(shape: Shape) -> None:
    peak = streamed_peak(shape, tokens=32 * 512, itemsize=2)
    assert peak.total < 0.8 * 80e9
    assert peak.embeddings < 64e9 and 2 * shape.weights > 128e9  # the host holds a part at a time, never the model
    assert streamed_peak(shape, tokens=128 * 2048, itemsize=2).total < 80e9  # the windows of the GPTQ paper


@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_a_measured_peak_is_near_the_formula(mode: str, tmp_path: Path) -> None:
    shape = Shape(3, 256, 1408, 4, 2, 4000)
    write_random(shape, tmp_path / "dense")
    found = measure(mode, tmp_path / "dense", tmp_path / "out", windows=4, length=32, dtype="float32", device="cpu")
    formula = streamed_peak(shape, tokens=128, itemsize=4).total if mode == "streamed" else None
    formula = formula or resident_peak(shape, tokens=128, itemsize=4)
    assert found["host_bytes"] == pytest.approx(formula, rel=0.25)
    assert found["device_bytes"] is None and found["seconds"] > 0
    assert lqedu.load_model(tmp_path / "out")


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    options = {"windows": 1, "length": 8, "dtype": "float32", "device": "cpu"}
    with pytest.raises(UsageError, match="'streamed' or 'resident'"):
        measure("both", tmp_path, tmp_path / "out", **options)


def test_the_measurement_has_a_row_for_every_model_and_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"host_bytes": 10, "device_bytes": None, "seconds": 1.0}
    monkeypatch.setattr(measurements, "STREAMED", [TINY])
    monkeypatch.setattr(measurements, "memory_of_run", lambda mode, source, out, **options: out.mkdir() or found)
    configuration, rows = measurements.MEASUREMENTS["streaming"]("cpu")
    assert [row["name"] for row in rows] == ["streamed", "resident", "formula, llama-2-70b", "formula, llama-3-70b"]
    assert configuration["dtype"] == "float32" and rows[0]["samples"] == [10]
