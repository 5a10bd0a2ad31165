import json
import shutil

import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import lqedu
from lqedu.errors import CheckpointError, MissingDependencyError, UnsupportedModelError, UsageError
from lqedu.models import load_model, weights_sha256
from lqedu.models.load import local_folder
from tests.models.tiny import TYPES, VOCABULARY, tiny_model, tiny_windows


def save_tiny(folder, model_type="llama", **changes):
    model = tiny_model(model_type, **changes)
    model.save_pretrained(folder)
    vocabulary = {f"<{i}>": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")))
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path):
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("model_type", TYPES)
def test_a_folder_gives_the_model_that_was_saved(tmp_path, model_type):
    saved = save_tiny(tmp_path, model_type)
    model, tokenizer = load_model(tmp_path)
    assert weights_sha256(model) == weights_sha256(saved)
    assert not model.training
    assert tokenizer.vocab_size == VOCABULARY
    assert model.lqedu_tokenizer is tokenizer
    with torch.no_grad():
        assert torch.equal(model(tiny_windows()).logits, saved(tiny_windows()).logits)


def test_tied_embeddings_stay_tied_and_the_model_is_plain(folder, tmp_path):
    model, _ = load_model(str(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.half().float().save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtype(folder, dtype):
    model, _ = load_model(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float16", None])
def test_dtypes_that_are_none(folder, dtype):
    with pytest.raises(UsageError, match=r"dtype must be one of torch\.float32"):
        load_model(folder, dtype=dtype)


def test_devices_that_are_not_there(folder):
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        load_model(folder, device="gpu")
    with pytest.raises(MissingDependencyError, match="device 'cuda:99' is not there"):
        load_model(folder, device="cuda:99")


@pytest.mark.parametrize("name", ["smollm", "no such model", "/no/such/folder", "a/b/c", ""])
def test_names_that_mean_nothing(name):
    with pytest.raises(UsageError, match="'smollm2-135m', a Hub id such as 'org/name', or a folder"):
        load_model(name)


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such", "../no-such", "~/no-such"])
def test_a_path_without_a_folder_is_no_name_on_the_hub(name):
    with pytest.raises(UsageError, match=f"no such folder '{name}'"):
        load_model(name)
    with pytest.raises(UsageError, match=f"no such folder '{name}'"):
        local_folder(name)


def test_a_file_is_no_model(folder):
    with pytest.raises(UsageError, match="no model"):
        load_model(folder / "model.safetensors")


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_an_incomplete_folder(folder, part):
    (folder / part).unlink()
    with pytest.raises(UsageError, match=part.removeprefix("model.")):
        load_model(folder)


def test_a_folder_without_a_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UsageError, match="has no tokenizer"):
        load_model(folder)


def test_pickled_weights_are_not_read(folder):
    model, _ = load_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors"):
        load_model(folder)


def test_code_of_a_repository_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": code}))
    (folder / "evil.py").write_text("raise SystemExit('code from a repository ran')")
    with pytest.raises(UnsupportedModelError, match="not a causal language model that transformers knows by itself"):
        load_model(folder)


@pytest.mark.parametrize("model_type", ["no-such-type", "vit"])
def test_types_that_are_no_language_models(folder, model_type):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(UnsupportedModelError, match="not a causal language model"):
        load_model(folder)


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json"):
        load_model(folder)


def test_what_another_tool_quantized_in_a_way_that_is_not_read(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"already quantized \(bitsandbytes\).*load the dense model"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_another_tool_quantized(tmp_path, folder, dtype):
    quantized = lqedu.quantize(load_model(folder)[0], lqedu.methods.RTN(group_size=16))
    out = lqedu.checkpoint.export(quantized, tmp_path / "gptq", "gptq")
    model, tokenizer = load_model(out, dtype=dtype)
    assert model.lqedu_tokenizer is tokenizer and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    layer, was = (m.get_submodule("model.layers.0.mlp.up_proj") for m in (model, quantized))
    assert layer.scale.dtype == torch.float16 and torch.equal(layer.codes, was.codes)


def test_what_another_tool_quantized_on_the_hub(tmp_path, folder, monkeypatch):
    quantized = lqedu.quantize(load_model(folder)[0], lqedu.methods.RTN(group_size=16))
    out = lqedu.checkpoint.export(quantized, tmp_path / "awq", "awq")
    real = AutoConfig.from_pretrained
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda name, **more: real(out if name == "org/awq" else name, **more)
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **more: str(out))
    model, _ = load_model("org/awq")
    assert torch.equal(
        model.get_submodule("model.layers.0.mlp.up_proj").codes,
        quantized.get_submodule("model.layers.0.mlp.up_proj").codes,
    )


def test_an_index_that_leads_out_of_the_folder(folder):
    """transformers would read the file."""
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names the file '\.\./outside\.safetensors'"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_are_no_dense_weights(folder, dtype):
    """transformers would cast them, and their scales would be lost."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight in .*8.*, which is no dense weight"):
        load_model(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"weights of .* are damaged"):
        load_model(folder)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 4}, {"intermediate_size": 50}])
def test_weights_that_do_not_fill_the_model(folder, change):
    """transformers would fill the rest with random numbers."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match="lack or misshape"):
        load_model(folder)


def answer(status):
    import httpx2 as httpx

    request = httpx.Request("GET", "https://example.invalid")
    return httpx.Response(status, request=request)


@pytest.mark.parametrize(
    ("cause", "error", "words"),
    [
        (None, MissingDependencyError, "cannot reach the Hub for 'some/model'"),
        ("RepositoryNotFoundError", UsageError, "no model 'some/model' on the Hub that this account may read"),
        ("GatedRepoError", UsageError, "log in"),
        ("EntryNotFoundError", UsageError, r"has no config\.json"),
    ],
)
def test_what_the_hub_answers(monkeypatch, cause, error, words):
    def from_pretrained(*args, **kwargs):
        if cause is None:
            raise OSError("We couldn't connect")
        kind = getattr(hub, cause)
        try:
            raise kind.__new__(kind)
        except kind as raised:
            raise OSError("some/model: see the cause") from raised

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(error, match=words):
        load_model("some/model")


def test_a_folder_of_ours_goes_to_the_checkpoint_reader(folder, monkeypatch):
    (folder / "lqedu.json").write_text("{}")
    seen = []

    def load(path):
        seen.append(path)
        model = tiny_model("llama")
        model.register_buffer("scale", torch.ones(2, dtype=torch.float16))
        return model.train(), "tokenizer"

    monkeypatch.setattr("lqedu.checkpoint.load", load)
    model, tokenizer = load_model(folder, dtype=torch.bfloat16)
    assert (seen, tokenizer) == ([str(folder)], "tokenizer")
    assert model.scale.dtype == torch.float16  # part of the stored format
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_progress_bars_are_as_before(folder, capfd):
    from transformers.utils import logging

    for enable in (logging.disable_progress_bar, logging.enable_progress_bar):
        enable()
        before = logging.is_progress_bar_enabled()
        load_model(folder)
        assert logging.is_progress_bar_enabled() is before
    assert capfd.readouterr() == ("", "")


def test_weights_sha256_sees_names_dtypes_shapes_and_bytes(tmp_path):
    model = tiny_model("llama")
    digest = weights_sha256(model)
    assert digest == weights_sha256(tiny_model("llama"))
    assert len(digest) == 64
    others = [tiny_model("llama", seed=1), tiny_model("mistral"), tiny_model("llama").half(), tiny_model("llama")]
    weight = others[-1].model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.reshape(weight.shape[::-1])
    others.append(tiny_model("llama"))
    others[-1].model.layers[0].self_attn.k_proj.weight.data[-1, -1] += 1e-7
    assert len({digest, *map(weights_sha256, others)}) == 1 + len(others)
    assert weights_sha256(model) == digest


def test_loading_twice_gives_independent_models(folder):
    a, _ = load_model(folder)
    b, _ = load_model(folder)
    a.lm_head.weight.data.zero_()
    assert b.lm_head.weight.abs().sum() > 0
    shutil.rmtree(folder)  # and neither needs its folder any more
    b(tiny_windows())
