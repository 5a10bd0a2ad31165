"""FP8 as a method: every choice of scales, what is kept, static scales that survive, the command line, E5M2's cost."""

import json
from pathlib import Path

import pytest
import torch

import lqedu
from lqedu.checkpoint import folder_bytes
from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Grid, float8_quantize
from lqedu.formats.kv import KVFloat8
from lqedu.methods import FP8
from lqedu.methods.pipeline import check_request
from lqedu.models.anatomy import block_list, linears
from lqedu.runtime import quantized_linears
from lqedu.runtime.float8 import Float8Linear
from tests.compare import relative_error
from tests.models.tiny import TYPES, tiny_model, tiny_windows
from tests.test_cli import run, text_file, tiny_folder  # noqa: F401  (fixtures)

GRANULARITIES = ["tensor", "channel", "block"]
ACTIVATIONS = ["token", "group", "tensor", "static", "none"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_layer_multiplies_what_the_grids_stand_for(granularity, activation):
    """In the running model: inputs rounded on their grid, weights on theirs, one product in float64."""
    model, windows = tiny_model("llama"), tiny_windows()
    method = FP8(granularity=granularity, activation=activation)
    quantized = lqedu.quantize(model, method, windows)
    layers = quantized_linears(quantized)
    assert layers.keys() == linears(model).keys()
    seen = {}
    for name, layer in layers.items():
        assert isinstance(layer, Float8Linear)
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        got = quantized(windows).logits
        assert 0 < relative_error(got, model(windows).logits) < 0.5  # a random model is a loud amplifier
    for name, (x, y) in seen.items():
        w_hat = float8_quantize(linears(model)[name].weight, Float8Grid(granularity)).dequantize(torch.float64)
        grid = method.activation_grid()
        if activation == "static":
            scale = layers[name].input_scale
            x = grid.decode(grid.encode(x, scale), scale)
        elif grid is not None:
            x = grid.round_trip(x)
        assert relative_error(y, x.double() @ w_hat.T) < 1e-6, name


@pytest.mark.parametrize("model_type", TYPES)
def test_every_architecture(model_type):
    model, windows = tiny_model(model_type), tiny_windows()
    with torch.no_grad():
        got = lqedu.quantize(model, FP8(kv="fp8"))(windows).logits
        assert 0 < relative_error(got, model(windows).logits) < 0.5


def test_a_static_scale_is_the_largest_calibration_input_over_448():
    model, windows = tiny_model("llama"), tiny_windows()
    quantized = lqedu.quantize(model, FP8(activation="static"), windows)
    seen = {}
    block = block_list(model)[0]
    hook = block.self_attn.q_proj.register_forward_pre_hook(lambda _, x: seen.update(x=x[0]))
    with torch.no_grad():
        model(windows)
    hook.remove()
    layer = block_list(quantized)[0].self_attn.q_proj
    assert torch.allclose(layer.input_scale, seen["x"].abs().max().reshape(1) / 448, rtol=1e-6)
    assert FP8(activation="static").uses_calibration and not FP8().uses_calibration
    with pytest.raises(CalibrationError, match="needs calibration"):
        check_request(model, FP8(activation="static"), None)


def test_weights_only_equals_the_dense_model_of_the_rounded_weights():
    model, windows = tiny_model("llama"), tiny_windows()
    quantized = lqedu.quantize(model, FP8(activation="none", granularity="block"))
    for linear in linears(model).values():
        linear.weight.data = float8_quantize(linear.weight, Float8Grid("block")).dequantize()
    with torch.no_grad():
        assert torch.equal(quantized(windows).logits, model(windows).logits)


def test_what_is_kept_stays_dense_and_nothing_else():
    model, windows = tiny_model("llama"), tiny_windows()
    for activation in ("token", "static"):
        quantized = lqedu.quantize(model, FP8(keep="down_proj, o_proj", activation=activation), windows)
        names = {name.rpartition(".")[2] for name in quantized_linears(quantized)}
        assert names == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
        for before, after in zip(block_list(model), block_list(quantized), strict=True):
            assert after.mlp.down_proj.weight.data_ptr() == before.mlp.down_proj.weight.data_ptr()
    everything = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    with pytest.raises(UsageError, match="keep every linear"):
        lqedu.quantize(model, FP8(keep=everything))


@pytest.mark.parametrize(
    ("keep", "named"),
    [
        ("dwn_proj", "'dwn_proj'"),
        ("o_proj, dwn_proj", "'dwn_proj'"),
        ("down_proj;o_proj", "'down_proj;o_proj'"),
        ("mlp.down_proj", "'mlp.down_proj'"),
        ("model.layers.0.mlp.down_proj", "'model.layers.0.mlp.down_proj'"),
        ("fc1", "'fc1'"),
    ],
)
def test_a_name_that_is_not_there_is_refused(keep, named):
    names = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    with pytest.raises(UsageError, match=f"keep {named}, which.* are {names}"):
        lqedu.quantize(tiny_model("llama"), FP8(keep=keep))


def test_names_are_those_of_the_model_and_commas_may_trail():
    layers = quantized_linears(lqedu.quantize(tiny_model("opt"), FP8(keep="fc1,")))
    names = {name.rpartition(".")[2] for name in layers}
    assert "fc2" in names and "fc1" not in names


def test_the_cache_is_an_option():
    model = tiny_model("llama")
    quantized = lqedu.quantize(model, FP8(kv="fp8"))
    assert quantized.lqedu_attention.key == quantized.lqedu_attention.value == KVFloat8()
    assert not hasattr(lqedu.quantize(model, FP8()), "lqedu_attention")


def test_two_bits_of_mantissa_cost_twice_the_error_of_three():
    model, windows = tiny_model("llama"), tiny_windows()
    with torch.no_grad():
        want = model(windows).logits
        errors = [
            relative_error(lqedu.quantize(model, FP8(format=form))(windows).logits, want) for form in ("E4M3", "E5M2")
        ]
    assert 1.5 < errors[1] / errors[0] < 2.5


def test_search_lowers_the_error_of_every_weight():
    model = tiny_model("llama")
    plain, searched = (
        quantized_linears(lqedu.quantize(model, FP8(search=search, granularity="tensor"))) for search in ("none", "mse")
    )
    for name, linear in linears(model).items():
        errors = [relative_error(layers[name].quantized.dequantize(), linear.weight) for layers in (plain, searched)]
        assert errors[1] <= errors[0]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"granularity": "group"}, GridError),
        ({"activation": "channel"}, UsageError),
        ({"activation": None}, UsageError),
        ({"kv": "int8"}, UsageError),
        ({"format": "E2M1"}, GridError),
        ({"search": "best"}, GridError),
        ({"keep": ("down_proj",)}, UsageError),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error):
    with pytest.raises(error):
        FP8(**options)


