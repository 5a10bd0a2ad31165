"""AutoModelForCausalLM on folders of ours: the same bits as lqedu.load_model, and every refusal before a tensor is read."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.quantizers import auto

import lqedu.integrations.transformers as integration
from lqedu.checkpoint import save
from lqedu.errors import CheckpointError, UsageError
from lqedu.methods import FP8, GPTQ, QQQ, RTN, QoQ, QuaRot, QuIP, SmoothQuant
from lqedu.methods.pipeline import quantize
from lqedu.methods.streaming import quantize_folder
from lqedu.models import load_model
from lqedu.runtime import PackedCache, quantize_kv, to_kernels
from lqedu.runtime.attention import NAME
from tests.models_tiny import ARCHITECTURES, tiny_model, tiny_windows

METHODS = {
    "rtn": RTN(group_size=32),
    "three bits": GPTQ(bits=3, group_size=32),
    "quip": QuIP(),
    "smoothquant": SmoothQuant(),
    "static inputs": SmoothQuant(activation="static"),
    "quarot": QuaRot(kv_bits=4),
    "qqq": QQQ(group_size=32),
    "qoq": QoQ(group_size=32),
    "fp8": FP8(),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")))


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save(quantize(tiny_model(), RTN(group_size=32)), tmp_path / "model", tokenizer)


def _equal(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    with torch.no_grad():
        assert torch.equal(a(tiny_windows()).logits, b(tiny_windows()).logits)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_that_of_load_model(method: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save(quantize(tiny_model(), METHODS[method], tiny_windows()), tmp_path / "model", tokenizer)
    model, (expected, _) = AutoModelForCausalLM.from_pretrained(folder), load_model(folder)
    _equal(model, expected)
    assert model.lqedu_method == expected.lqedu_method and model.lqedu_reports == expected.lqedu_reports
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dtype_is_of_parameters_and_not_of_scales(
    architecture: str, dtype: torch.dtype, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tied = architecture == "opt"
    model = quantize_kv(
        quantize(tiny_model(architecture, tied=tied), RTN(group_size=32)), 4, hadamard=True, centre=tiny_windows(3, 11)
    )
    folder = save(model, tmp_path / "model", tokenizer)
    model, (expected, _) = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), load_model(folder, dtype=dtype)
    assert model.dtype == dtype and torch.get_default_dtype() == torch.float32
    _equal(model, expected)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_generate_with_and_without_packed_keys(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = quantize(tiny_model(), QuaRot(kv_bits=4), tiny_windows())
    folder = save(model, tmp_path / "model", tokenizer)
    model, (expected, _) = AutoModelForCausalLM.from_pretrained(folder), load_model(folder)
    assert model.config._attn_implementation == NAME
    prompt = tiny_windows(2, 5)
    ask = dict(
        attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    written = expected.generate(prompt, **ask)
    assert written.shape == (2, 11)
    assert torch.equal(model.generate(prompt, **ask), written)
    assert torch.equal(model.generate(prompt, past_key_values=PackedCache(model), **ask), written)


def test_it_goes_through_a_pipeline(saved: Path) -> None:
    said = pipeline("text-generation", model=str(saved), max_new_tokens=2, pad_token_id=0)("a a")
    assert said[0]["generated_text"].startswith("a a")


def test_saved_again_it_is_the_same_folder(saved: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    again = save(AutoModelForCausalLM.from_pretrained(saved), tmp_path / "again", tokenizer)
    for name in ("model.safetensors", "lqedu.json", "README.md", "generation_config.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name
    _equal(load_model(again)[0], load_model(saved)[0])
    assert not hasattr(load_model(again)[0].config, "quantization_config")


def test_the_model_card_tells_how_to_load_it(saved: Path) -> None:
    code = (saved / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(saved)), names)
    _equal(names["model"], load_model(saved)[0])
    assert code.count("import lqedu") == 2


def test_shards_that_were_written_one_block_at_a_time(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_model().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    folder = quantize_folder(tmp_path / "dense", RTN(group_size=32), None, tmp_path / "out")
    assert (folder / "model.safetensors.index.json").is_file()
    _equal(AutoModelForCausalLM.from_pretrained(folder), load_model(folder)[0])


def test_save_pretrained_is_refused_and_writes_nothing(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"call lqedu\.save"):
        AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_mark_is_all_that_config_gets(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    assert config.quantization_config == {"quant_method": "lqedu", "format_version": 1}
    dense = tiny_model()
    quantized = quantize(dense, RTN(group_size=32))
    assert not hasattr(dense.config, "quantization_config") and not hasattr(quantized.config, "quantization_config")


def test_registering_again_does_nothing() -> None:
    integration.register()
    assert auto.AUTO_QUANTIZER_MAPPING["lqedu"] is integration.LqeduQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lqedu"] is integration.LqeduConfig


def _tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SCALE = "model.layers.0.mlp.up_proj.scale"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "lqedu.json").unlink(), "no lqedu.json"),
        (lambda f: (f / "lqedu.json").write_text("{"), "cannot be read"),
        (lambda f: _config(f, quantization_config={"quant_method": "lqedu", "format_version": 9}), "format version 9"),
        (lambda f: _tensors(f, lambda t: t.pop(SCALE)), f"missing {SCALE}"),
        (lambda f: _tensors(f, lambda t: t.update(more=torch.ones(1))), "unexpected more"),
        (lambda f: _tensors(f, lambda t: t.update({SCALE: torch.ones(1, 1)})), r"shape \[1, 1\], expected"),
        (lambda f: _tensors(f, lambda t: t.update({SCALE: t[SCALE].bfloat16()})), "dtype torch.bfloat16, expected"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "damaged"),
        (lambda f: _config(f, num_hidden_layers=3), "missing model.layers.2"),
    ],
)
def test_damage_is_refused_where_transformers_would_fill_in(saved: Path, damage, match: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=match):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_shard_outside_the_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = list(load_file(tmp_path / "elsewhere.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((CheckpointError, OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_pickle_is_never_read(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises((CheckpointError, OSError)):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"model": "cpu", "lm_head": 0}])
def test_offloading_is_refused(saved: Path, device_map: dict) -> None:
    with pytest.raises(UsageError, match="not offloaded"):
        AutoModelForCausalLM.from_pretrained(saved, device_map=device_map)


def test_a_device_map_of_one_device_is_fine(saved: Path) -> None:
    _equal(AutoModelForCausalLM.from_pretrained(saved, device_map="cpu"), load_model(saved)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_it_is_the_same_model(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, device_map="cuda", dtype=torch.float16)
    expected, _ = load_model(saved, device="cuda", dtype=torch.float16)
    windows = tiny_windows().cuda()
    with torch.no_grad():
        assert torch.equal(model(windows).logits, expected(windows).logits)
        fast = to_kernels(model)
        scale = expected(windows).logits.abs().max()
        assert (fast(windows).logits - expected(windows).logits).abs().max() < 2e-2 * scale


def test_an_attention_that_would_undo_the_cache_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save(quantize_kv(quantize(tiny_model(), RTN(group_size=32)), 4), tmp_path / "model", tokenizer)
    with pytest.raises(UsageError, match="attn_implementation='eager' would undo"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def test_quantizing_while_loading_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match=r"lqedu\.quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=integration.LqeduConfig())


def test_the_record_of_a_model_on_the_hub_is_fetched_beside_its_weights(
    saved: Path, tmp_path: Path, monkeypatch
) -> None:
    weights = tmp_path / "snapshot" / "model.safetensors"
    weights.parent.mkdir()
    asked = []

    def fetch(name: str, file: str, **kwargs: object) -> str:
        asked.append((name, file, kwargs["_commit_hash"]))
        return str(saved / file)

    monkeypatch.setattr(integration, "cached_file", fetch)
    model = tiny_model()
    model.config.name_or_path, model.config._commit_hash = "org/name", "abc"
    assert integration._record_of(model, weights) == saved
    assert asked == [("org/name", "lqedu.json", "abc")]
