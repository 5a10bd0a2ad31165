"""The layer that multiplies 8-bit floats: its three products against formulas in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from lqedu.errors import UsageError
from lqedu.formats.smallfloat import E4M3, E5M2
from lqedu.training import Fp8Linear, Recipe, convert, small_llama
from tests.models.tiny import tiny_model, tiny_windows

CURRENT = Recipe(scaling="current")


def _problem(tokens=(2, 5), columns=24, outs=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, outs)
    with torch.no_grad():
        linear.weight.normal_(0, 0.3, generator=generator)
        linear.bias.normal_(0, 1, generator=generator)
    x = torch.randn(*tokens, columns, generator=generator)
    return linear, x, 1e-4 * torch.randn(*tokens, outs, generator=generator)


def _hat(x, fmt):
    """Rounded by current scaling, float64, with the codec alone."""
    s = x.detach().abs().max().float() * (1 / fmt.max)
    return fmt.decode(fmt.encode(x.detach().float() / s), torch.float64) * s.double()


@pytest.mark.parametrize(("tokens", "columns", "outs"), [((2, 5), 24, 7), ((3,), 1, 1), ((1, 1, 4), 130, 33)])
def test_the_three_products_equal_their_formulas(tokens, columns, outs):
    linear, x, g = _problem(tokens, columns, outs)
    layer = Fp8Linear(linear, CURRENT)
    x.requires_grad_()
    y = layer(x)
    y.backward(g)
    x_hat, w_hat, g_hat = _hat(x, E4M3), _hat(linear.weight, E4M3), _hat(g, E5M2)
    close = {"rtol": 1e-5, "atol": 1e-6}
    assert torch.allclose(y.double(), x_hat @ w_hat.T + linear.bias.double(), **close)
    assert torch.allclose(x.grad.double(), g_hat @ w_hat, rtol=1e-5, atol=1e-9)
    want = g_hat.flatten(0, -2).T @ x_hat.flatten(0, -2)
    assert torch.allclose(layer.weight.grad.double(), want, rtol=1e-5, atol=1e-9)
    assert torch.allclose(layer.bias.grad.double(), g.double().flatten(0, -2).sum(0))  # not rounded


def test_on_powers_of_two_every_product_is_exact():
    generator = torch.Generator().manual_seed(4)

    def powers(*shape):
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return sign * torch.exp2(torch.randint(-6, 9, shape, generator=generator).float())

    linear = nn.Linear(8, 5, bias=False)
    with torch.no_grad():
        linear.weight.copy_(powers(5, 8))
    x, g = powers(6, 8).requires_grad_(), powers(6, 5)
    dense = x @ linear.weight.T
    dx, dw = torch.autograd.grad(dense, (x, linear.weight), g)
    layer = Fp8Linear(linear, Recipe(scaling="none"))
    y = layer(x)
    y.backward(g)
    assert torch.equal(y, dense) and torch.equal(x.grad, dx) and torch.equal(layer.weight.grad, dw)


def test_operands_go_to_the_formats_of_the_recipe():
    linear, x, g = _problem()
    for gradient in (E4M3, E5M2):
        layer = Fp8Linear(linear, Recipe(gradient=gradient, scaling="none"))
        x.requires_grad_()
        (dx,) = torch.autograd.grad(layer(x), x, g)
        g_hat = gradient.decode(gradient.encode(g), torch.float64)
        w_hat = E4M3.decode(E4M3.encode(linear.weight.detach()), torch.float64)
        assert torch.allclose(dx.double(), g_hat @ w_hat, rtol=1e-5, atol=1e-9)
    assert not E4M3.decode(E4M3.encode(g)).any()  # this gradient underflows in E4M3 and not in E5M2
    assert E5M2.decode(E5M2.encode(g)).any()


def test_only_wanted_gradients_are_made():
    linear, x, g = _problem()
    layer = Fp8Linear(linear, CURRENT)
    layer.weight.requires_grad_(False)
    x.requires_grad_()
    layer(x).backward(g)
    assert layer.weight.grad is None and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_type_of_the_input(dtype):
    linear, x, _ = _problem()
    x = x.to(dtype)
    y = Fp8Linear(linear, CURRENT)(x)
    assert y.dtype == dtype
    want = _hat(x.float(), E4M3) @ _hat(linear.weight, E4M3).T + linear.bias.double()
    assert torch.allclose(y.double(), want, rtol=0.02, atol=0.02)


def test_delayed_scales_are_those_of_the_steps_before_for_each_role():
    linear, *_ = _problem()
    layer = Fp8Linear(linear, Recipe(history=2))
    seen = {"input": [], "weight": [], "gradient": []}
    for step in range(5):
        _, x, g = _problem(seed=step)
        x, g = x * 2.0**step, g * 3.0**-step
        for role, tensor in (("input", x), ("weight", linear.weight), ("gradient", g)):
            seen[role].append(float(tensor.detach().abs().max()))
        layer(x.requires_grad_()).backward(g)
        for role, top in (("input", 448), ("weight", 448), ("gradient", 57344)):
            assert float(layer.scales[role].scale) == pytest.approx(max(seen[role][-2:]) / top, rel=1e-6)
    assert layer.state_dict().keys() >= {"weight", "bias", "scales.gradient.amax", "scales.input.scale"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_are_refused_by_current_scaling_and_stay_visible_in_the_others(bad):
    linear, x, g = _problem()
    x[0, 0, 0] = bad
    with pytest.raises(UsageError, match="the input of up: a scale needs a finite amax"):
        Fp8Linear(linear, CURRENT, "up")(x)
    for scaling in ("delayed", "none"):
        y = Fp8Linear(linear, Recipe(scaling=scaling))(x)
        assert y[0, 0].isnan().all() and y[0, 1:].isfinite().all()
    _, x, g = _problem()
    g[1, 1, 1] = bad
    with pytest.raises(UsageError, match="the gradient of up"):
        Fp8Linear(linear, CURRENT, "up")(x).backward(g)


def test_a_gradient_of_zeros_gives_zeros():
    linear, x, g = _problem()
    for scaling in ("current", "delayed", "none"):
        layer = Fp8Linear(copy.deepcopy(linear), Recipe(scaling=scaling))
        layer(x).backward(torch.zeros_like(g))
        assert layer.weight.grad.abs().max() == 0


# --- whole models -----------------------------------------------------------------------------------------------------


def test_convert_swaps_the_linears_of_a_copy_and_nothing_else():
    model = tiny_model("llama", tie_word_embeddings=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = convert(model, CURRENT)
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())
    swapped = {name for name, module in converted.named_modules() if isinstance(module, Fp8Linear)}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert swapped == linears - {"lm_head"} and len(swapped) == 21
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in converted.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in converted.parameters()}
    assert not shared and not converted.training
    windows = tiny_windows()
    with torch.no_grad():
        y, z = model(windows).logits, converted(windows).logits
    assert 0 < float((y - z).norm() / y.norm()) < 0.5  # random weights far from their default multiply errors


def test_biases_and_layers_to_skip_stay():
    model = tiny_model("qwen2")
    converted = convert(model, Recipe(), skip=("lm_head", "down_proj"))
    layer = converted.model.layers[0]
    assert type(layer.mlp.down_proj) is nn.Linear and isinstance(layer.self_attn.q_proj, Fp8Linear)
    assert torch.equal(layer.self_attn.q_proj.bias, model.model.layers[0].self_attn.q_proj.bias)
    assert layer.self_attn.q_proj.name == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_a_converted_model_leaves_weights_and_histories_float32(dtype):
    model = convert(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)), Recipe(history=3))
    layer = model[0]
    layer.scales["input"].record(torch.tensor(1e-9))
    layer.scales["input"].record(torch.tensor(1e5))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    model.to(dtype)
    assert model[1].weight.dtype == dtype
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    assert all(tensor.dtype == before[name].dtype for name, tensor in layer.state_dict().items())
    assert torch.equal(layer.scales["input"].amax, torch.tensor([1e5, 1e-9, 0]))
    model(torch.ones(2, 8, dtype=dtype)).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    model.to("meta")  # a device still moves
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


class _Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.block = nn.Sequential(nn.Linear(4, 4), self.a)
        self.again = self.block


def test_a_shared_layer_is_one_converted_layer_under_all_its_names():
    model = _Shared()
    converted = convert(model, CURRENT)
    assert isinstance(converted.a, Fp8Linear) and converted.a is converted.b is converted.block[1]
    assert converted.block is converted.again and isinstance(converted.block[0], Fp8Linear)
    assert not any(type(module) is nn.Linear for module in converted.modules())
    assert type(model.a) is nn.Linear and model.a is model.b


@pytest.mark.parametrize("skip", ["lm_head", "a", None, 3])
def test_names_to_skip_are_a_collection(skip):
    with pytest.raises(UsageError, match="skip is a collection of last names"):
        convert(_Shared(), CURRENT, skip=skip)


def test_a_name_to_skip_that_no_layer_has_is_refused():
    with pytest.raises(UsageError, match="skip names no linear layer of the model: 'block', 'down_porj'"):
        convert(_Shared(), CURRENT, skip=("lm_head", "down_porj", "a", "block"))
    assert type(convert(_Shared(), CURRENT, skip=("a", "1")).block[1]) is nn.Linear


def test_a_scale_from_a_broken_checkpoint_is_refused_with_its_layer():
    layer = Fp8Linear(nn.Linear(4, 4), Recipe(), "up")
    layer.load_state_dict(layer.state_dict() | {"scales.weight.scale": torch.tensor(math.nan)})
    with pytest.raises(UsageError, match="the weight of up: a scale is positive and finite"):
        layer(torch.ones(2, 4))


def test_what_cannot_be_converted_is_refused():
    model = small_llama(hidden_size=32, layers=1)
    with pytest.raises(UsageError, match="converted already"):
        convert(convert(model, CURRENT), CURRENT)
    with pytest.raises(UsageError, match=r"float16 weights; master weights are float32"):
        convert(copy.deepcopy(model).half(), CURRENT)
    with pytest.raises(UsageError, match="no linear layer to convert"):
        convert(nn.Sequential(nn.ReLU()), CURRENT)
    with pytest.raises(UsageError, match="for one layer use Fp8Linear"):
        convert(nn.Linear(2, 2), CURRENT)
    with pytest.raises(UsageError, match="of type Fp8Linear"):
        Fp8Linear(Fp8Linear(nn.Linear(2, 2), CURRENT), CURRENT)
