"""QQQ: the same function before rounding, integer products equal to simulated ones, both levels, resume, command line."""

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
from lqedu.formats.requantized import RequantizedTensor
from lqedu.linalg.hessian import HessianAccumulator
from lqedu.methods import GPTQ, QQQ, RTN
from lqedu.models.anatomy import block_list, describe
from lqedu.models.copying import copy_sharing_tensors
from lqedu.rounding.report import proxy_loss
from lqedu.runtime import quantized_linears
from lqedu.runtime.integer import int_matmul
from lqedu.runtime.two_level import TwoLevelLinear
from lqedu.transforms.threshold import threshold_scales
from tests import problems
from tests.compare import relative_error
from tests.models.tiny import TYPES, tiny_model, tiny_windows

ROTARY = ("llama", "mistral", "qwen2", "qwen3")
FAST = {"group_size": 16, "thresholds": 4, "search_tokens": 16, "block_size": 16}
GRIDS = pytest.mark.parametrize("group_size", [None, 16])


@pytest.mark.parametrize("model_type", TYPES)
@GRIDS
def test_smoothing_leaves_a_blocks_function_alone(model_type, group_size):
    model, windows = tiny_model(model_type), tiny_windows()
    hidden, kwargs = block_inputs(model, windows)
    want = run_block(block_list(model)[0], hidden, kwargs)
    block = block_list(copy_sharing_tensors(model))[0]
    method, stages = QQQ(**FAST | {"group_size": group_size, "activation_bits": 4}), describe(model).stages
    found = method.search_block(block, stages, hidden, kwargs)
    assert torch.equal(run_block(block, hidden, kwargs), want)
    assert list(found) == [stage for stage in stages if stage.source is not None]
    assert any(bool((search.scale > 1).any()) for search in found.values())
    method.prepare_block(block, stages, hidden, kwargs)
    assert relative_error(run_block(block, hidden, kwargs), want) <= 1e-5
    assert torch.equal(run_block(block_list(model)[0], hidden, kwargs), want)  # the model is not touched
    sources = {stage.source for stage in stages}
    for stage, search in found.items():
        name = stage.linears[0]
        if name not in sources:  # the rows of a source shrink by the scale of what it feeds
            dense = block_list(model)[0].get_submodule(name).weight
            assert torch.equal(block.get_submodule(name).weight, dense * search.scale)


def test_heads_that_share_a_value_head_share_their_scale():
    model, windows = tiny_model("llama"), tiny_windows()
    hidden, kwargs = block_inputs(model, windows)
    stage = describe(model).stages[1]
    seen = []
    run_block(block_list(model)[0], hidden, kwargs, visit={stage.linears[0]: lambda x: seen.append(x)})
    found = QQQ(**FAST, activation_bits=4).search_block(block_list(model)[0], (stage,), hidden, kwargs)[stage]
    largest = seen[0].abs().amax((0, 1)).view(2, 2, 8)  # value heads, query heads of each, features
    tied = largest.amax(1, keepdim=True).expand(-1, 2, -1).reshape(-1)
    assert torch.equal(found.scale, threshold_scales(tied, found.threshold))


@pytest.mark.parametrize("model_type", ROTARY)
def test_rotating_leaves_the_logits_alone(model_type):
    model, windows = tiny_model(model_type).double(), tiny_windows()
    rotated = QQQ(**FAST, move="rotate").prepare_model(copy_sharing_tensors(model), {})
    assert relative_error(rotated(windows).logits, model(windows).logits) <= 1e-6
    block = block_list(rotated)[0]
    assert all(type(m) is torch.nn.Linear for m in (block.self_attn.o_proj, block.mlp.down_proj))  # nothing is online
    assert QQQ(**FAST).prepare_model(model, {}) is model
    assert QQQ(**FAST, move="none").prepare_model(model, {}) is model