def test_grids_of_the_recipes():
    block = FP8(granularity="block", activation="group")
    assert block.grid() == Float8Grid("block", 128) and block.activation_grid() == Float8ActivationGrid("group")
    static = FP8(granularity="tensor", activation="static")
    assert static.activation_grid() == Float8ActivationGrid("tensor", static=True)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["granularity=block", "activation=group", "kv=fp8"],
        ["granularity=tensor", "activation=static", "search=mse", "keep=down_proj"],
    ],
)
def test_the_command_line_saves_what_is_computed(
    options: list[str], tiny_folder: Path, text_file: Path, tmp_path: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    command = ["quantize", tiny_folder, "--method", "fp8", "--calibration", text_file, "--windows", 4, "--length", 32]
    settings = [part for option in options for part in ("--set", option)]
    status, stdout, stderr = run(*command, *settings, "--out", out, "--json", capsys=capsys)
    assert status == 0, stderr
    summary = json.loads(stdout)
    assert 8 < summary["bits_per_weight"] < 10
    dense, tokenizer = lqedu.load_model(tiny_folder)
    calibration = lqedu.token_windows(tokenizer, text_file.read_text(), length=32, count=4, seed=0)
    quantized = lqedu.quantize(dense, FP8(**summary["method"]["options"]), calibration)
    back, _ = lqedu.load_model(out)
    with torch.no_grad():
        assert torch.equal(back(calibration).logits, quantized(calibration).logits)
    layers = quantized_linears(quantized).values()
    parts = folder_bytes(out)
    assert parts["codes"] + parts["scales"] == sum(layer.nbytes for layer in layers)
    assert parts["zeros"] == 0


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path):
    model, windows = tiny_model("llama", tie_word_embeddings=False).requires_grad_(False), tiny_windows()
    method = FP8(granularity="block", activation="static", keep="o_proj")
    whole = lqedu.quantize(model, method, windows, resume_dir=tmp_path / "run")
    (tmp_path / "run" / f"block-{len(block_list(model)) - 1:04d}.safetensors").unlink()
    resumed = lqedu.quantize(model, method, windows, resume_dir=tmp_path / "run")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
