"""SpinQuant: rotations that stay orthogonal, a training pass that computes what the rotated model will, resume."""

import pytest
import torch
from torch import nn

import lqedu
from lqedu.errors import CalibrationError, UnsupportedModelError, UsageError
from lqedu.methods import SpinQuant
from lqedu.methods import spinquant as module
from lqedu.methods.spinquant import learn_rotations, round_through
from lqedu.models.anatomy import block_list, linears
from lqedu.models.copying import copy_sharing_tensors
from lqedu.runtime.attention import set_attention_path
from lqedu.runtime.inputs import TransformedLinear, input_path
from lqedu.transforms.rotation import rotate_model
from tests.compare import relative_error
from tests.models.tiny import tiny_model, tiny_windows

ROTARY = ("llama", "mistral", "qwen2", "qwen3")


def _method(**changes) -> SpinQuant:
    return SpinQuant(**({"steps": 3, "windows_per_step": 2} | changes))


@pytest.mark.parametrize("model_type", ROTARY)
@pytest.mark.parametrize("online", [True, False])
def test_the_training_pass_is_the_rotated_model_with_rounded_activations(model_type, online):
    """Q(x R)(w R)^T = (Q(x R) R^T) w^T for every linear, keys and values included, at dense weights."""
    model, windows = tiny_model(model_type), tiny_windows()
    method = _method(online=online, activation_bits=6, kv_bits=5)
    dense = module._frozen(rotate_model(model))
    size = lqedu.transforms.rotation.head_dim(model)
    g = torch.Generator().manual_seed(0)
    rotations = [lqedu.linalg.random_orthogonal(n, g).float() for n in [32] + [size] * 3]
    with module._rounded(dense, rotations, method), torch.no_grad():
        trained = dense(windows, use_cache=False).logits

    learned = {"residual": rotations[0], "values": torch.stack(rotations[1:])}
    rotated = method.prepare_model(copy_sharing_tensors(model), learned)
    grid = method.activation_grid()
    for name, linear in linears(rotated).items():
        rotated.set_submodule(name, _Rounded(linear, grid))
    set_attention_path(rotated, method.attention_path())
    with torch.no_grad():
        deployed, exact = rotated(windows).logits, model(windows).logits
    damage = relative_error(deployed, exact)
    assert damage > 0.01  # something was rounded
    assert relative_error(trained, deployed) <= 0.2 * damage  # a value on the edge of two codes may fall either way


class _Rounded(nn.Module):
    """A dense linear whose input is rounded where a quantized one would round it."""

    def __init__(self, linear, grid):
        super().__init__()
        self.linear, self.path, self.grid = linear, input_path(linear), grid

    def forward(self, x):
        x = self.grid.round_trip(self.path.transform(x))
        return nn.functional.linear(x, self.linear.weight, self.linear.bias)


def test_rotations_stay_orthogonal_and_move():
    model, windows = tiny_model("llama"), tiny_windows(6)
    found = learn_rotations(model, windows, _method(steps=30))
    start = learn_rotations(model, windows, _method(steps=0))
    for r, r0 in zip((found.residual, *found.values), (start.residual, *start.values), strict=True):
        assert float((r.T @ r - torch.eye(len(r))).abs().max()) < 1e-5
        assert float((r - r0).abs().max()) > 1e-3
    assert len(found.losses) == 30 and start.losses == ()


def test_training_lowers_the_loss_that_it_sees():
    """A linear model of outliers: the loss is the rounding error itself, and rotations can lower it."""
    model, windows = tiny_model("llama", num_hidden_layers=1), tiny_windows(4, 24)
    with torch.no_grad():  # the model predicts its own tokens well, so that damage is loss
        model.get_input_embeddings().weight.mul_(4)
    with torch.no_grad():
        windows = model(windows).logits.argmax(-1).roll(1, 1)
    method = _method(steps=60, windows_per_step=4, activation_bits=4, kv_bits=4, learning_rate=0.5)
    losses = learn_rotations(model, windows, method).losses
    assert sum(losses[-10:]) < sum(losses[:10])


