"""Opening folders of other tools: what they hold, how old tools wrote it, and what can be wrong with them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from lqedu.checkpoint import export, import_model
from lqedu.errors import CheckpointError, LqeduError, UnsupportedModelError, UsageError
from lqedu.formats.kv import KVStaticFloat8
from lqedu.methods import FP8, RTN
from lqedu.methods.pipeline import quantize
from lqedu.runtime import quantized_linears
from lqedu.runtime.attention import AttentionPath
from lqedu.runtime.permuted import PermutedLinear
from tests.checkpoint.words import tiny_tokenizer
from tests.models_tiny import tiny_model, tiny_windows

UP = "model.layers.0.mlp.up_proj"


def folder_of(path: Path, name: str, **options) -> Path:
    method = {"group_size": 32} | options
    return export(quantize(tiny_model(), RTN(**method)), path, name, tiny_tokenizer())


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "gptq", "gptq")


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return import_model(folder)[0](tiny_windows()).logits


# --- as other tools and older ones write it ---------------------------------------------------------------------------


def test_act_order(gptq: Path) -> None:
    """The same function with its inputs listed in another order: groups are no runs any more."""
    want = logits(gptq)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def shuffle(tensors: dict) -> None:
        """Feature i of the stream becomes feature order[i]: embeddings, norms and outputs follow."""
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = tensors[key][:, order].contiguous()
        for key in [key for key in tensors if key.endswith("norm.weight")]:
            tensors[key] = tensors[key][order].contiguous()
        for key in [key for key in tensors if key.endswith(("_proj.qweight",))]:
            layer = key.removesuffix(".qweight")
            bits = torch.arange(0, 32, 4)
            codes = (tensors[key][:, None] >> bits[:, None] & 15).flatten(0, 1)  # [in, out]
            if layer.endswith(("o_proj", "down_proj")):  # their outputs are features of the stream
                zeros = (tensors[layer + ".qzeros"][..., None] >> bits & 15).flatten(1)[:, order]
                tensors[layer + ".qzeros"] = (zeros.view(len(zeros), -1, 8) << bits).sum(-1).to(torch.int32)
                tensors[layer + ".scales"] = tensors[layer + ".scales"][:, order].contiguous()
                codes = codes[:, order]
            else:  # their inputs are
                codes = codes[order]
                tensors[layer + ".g_idx"] = tensors[layer + ".g_idx"][order].contiguous()
            tensors[key] = (codes.view(-1, 8, codes.shape[1]) << bits[:, None]).sum(1).to(torch.int32)

    edit_tensors(gptq, shuffle)
    edit_config(gptq, lambda config: config["quantization_config"].update(desc_act=True))
    model, tokenizer = import_model(gptq)
    assert isinstance(model.get_submodule(UP), PermutedLinear)
    with torch.no_grad():
        assert torch.allclose(model(tiny_windows()).logits, want, atol=1e-4)
    again, _ = import_model(export(model, gptq.with_name("again"), "gptq", tokenizer))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    assert json.loads((gptq.with_name("again") / "config.json").read_text())["quantization_config"]["desc_act"] is True


def test_version_2(gptq: Path) -> None:
    want = logits(gptq)

    def plus_one(tensors: dict) -> None:
        for key in [key for key in tensors if key.endswith("qzeros")]:
            tensors[key] = (tensors[key].long() + 0x11111111).to(torch.int32)

    edit_tensors(gptq, plus_one)
    assert not torch.equal(logits(gptq), want)
    edit_config(gptq, lambda config: config["quantization_config"].update(checkpoint_format="gptq_v2"))
    assert torch.equal(logits(gptq), want)


def test_files_of_autogptq(gptq: Path) -> None:
    """Its config was a file of its own, it wrote zeros for biases that are not there and angles that models compute."""
    want = logits(gptq)
    said = json.loads((gptq / "config.json").read_text())["quantization_config"]
    edit_config(gptq, lambda config: config.pop("quantization_config"))
    keep = {key: said[key] for key in ("bits", "group_size", "desc_act", "sym")}
    (gptq / "quantize_config.json").write_text(json.dumps(keep))
    extra = {f"{UP}.bias": torch.zeros(96), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_tensors(gptq, lambda tensors: tensors.update(extra))
    assert torch.equal(logits(gptq), want)
    edit_tensors(gptq, lambda tensors: tensors.update({f"{UP}.bias": torch.ones(96)}))
    with pytest.raises(CheckpointError, match=r"up_proj \[96, 64\]: it has a bias, and its architecture has none"):
        import_model(gptq)


def test_names_of_llm_awq(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "awq", "awq")
    want = logits(folder)
    said = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    edit_config(folder, lambda config: config.update(quantization_config=said))
    assert torch.equal(logits(folder), want)


def test_qserve_without_a_config(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "qserve", "qserve", group_size=None, activation_bits=8)
    want = logits(folder)
    edit_config(folder, lambda config: config.pop("quantization_config"))
    assert torch.equal(logits(folder), want)


def fp8_blocks(folder: Path, **fields) -> Path:
    """A model as DeepSeek and Qwen3 store it, in blocks that are no multiple of a layer's sides."""
    export(quantize(tiny_model("qwen3"), FP8(granularity="channel", activation="none")), folder, "compressed-tensors",
           tiny_tokenizer())  # fmt: skip
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [48, 48]}
    edit_config(folder, lambda config: config.update(quantization_config=said | fields))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            rows, columns = tensors[name.removesuffix("_scale")].shape
            scale = torch.rand(-(-rows // 48), -(-columns // 48), generator=torch.Generator().manual_seed(0)) / 448
            tensors.pop(name)
            tensors[name + "_inv"] = scale

    edit_tensors(folder, change)
    return folder


def test_fp8_in_blocks(tmp_path: Path) -> None:
    folder = fp8_blocks(tmp_path / "fp8")
    model, _ = import_model(folder)
    tensors, layer = load_file(folder / "model.safetensors"), quantized_linears(model)[UP]
    scale = tensors[UP + ".weight_scale_inv"].repeat_interleave(48, 0)[:96].repeat_interleave(48, 1)[:, :64]
    w = tensors[UP + ".weight"].double() * scale.double()
    assert torch.equal(layer.quantized.dequantize(torch.float64), w)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    rounded = []
    for part in x.split(48, dim=1):  # each token has a scale for 48 features, the last for 16
        s = part.abs().amax(1, keepdim=True) / 448
        rounded.append((part / s).to(torch.float8_e4m3fn).double() * s.double())
    assert torch.allclose(layer(x).double(), torch.cat(rounded, 1) @ w.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"weight_block_size": None}, r"its weight_block_size is None; square blocks are read, such as \[128, 128\]"),
        ({"weight_block_size": [128, 64]}, "square blocks"),
        ({"activation_scheme": "static"}, "its activation_scheme is 'static', and only 'dynamic' is read"),
        ({"scale_fmt": "ue8m0"}, "its scale_fmt is 'ue8m0', and only 'float' is read"),
        ({"weight_block_size": [32, 32]}, r"weight_scale_inv has shape \[2, 2\], expected \[\d, 2\]"),
    ],
)
def test_fp8_that_is_not_read(fields, match: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=match):
        import_model(fp8_blocks(tmp_path / "fp8", **fields))


