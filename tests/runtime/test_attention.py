"""Our attention function: causal, padded, grouped, and equal to transformers' own where nothing is rounded."""

import copy

import pytest
import torch

from lqedu.errors import GridError
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.kv import KVFloat8, KVInt
from lqedu.runtime.attention import AttentionPath, set_attention_path
from tests.compare import relative_error
from tests.models.tiny import tiny_model, tiny_windows

KV4 = KVInt(4, clip_ratio=0.95)
ROUNDED = AttentionPath(hadamard=True, key=KV4, value=KV4)


def _with(model: torch.nn.Module, path: AttentionPath) -> torch.nn.Module:
    model = copy.deepcopy(model)
    set_attention_path(model, path)
    return model


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "opt"])
@pytest.mark.parametrize("hadamard", [False, True])
@torch.no_grad()
def test_nothing_rounded_changes_nothing(model_type, hadamard):
    model = tiny_model(model_type)
    ours = _with(model, AttentionPath(hadamard=hadamard))
    assert relative_error(ours(tiny_windows()).logits, model(tiny_windows()).logits) < 1e-5


@torch.no_grad()
def test_rounding_is_seen_and_the_future_is_not():
    model = tiny_model("llama")
    ours, windows = _with(model, ROUNDED), tiny_windows()
    logits = ours(windows).logits
    assert 1e-3 < relative_error(logits, model(windows).logits) < 0.5
    later = windows.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 97
    assert torch.equal(ours(later).logits[:, :7], logits[:, :7])


@torch.no_grad()
def test_left_padding_is_masked():
    ours, windows = _with(tiny_model("llama").double(), ROUNDED), tiny_windows()
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), windows], dim=1)
    mask = torch.cat([torch.zeros(3, 4), torch.ones(windows.shape)], dim=1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = ours(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    assert relative_error(got, ours(windows).logits) < 1e-5


def test_as_data_and_refusals():
    for path in (ROUNDED, AttentionPath(), AttentionPath(key=KVFloat8(), value=KVInt(2))):
        assert AttentionPath.from_dict(path.to_dict()) == path
    with pytest.raises(GridError, match="fields"):
        AttentionPath.from_dict({"hadamard": True})
    with pytest.raises(GridError, match="a scale for each token"):
        AttentionPath(key=ActivationGrid(8, granularity="tensor"))