def test_the_loss_of_rotations_is_the_one_that_training_saw():
    model, windows = tiny_model("llama"), tiny_windows()
    method = _method(steps=1, windows_per_step=len(windows))  # one step over all windows
    start = learn_rotations(model, windows, _method(steps=0))
    losses = module.rotated_loss(model, windows, start, method)
    assert losses.shape == (len(windows),)
    seen = learn_rotations(model, windows, method).losses[0]
    assert float(losses.mean()) == pytest.approx(seen, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_every_dtype_can_be_trained(dtype):
    model, windows = tiny_model("llama").to(dtype), tiny_windows()
    found = learn_rotations(model, windows, _method(steps=1))
    assert found.residual.dtype == torch.float32 and found.losses[0] > 0
    quantized = lqedu.quantize(model, _method(steps=1), windows)
    assert quantized(windows[:1]).logits.dtype == dtype


def test_it_is_reproducible_and_the_seed_matters():
    model, windows = tiny_model("llama"), tiny_windows(6)
    a, b, c = (learn_rotations(model, windows, _method(seed=s)) for s in (0, 0, 1))
    assert torch.equal(a.residual, b.residual) and a.losses == b.losses
    assert not torch.equal(a.residual, c.residual)


def test_the_callers_model_is_left_alone():
    model, windows = tiny_model("llama"), tiny_windows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    learn_rotations(model, windows, _method())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert wanted == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_pass_straight_through():
    grid = _method().activation_grid()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = round_through(x, grid)
    assert torch.allclose(y, grid.round_trip(x.detach()))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_resumed_run_does_not_train_again(tmp_path, monkeypatch):
    model, windows = tiny_model("llama"), tiny_windows()
    method, folder = _method(), tmp_path / "run"
    whole = lqedu.quantize(model, method, windows, resume_dir=folder)
    (folder / "block-0001.safetensors").unlink()
    (folder / "block-0002.safetensors").unlink()
    monkeypatch.setattr(module, "learn_rotations", lambda *_, **__: pytest.fail("trained again"))
    resumed = lqedu.quantize(model, method, windows, resume_dir=folder)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("progress", [True, False])
def test_progress_of_training_is_shown_where_asked(progress, capsys):
    lqedu.quantize(tiny_model("llama"), _method(), tiny_windows(), progress=progress)
    assert ("rotations: 100%" in capsys.readouterr().err) == progress


@pytest.mark.parametrize("online", [True, False])
def test_rotations_in_blocks_are_reported(online):
    model = tiny_model("llama", intermediate_size=46)
    notes = lqedu.quantize(model, _method(online=online), tiny_windows()).lqedu_notes
    assert len(notes) == online and all(note.startswith("the input of down_proj is transformed in") for note in notes)
    narrow = tiny_model("llama", hidden_size=30, num_attention_heads=5, num_key_value_heads=5)
    assert _method().notes(narrow)[0].startswith("the rotation of the residual stream starts in blocks of 2")


@pytest.mark.parametrize("online", [True, False])
def test_online_transforms_are_an_option(online):
    model = tiny_model("llama")
    method = _method(online=online)
    rotated = method.prepare_model(copy_sharing_tensors(model), method.learn(model, tiny_windows()))
    block = block_list(rotated)[0]
    assert isinstance(block.mlp.down_proj, TransformedLinear) == online
    assert not isinstance(block.self_attn.o_proj, TransformedLinear)
    assert method.attention_path().hadamard == online


def test_refusals():
    model, windows = tiny_model("llama"), tiny_windows(1)
    with pytest.raises(CalibrationError, match="2 windows"):
        learn_rotations(model, windows, _method())
    with pytest.raises(CalibrationError, match="next token"):
        learn_rotations(model, tiny_windows(3, 1), _method())
    with pytest.raises(UsageError, match="activation_bits or kv_bits"):
        _method(activation_bits=None, kv_bits=None)
    with pytest.raises(UsageError, match="order 6 is known; leave the keys as they are"):
        lqedu.quantize(tiny_model("llama", head_dim=6), _method(), tiny_windows())
    with pytest.raises(UnsupportedModelError, match="opt"):
        lqedu.quantize(tiny_model("opt"), _method(), tiny_windows())
    for options in ({"steps": -1}, {"learning_rate": 0}, {"windows_per_step": 0}):
        with pytest.raises(UsageError):
            _method(**options)