@pytest.mark.parametrize("model_type", ROTARY)
@pytest.mark.parametrize("move", ["smooth", "rotate"])
@GRIDS
def test_integer_products_equal_the_simulation(model_type, move, group_size, monkeypatch):
    """Every layer multiplies int8 codes, its int32 sums are those of plain integers, and its output the simulated one."""
    from lqedu.runtime import integer, two_level

    model, windows = tiny_model(model_type), tiny_windows()
    quantized = lqedu.quantize(model, QQQ(**FAST | {"group_size": group_size, "move": move}), windows)
    layers = quantized_linears(quantized)
    assert all(isinstance(layer, TwoLevelLinear) == (group_size is not None) for layer in layers.values())
    sums, inputs = [], []

    def spy(x, w):
        sums.append((x, w, int_matmul(x, w)))
        return sums[-1][2]

    monkeypatch.setattr(integer, "int_matmul", spy)
    monkeypatch.setattr(two_level, "int_matmul", spy)
    hooks = [
        layer.register_forward_hook(lambda layer, x, y: inputs.append((layer, x[0], y))) for layer in layers.values()
    ]
    quantized(windows)
    for hook in hooks:
        hook.remove()
    assert len(sums) == len(inputs) == len(layers)  # one product a layer, also with groups
    for (q_x, q_w, total), (layer, x, y) in zip(sums, inputs, strict=True):
        grid = layer.path.activation
        scale, _ = grid.fit(x)
        flat = x.reshape(-1, x.shape[-1])
        assert torch.equal(q_x, torch.round(flat / scale.view(-1, 1)).clamp(-128, 127).to(torch.int8))
        weight = layer.quantized
        assert torch.equal(q_w, weight.codes if group_size is None else weight.int8())
        assert torch.equal(total.to(torch.int64), q_x.to(torch.int64) @ q_w.to(torch.int64).T)
        simulated = torch.nn.functional.linear(grid.round_trip(x), weight.dequantize(), layer.bias)
        assert relative_error(y, simulated) <= 1e-5


@GRIDS
def test_a_layer_is_gptq_and_then_the_second_level(group_size):
    w, h = problems.weight(24, 48, seed=1), problems.hessian(48, seed=2)
    method = QQQ(**FAST | {"group_size": group_size})
    stored, report = method.quantize_linear(w, h)
    assert report.proxy_loss == pytest.approx(proxy_loss(w - stored.dequantize(), h), rel=1e-6)
    naive = RTN(bits=4, group_size=group_size, symmetric=True).quantize_linear(w, h)[1]
    assert report.proxy_loss < naive.proxy_loss and report.flips > 0
    if group_size is None:
        assert stored.grid.bits == 4 and int(stored.codes.max()) <= 7
        return
    assert isinstance(stored, RequantizedTensor)
    assert int(stored.int8().to(torch.int64).abs().max()) == 127
    first = GPTQ(bits=4, group_size=16, symmetric=True, order="activation", block_size=16).quantize_linear(w, h)[0]
    assert float((stored.codes != first.codes).double().mean()) < 0.05  # scales in float16 there: few codes differ


def test_rotating_searches_ranges_and_smoothing_does_not():
    assert QQQ().grid().search == "none" and QQQ(move="rotate").grid().search == "mse"
    assert QQQ(search="mse").grid().search == "mse" and QQQ(move="rotate", search="none").grid().search == "none"


def test_smoothing_repairs_what_one_outlier_channel_costs():
    model, windows = tiny_model("llama").requires_grad_(False), tiny_windows(8)
    with torch.no_grad():
        for block in block_list(model):
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[3] *= 60
            for linear in (
                *[block.self_attn.get_submodule(f"{x}_proj") for x in "qkv"],
                block.mlp.gate_proj,
                block.mlp.up_proj,
            ):
                linear.weight[:, 3] /= 60
        want = model(windows).logits
    base = QQQ(**FAST | {"thresholds": 20, "activation_bits": 6})
    errors = [
        relative_error(lqedu.quantize(model, m, windows)(windows).logits, want)
        for m in (replace(base, move="none"), base)
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("move", ["smooth", "rotate"])
def test_a_resumed_run_ends_with_the_same_bits_and_a_folder_keeps_them(move, tmp_path, tokenizer):
    model, windows = tiny_model("llama", tie_word_embeddings=False).requires_grad_(False), tiny_windows()
    method = QQQ(**FAST, move=move, kv_bits=4)
    quantized = lqedu.quantize(model, method, windows)
    folder = tmp_path / "run"
    lqedu.quantize(model, method, windows, resume_dir=folder)
    (folder / "block-0002.safetensors").unlink()
    resumed = lqedu.quantize(model, method, windows, resume_dir=folder)
    back, _ = load(save(quantized, tmp_path / "out", tokenizer))
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
        assert torch.equal(tensor, back.state_dict()[name]), name
    assert back.lqedu_attention == quantized.lqedu_attention and back.lqedu_attention.key.bits == 4
    with torch.no_grad():
        assert torch.equal(back(windows).logits, quantized(windows).logits)


def test_another_width_of_keys_and_values_leaves_every_stored_tensor():
    """So that a measurement can quantize once and evaluate all widths."""
    model, windows = tiny_model("llama"), tiny_windows()
    plain, rounded = (lqedu.quantize(model, QQQ(**FAST, kv_bits=bits), windows) for bits in (None, 4))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, rounded.state_dict()[name]), name


