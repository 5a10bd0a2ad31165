"""SmoothQuant: the block's function before rounding, the codes that the product sees, static scales that are kept."""

import pytest
import torch

import lqedu
from lqedu.calibration.capture import block_inputs, run_block
from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.methods import RTN, SmoothQuant
from lqedu.models.anatomy import block_list, describe
from lqedu.models.copying import copy_sharing_tensors
from lqedu.runtime import linear as linear_module
from lqedu.runtime import quantized_linears
from tests.compare import relative_error
from tests.models.tiny import TYPES, tiny_model, tiny_windows


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("folds", ["norms", "all"])
def test_smoothing_leaves_a_blocks_function_alone(model_type, folds):
    model, windows = tiny_model(model_type), tiny_windows()
    hidden, kwargs = block_inputs(model, windows)
    want = run_block(block_list(model)[0], hidden, kwargs)
    block = block_list(copy_sharing_tensors(model))[0]
    changed = SmoothQuant(folds=folds, alpha=0.7).prepare_block(block, describe(model).stages, hidden, kwargs)
    assert relative_error(run_block(block, hidden, kwargs), want) <= 1e-5
    assert torch.equal(run_block(block_list(model)[0], hidden, kwargs), want)  # the model is not touched
    assert changed and all("norm" in name or "bias" in name for name in changed)
    weights = [block.get_submodule(s.linears[0]).weight for s in describe(model).stages]
    dense = [block_list(model)[0].get_submodule(s.linears[0]).weight for s in describe(model).stages]
    smoothed = [not torch.equal(a, b) for a, b in zip(weights, dense, strict=True)]
    assert smoothed == [s.source is not None if folds == "all" else s.behind_norm for s in describe(model).stages]


@pytest.mark.parametrize("activation", ["token", "tensor", "static"])
def test_the_product_sees_the_activations_codes(activation, monkeypatch):
    """The integer path is taken, with the codes of the layer's own grid and scale, by every layer."""
    model, windows = tiny_model("llama"), tiny_windows()
    quantized = lqedu.quantize(model, SmoothQuant(activation=activation), windows)
    seen, inputs = [], []
    product = linear_module.integer_linear

    def spy(codes, scale, zero, weight):
        seen.append((codes, scale, zero))
        return product(codes, scale, zero, weight)

    monkeypatch.setattr(linear_module, "integer_linear", spy)
    layers = quantized_linears(quantized)
    hooks = [layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0])) for layer in layers.values()]
    quantized(windows)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(inputs) == len(layers)
    for (codes, scale, zero), x in zip(seen, inputs, strict=True):
        assert codes.dtype == torch.int8 and zero is None
        assert torch.equal(codes, torch.round(x / scale).clamp(-128, 127).to(torch.int8))
        assert scale.shape == ((*x.shape[:-1], 1) if activation == "token" else (1,))


def test_static_scales_come_from_the_smoothed_inputs_and_survive_reload_and_resume(tmp_path):
    model, windows = tiny_model("llama", tie_word_embeddings=False).requires_grad_(False), tiny_windows()
    method = SmoothQuant(granularity="tensor", activation="static")
    quantized = lqedu.quantize(model, method, windows)
    layer = block_list(quantized)[0].self_attn.q_proj
    hidden, _ = block_inputs(model, windows)
    smooth = block_list(quantized)[0].input_layernorm(hidden)
    assert torch.allclose(layer.input_scale, smooth.abs().max().reshape(1) / 127, rtol=1e-6)
    folder = tmp_path / "run"
    lqedu.quantize(model, method, windows, resume_dir=folder)
    (folder / "block-0002.safetensors").unlink()
    resumed = lqedu.quantize(model, method, windows, resume_dir=folder)
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_smoothing_repairs_what_one_outlier_channel_costs():
    """A channel 60 times as large as the others: static per-tensor scales lose most of it, smoothing wins most back."""
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
    naive = RTN(bits=8, group_size=None, symmetric=True, activation_bits=8, activation="static")
    errors = [
        relative_error(lqedu.quantize(model, m, windows)(windows).logits, want)
        for m in (naive, SmoothQuant(activation="static"))
    ]
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"alpha": -0.1}, UsageError),
        ({"alpha": 2}, UsageError),
        ({"folds": "some"}, UsageError),
        ({"granularity": "group"}, UsageError),
        ({"granularity": "row"}, UsageError),
        ({"activation": "row"}, UsageError),
        ({"activation_bits": 9}, GridError),
        ({"kv_bits": 1}, GridError),
        ({"bits": 1}, GridError),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options, error):
    with pytest.raises(error):
        SmoothQuant(**options)


def test_it_needs_windows_and_static_scales_make_rtn_need_them_too():
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match="needs calibration"):
        lqedu.quantize(model, SmoothQuant())
    static = RTN(bits=8, group_size=None, activation_bits=8, activation="static")
    assert static.uses_calibration and not RTN().uses_calibration
    with pytest.raises(CalibrationError, match="needs calibration"):
        lqedu.quantize(model, static)
