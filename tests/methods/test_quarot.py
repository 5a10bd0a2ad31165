"""QuaRot: the same logits before rounding on every architecture, the promised transforms, and what is refused."""

import pytest
import torch

import lqedu
from lqedu.errors import CalibrationError, GridError, UnsupportedModelError, UsageError
from lqedu.linalg import hadamard_matrix
from lqedu.methods import RTN, QuaRot
from lqedu.methods.quarot import across_heads, hadamard_rotation
from lqedu.models.anatomy import block_list
from lqedu.models.copying import copy_sharing_tensors
from lqedu.runtime.attention import AttentionPath, set_attention_path
from lqedu.runtime.inputs import InputPath, TransformedLinear
from tests.compare import relative_error
from tests.models.tiny import tiny_model, tiny_windows

ROTARY = ("llama", "mistral", "qwen2", "qwen3")
HEADS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "three heads": {"num_attention_heads": 3, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("model_type", ROTARY)
@pytest.mark.parametrize("heads", HEADS)
def test_logits_do_not_change_before_rounding(model_type, heads):
    """Every transform included: residual, values, o_proj, down_proj, and q and k after RoPE."""
    changes = HEADS[heads]
    if heads == "three heads":
        changes = changes | {"hidden_size": 24} | ({} if model_type == "qwen2" else {"head_dim": 8})
    model, windows = tiny_model(model_type, **changes).double(), tiny_windows()
    rotated = QuaRot().prepare_model(copy_sharing_tensors(model), {})
    set_attention_path(rotated, AttentionPath(hadamard=True))
    want, got = model(windows).logits, rotated(windows).logits
    assert relative_error(got, want) <= 1e-6
    single = QuaRot().prepare_model(copy_sharing_tensors(model.float()), {})
    set_attention_path(single, AttentionPath(hadamard=True))
    assert relative_error(single(windows).logits, model(windows).logits) <= 1e-5


def test_what_is_transformed_where():
    model = tiny_model("llama")
    rotated = QuaRot().prepare_model(copy_sharing_tensors(model), {})
    block = block_list(rotated)[0]
    assert isinstance(block.self_attn.o_proj, TransformedLinear) and isinstance(block.mlp.down_proj, TransformedLinear)
    assert block.self_attn.o_proj.path == InputPath(hadamard=4, stride=8)
    assert block.mlp.down_proj.path == InputPath(hadamard=48)
    assert across_heads(576, 64) == InputPath(hadamard=576)  # nine heads have no Hadamard matrix, 576 = 36 · 16 has
    assert not rotated.config.tie_word_embeddings


def test_across_heads_completes_the_transform_of_the_whole_width():
    """(H_heads ⊗ I)(I ⊗ H_size) = H_heads ⊗ H_size, the reference's full transform of o_proj's input."""
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h4, h8 = (hadamard_matrix(n).double() / n**0.5 for n in (4, 8))
    values = (x.view(5, 4, 8) @ h8.T).reshape(5, 32)
    assert torch.allclose(across_heads(32, 8).transform(values), x @ torch.kron(h4, h8).T)


def test_a_width_without_a_hadamard_matrix_is_transformed_in_blocks():
    r = hadamard_rotation(18, torch.Generator().manual_seed(0))
    assert torch.allclose(r.T @ r, torch.eye(18, dtype=torch.float64))
    assert int((r[0] != 0).sum()) == 2


ODD = {"intermediate_size": 46, "hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 6}


def test_transforms_in_blocks_are_reported(tmp_path):
    """Orders 46, 30 and 6 have no Hadamard matrix: blocks of 2, everywhere; 48 and 32 have one."""
    assert lqedu.quantize(tiny_model("llama"), QuaRot(rounding="nearest")).lqedu_notes == ()
    quantized = lqedu.quantize(tiny_model("llama", **ODD), QuaRot(rounding="nearest", kv_bits=None))
    heads = [note.split(":")[0] for note in quantized.lqedu_notes]
    assert heads == [
        "the residual stream is rotated in blocks of 2",
        "the values of a head are rotated in blocks of 2",
        "the input of o_proj is transformed in blocks of 2",
        "the input of down_proj is transformed in blocks of 2",
    ]
    assert quantized.lqedu_notes[-1].endswith("no Hadamard matrix of order 46 is constructed here")
    block = block_list(quantized)[0]
    assert block.mlp.down_proj.path.hadamard == block.self_attn.o_proj.path.hadamard == 2


def test_rotation_spreads_an_outlier_channel():
    """A channel of the residual stream 10 times as large costs per-token 6-bit activations more than rotated ones."""
    model, windows = tiny_model("llama", tie_word_embeddings=False), tiny_windows(6)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 5] *= 10
    want = model(windows).logits
    naive = RTN(bits=8, group_size=None, symmetric=True, activation_bits=6)
    rotated = QuaRot(bits=8, rounding="nearest", activation_bits=6, kv_bits=None, activation_clip=1.0)
    errors = [relative_error(lqedu.quantize(model, m)(windows).logits, want) for m in (naive, rotated)]
    assert errors[1] < 0.7 * errors[0]


def test_gptq_rounds_the_rotated_weights_with_the_hessian_of_rotated_inputs():
    model, windows = tiny_model("llama"), tiny_windows(8)
    reports = {r: lqedu.quantize(model, QuaRot(rounding=r, bits=3), windows).lqedu_reports for r in ("gptq", "nearest")}
    assert all(report.proxy_loss is not None for report in reports["gptq"].values())
    assert all(report.proxy_loss is None for report in reports["nearest"].values())


def test_nearest_needs_no_windows_and_gptq_does():
    model, windows = tiny_model("llama"), tiny_windows()
    lqedu.quantize(model, QuaRot(rounding="nearest"))
    with pytest.raises(CalibrationError, match="needs calibration"):
        lqedu.quantize(model, QuaRot())
    quantized = lqedu.quantize(model, QuaRot(), windows)
    assert quantized.lqedu_attention.hadamard and quantized.lqedu_attention.key.bits == 4
    assert quantized.lqedu_attention.key.clip_ratio == 0.95


def test_seeds_draw_other_signs():
    model = tiny_model("llama")
    weights = [QuaRot(seed=s).prepare_model(copy_sharing_tensors(model), {}).lm_head.weight for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_norms_that_subtract_a_mean_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="opt"):
        lqedu.quantize(tiny_model("opt"), QuaRot(), tiny_windows())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rounding": "up"}, UsageError),
        ({"activation_clip": 0}, GridError),
        ({"kv_clip": 1.5}, GridError),
        ({"damping": 0}, UsageError),
        ({"seed": -1}, UsageError),
        ({"search": "all"}, GridError),
        ({"order": "up"}, UsageError),
        ({"kv_bits": 9}, GridError),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options, error):
    with pytest.raises(error):
        QuaRot(**options)