def test_other_seeds_other_tokens_and_signs():
    model, windows = tiny_model("llama"), tiny_windows()
    signs = [QQQ(**FAST, move="rotate", seed=s).prepare_model(copy_sharing_tensors(model), {}) for s in (0, 0, 1)]
    heads = [m.lm_head.weight for m in signs]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    hidden, kwargs = block_inputs(model, windows)
    stage = describe(model).stages[0]
    losses = [
        QQQ(**FAST | {"seed": s}).search_block(block_list(model)[0], (stage,), hidden, kwargs)[stage].losses
        for s in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"move": "clip"}, UsageError),
        ({"search": "all"}, UsageError),
        ({"damping": 0}, UsageError),
        ({"order": "up"}, UsageError),
        ({"thresholds": 1}, UsageError),
        ({"search_tokens": 0}, UsageError),
        ({"seed": -1}, UsageError),
        ({"group_size": 0}, GridError),
        ({"group_size": 96}, GridError),  # would be cut in two by blocks of 128
        ({"activation_bits": 9}, GridError),
        ({"kv_bits": 1}, GridError),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options, error):
    with pytest.raises(error):
        QQQ(**options)


def test_what_does_not_fit_is_refused_before_work():
    with pytest.raises(GridError, match="does not divide"):
        lqedu.quantize(tiny_model("llama"), QQQ(), tiny_windows())
    with pytest.raises(CalibrationError, match="needs calibration"):
        lqedu.quantize(tiny_model("llama"), QQQ(**FAST))
    with pytest.raises(UnsupportedModelError, match="opt"):
        lqedu.quantize(tiny_model("opt"), QQQ(**FAST, move="rotate"), tiny_windows())


def test_the_hessian_is_that_of_smoothed_inputs():
    """What GPTQ sees of a stage is X / s: the diagonal of an outlier channel falls by s²."""
    model, windows = tiny_model("llama", tie_word_embeddings=False).requires_grad_(False), tiny_windows(8)
    with torch.no_grad():
        block_list(model)[0].input_layernorm.weight[3] *= 40
    hidden, kwargs = block_inputs(model, windows)
    block, stages = block_list(copy_sharing_tensors(model))[0], describe(model).stages
    method = QQQ(**FAST | {"thresholds": 20})
    scale = method.search_block(block, stages, hidden, kwargs)[stages[0]].scale
    assert float(scale[3]) > 2
    diagonals = []
    for b in (block_list(model)[0], block):
        accumulator = HessianAccumulator(32)
        run_block(b, hidden, kwargs, visit={stages[0].linears[0]: accumulator.add})
        diagonals.append(accumulator.result().diagonal())
        method.prepare_block(block, stages, hidden, kwargs)
    assert torch.allclose(diagonals[1], diagonals[0] / scale**2, rtol=1e-4)


def test_the_command_line_quantizes_and_reads_back(tmp_path, tokenizer):
    folder = tmp_path / "model"
    model = tiny_model("llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 90}" for i in range(3000)))
    out = tmp_path / "out"
    command = ["quantize", str(folder), "--method", "qqq", "--group-size", "16", "--out", str(out), "--json"]
    command += ["--calibration", str(text), "--windows", "4", "--length", "16"]
    command += [x for name in ("thresholds=4", "search_tokens=16", "block_size=16") for x in ("--set", name)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "lqedu.json").read_text())
    assert record["method"]["name"] == "qqq" and record["method"]["options"]["group_size"] == 16
    assert {layer["kind"] for layer in record["layers"].values()} == {"requantized"}


def test_a_rotation_in_blocks_is_reported():
    narrow = tiny_model("llama", hidden_size=30, num_attention_heads=5, num_key_value_heads=5)  # order 30 has no matrix
    assert QQQ(move="smooth").notes(narrow) == QQQ(move="rotate").notes(tiny_model("llama")) == ()
    assert [note.split(":")[0] for note in QQQ(move="rotate").notes(narrow)] == [
        "the residual stream is rotated in blocks of 2"
    ]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0} | {f"w{i}": i + 1 for i in range(90)}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
