"""Whole models to another tool's format and back: which method goes where, nothing changed, nothing half-written."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lqedu.checkpoint import export, exporting, import_model, load, save
from lqedu.checkpoint.exporting import LAYOUTS, TABLE
from lqedu.errors import CheckpointError, ExportError, UsageError
from lqedu.methods import FP8, GPTQ, RTN, QoQ, SmoothQuant, available
from lqedu.methods.pipeline import quantize
from lqedu.runtime import quantize_kv, quantized_linears
from tests.checkpoint.words import tiny_tokenizer
from tests.models_tiny import ARCHITECTURES, tiny_model, tiny_windows

FORMATS = ("compressed-tensors", "gptq", "awq", "qserve")
TOKENIZER = tiny_tokenizer()

#: Options of a method -> the formats that hold what comes out: the table of lqedu.checkpoint.exporting.
WHERE = [
    ("rtn", {"group_size": 32}, ("compressed-tensors", "gptq", "awq")),
    ("rtn", {"group_size": 32, "symmetric": True}, ("compressed-tensors", "gptq", "awq")),
    ("rtn", {"group_size": 32, "bits": 5}, ("compressed-tensors",)),
    ("rtn", {"group_size": 32, "bits": 3}, ("compressed-tensors", "gptq")),
    ("rtn", {"group_size": None, "bits": 8, "symmetric": True, "activation_bits": 8}, ("compressed-tensors",)),
    ("rtn", {"group_size": None, "activation_bits": 8}, ("compressed-tensors", "qserve")),
    ("rtn", {"group_size": None, "activation_bits": 4}, ()),
    ("rtn", {"group_size": 32, "kv_bits": 4}, ()),
    ("gptq", {"group_size": 32, "order": "activation"}, ("compressed-tensors", "gptq", "awq")),
    ("gptq", {"group_size": None, "bits": 2}, ("compressed-tensors", "gptq")),
    ("awq", {"group_size": 32}, ("compressed-tensors", "gptq", "awq")),
    ("hqq", {"group_size": 32}, ()),
    ("quip", {}, ()),
    ("smoothquant", {}, ("compressed-tensors",)),
    ("smoothquant", {"granularity": "tensor", "activation": "static"}, ("compressed-tensors",)),
    ("quarot", {}, ()),
    ("quarot", {"kv_bits": None, "activation_bits": None}, ()),
    ("spinquant", {"steps": 1}, ()),
    ("spinquant", {"steps": 1, "online": False, "kv_bits": None, "activation_bits": 8}, ("compressed-tensors",)),
    ("qqq", {"group_size": None}, ("compressed-tensors",)),
    ("qqq", {"group_size": 32}, ()),
    ("qoq", {"group_size": None}, ("qserve",)),
    ("qoq", {"group_size": None, "kv_bits": None}, ("compressed-tensors", "qserve")),
    ("qoq", {"group_size": 32}, ()),
    ("fp8", {}, ("compressed-tensors",)),
    ("fp8", {"granularity": "tensor", "activation": "static"}, ("compressed-tensors",)),
    ("fp8", {"granularity": "block", "activation": "none"}, ("compressed-tensors",)),
    ("fp8", {"keep": "down_proj"}, ("compressed-tensors",)),
    ("fp8", {"kv": "fp8"}, ()),
    ("fp8", {"format": "E5M2"}, ()),
]  # fmt: skip


def assert_same_model(got: nn.Module, want: nn.Module) -> None:
    layers, theirs = quantized_linears(want), quantized_linears(got)
    assert list(layers) == list(theirs)
    assert set(got.state_dict()) == set(want.state_dict())
    for name, tensor in want.state_dict().items():
        assert got.state_dict()[name].dtype == tensor.dtype and torch.equal(got.state_dict()[name], tensor), name
    windows = tiny_windows()
    with torch.no_grad():
        assert torch.equal(got(windows).logits, want(windows).logits)


@pytest.mark.parametrize(("method", "options", "able"), WHERE)
def test_what_goes_where(method, options, able, tmp_path: Path) -> None:
    quantized = quantize(tiny_model(blocks=1), available()[method](**options), tiny_windows(8, 16))
    for name in FORMATS:
        folder = tmp_path / name
        if name in able:
            back, _ = import_model(export(quantized, folder, name, TOKENIZER))
            assert_same_model(back, quantized)
            continue
        with pytest.raises(ExportError) as refusal:
            export(quantized, folder, name, TOKENIZER)
        assert not folder.exists()
        others = " or ".join(able) if able else None
        assert str(refusal.value).endswith(f"use {others}" if others else "keep it with lqedu.save"), refusal.value


def test_the_groups_of_qoq_go_to_qserve(tmp_path: Path) -> None:
    model = tiny_model()
    config = type(model.config)(
        **(model.config.to_dict() | {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32})
    )
    torch.manual_seed(0)
    model = type(model)(config).requires_grad_(False).eval()
    quantized = quantize(model, QoQ(search_tokens=32), tiny_windows())
    folder = export(quantized, tmp_path / "out", "qserve", TOKENIZER)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (said["group_size"], said["kv_bits"], said["zero"]) == (128, 4, "code")
    back, _ = import_model(folder)
    assert_same_model(back, quantized)
    assert back.lqedu_attention == quantized.lqedu_attention


def test_the_table_names_every_method() -> None:
    rows = [line.split()[0] for line in TABLE.splitlines()[1:]]
    assert sorted(rows) == sorted(available())
    head = TABLE.splitlines()[0]
    assert head.split() == ["method", *FORMATS] == ["method", *LAYOUTS]
    columns = [head.index(name) for name in FORMATS] + [200]
    for line in TABLE.splitlines()[1:]:
        method = line.split()[0]
        cells = [re.split(r" {3,}", line[a:b].strip() or "-")[0] for a, b in itertools.pairwise(columns)]
        able = {name for name, options, formats in WHERE if name == method for name in formats}
        if method == "rtn":
            assert able == set(FORMATS)
        assert {name for name, cell in zip(FORMATS, cells, strict=True) if cell != "-"} == able, method


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture(architecture, name, tied, tmp_path: Path) -> None:
    quantized = quantize(tiny_model(architecture, tied=tied), RTN(group_size=32, symmetric=tied))
    back, words = import_model(export(quantized, tmp_path / "out", name, TOKENIZER))
    assert_same_model(back, quantized)
    assert words("a").input_ids == TOKENIZER("a").input_ids
    if tied:
        assert back.get_output_embeddings().weight is back.get_input_embeddings().weight


def test_the_folder(tmp_path: Path) -> None:
    quantized = quantize(tiny_model(), GPTQ(group_size=32), tiny_windows())
    folder = export(quantized.half(), tmp_path / "out", "gptq", TOKENIZER)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float16" and config["quantization_config"]["quant_method"] == "gptq"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md"}
    assert "gptq" in (folder / "README.md").read_text()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" in file.keys()  # noqa: SIM118
    assert oct((folder / "model.safetensors").stat().st_mode & 0o777) == oct(0o644)


def test_shards_and_their_index(tmp_path: Path) -> None:
    quantized = quantize(tiny_model(), RTN(group_size=32))
    folder = export(quantized, tmp_path / "out", "awq", TOKENIZER, max_shard_size=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert not (folder / "model.safetensors").exists()
    assert_same_model(import_model(folder)[0], quantized)


def test_what_was_imported_can_be_saved_and_exported_again(tmp_path: Path) -> None:
    quantized = quantize(tiny_model(), RTN(group_size=32))
    first = export(quantized, tmp_path / "a", "gptq", TOKENIZER)
    back, words = import_model(first)
    again = export(back, tmp_path / "b", "awq", words)
    assert_same_model(import_model(again)[0], quantized)
    assert_same_model(load(save(back, tmp_path / "c"))[0], quantized)
    twice = export(back, tmp_path / "d", "gptq")
    assert (twice / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_exporting_twice_gives_identical_bytes(tmp_path: Path) -> None:
    quantized = quantize(tiny_model(), FP8())
    folders = [export(quantized, tmp_path / name, "compressed-tensors", TOKENIZER) for name in "ab"]
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    quantized = quantize(tiny_model(), SmoothQuant(), tiny_windows())
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    config = quantized.config.to_dict()
    export(quantized, tmp_path / "out", "compressed-tensors", TOKENIZER)
    assert quantized.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantized.state_dict().items())


def test_a_refusal_names_layer_reason_and_remedy(tmp_path: Path) -> None:
    quantized = quantize(tiny_model(), RTN(bits=3, group_size=32))
    message = r"model\.layers\.0\.self_attn\.q_proj: it has 3 bits, and awq has 4; use compressed-tensors or gptq$"
    with pytest.raises(ExportError, match=message):
        export(quantized, tmp_path / "out", "awq", TOKENIZER)
    with pytest.raises(
        ExportError, match="stored on a grid, and gptq says nothing of them; leave them as they come: kv_bits=None"
    ):
        export(quantize_kv(quantized, 4), tmp_path / "out", "gptq", TOKENIZER)
    with pytest.raises(ExportError, match="4 or 8 bits with float zero points"):
        export(quantize_kv(quantized, 4, hadamard=True), tmp_path / "out", "qserve", TOKENIZER)
    with pytest.raises(ExportError, match=r"each token of each head has a scale.*quantize_kv\(model, 'fp8-static'"):
        export(quantize_kv(quantized, "fp8"), tmp_path / "out", "compressed-tensors", TOKENIZER)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_keys_and_values_with_constants_go_to_compressed_tensors(architecture, tmp_path: Path) -> None:
    quantized = quantize(tiny_model(architecture), FP8())
    quantized = quantize_kv(quantized, "fp8-static", calibration=tiny_windows(3, 11))
    folder = export(quantized, tmp_path / "out", "compressed-tensors", TOKENIZER)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (said["num_bits"], said["type"], said["strategy"], said["dynamic"]) == (8, "float", "tensor", False)
    back, _ = import_model(folder)
    assert_same_model(back, quantized)
    with pytest.raises(ExportError, match=r"gptq says nothing of them.*use compressed-tensors$"):
        export(quantize_kv(quantize(tiny_model(), RTN(group_size=32)), "fp8-static", calibration=tiny_windows(3, 11)),
               tmp_path / "no", "gptq", TOKENIZER)  # fmt: skip


def test_export_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    quantized = quantize(tiny_model(), RTN(group_size=32))
    with pytest.raises(UsageError, match="no format 'gguf'; there are compressed-tensors, gptq, awq, qserve"):
        export(quantized, tmp_path / "x", "gguf", TOKENIZER)
    with pytest.raises(UsageError, match="no quantized layers"):
        export(tiny_model(), tmp_path / "x", "gptq", TOKENIZER)
    with pytest.raises(UsageError, match="no tokenizer"):
        export(quantized, tmp_path / "x", "gptq")
    with pytest.raises(UsageError, match="max_shard_size"):
        export(quantized, tmp_path / "x", "gptq", TOKENIZER, max_shard_size="much")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export(quantized, tmp_path / "there", "gptq", TOKENIZER)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        export(quantized, tmp_path / "file" / "below", "gptq", TOKENIZER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = quantize(tiny_model(), RTN(group_size=32))
    real = exporting.write_weights

    def full(tensors, folder, size):
        real(tensors, folder, size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_weights", full)
    with pytest.raises(CheckpointError, match="No space left on device; free space or choose another folder"):
        export(quantized, tmp_path / "out", "gptq", TOKENIZER)
    assert list(tmp_path.iterdir()) == []
