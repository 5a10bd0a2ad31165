"""QoQ: every move leaves the function alone on every architecture, every part can be off, and what is stored is exact."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import lqedu
from lqedu.calibration.capture import block_inputs, run_block
from lqedu.checkpoint import load, save
from lqedu.cli import app
from lqedu.errors import CalibrationError, GridError, UnsupportedModelError, UsageError
from lqedu.formats import QTensor
from lqedu.formats.progressive import ProgressiveTensor
from lqedu.methods import QoQ
from lqedu.models.anatomy import block_list, describe, linears
from lqedu.models.copying import copy_sharing_tensors
from lqedu.runtime import quantized_linears
from lqedu.runtime import two_level as two_level_module
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.integer import int_matmul, integer_linear
from lqedu.runtime.two_level import two_level_linear
from lqedu.transforms.reorder import RESIDUAL
from tests.compare import relative_error
from tests.models.tiny import tiny_model, tiny_windows

ROTARY = ("llama", "mistral", "qwen2", "qwen3")
HEADS = {"gqa": {}, "mha": {"num_key_value_heads": 4}}
OFF = {"rotate": False, "reorder": "none", "smooth": "none", "smooth_attention": "none"}
MOVES = {
    "rotate": {"rotate": True},
    "reorder blocks": {"reorder": "blocks"},
    "reorder all": {"reorder": "all"},
    "smooth down": {"smooth": "down"},
    "smooth outputs": {"smooth": "outputs"},
    "keys, fixed": {"smooth_attention": "fixed"},
    "keys, searched": {"smooth_attention": "search"},
    "all": {"rotate": True, "reorder": "all", "smooth": "outputs", "smooth_attention": "search"},
}


def _moved(model: torch.nn.Module, windows: torch.Tensor, method: QoQ) -> torch.nn.Module:
    """The model as the pipeline moves it, with nothing rounded."""
    moved = method.prepare_model(copy_sharing_tensors(model), method.learn(model, windows))
    hidden, kwargs = block_inputs(moved, windows)
    for block in block_list(moved):
        method.prepare_block(block, describe(model).stages, hidden, kwargs)
        hidden = run_block(block, hidden, kwargs)
    return moved


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("model_type", ROTARY)
def test_no_move_changes_the_function(model_type, move, heads):
    model, windows = tiny_model(model_type, **HEADS[heads]), tiny_windows()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    moved = _moved(model, windows, QoQ(group_size=16, **(OFF | MOVES[move])))
    assert relative_error(moved(windows).logits, model(windows).logits) <= 2e-5
    assert any(not torch.equal(p, before.get(name, p + 1)) for name, p in moved.named_parameters())
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())


def test_every_part_off_is_plain_rounding_without_text():
    model = tiny_model("llama")
    plain = QoQ(group_size=16, kv_bits=None, clip=False, rounding="nearest", **OFF)
    assert not plain.uses_calibration and plain.key_strategy() == "none"
    quantized = lqedu.quantize(model, plain)
    for name, layer in quantized_linears(quantized).items():
        from lqedu.formats.progressive import progressive_quantize

        want = progressive_quantize(linears(model)[name].weight.detach(), plain.grid())
        assert torch.equal(layer.quantized.codes, want.codes)
    assert not hasattr(quantized, "lqedu_attention")


@pytest.mark.parametrize(
    "part",
    [
        {"rotate": False},
        {"reorder": "none"},
        {"reorder": "all"},
        {"smooth": "none"},
        {"smooth": "outputs"},
        {"smooth_alpha": 0.9},
        {"smooth_attention": "none"},
        {"smooth_attention": "search"},
        {"attention_alpha": 1.0},
        {"clip": False},
        {"rounding": "nearest"},
        {"damping": 0.1},
        {"order": "natural"},
        {"search_tokens": 11},
        {"seed": 1},
        {"kv_bits": 8},
        {"activation_bits": 4},
    ],
    ids=str,
)
def test_every_field_changes_what_is_computed(part):
    model, windows = tiny_model("llama"), tiny_windows(8)
    method = QoQ(group_size=16)
    logits = [lqedu.quantize(model, m, windows)(windows).logits for m in (method, replace(method, **part))]
    assert not torch.equal(*logits)


@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_what_is_stored_and_what_it_is_multiplied_with(group_size, rounding):
    """4-bit codes; channel codes inside int8; the packed product equals the fake-quantized float one."""
    model, windows = tiny_model("qwen2"), tiny_windows(6)
    quantized = lqedu.quantize(model, QoQ(group_size=group_size, rounding=rounding), windows)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for name, layer in quantized_linears(quantized).items():
        weight, grid = layer.quantized, layer.path.activation
        assert layer.path == InputPath(activation=grid) and grid.bits == 8 and grid.symmetric
        x = hidden if layer.in_features == 32 else torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
        scale, zero = grid.fit(x)
        codes = grid.encode(x, scale, zero)
        fake = grid.decode(codes, scale, zero).double() @ weight.dequantize(torch.float64).T
        if group_size is None:
            assert isinstance(weight, QTensor) and weight.codes.dtype == torch.uint8 and int(weight.codes.max()) <= 15
            product = integer_linear(codes, scale, zero, weight)
            accumulator = int_matmul(codes, (weight.codes.to(torch.int16) - 8).to(torch.int8))
            exact = codes.to(torch.int64) @ (weight.codes.to(torch.int64) - 8).T
        else:
            assert isinstance(weight, ProgressiveTensor) and int(weight.int8().to(torch.int32).abs().max()) <= 127
            product = two_level_linear(codes, scale, zero, weight)
            accumulator = int_matmul(codes, weight.int8())
            exact = codes.to(torch.int64) @ weight.int8().to(torch.int64).T
        assert torch.equal(accumulator.to(torch.int64), exact), name
        assert relative_error(product, fake) <= 1e-6, name
        bias = 0 if layer.bias is None else layer.bias
        assert relative_error(layer(x), product + bias) <= 1e-6, name


def test_the_integer_product_is_the_one_that_runs(monkeypatch):
    model, windows = tiny_model("llama"), tiny_windows(6)
    quantized = lqedu.quantize(model, QoQ(group_size=16), windows)
    calls, product = [], two_level_module.two_level_linear
    monkeypatch.setattr(two_level_module, "two_level_linear", lambda *a: calls.append(a[0].dtype) or product(*a))
    quantized(windows)
    assert calls == [torch.int8] * len(quantized_linears(quantized))
    path = quantized.lqedu_attention
    assert not path.hadamard and path.key.bits == path.value.bits == 4


def test_parts_help_where_they_should():
    """A model with loud keys and loud hidden channels: smoothing both lowers the error of the whole."""
    model, windows = tiny_model("llama", tie_word_embeddings=False), tiny_windows(8)
    with torch.no_grad():
        for block in block_list(model):
            block.self_attn.k_proj.weight[[1, 5, 9, 13]] *= 12
            block.self_attn.q_proj.weight[[1, 5, 9, 13, 17, 21, 25, 29]] /= 12
            block.mlp.up_proj.weight[3] *= 150
            block.mlp.down_proj.weight[:, 3] /= 150
        want = model(windows).logits
    method = QoQ(group_size=16, rounding="nearest", clip=False, reorder="none", rotate=False)
    variants = [method, replace(method, smooth="none"), replace(method, smooth_attention="none")]
    errors = [relative_error(lqedu.quantize(model, m, windows)(windows).logits, want) for m in variants]
    assert errors[0] < 0.9 * min(errors[1:])


def test_defaults_follow_the_group():
    assert QoQ().key_strategy() == "fixed" and QoQ(group_size=None).key_strategy() == "search"
    assert QoQ(kv_bits=None).key_strategy() == "none"
    assert QoQ().reorders() and not QoQ(group_size=None).reorders()
    model, windows = tiny_model("llama"), tiny_windows()
    assert RESIDUAL in QoQ(group_size=16, reorder="all").learn(model, windows)
    assert set(QoQ(group_size=16).learn(model, windows)) == {
        f"{i}.{name}" for i in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")
    }


def test_searches_read_the_search_tokens_only(monkeypatch):
    from lqedu.methods import qoq as module

    model, windows = tiny_model("llama"), tiny_windows(6, 11)
    seen = []
    monkeypatch.setattr(module, "find_orders", lambda m, w, **k: seen.append(tuple(w.shape)) or {})
    heads = module.attention_heads
    monkeypatch.setattr(module, "attention_heads", lambda b, h, k: seen.append(tuple(h.shape[:2])) or heads(b, h, k))
    lqedu.quantize(model, QoQ(group_size=16, search_tokens=20), windows)
    assert seen == [(2, 11)] * 4  # two windows of 11 hold 20 tokens


@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_saved_models_and_resumed_runs_hold_the_same_bits(tmp_path, model_type, group_size):
    """Biases and head norms that were folded into are kept, and so are the orders of channels."""
    model, windows = tiny_model(model_type).requires_grad_(False), tiny_windows(6)
    method = QoQ(group_size=group_size, smooth="outputs", reorder="all")
    quantized = lqedu.quantize(model, method, windows)
    folder = tmp_path / "run"
    lqedu.quantize(model, method, windows, resume_dir=folder)
    (folder / "block-0002.safetensors").unlink()
    resumed = lqedu.quantize(model, method, windows, resume_dir=folder)
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    save(quantized, tmp_path / "model", tokenizer=_Tokenizer())
    monkey = _loaded(tmp_path / "model")
    assert torch.equal(monkey(windows).logits, quantized(windows).logits)
    assert monkey.lqedu_method["options"]["smooth"] == "outputs"


class _Tokenizer:
    def save_pretrained(self, folder):
        return folder


def _loaded(folder):
    from unittest.mock import patch

    with patch("transformers.AutoTokenizer.from_pretrained", return_value=_Tokenizer()):
        return load(folder)[0]


def test_the_command_line_takes_its_parts():
    listed = CliRunner().invoke(app, ["methods", "--json"])
    row = next(r for r in json.loads(listed.stdout)["methods"] if r["name"] == "qoq")
    assert row["quantizes"] == ["weights", "activations", "KV cache"] and row["options"]["smooth_alpha"] is None
    options = {"smooth": "outputs", "clip": False, "smooth_alpha": 0.2, "group_size": None, "kv_bits": None}
    assert lqedu.methods.build("qoq", options) == QoQ(**options)


def test_what_cannot_be_done_is_refused():
    model, windows = tiny_model("llama"), tiny_windows()
    with pytest.raises(CalibrationError, match="needs calibration"):
        lqedu.quantize(model, QoQ(group_size=16))
    with pytest.raises(GridError, match=r"q_proj.*does not divide"):
        lqedu.quantize(model, QoQ(group_size=128), windows)
    for method in (QoQ(group_size=16), QoQ(group_size=16, rotate=False)):
        with pytest.raises(UnsupportedModelError, match="llama"):
            lqedu.quantize(tiny_model("opt"), method, windows)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"reorder": "some"}, UsageError),
        ({"smooth": "up"}, UsageError),
        ({"smooth_attention": "yes"}, UsageError),
        ({"rounding": "up"}, UsageError),
        ({"smooth_alpha": 2.0}, UsageError),
        ({"attention_alpha": -1.0}, UsageError),
        ({"damping": 0.0}, UsageError),
        ({"search_tokens": 0}, UsageError),
        ({"seed": -1}, UsageError),
        ({"order": "up"}, UsageError),
        ({"clip": 1}, UsageError),
        ({"group_size": 0}, GridError),
        ({"block_size": 48}, GridError),
        ({"kv_bits": 9}, GridError),
        ({"kv_bits": 16}, GridError),
    ],
    ids=str,
)
def test_hyper_parameters_that_make_no_sense_are_refused(options, error):
    with pytest.raises(error):
        QoQ(**options)
