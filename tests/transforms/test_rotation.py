"""Folding and rotating leave the logits alone: every Llama-like type, with and without grouped queries."""

import pytest
import torch

from lqedu.errors import UnsupportedModelError, UsageError
from lqedu.models.anatomy import block_list
from lqedu.transforms.rotation import head_dim, rotate_model
from tests.compare import relative_error
from tests.models.tiny import tiny_model, tiny_windows


def _orthogonal(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]


def _rotations(model: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    values = [_orthogonal(head_dim(model), 10 + index) for index in range(len(block_list(model)))]
    return _orthogonal(model.config.hidden_size, 1), values


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("what", ["fold", "residual", "values", "both"])
@torch.no_grad()
def test_logits_stay(model_type, heads, what):
    model = tiny_model(model_type, num_key_value_heads=heads)
    residual, values = _rotations(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotated = rotate_model(
        model, residual if what in ("residual", "both") else None, values if what in ("values", "both") else None
    )
    windows = tiny_windows()
    want = model(windows).logits
    assert relative_error(rotated(windows).logits, want) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.tie_word_embeddings == (model_type == "llama")
    assert not rotated.config.tie_word_embeddings
    norms = [p for name, p in rotated.named_parameters() if "layernorm" in name or name == "model.norm.weight"]
    assert norms and all(bool((norm == 1).all()) for norm in norms)


@torch.no_grad()
def test_the_stream_and_the_values_are_rotated():
    model = tiny_model("llama")
    residual, values = _rotations(model)
    rotated = rotate_model(model, residual, values)
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name):
        return lambda module, args: seen.setdefault(name, []).append(args[0])

    for one in (model, rotated):
        block = block_list(one)[1]
        block.mlp.register_forward_pre_hook(watch("mlp"))
        block.self_attn.o_proj.register_forward_pre_hook(watch("heads"))
        block_list(one)[2].input_layernorm.register_forward_pre_hook(watch("stream"))
        one(tiny_windows())
    stream, turned = seen["stream"]
    assert relative_error(turned, stream @ residual.float()) < 1e-5
    heads, turned = (t.unflatten(-1, (-1, head_dim(model))) for t in seen["heads"])
    assert relative_error(turned, heads @ values[1].float()) < 1e-5


def test_half_precision_is_cast_once():
    model = tiny_model("llama").half()
    residual, _ = _rotations(model)
    rotated = rotate_model(model, residual)
    weight, gain = model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].post_attention_layernorm.weight
    want = (weight.double() * gain.double() @ residual).half()
    assert torch.equal(rotated.model.layers[0].mlp.up_proj.weight, want)


def test_what_cannot_be_rotated_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"'opt'.*RMSNorm"):
        rotate_model(tiny_model("opt"))
    model = tiny_model("llama")
    with pytest.raises(UsageError, match=r"\[32, 32\]"):
        rotate_model(model, torch.eye(8))
    with pytest.raises(UsageError, match="orthogonal"):
        rotate_model(model, 1.01 * torch.eye(32))
    with pytest.raises(UsageError, match="3 blocks"):
        rotate_model(model, None, [torch.eye(8)])
    with pytest.raises(UsageError, match=r"values\[1\]"):
        rotate_model(model, None, [torch.eye(8), torch.ones(8, 8), torch.eye(8)])
