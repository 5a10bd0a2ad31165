"""QuaRot's two transforms of o_proj's input, offline and online, must not undo each other."""

import pytest
import torch

from lqedu.methods import QuaRot
from tests.compare import relative_error
from tests.models.tiny import tiny_model, tiny_windows


def _inputs_of_o_proj(model: torch.nn.Module) -> torch.Tensor:
    """What the first o_proj's weight is multiplied with, ``[tokens, in]``."""
    linear, seen = model.model.layers[0].self_attn.o_proj, []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    model(tiny_windows(24, 12))
    return linear.path.transform(seen[0]) if hasattr(linear, "path") else seen[0]


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 2)])
@torch.no_grad()
def test_every_output_sees_every_input_of_o_proj(heads: int, kv_heads: int) -> None:
    """9 heads have no Hadamard matrix and get a transform of the whole width; 4 get one across heads."""
    sizes = {"hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16}
    model = tiny_model("llama", **sizes).double()
    rotated = QuaRot(seed=3).prepare_model(model, {})
    assert relative_error(rotated(tiny_windows()).logits, model(tiny_windows()).logits) < 1e-5
    before, after = _inputs_of_o_proj(model), _inputs_of_o_proj(rotated)
    mixing = torch.linalg.lstsq(before, after).solution  # after = before @ mixing
    assert relative_error(before @ mixing, after) < 1e-5
    assert relative_error(mixing @ mixing.T, torch.eye(16 * heads, dtype=torch.float64)) < 1e-4
    seen = (mixing.abs() > 1e-4).sum(0)  # without signs between the two it was 12 of the 144 for 9 heads
    assert int(seen.min()) > 16 * heads // 2
