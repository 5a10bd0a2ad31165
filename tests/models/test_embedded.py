"""The embedded model and corpus themselves, against what is known of them. Fetches both on first use."""

import hashlib

import pytest
import torch

from lqedu import assets
from lqedu.calibration import load_corpus, token_windows
from lqedu.evaluation import perplexity
from lqedu.models import describe, linears, load_model, weights_sha256

pytestmark = pytest.mark.model

WEIGHTS_SHA256 = "5e145af54152cd3df6066a0a2e3a347de5706586e86b6db56469d3ce60a25137"


@pytest.fixture(scope="module")
def loaded():
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def tensors():
    """The tensors of the GGUF by name, dequantized by the reference implementation of the format."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = GGUFReader(assets.smollm2_gguf()).tensors
    return {tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) for tensor in stored}


def test_every_load_gives_the_same_weights(loaded, monkeypatch):
    monkeypatch.setattr(assets, "_download", lambda *args: pytest.fail("downloaded again"))
    monkeypatch.setattr("lqedu.models.load._convert_gguf", lambda *args: pytest.fail("converted again"))
    again, _ = load_model("smollm2-135m")
    assert weights_sha256(again) == weights_sha256(loaded[0]) == WEIGHTS_SHA256


def test_weights_are_the_dequantized_ones_bit_for_bit(loaded, tensors):
    model, _ = loaded
    state = model.state_dict()
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    seen = {"lm_head.weight"}
    for name, expected in tensors.items():
        if name.startswith("blk."):
            _, index, part, _ = name.split(".")
            target = f"model.layers.{index}.{names[part]}.weight"
            if part in ("attn_q", "attn_k"):  # the format interleaves the two halves of a head that RoPE turns together
                expected = expected.view(-1, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
        else:
            target = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
        seen.add(target)
        assert torch.equal(state[target], expected.view_as(state[target])), target
    assert seen == set(state)


def test_linears_lie_on_a_four_bit_lattice(loaded):
    """Why no 4-bit result with groups of 32 or less is reported on this model: it would be lossless."""
    for name, linear in linears(loaded[0]).items():
        blocks = linear.weight.detach()[:8].reshape(-1, 32).sort(-1).values
        distinct = 1 + (blocks.diff() != 0).sum(-1)
        assert distinct.max() <= 16, name


def test_it_is_a_plain_dense_model(loaded, tmp_path):
    model, _ = load_model("smollm2-135m")
    assert describe(model).model_type == "llama"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    assert model.name_or_path == "smollm2-135m"
    assert {parameter.dtype for parameter in model.half().parameters()} == {torch.float16}
    model.save_pretrained(tmp_path)
    loaded[1].save_pretrained(tmp_path)
    again, _ = load_model(tmp_path, dtype=torch.float16)
    assert weights_sha256(again) == weights_sha256(model)
    assert weights_sha256(model.float()) != WEIGHTS_SHA256  # half precision lost something


def test_tokenizer_round_trip(loaded):
    _, tokenizer = loaded
    unusual = "  two  spaces,\ttab \u2014 caf\u00e9 \u65e5\u672c \U0001f389\n\n\n"
    for text in (load_corpus("sotu", split="evaluation"), unusual):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("")["input_ids"] == []  # it adds nothing of its own


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("calibration", "20933cba7e0035e06d6f4aabbaad245131c086a5301041b2bd66d2ea09c8ba9f"),
        ("evaluation", "8279f23d9b06a514626dae290d9631ce786f1f3090b6bc5763483305652c505e"),
    ],
)
def test_corpus_is_always_the_same_text(split, digest):
    assert hashlib.sha256(load_corpus("sotu", split=split).encode()).hexdigest() == digest


def test_perplexity_on_the_evaluation_text(loaded):
    model, tokenizer = loaded
    windows = token_windows(tokenizer, load_corpus("sotu", split="evaluation"), length=512, count=8)
    result = perplexity(model, windows)
    assert result.tokens == 4096
    assert 21.5 < result.ppl < 22.5  # 8 windows say this to +- 0.1 nats ...
    assert result.nll == pytest.approx(3.0864, abs=2e-3)  # ... but the same 8 say the same everywhere
    assert 0.02 < result.stderr < 0.1
