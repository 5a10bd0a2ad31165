"""A model on kernels computes what the quantized model computes, method by method, and says where no kernel helps."""

import pytest
import torch
from torch import nn

import lqedu
from lqedu.errors import UsageError
from lqedu.methods import FP8, HQQ, RTN, Method, QuIP, SpinQuant
from lqedu.runtime import PackedLinear, quantized_linears, to_kernels
from tests.compare import relative_error
from tests.models.on_kernels import FLIP, METHODS, SIZES
from tests.models.tiny import tiny_model, tiny_windows

pytest.importorskip("triton", reason="the kernels' layouts are defined in lqedu_kernels, which needs Triton")

#: One rounding to float16 moves an output by at most 2^-11 of itself; the layers that are compared round once each.
HALF = 2.0**-10


@pytest.fixture(scope="module", params=METHODS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, str]:
    """A quantized model (qwen2: biases, grouped queries) and the kernels that are to run it."""
    method, operation = METHODS[request.param]
    return lqedu.quantize(tiny_model("qwen2", **SIZES), method, tiny_windows(4, 24)), operation


def test_every_layer_runs_on_its_kernel(pair: tuple[nn.Module, str]) -> None:
    model, operation = pair
    packed = to_kernels(model)
    layers = quantized_linears(model)
    assert packed.lqedu_kernels == dict.fromkeys(layers, operation)
    assert packed.lqedu_notes == model.lqedu_notes
    assert not quantized_linears(packed)
    generator = torch.Generator().manual_seed(3)
    for name, layer in layers.items():
        x = torch.randn(5, layer.in_features, generator=generator).half()
        fast = packed.get_submodule(name)
        assert isinstance(fast, PackedLinear)
        want = layer(x.float() if operation == "w4a16" else x)  # W4A16 in float16 would round the weights
        assert relative_error(fast(x), want) < HALF, name


def test_logits_are_those_of_the_reference(pair: tuple[nn.Module, str]) -> None:
    """In float32 only the order of sums differs, and the one code that it may move by a step: see FLIP.

    In float16 a model's own rounding is the measure: the packed one may be at most three times as far from the float32 model
    as the reference in float16 is.
    """
    model, operation = pair
    ids = tiny_windows(2, 16, seed=5)
    with torch.no_grad():
        want = model(ids).logits
        assert relative_error(to_kernels(model, torch.float32)(ids).logits, want) < FLIP[operation]
        own = relative_error(_half(model)(ids).logits, want)
        assert relative_error(to_kernels(model)(ids).logits, want) < 3 * own


def _half(model: nn.Module) -> nn.Module:
    """The reference in float16, in a copy: ``.half()`` changes a model."""
    from lqedu.models.copying import copy_sharing_tensors
    from lqedu.runtime.packed import _cast

    copy = copy_sharing_tensors(model)
    _cast(copy, torch.float16)
    return copy


def test_generate_of_transformers_finds_the_same_tokens(pair: tuple[nn.Module, str]) -> None:
    model, _ = pair
    ids = tiny_windows(2, 7, seed=6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        got = to_kernels(model, torch.float32).generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (RTN(bits=3, group_size=32), "4-bit codes by channel or in groups"),
        (RTN(bits=8, group_size=None), "4-bit codes by channel or in groups"),
        (RTN(group_size=32, activation_bits=8), "groups need a second level"),
        (QuIP(bits=4), "no kernel reads a IncoherentWeight"),
        (FP8(activation="none"), "the fp8 kernel multiplies codes of a Float8ActivationGrid, got None"),
        (HQQ(group_size=64, axis=0), "in groups of 32, 64 or 128 inputs"),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else None,
)
def test_what_no_kernel_reads_keeps_its_module_and_is_reported(method: Method, reason: str) -> None:
    model = lqedu.quantize(tiny_model("llama", **SIZES), method, tiny_windows(3, 24))
    packed = to_kernels(model, torch.float32)
    layers = quantized_linears(model)
    assert quantized_linears(packed).keys() == layers.keys()
    assert all(entry.startswith("reference: ") and reason in entry for entry in packed.lqedu_kernels.values())
    (note,) = packed.lqedu_notes[len(model.lqedu_notes) :]
    assert note.startswith(f"{len(layers)} of {len(layers)} linears run as their reference: ") and reason in note
    ids = tiny_windows(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits)


def test_the_given_model_stays_and_tied_weights_stay_tied() -> None:
    model = lqedu.quantize(tiny_model("llama", **SIZES), RTN(group_size=32))
    before = {name: (t.dtype, t.clone()) for name, t in model.state_dict().items()}
    packed = to_kernels(model, torch.bfloat16)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    assert packed.lm_head.weight.dtype == packed.config.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name][0] and torch.equal(tensor, before[name][1]), name
    assert isinstance(model.lm_head.weight, nn.Parameter) and model.lm_head.weight.dtype == torch.float32


def test_kernel_tensors_move_and_keep_their_bits() -> None:
    model = lqedu.quantize(tiny_model("llama", **SIZES), SpinQuant(steps=1, windows_per_step=2), tiny_windows(4, 12))
    packed = to_kernels(model)
    layer = packed.model.layers[0].mlp.down_proj
    before = {name: t.clone() for name, t in layer.named_buffers()}
    moved = packed.bfloat16()  # changes packed, as for every module
    for name, tensor in moved.model.layers[0].mlp.down_proj.named_buffers():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert {t.device.type for t in packed.to("meta").model.layers[0].mlp.down_proj.buffers()} == {"meta"}


def test_bytes_are_those_of_the_tensors() -> None:
    model = lqedu.quantize(tiny_model("llama", **SIZES), SpinQuant(steps=1, windows_per_step=2, bits=8, activation_bits=8),
                           tiny_windows(4, 12))  # fmt: skip
    layer = to_kernels(model).model.layers[0].mlp.down_proj
    assert (
        layer.nbytes == 128 * 192 + 128 * 2 + 128 * 4
    )  # codes, float16 scales, and the sums that zero points multiply
    assert layer.nbytes == sum(t.numel() * t.element_size() for t in layer.buffers())


def test_refusals() -> None:
    model = tiny_model("llama", **SIZES)
    with pytest.raises(UsageError, match="no quantized linear layers"):
        to_kernels(model)
    with pytest.raises(UsageError, match="no quantized linear layers"):
        to_kernels("smollm2")
    with pytest.raises(UsageError, match="runs on kernels already"):
        to_kernels(to_kernels(lqedu.quantize(tiny_model("llama", **SIZES), RTN(group_size=None))))
    with pytest.raises(UsageError, match="float16 or bfloat16"):
        to_kernels(lqedu.quantize(model, RTN(group_size=32)), torch.float64)


def test_a_packed_model_is_not_saved_as_if_it_were_dense(tmp_path) -> None:
    packed = to_kernels(lqedu.quantize(tiny_model("llama", **SIZES), RTN(group_size=32)))
    with pytest.raises(UsageError, match="to_kernels"):
        lqedu.save(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
