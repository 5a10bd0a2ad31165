"""Two-level layers: the exact integer product with one scale a row, behind every input path, saved and loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lqedu.checkpoint import folder_bytes, load, save
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.progressive import ProgressiveGrid, progressive_quantize
from lqedu.formats.requantized import RequantizedGrid, requantize
from lqedu.models.anatomy import linears
from lqedu.rounding import RoundingReport, nearest
from lqedu.runtime import quantized_linears
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.kinds import describe, layer_of, rebuild
from lqedu.runtime.two_level import TwoLevelLinear, two_level_linear
from tests import problems
from tests.compare import relative_error
from tests.models_tiny import tiny_model, tiny_windows

FORMATS: dict[str, Callable[[Tensor, int], Any]] = {
    "progressive": lambda w, g: progressive_quantize(w, ProgressiveGrid(g)),
    "progressive offset": lambda w, g: progressive_quantize(w, ProgressiveGrid(g, zero="offset")),
    "requantized": lambda w, g: requantize(nearest(w, RequantizedGrid(g).groups())[0]),
}
formats = pytest.mark.parametrize("name", FORMATS)


@formats
@pytest.mark.parametrize("shape", [(24, 48), (13, 96), (1, 16)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_equals_int64_arithmetic(name: str, shape: tuple[int, int], symmetric: bool, granularity: str) -> None:
    """The accumulator of the layer is that of 64-bit integers, and the scales come last."""
    stored = FORMATS[name](problems.weight(*shape, seed=1), 16)
    grid = ActivationGrid(8, symmetric, granularity)
    x = torch.randn(2, 5, shape[1], generator=problems.seeded(3)) * 4 + 1
    scale, zero = grid.fit(x)
    codes = grid.encode(x, scale, zero)
    z = 0 if zero is None else zero.to(torch.int64)
    exact = (codes.to(torch.int64) - z) @ stored.int8().to(torch.int64).T  # [2, 5, out]
    want = (exact.float() * stored.channel_scale.float().T) * scale
    assert torch.equal(two_level_linear(codes, scale, zero, stored), want)
    bias = torch.randn(shape[0], generator=problems.seeded(4))
    layer = layer_of(stored, bias, InputPath(activation=grid))
    assert isinstance(layer, TwoLevelLinear)
    assert torch.equal(layer(x), want + bias)
    fake = grid.round_trip(x).double() @ stored.dequantize(torch.float64).T + bias.double()
    assert relative_error(layer(x), fake) <= 1e-6


@formats
def test_floating_point_inputs_meet_the_dequantized_weight(name: str) -> None:
    stored = FORMATS[name](problems.weight(24, 48, seed=1), 16)
    layer, x = layer_of(stored, None), torch.randn(3, 48, generator=problems.seeded(2))
    assert torch.equal(layer(x), torch.nn.functional.linear(x, stored.dequantize()))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    rotated = layer_of(stored, None, InputPath(hadamard=16))
    transformed = InputPath(hadamard=16).transform(x)
    assert torch.equal(rotated(x), torch.nn.functional.linear(transformed, stored.dequantize()))


@formats
def test_a_static_scale_is_a_buffer(name: str) -> None:
    stored = FORMATS[name](problems.weight(24, 48, seed=1), 16)
    grid = ActivationGrid(8, symmetric=False, granularity="tensor", static=True)
    x = torch.randn(3, 48, generator=problems.seeded(2))
    scale, zero = grid.fit(x)
    layer = layer_of(stored, None, InputPath(activation=grid), (scale, zero))
    assert torch.equal(layer(x), two_level_linear(grid.encode(x, scale, zero), scale, zero, stored))
    assert torch.equal(layer.input_scale, scale) and torch.equal(layer.input_zero, zero)


@formats
def test_stores_what_it_counts_and_keeps_the_bits(name: str) -> None:
    stored = FORMATS[name](problems.weight(24, 48, seed=1), 16)
    layer = layer_of(stored, None)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == layer.nbytes == stored.nbytes
    before = {key: buffer.clone() for key, buffer in layer.named_buffers()}
    layer.bfloat16()
    assert all(torch.equal(buffer, before[key]) for key, buffer in layer.named_buffers())
    assert torch.equal(layer.quantized.int8(), stored.int8())


@formats
def test_describes_and_rebuilds(name: str) -> None:
    stored = FORMATS[name](problems.weight(24, 48, seed=1), 16)
    description = describe(stored)
    assert description["kind"] == name.split()[0]
    again = rebuild(description, stored.packed())
    assert again.grid == stored.grid and torch.equal(again.dequantize(), stored.dequantize())
    frame, layer = layer_of(rebuild(description, None), None), layer_of(stored, None)
    frame.load_state_dict(layer.state_dict())
    x = torch.randn(3, 48, generator=problems.seeded(5))
    assert torch.equal(frame(x), layer(x))


@formats
def test_a_model_comes_back_from_a_folder(name: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    model, windows = tiny_model(), tiny_windows()
    path = InputPath(activation=ActivationGrid(8))
    layers = {key: FORMATS[name](linear.weight.detach(), 16) for key, linear in linears(model).items()}
    for key, stored in layers.items():
        model.set_submodule(key, layer_of(stored, model.get_submodule(key).bias, path))
    model.lqedu_method = {"name": name, "options": {}}
    model.lqedu_reports = {key: RoundingReport(proxy_loss=None) for key in layers}
    folder = save(model, tmp_path / "out", tokenizer)
    back, _ = load(folder)
    with torch.no_grad():
        assert torch.equal(back(windows).logits, model(windows).logits)
    assert all(isinstance(layer, TwoLevelLinear) for layer in quantized_linears(back).values())
    parts = folder_bytes(folder)
    assert parts["codes"] + parts["scales"] + parts["zeros"] == sum(stored.nbytes for stored in layers.values())
    assert parts["codes"] == sum(stored.codes.numel() // 2 for stored in layers.values())
