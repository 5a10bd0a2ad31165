"""A measurement runs from end to end on a tiny model; what it measures is the method's own tests' business."""

import pytest
import torch

import lqedu
from lqedu.book import measure
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.kv import KVInt
from tests.models.tiny import tiny_model, tiny_windows


class _TinyBench(measure._Bench):
    """The bench with a random model of one block whose widths hold groups of 64, and three windows of eleven tokens."""

    def __init__(self, device: str) -> None:
        shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 1}
        self.model = tiny_model("llama", **shape).requires_grad_(False)
        self.windows, self.digest, self.batch_size = tiny_windows(), "0" * 64, 4
        self.dense = lqedu.perplexity(self.model, self.windows, batch_size=self.batch_size)

    def calibration(self, windows: int) -> torch.Tensor:
        return tiny_windows(seed=2)


def test_qqq_has_a_row_for_every_width_behind_the_same_weights(monkeypatch):
    monkeypatch.setattr(measure, "_Bench", _TinyBench)
    configuration, rows = measure.MEASUREMENTS["qqq"]("cpu")
    assert configuration["model"] == "smollm2-135m"
    found = {
        (row.get("name"), row["method"], row.get("group_size"), row.get("move"), row.get("search")) for row in rows
    }
    for group_size in (None, 64):
        for move in ("smooth", "rotate"):
            five = [
                row for row in rows if (row.get("move"), row.get("group_size")) == (move, group_size)
                and row["search"] == "auto"
            ]  # fmt: skip
            assert [row["kv_bits"] for row in five] == [None, 8, 4, 4, 4]
            assert len({row["proxy_loss"] for row in five}) == 1 < len({row["nll"] for row in five})
        assert {("KV16", "qqq", group_size, "none", "auto"), ("folded", "qqq", group_size, "none", "auto")} <= found
    assert len(rows) == 1 + 5 + 1 + 2 * (5 + 2 + 2 * 5 + 2)
    assert all(len(row["samples"]) == 3 for row in rows)


def test_fp8_has_a_row_for_every_granularity_and_block_formats_behind_a_rotation(monkeypatch):
    monkeypatch.setattr(measure, "_Bench", _TinyBench)
    _, rows = measure.MEASUREMENTS["fp8"]("cpu")
    plain = [row for row in rows if row.get("name") == "FP8"]
    assert len({(row["granularity"], row["activation"]) for row in plain}) == len(plain) == 3 * 5
    searched = [row for row in rows if row.get("name") == "FP8, searched"]
    assert len(searched) == 3 * 2 and {row["search"] for row in searched} == {"mse"}
    blocks = [row for row in rows if str(row.get("name")).startswith("rotated, ")]
    assert {(row["name"].removeprefix("rotated, "), row["bits_per_weight"], row["inputs"]) for row in blocks} == {
        (name, bits, inputs) for name, bits in (("MXFP8", 8.25), ("MXFP4", 4.25), ("NVFP4", 4.5)) for inputs in (0, 1)
    }
    whole, kept = ([r for r in rows if r.get("name") == n][0] for n in ("FP8", "FP8, kept"))  # noqa: RUF015
    assert 8 < whole["bits_per_weight"] < 9 < kept["bits_per_weight"] < 12  # a fifth of the weights in 16 bits
    assert len({row["nll"] for row in rows}) > 0.7 * len(rows)  # one group is a token here, one block may be a tensor
    assert all(len(row["samples"]) == 3 for row in rows)


@pytest.mark.parametrize(
    "grid", [ActivationGrid(4), ActivationGrid(4, symmetric=False, clip_ratio=0.8), KVInt(4, zero_point="integer")]
)
def test_the_gradient_that_follows_the_scale_has_the_values_and_euler_s_identity(grid):
    """Rounding by a scale of the token's own range is homogeneous: ∇(v·f)·x = v·f, which straight through misses."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, generator=generator).requires_grad_()
    v = torch.randn(5, 32, generator=generator)
    y = measure._round_following(x, grid)
    assert torch.allclose(y, grid.round_trip(x.detach()), atol=1e-6)
    (gradient,) = torch.autograd.grad((v * y).sum(), x)
    wanted = (v * y.detach()).sum(1)
    assert torch.allclose((gradient * x).sum(1), wanted, rtol=2e-3, atol=2e-3)  # FP16 scales are not quite homogeneous
    assert not torch.allclose((v * x.detach()).sum(1), wanted, rtol=2e-3, atol=2e-3)


def test_fp8_scales_draw_other_roundings_with_the_same_error(monkeypatch):
    monkeypatch.setattr(measure, "_Bench", _TinyBench)
    _, rows = measure.MEASUREMENTS["fp8-scales"]("cpu")
    assert [row["name"] for row in rows[:3]] == ["dense", "tensor, fitted", "channel, fitted"] and len(rows) == 11
    assert rows[0]["delta_nll"] == 0 and len({row["nll"] for row in rows}) == 11
    errors = [row["weight_error"] for row in rows[1:]]
    assert max(errors) < 1.15 * min(errors)


def test_fp8_training_trains_every_recipe_from_the_same_start(monkeypatch):
    tiny = {"layers": 1, "hidden_size": 32, "steps": 20, "batch": 2, "length": 16, "seeds": 2}
    monkeypatch.setitem(measure._SMALL, "cpu", tiny)
    configuration, rows = measure.MEASUREMENTS["fp8-training"]("cpu")
    assert configuration["steps"] == 20 and configuration["parameters"] > 20_000
    assert [row["name"] for row in rows] == list(measure._RECIPES)
    by_name = {row["name"]: row for row in rows}
    assert all(len(row["losses"]) == 2 and len(row["losses"][0]) == 2 and len(row["samples"]) == 2 for row in rows)
    assert by_name["FP32"]["delta"] == 0 and len({row["held_out"] for row in rows}) > 8
    assert by_name["hybrid, delayed"]["gradient"] == "E5M2" and by_name["E4M3, unscaled"]["gradient"] == "E4M3"
    assert all(abs(row["losses"][0][0] - by_name["FP32"]["losses"][0][0]) < 0.2 for row in rows)
