"""Checkpoints: bit-exact round trips, whole or not at all, every foreign or damaged folder refused in one sentence."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from lqedu.atomic import atomic_directory, atomic_file
from lqedu.checkpoint import folder_bytes, load, save
from lqedu.errors import CheckpointError, UsageError
from lqedu.methods import GPTQ, RTN, QuIP
from lqedu.methods.pipeline import quantize
from lqedu.runtime import quantize_kv, quantized_linears
from tests.models_tiny import ARCHITECTURES, tiny_model, tiny_windows


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")))


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save(quantize(tiny_model(), RTN(group_size=32)), tmp_path / "model", tokenizer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_exact(architecture: str, tied: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, windows = tiny_model(architecture, tied=tied), tiny_windows()
    quantized = quantize(model, GPTQ(bits=3, group_size=32, symmetric=tied), windows)
    back, words = load(save(quantized, tmp_path / "out", tokenizer))
    assert set(back.state_dict()) == set(quantized.state_dict())
    for name, tensor in quantized.state_dict().items():
        assert tensor.dtype == back.state_dict()[name].dtype
        assert torch.equal(tensor, back.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(back(windows).logits, quantized(windows).logits)
    assert back.lqedu_reports == quantized.lqedu_reports
    assert back.lqedu_method == quantized.lqedu_method
    assert words("a").input_ids == tokenizer("a").input_ids
    if tied:
        assert back.get_output_embeddings().weight is back.get_input_embeddings().weight


def test_constants_of_keys_and_values_are_kept(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    windows = tiny_windows()
    quantized = quantize_kv(quantize(tiny_model(), RTN(group_size=32)), "fp8-static", calibration=windows)
    folder = save(quantized, tmp_path / "out", tokenizer)
    with torch.no_grad():
        assert torch.equal(load(folder)[0](windows).logits, quantized(windows).logits)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.lqedu_value_scale"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lqedu_value_scale is \[nan\], no finite scale above 0"):
        load(folder)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_quantized_cache_is_kept_with_the_mean_keys(
    architecture: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    windows = tiny_windows()
    quantized = quantize(tiny_model(architecture), RTN(group_size=32))
    quantized = quantize_kv(quantized, 4, hadamard=True, centre=tiny_windows(3, 11))
    back, _ = load(save(quantized, tmp_path / "out", tokenizer))
    assert back.lqedu_attention == quantized.lqedu_attention and back.lqedu_attention.centred
    with torch.no_grad():
        assert torch.equal(back(windows).logits, quantized(windows).logits)


def test_saving_twice_gives_identical_bytes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folders = [save(quantize(tiny_model(), RTN(group_size=32)), tmp_path / name, tokenizer) for name in "ab"]
    files = sorted(path.name for path in folders[0].iterdir())
    assert files == sorted(path.name for path in folders[1].iterdir())
    for name in files:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_shards_hold_the_same_tensors(saved: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    quantized = quantize(tiny_model(), RTN(group_size=32))
    sharded = save(quantized, tmp_path / "sharded", tokenizer, max_shard_size="20KB")
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2 and not (sharded / "model.safetensors").exists()
    model, want = load(sharded)[0], load(saved)[0].state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    parts = [{k: v for k, v in folder_bytes(folder).items() if k != "files"} for folder in (saved, sharded)]
    assert parts[0] == parts[1]
    with pytest.raises(UsageError, match="max_shard_size is bytes"):
        save(quantized, tmp_path / "wrong", tokenizer, max_shard_size="many")
    assert not (tmp_path / "wrong").exists()


def test_bytes_by_part_equal_the_formula(saved: Path) -> None:
    model, _ = load(saved)
    layers = quantized_linears(model).values()
    parts = folder_bytes(saved)
    assert parts["codes"] + parts["scales"] + parts["zeros"] == sum(layer.nbytes for layer in layers)
    assert parts["linears_fp16"] == sum(2 * layer.in_features * layer.out_features for layer in layers)
    total = sum(t.nbytes for t in load_file(saved / "model.safetensors").values())
    assert parts["codes"] + parts["scales"] + parts["zeros"] + parts["other_tensors"] == total
    assert parts["transforms"] == 0  # RTN stores none


def test_no_pickle_in_the_folder(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} <= {".json", ".safetensors", ".md"}


def _edit_record(folder: Path, **changes: object) -> None:
    path = folder / "lqedu.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rewrite_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


SCALE = "model.layers.0.mlp.up_proj.scale"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "lqedu.json").unlink(), "no lqedu.json"),
        (lambda f: (f / "lqedu.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "lqedu.json").write_text('{"format": "other"}'), "not written by lqedu"),
        (lambda f: _edit_record(f, format_version=99), "format version 99"),
        (lambda f: _edit_record(f, layers=None), "lacks layers"),
        (lambda f: _edit_record(f, layers={"model.nothing": {}}), "layer 'model.nothing'"),
        (lambda f: (f / "model.safetensors").unlink(), "missing or damaged"),
        (_truncate, "missing or damaged"),
        (lambda f: _rewrite_tensors(f, lambda t: t.pop(SCALE)), f"missing {SCALE}"),
        (lambda f: _rewrite_tensors(f, lambda t: t.update(extra=torch.ones(1))), "unexpected extra"),
        (lambda f: _rewrite_tensors(f, lambda t: t.update({SCALE: torch.ones(1, 1)})), r"shape \[1, 1\], expected"),
        (lambda f: (f / "config.json").unlink(), "config or tokenizer"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nonsense"}'), "config or tokenizer"),
    ],
)
def test_damage_is_refused_in_one_sentence(saved: Path, damage, match: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=match):
        load(saved)


@pytest.mark.parametrize("side", ["u", "v"])
def test_an_order_that_is_no_permutation_is_refused(side: str, tmp_path: Path, tokenizer) -> None:
    model, windows, name = tiny_model(blocks=1), tiny_windows(), "model.layers.0.mlp.down_proj"
    folder = save(quantize(model, QuIP(), windows, resume_dir=tmp_path / "run"), tmp_path / "model", tokenizer)

    def repeat(order: torch.Tensor) -> None:
        order[0] = order[1]

    load(folder)
    _rewrite_tensors(folder, lambda tensors: repeat(tensors[f"{name}.{side}_order"]))
    with pytest.raises(CheckpointError, match=rf"{name}: {side}_order is not a permutation"):
        load(folder)

    block = tmp_path / "run" / "block-0000.safetensors"
    tensors = load_file(block)
    repeat(tensors[f"{name}.{side}_order"])
    save_file(tensors, block)
    with pytest.raises(CheckpointError, match=rf"block-0000.*{side}_order is not a permutation.*remove this file"):
        quantize(model, QuIP(), windows, resume_dir=tmp_path / "run")


def test_save_refuses_what_it_cannot_do(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="no quantized layers"):
        save(tiny_model(), tmp_path / "x", tokenizer)
    quantized = quantize(tiny_model(), RTN(group_size=32))
    with pytest.raises(UsageError, match="tokenizer"):
        save(quantized, tmp_path / "x")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        save(quantized, tmp_path / "there", tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save(quantized, tmp_path / "file" / "below", tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    with pytest.raises(CheckpointError, match="No space left"), atomic_file(tmp_path / "a") as temporary:
        temporary.symlink_to(full)
        temporary.write_bytes(b"x" * 10_000)
    with pytest.raises(CheckpointError, match="No space left"), atomic_directory(tmp_path / "b") as temporary:
        (temporary / "part").symlink_to(full)
        (temporary / "part").write_bytes(b"x" * 10_000)
    assert os.listdir(tmp_path) == []


def test_atomic_names_appear_only_at_the_end(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "b") as temporary:
        (temporary / "part").write_text("1")
        assert not (tmp_path / "b").exists()
    assert (tmp_path / "b" / "part").read_text() == "1"
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "c") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_moving_a_model_keeps_the_stored_bits() -> None:
    quantized = quantize(tiny_model("qwen2"), RTN(group_size=32))
    layer: nn.Module = quantized_linears(quantized)["model.layers.0.self_attn.q_proj"]
    scale, codes = layer.scale.clone(), layer.codes.clone()
    quantized.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.scale, scale)
    assert torch.equal(layer.codes, codes)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
