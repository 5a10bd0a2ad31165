"""Folding a scale leaves a block's function alone, in every stage of every architecture that can absorb one."""

import pytest
import torch

from lqedu.errors import UsageError
from lqedu.models.anatomy import block_list, describe
from lqedu.models.copying import copy_sharing_tensors
from lqedu.transforms.folding import fold_scale, tie_heads
from tests.compare import relative_error
from tests.models.tiny import TYPES, tiny_model, tiny_windows


def _scale(block: torch.nn.Module, stage, seed: int = 5) -> torch.Tensor:
    width = block.get_submodule(stage.linears[0]).in_features
    scale = torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(seed)))
    return tie_heads(block, scale) if stage.source.endswith("v_proj") else scale


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("index", range(4))
@torch.no_grad()
def test_the_function_stays(model_type, index):
    model = tiny_model(model_type)
    stage = describe(model).stages[index]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = copy_sharing_tensors(model)
    block = block_list(folded)[1]
    scale = _scale(block, stage)
    changed = fold_scale(block, stage, scale)
    assert relative_error(folded(tiny_windows()).logits, model(tiny_windows()).logits) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # everything else that differs is in the returned dict, or is the weight of a linear
    prefix = f"{describe(model).blocks}.1."
    differs = {n for n, t in folded.state_dict().items() if not torch.equal(t, before[n])}
    linears = {prefix + name + ".weight" for s in describe(model).stages for name in s.linears}
    assert differs - linears == {prefix + name for name in changed}
    seen: list[torch.Tensor] = []
    for one in (model, folded):
        linear = block_list(one)[1].get_submodule(stage.linears[0])
        linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        one(tiny_windows())
    assert relative_error(seen[1] * scale, seen[0]) < 1e-5


def test_heads_that_share_a_value_head_must_agree():
    model = tiny_model("llama")
    block, stage = block_list(model)[0], describe(model).stages[1]
    scale = torch.linspace(0.5, 2, 32)
    with pytest.raises(UsageError, match="2 query heads share a value head"):
        fold_scale(block, stage, scale)
    with pytest.raises(UsageError, match="2 query heads share a value head"):
        fold_scale(block, stage, tie_heads(block, scale) * torch.linspace(1, 1.0001, 32))
    tied = tie_heads(block, scale).view(2, 2, 8)
    assert torch.equal(tied[:, 0], tied[:, 1])
    assert torch.allclose(tied[:, 0], scale.view(2, 2, 8).mean(1))
    whole = tiny_model("llama", num_key_value_heads=4)
    assert torch.equal(tie_heads(block_list(whole)[0], scale), scale)


@torch.no_grad()
def test_a_scale_tied_but_for_its_last_bit_is_folded():
    """torch.pow of equal numbers may differ by one unit in the last place between places of a vector register."""
    model = tiny_model("llama")
    stage = describe(model).stages[1]
    scale = tie_heads(block_list(model)[0], torch.linspace(0.5, 2, 32))
    noisy = scale.clone()
    noisy[8:16] = torch.nextafter(noisy[8:16], torch.tensor(3.0))  # the second head of the first group
    blocks = []
    for one in (scale, noisy):
        folded = copy_sharing_tensors(model)
        fold_scale(block_list(folded)[0], stage, one)
        blocks.append(block_list(folded)[0].state_dict())
    assert not torch.equal(noisy, scale)
    assert all(torch.equal(tensor, blocks[1][name]) for name, tensor in blocks[0].items())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_that_cannot_be_stored_are_refused(bad):
    model = tiny_model("llama")
    scale = torch.ones(32)
    scale[3] = bad
    with pytest.raises(UsageError, match="finite and positive"):
        fold_scale(block_list(model)[0], describe(model).stages[0], scale)


def test_a_scale_that_only_float32_can_hold_is_refused_in_half_precision():
    model = tiny_model("llama").half()
    with pytest.raises(UsageError, match="float16"):
        fold_scale(block_list(model)[0], describe(model).stages[0], torch.full((32,), 1e6))
    with pytest.raises(UsageError, match="float16"):
        fold_scale(block_list(model)[0], describe(model).stages[0], torch.full((32,), 1e-6))


def test_a_weight_that_overflows_half_precision_is_refused():
    """A gain of 10 divided by 1e-4 is 100,000, and float16 ends at 65,504."""
    model = tiny_model("llama").half()
    block = block_list(model)[0]
    block.input_layernorm.weight = torch.nn.Parameter(torch.full((32,), 10.0).half())
    with pytest.raises(UsageError, match=r"carries a weight \[32\] out of torch.float16"):
        fold_scale(block, describe(model).stages[0], torch.full((32,), 1e-4))


def test_shapes_and_missing_sources():
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="32 inputs"):
        fold_scale(block_list(model)[0], describe(model).stages[0], torch.ones(8))
    opt = tiny_model("opt", activation_function="gelu")
    with pytest.raises(UsageError, match="nothing before fc2"):
        fold_scale(block_list(opt)[0], describe(opt).stages[3], torch.ones(48))
