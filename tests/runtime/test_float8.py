"""FP8 products against float64 arithmetic on decoded codes; the layer behind every input path, saved and loaded."""

import pytest
import torch

from lqedu.errors import GridError
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Grid, decode, float8_quantize
from lqedu.formats.smallfloat import E4M3
from lqedu.rounding import nearest
from lqedu.runtime.float8 import (
    TENSOR_CORE_ERROR,
    Float8Linear,
    float8_linear,
    float8_matmul,
    has_tensor_cores,
    scaled_matmul,
)
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.kinds import check_layer, describe, layer_of, rebuild
from tests import problems
from tests.compare import relative_error
from tests.tolerances import FP8_TENSOR_CORES

WEIGHTS = ["tensor", "channel", "block"]
INPUTS = ["tensor", "token", "group"]
needs_fp8 = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_tensor_cores("cuda")), reason="needs a GPU that multiplies FP8"
)


def _codes(rows: int, columns: int, seed: int) -> torch.Tensor:
    """All 254 finite codes alike: products of very different sizes and both signs."""
    codes = torch.randint(0, 254, (rows, columns), generator=problems.seeded(seed)).to(torch.uint8)
    return torch.where(codes >= 127, codes + 1, codes)


def _exact(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x w^T`` of codes and ``Σ|x||w|``, in float64 from the definition of the format."""
    a, b = E4M3.decode(x.cpu(), torch.float64), E4M3.decode(w.cpu(), torch.float64)
    return a @ b.T, a.abs() @ b.abs().T


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (17, 8, 1000), (4, 6, 4097)])
@pytest.mark.parametrize("product", [float8_matmul, scaled_matmul])
def test_codes_are_multiplied_exactly_and_summed_in_float32(shape, product):
    """``scaled_matmul`` on the CPU proves the layout: the operands, transposes and filling that a GPU will be given."""
    tokens, outs, inputs = shape
    x, w = _codes(tokens, inputs, 1), _codes(outs, inputs, 2)
    got = product(x, w)
    want, size = _exact(x, w)
    assert got.dtype == torch.float32 and got.shape == (tokens, outs)
    assert bool(((got - want).abs() <= inputs * 2.0**-24 * size).all())


def test_one_product_is_exact_for_all_pairs_of_codes():
    x = _codes(1, 4000, 0).unique()[:, None]
    assert len(x) == 254
    assert torch.equal(float8_matmul(x, x), decode(x) @ decode(x).T)
    assert torch.equal(float8_matmul(x, x).double(), _exact(x, x)[0])
    assert torch.equal(scaled_matmul(x, x).double(), _exact(x, x)[0])


def test_operands_that_are_views_keep_their_meaning():
    x, w = _codes(40, 33, 1).T[:, 4:], _codes(36, 20, 2).T
    assert torch.equal(scaled_matmul(x, w), scaled_matmul(x.contiguous(), w.contiguous()))
    want, size = _exact(x, w)
    assert bool(((scaled_matmul(x, w) - want).abs() <= 36 * 2.0**-24 * size).all())


@pytest.mark.parametrize("product", [float8_matmul, scaled_matmul])
def test_bad_arguments(product):
    x = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match="uint8"):
        product(x, x.to(torch.int8))
    for w in (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="got"):
            product(x, w)


@pytest.mark.parametrize("granularity", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_inputs_that_do_not_fit_the_weight_are_refused(granularity, inputs):
    stored = float8_quantize(problems.weight(20, 44, seed=1), Float8Grid(granularity, 16))
    grid = Float8ActivationGrid(inputs, group_size=16)
    layer = layer_of(stored, None, InputPath(activation=grid))
    for features in (32, 40, 48, 60):
        with pytest.raises(GridError, match=r"\[\.\.\., 44\]"):
            layer(torch.ones(2, 3, features))
    x = torch.ones(2, 3, 44)
    scale, _ = grid.fit(x)
    codes = grid.encode(x, scale)
    for wrong in (torch.ones(2, 3, 2), torch.ones(2, 3, 4), torch.ones(5, 1), torch.ones(())):
        with pytest.raises(GridError, match="that grid"):
            float8_linear(codes, wrong, grid, stored)


def test_only_some_gpus_have_fp8(monkeypatch):
    assert not has_tensor_cores("cpu") and not has_tensor_cores(torch.device("meta"))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for capability, has in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert has_tensor_cores("cuda:0") is has
    monkeypatch.setattr(torch.version, "cuda", None)  # another vendor's devices are called "cuda" too
    assert not has_tensor_cores("cuda:0")


@needs_fp8
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (64, 576, 128), (64, 576, 1536), (33, 100, 4096), (256, 256, 16384)]
)
@pytest.mark.parametrize("positive", [False, True])
def test_tensor_cores_stay_within_their_bound(shape, positive):
    tokens, outs, inputs = shape
    x, w = _codes(tokens, inputs, 1), _codes(outs, inputs, 2)
    if positive:
        x, w = x & 127, w & 127
    got = float8_matmul(x.cuda(), w.cuda()).cpu()
    want, size = _exact(x, w)
    worst = float(((got - want).abs() / size).nan_to_num().max())
    print(f"{shape} {'positive' if positive else 'signed'}: 2^{torch.tensor(worst).log2():.2f}")
    assert worst <= TENSOR_CORE_ERROR


@needs_fp8
@pytest.mark.parametrize("granularity", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_a_layer_says_the_same_on_a_gpu(granularity, inputs):
    x = torch.randn(2, 5, 576, generator=problems.seeded(3))
    stored = float8_quantize(problems.weight(200, 576, seed=1), Float8Grid(granularity))
    layer = layer_of(stored, None, InputPath(activation=Float8ActivationGrid(inputs)))
    want = layer(x)
    assert relative_error(layer.cuda()(x.cuda()).cpu(), want) <= FP8_TENSOR_CORES


@pytest.mark.parametrize("granularity", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("format", ["E4M3", "E5M2"])
@pytest.mark.parametrize("shape", [(24, 48), (13, 36), (40, 16), (5, 7)])
def test_equals_the_product_of_the_decoded(granularity, inputs, format, shape):
    """Ragged blocks and groups included: the reference is one float64 product of what the codes stand for."""
    stored = float8_quantize(problems.weight(*shape, seed=1), Float8Grid(granularity, 16, format))
    grid = Float8ActivationGrid(inputs, group_size=16, format=format)
    x = torch.randn(2, 5, shape[1], generator=problems.seeded(3)) * 4 + 1
    scale, _ = grid.fit(x)
    codes = grid.encode(x, scale)
    got = float8_linear(codes, scale, grid, stored)
    want = grid.decode(codes, scale.double(), dtype=torch.float64) @ stored.dequantize(torch.float64).T
    assert got.shape == (2, 5, shape[0])
    assert relative_error(got, want) < 1e-6
    bias = torch.randn(shape[0], generator=problems.seeded(4))
    layer = layer_of(stored, bias, InputPath(activation=grid))
    assert isinstance(layer, Float8Linear)
    assert torch.equal(layer(x), got + bias)
    if inputs != "tensor":  # tokens do not see each other
        assert torch.allclose(layer(x[0]), (got + bias)[0], rtol=1e-5, atol=1e-5)


def test_blocks_and_groups_must_have_one_size():
    stored = float8_quantize(problems.weight(24, 48, seed=1), Float8Grid("block", 16))
    with pytest.raises(GridError, match="one size"):
        layer_of(stored, None, InputPath(activation=Float8ActivationGrid("group", group_size=8)))


def test_codes_of_other_kinds_do_not_mix():
    w = problems.weight(24, 48, seed=1)
    with pytest.raises(GridError, match="Float8ActivationGrid"):
        layer_of(float8_quantize(w, Float8Grid()), None, InputPath(activation=ActivationGrid()))
    with pytest.raises(GridError, match="ActivationGrid"):
        layer_of(nearest(w, IntGrid(8))[0], None, InputPath(activation=Float8ActivationGrid()))


def test_floating_point_inputs_meet_the_dequantized_weight():
    stored = float8_quantize(problems.weight(24, 48, seed=1), Float8Grid("block", 16))
    layer, x = layer_of(stored, None), torch.randn(3, 48, generator=problems.seeded(2))
    assert torch.equal(layer(x), torch.nn.functional.linear(x, stored.dequantize()))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_static_scale_is_a_buffer_and_moving_keeps_all_bits():
    stored = float8_quantize(problems.weight(24, 48, seed=1), Float8Grid())
    grid = Float8ActivationGrid("tensor", static=True)
    x = torch.randn(3, 48, generator=problems.seeded(2))
    static = grid.fit(x)
    layer = layer_of(stored, None, InputPath(activation=grid), static)
    assert torch.equal(layer.input_scale, static[0]) and layer.input_zero is None
    assert torch.equal(layer(10 * x), float8_linear(grid.encode(10 * x, static[0]), static[0], grid, stored))
    before = {key: buffer.clone() for key, buffer in layer.named_buffers()}
    layer.bfloat16()
    assert all(torch.equal(buffer, before[key]) for key, buffer in layer.named_buffers())
    assert sum(before[key].nbytes for key in ("codes", "scale")) == layer.nbytes == stored.nbytes


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_static_and_dynamic_layers_refuse_what_is_not_finite(static, bad):
    grid = Float8ActivationGrid("tensor", static=static)
    x = torch.randn(3, 48, generator=problems.seeded(2))
    layer = layer_of(
        float8_quantize(problems.weight(24, 48, seed=1), Float8Grid()), None, InputPath(activation=grid), grid.fit(x)
    )
    layer(x)
    x[1, 2] = bad
    with pytest.raises(GridError, match="NaN or infinite"):
        layer(x)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_loaded_scales_are_finite_and_above_zero(bad):
    stored = float8_quantize(problems.weight(24, 48, seed=1), Float8Grid())
    path = InputPath(activation=Float8ActivationGrid("tensor", static=True))
    wrong = torch.full((1,), bad)
    with pytest.raises(GridError, match="input_scale holds"):
        layer_of(stored, None, path, (wrong, None))
    for name in ("scale", "input_scale"):
        layer = layer_of(stored, None, path)
        check_layer(layer)
        layer.load_state_dict(layer.state_dict() | {name: wrong.expand_as(layer.get_buffer(name)).clone()})
        with pytest.raises(GridError, match=f"{name} holds"):
            check_layer(layer)
        stored = float8_quantize(problems.weight(24, 48, seed=1), Float8Grid())  # the layer shares its tensors
    with pytest.raises(GridError, match="scale holds"):
        rebuild(describe(stored), stored.packed() | {"scale": wrong.expand(24, 1)})


def test_describes_and_rebuilds():
    stored = float8_quantize(problems.weight(24, 48, seed=1), Float8Grid("block", 16, search="mse"))
    description = describe(stored)
    assert description["kind"] == "float8"
    again = rebuild(description, stored.packed())
    assert again.grid == stored.grid and torch.equal(again.dequantize(), stored.dequantize())
    path = InputPath(hadamard=16, activation=Float8ActivationGrid("group", group_size=16))
    assert InputPath.from_dict(path.to_dict()) == path
    frame, layer = layer_of(rebuild(description, None), None, path), layer_of(stored, None, path)
    frame.load_state_dict(layer.state_dict())
    x = torch.randn(3, 48, generator=problems.seeded(5))
    assert torch.equal(frame(x), layer(x))


def test_paths_of_older_folders_are_read():
    """A grid of integers carries no kind."""
    d = {"hadamard": None, "stride": 1, "activation": ActivationGrid(8).to_dict()}
    assert "kind" not in d["activation"]
    assert InputPath.from_dict(d) == InputPath(activation=ActivationGrid(8))
    with pytest.raises(GridError, match="kind 'float8'"):
        InputPath.from_dict(d | {"activation": {"kind": "other"}})