def test_a_quantized_head(gptq: Path) -> None:
    layer = quantize(tiny_model(), RTN(group_size=32))
    folder = export(layer, gptq.with_name("ct"), "compressed-tensors", tiny_tokenizer())
    head = quantized_linears(import_model(folder)[0])[UP]  # any packed layer tells how a head of its shape is stored
    tensors = load_file(folder / "model.safetensors")
    up = {key.removeprefix(UP): tensor for key, tensor in tensors.items() if key.startswith(UP)}
    tensors.pop("lm_head.weight")
    tensors |= {f"lm_head{key}": torch.cat([tensor, tensor[: len(tensor) // 3]]) for key, tensor in up.items()}
    tensors["lm_head.weight_shape"] = torch.tensor([128, 64])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, lambda config: config["quantization_config"].update(ignore=[]))
    model, _ = import_model(folder)
    w = head.quantized.dequantize()
    assert torch.equal(quantized_linears(model)["lm_head"].quantized.dequantize(), torch.cat([w, w[:32]]))


FP8_KV = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def with_cache_scheme(folder: Path, **fields) -> Path:
    """An FP8 model whose keys and values have constants, as other tools write them."""
    export(quantize(tiny_model(), FP8()), folder, "compressed-tensors", tiny_tokenizer())
    say(kv_cache_scheme=FP8_KV | fields)(folder)
    scales = {f"model.layers.{i}.self_attn.{name}_scale": torch.tensor(0.25 + i) for i in range(2) for name in "kv"}
    edit_tensors(folder, lambda tensors: tensors.update(scales))
    return folder


def test_a_cache_scheme_with_constants_is_read(tmp_path: Path) -> None:
    """Independent of the attention path: transformers' own attention, its keys and values rounded by torch's cast."""
    model, _ = import_model(with_cache_scheme(tmp_path / "fp8"))
    assert model.lqedu_notes == () and model.lqedu_attention == AttentionPath(
        key=KVStaticFloat8(), value=KVStaticFloat8()
    )
    plain = import_model(
        export(quantize(tiny_model(), FP8()), tmp_path / "kv16", "compressed-tensors", tiny_tokenizer())
    )[0]
    cache, windows = RoundedCache(), tiny_windows()
    with torch.no_grad():
        assert torch.allclose(model(windows).logits, plain(windows, past_key_values=cache).logits, rtol=1e-5, atol=1e-5)
        assert not torch.equal(model(windows).logits, plain(windows).logits)


class RoundedCache(DynamicCache):
    def update(self, key, value, index, *args, **kwargs):
        scale = 0.25 + index
        rounded = ((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale for x in (key, value))
        return super().update(*rounded, index, *args, **kwargs)


def test_other_cache_schemes_are_left_out_and_said_so(tmp_path: Path) -> None:
    for i, fields in enumerate(({"type": "int"}, {"strategy": "attn_head"}, {"dynamic": True}, {"symmetric": False})):
        model, _ = import_model(with_cache_scheme(tmp_path / str(i), **fields))
        assert "kv_cache_scheme" in model.lqedu_notes[0] and "quantize_kv" in model.lqedu_notes[0]
        assert not hasattr(model, "lqedu_attention")


def test_a_cache_scheme_needs_its_constants(tmp_path: Path) -> None:
    folder = with_cache_scheme(tmp_path / "fp8")
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.k_scale": torch.zeros(1)}))
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.self_attn\.k_scale is of shape \[1\], expected one number above 0"
    ):
        import_model(folder)
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_scale"))
    with pytest.raises(
        CheckpointError, match=r"asks for constants of keys and values, and model\.layers\.1\..*k_scale is missing"
    ):
        import_model(folder)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def say(**fields):
    return lambda folder: edit_config(folder, lambda config: config["quantization_config"].update(fields))


def put(**tensors):
    return lambda folder: edit_tensors(
        folder, lambda there: there.update({k.replace("__", "."): t for k, t in tensors.items()})
    )


def drop(name: str):
    return lambda folder: edit_tensors(folder, lambda there: there.pop(name))


def index(change):
    """Cut the weights in two files with an index, then change it."""

    def cut(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, files = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        weight_map = {name: files[i % 2] for i, name in enumerate(names)}
        for file in files:
            save_file(
                {name: tensors[name] for name in names if weight_map[name] == file}, folder / file, {"format": "pt"}
            )
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        change(folder, path, weight_map)

    return cut


def named(name: str):
    return index(
        lambda folder, path, names: path.write_text(json.dumps({"weight_map": names | {"lm_head.weight": name}}))
    )


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")


QWEIGHT = UP + ".qweight"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (truncate, "missing or damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "missing or damaged"),
        (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "gptq_model-4bit.safetensors"), "has to be called"),
        (to_pickle, r"as a pickle \(pytorch_model\.bin\), which could run code .* convert it to safetensors"),
        (index(lambda f, path, names: (f / "model-00002-of-00002.safetensors").unlink()), "missing or damaged"),
        (index(lambda f, path, names: path.write_text("{")), "not an index"),
        (index(lambda f, path, names: path.write_text('{"weight_map": {"a": 3}}')), "names no file"),
        (named("../x.safetensors"), r"names the file '\.\./x\.safetensors'"),
        (named("/etc/x.safetensors"), "no safetensors file of this folder"),
        (named("..\\x.safetensors"), "no safetensors file of this folder"),
        (named("sub/x.safetensors"), "no safetensors file of this folder"),
        (named("evil.bin"), "no safetensors file of this folder"),
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "cannot be read"),
        (lambda f: edit_config(f, lambda c: c.update(quantization_config=[])), r"quantization_config of .* is \[\]"),
        (lambda f: edit_config(f, lambda c: c.pop("quantization_config")), "says of no quantization"),
        (say(quant_method="bitsandbytes"), r"already quantized \(bitsandbytes\), and lqedu reads compressed-tensors, gptq"),
        (say(quant_method="lqedu"), r"was written by lqedu, and its lqedu\.json is missing"),
        (say(quant_method="awq"), "up_proj|q_proj.*does not: g_idx"),
        (say(dynamic={"-:.*down.*": {}}), r"a grid of its own for some layers \('dynamic'\)"),
        (say(rotation="hadamard"), r"a Hadamard transform that runs with every token \('rotation'\)"),
        (say(adapter={"name": "lora"}), r"low-rank terms beside the weights \('adapter'\)"),
        (say(bits=None), "'bits' of its quantization config is None"),
        (say(bits=8), r"\[64, 64\]: qweight has shape \[8, 64\], expected \[16, 64\]"),
        (say(group_size=48), "groups of 48 do not divide its 64 inputs"),
        (say(group_size=16), "qzeros has shape"),
        (say(sym=True), "calls its grid symmetric"),
        (lambda f: edit_config(f, lambda c: c.update(hidden_size=128)), "expected"),
        (lambda f: edit_config(f, lambda c: c.update(num_hidden_layers=3)), r"missing model\.layers\.2\.input_layernorm\.weight.*and 1 more"),
        (lambda f: edit_config(f, lambda c: c.update(num_hidden_layers=1)), r"unexpected model\.layers\.1"),
        (lambda f: edit_config(f, lambda c: c.update(vocab_size=100)), r"embed_tokens\.weight has shape \[128, 64\], expected \[100, 64\]"),
        (lambda f: edit_config(f, lambda c: c.update(model_type="nonsense")), "no config or tokenizer that transformers knows"),
        (lambda f: (f / "tokenizer.json").unlink(), "no config or tokenizer that transformers knows"),
        (drop(QWEIGHT), r"missing .*up_proj\.weight; unexpected .*up_proj\.g_idx"),
        (drop(UP + ".scales"), r"up_proj \[96, 64\]: it has no scales; it has g_idx, qweight, qzeros"),
        (put(**{QWEIGHT.replace(".", "__"): torch.zeros(8, 95, dtype=torch.int32)}), r"qweight has shape \[8, 95\], expected \[8, 96\]"),
        (put(extra=torch.ones(1)), "unexpected extra"),
        (put(lm_head__weight=torch.zeros(128, 64, dtype=torch.int8)), r"lm_head\.weight has dtype torch\.int8"),
        (put(lm_head__weight=torch.zeros(128, 64, dtype=torch.float8_e4m3fn)), r"lm_head\.weight has dtype torch\.float8_e4m3fn"),
    ],
)  # fmt: skip
def test_damage_is_refused_in_one_sentence(gptq: Path, damage, match: str) -> None:
    damage(gptq)
    with pytest.raises(LqeduError, match=match) as refusal:
        import_model(gptq)
    assert "\n" not in str(refusal.value)


def test_errors_by_kind(gptq: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        import_model(tmp_path / "nowhere")
    say(quant_method="hqq")(gptq)
    with pytest.raises(UnsupportedModelError):
        import_model(gptq)
    truncate(gptq)
    with pytest.raises(CheckpointError):
        import_model(gptq)


def test_the_linears_of_a_config_have_to_be_there(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "ct", "compressed-tensors")
    say(ignore=["re:.*"])(folder)
    with pytest.raises(CheckpointError, match="no linear layer of the model is quantized"):
        import_model(folder)
    say(ignore=["lm_head", UP])(folder)
    with pytest.raises(CheckpointError, match=r"missing .*up_proj\.weight; unexpected .*up_proj\.weight_packed"):
        import_model(folder)


def test_nothing_of_the_folder_runs(gptq: Path) -> None:
    (gptq / "evil.py").write_text("raise SystemExit('code of a folder ran')")
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit_config(gptq, lambda config: config.update(auto_map=code))
    assert import_model(gptq)[0] is not None
    edit_config(gptq, lambda config: config.update(model_type="evil"))
    with pytest.raises(UnsupportedModelError):
        import_model(gptq)
