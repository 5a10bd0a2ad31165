"""Streaming: the bits of a run in memory, one block in memory, nothing half-written, whatever is wrong with the files."""

import errno
import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import lqedu
from lqedu.checkpoint import folder_bytes
from lqedu.checkpoint import unfinished as unfinished_module
from lqedu.errors import CalibrationError, CheckpointError, GridError, LqeduError, UnsupportedModelError, UsageError
from lqedu.methods import AWQ, FP8, GPTQ, HQQ, QQQ, RTN, Method, QoQ, QuaRot, QuIP, SmoothQuant, SpinQuant, available
from lqedu.methods import pipeline as pipeline_module
from lqedu.methods.streaming import predicted_bytes
from lqedu.models import weights_sha256
from lqedu.models.shards import INDEX, Shards
from lqedu.models.streamed import StreamedModel
from tests.models_tiny import tiny_model, tiny_windows

METHODS = {
    method.name: method
    for method in (
        RTN(group_size=32, activation_bits=8, kv_bits=4), GPTQ(bits=3, group_size=32), AWQ(group_size=32, alphas=4),
        HQQ(group_size=32), QuIP(bits=4), SmoothQuant(activation="static", folds="all"), QuaRot(rounding="nearest"),
        QQQ(group_size=32, thresholds=4), QoQ(group_size=32, reorder="all", smooth="outputs", clip=False),
        FP8(activation="static", kv="fp8", keep="down_proj"),
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Models in shards of 60 kB, one of them in a single file."""
    folder = tmp_path_factory.mktemp("sources")
    models = {
        "llama": tiny_model(tied=True), "qwen3": tiny_model("qwen3"), "opt": tiny_model("opt", tied=True),
        "single": tiny_model("qwen2"), "deep": tiny_model(blocks=10), "three": tiny_model(blocks=3),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="5GB" if name == "single" else "60KB")
        tokenizer.save_pretrained(folder / name)
    assert (folder / "llama" / INDEX).is_file() and not (folder / "single" / INDEX).is_file()
    return {name: folder / name for name in models}


def assert_same_folder(resident: Path, streamed: Path) -> None:
    """Tensors, and every other file to the byte."""
    want, got = Shards(resident).read_all(), Shards(streamed).read_all()
    assert set(want) == set(got)
    for name, tensor in want.items():
        assert tensor.dtype == got[name].dtype and torch.equal(tensor, got[name]), name
    others = {path.name for path in resident.iterdir() if not path.name.startswith("model")}
    assert others == {path.name for path in streamed.iterdir() if not path.name.startswith("model")}
    for name in others:
        assert (resident / name).read_bytes() == (streamed / name).read_bytes(), name


def test_every_method_is_tried_or_refused() -> None:
    assert set(METHODS) | {"spinquant"} == set(available())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("source", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16)])
def test_streamed_and_resident_runs_write_the_same(
    name: str, source: str, dtype: torch.dtype, sources: dict[str, Path], tmp_path: Path
) -> None:
    method, windows = METHODS[name], tiny_windows()
    model, _ = lqedu.load_model(sources[source], dtype=dtype)
    resident = lqedu.save(lqedu.quantize(model, method, windows), tmp_path / "resident")
    streamed = lqedu.quantize_folder(sources[source], method, windows, tmp_path / "streamed", dtype=dtype)
    assert_same_folder(resident, streamed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resident", "streamed"]
    parts = folder_bytes(streamed)
    assert {k: v for k, v in parts.items() if k != "files"} == {
        k: v for k, v in folder_bytes(resident).items() if k != "files"
    }
    stored = parts["other_tensors"] + parts["codes"] + parts["scales"] + parts["zeros"]
    assert predicted_bytes(StreamedModel(sources[source], dtype=dtype).model, method) == pytest.approx(stored, rel=0.35)
    back, _ = lqedu.load_model(streamed, dtype=dtype)
    want, _ = lqedu.load_model(resident, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(back(windows).logits, want(windows).logits)


@pytest.mark.parametrize("source", ["opt", "single"])
def test_other_architectures_and_a_single_file(source: str, sources: dict[str, Path], tmp_path: Path) -> None:
    method, windows = GPTQ(bits=4, group_size=32), tiny_windows()
    model, _ = lqedu.load_model(sources[source])
    resident = lqedu.save(lqedu.quantize(model, method, windows), tmp_path / "resident")
    assert_same_folder(resident, lqedu.quantize_folder(sources[source], method, windows, tmp_path / "streamed"))


def test_the_digest_is_that_of_the_model_in_memory(sources: dict[str, Path]) -> None:
    for name in ("llama", "single"):
        model, _ = lqedu.load_model(sources[name], dtype=torch.float16)
        assert StreamedModel(sources[name], dtype=torch.float16).sha256() == weights_sha256(model)


def _live_bytes() -> int:
    """Bytes of all tensors that have been made since gc.freeze and are alive, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("kind", [GPTQ, QuaRot, QoQ, SmoothQuant])
def test_memory_does_not_grow_with_depth(
    kind: type[Method],
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Every tensor alive whenever a linear is quantized or a block is run, on 3 and on 10 blocks."""
    request.addfinalizer(gc.unfreeze)
    method, windows = METHODS[kind.name], tiny_windows()
    peaks: list[int] = []

    def watched(function):
        def call(*args, **kwargs):
            peaks.append(_live_bytes())
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(kind, "quantize_linear", watched(kind.quantize_linear))
    monkeypatch.setattr(pipeline_module, "run_block", watched(pipeline_module.run_block))
    found = {}
    for name in ("three", "deep"):
        gc.freeze()
        lqedu.quantize_folder(sources[name], method, windows, tmp_path / name)
        found[name] = max(peaks)
        peaks.clear()
    gc.freeze()
    model, _ = lqedu.load_model(sources["deep"])
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert 0 < found["three"] < 8 * block
    orders = 7 * (48 + 32) * 8 * 2  # QoQ keeps the order of the channels of every block
    assert found["deep"] <= found["three"] + (orders if kind is QoQ else 0)
    lqedu.quantize(model, method, windows)  # the same count of a run in memory, where the dense model is alive
    assert max(peaks) > 10 * block


def test_requests_are_refused_before_work_starts(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, out = tiny_windows(), tmp_path / "out"

    def refused(error: type[LqeduError], match: str, method: object = GPTQ(group_size=32), **changes: object) -> None:
        arguments = {"source": sources["llama"], "method": method, "calibration": windows, "out": out} | changes
        with pytest.raises(error, match=match):
            lqedu.quantize_folder(**arguments)
        assert list(tmp_path.iterdir()) == []

    refused(
        UsageError, "SpinQuant trains with gradients through the whole model, so it cannot be streamed", SpinQuant()
    )
    refused(UsageError, "method is an instance", "gptq")
    refused(GridError, r"layers.0.self_attn.q_proj \[64, 64\], GPTQ: group_size 128", GPTQ(group_size=128))
    refused(CalibrationError, "needs calibration", calibration=None)
    refused(UsageError, "does not have", FP8(keep="nothing"))
    refused(UsageError, "no such folder", source=tmp_path / "nowhere")
    refused(UsageError, "dtype must be", dtype=torch.int8)
    refused(UsageError, "unknown device", device="nonsense")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    refused(CheckpointError, "its disk has 0.00 GB left; free space")
    monkeypatch.undo()
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        lqedu.quantize_folder(sources["llama"], RTN(group_size=32), None, out)


NORM = "model.layers.1.input_layernorm.weight"


def _shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def _change(folder: Path, change) -> None:
    path = _shard_of(folder, NORM)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def _reindex(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "a missing shard": (lambda f: _shard_of(f, NORM).unlink(), "missing or damaged"),
    "a truncated shard": (lambda f: _truncate(_shard_of(f, NORM)), "missing or damaged"),
    "a shard of text": (lambda f: _shard_of(f, NORM).write_text("no tensors"), "missing or damaged"),
    "a tensor less": (lambda f: _change(f, lambda t: t.pop(NORM)), f"it lacks {NORM}"),
    "a tensor more": (
        lambda f: _change(f, lambda t: t.update(extra=torch.ones(1))),
        "it holds extra, which the index does not",
    ),
    "a foreign shard": (
        lambda f: shutil.copy(_shard_of(f, "model.norm.weight"), _shard_of(f, NORM)),
        "is not the shard that the index describes",
    ),
    "a wrong shape": (
        lambda f: _change(f, lambda t: t.update({NORM: torch.ones(63)})),
        rf"hold {NORM} of shape \[63\], not \[64\]",
    ),
    "integers": (
        lambda f: _change(f, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)})),
        "in int8, which is no dense weight",
    ),
    "a path that leads out": (
        lambda f: _reindex(f, lambda m: m.update({NORM: "../other.safetensors"})),
        "'../other.safetensors', which is no safetensors file of this folder",
    ),
    "an absolute path": (lambda f: _reindex(f, lambda m: m.update({NORM: "/etc/x.safetensors"})), "of this folder"),
    "a Windows path": (lambda f: _reindex(f, lambda m: m.update({NORM: r"..\x.safetensors"})), "of this folder"),
    "a pickle": (
        lambda f: _reindex(f, lambda m: m.update({NORM: "model.bin"})),
        "'model.bin', which is no safetensors",
    ),
    "an unlisted tensor": (lambda f: _reindex(f, lambda m: m.pop(NORM)), "which the index does not"),
    "a number for a file": (lambda f: _reindex(f, lambda m: m.update({NORM: 3})), "names no file"),
    "an index of nothing": (lambda f: (f / INDEX).write_text("{}"), "is not an index"),
    "an index of noise": (lambda f: (f / INDEX).write_text("{"), "is not an index"),
    "no weights": (lambda f: (f / INDEX).unlink(), "model.safetensors is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_weights_are_refused_and_nothing_is_written(
    damage: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    break_it, match = DAMAGE[damage]
    folder = shutil.copytree(sources["three"], tmp_path / "model")
    break_it(folder)
    with pytest.raises(CheckpointError, match=match):
        lqedu.quantize_folder(folder, RTN(group_size=32), None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_values_that_are_not_finite_are_refused_before_work_starts(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(sources["three"], tmp_path / "model")
    _change(folder, lambda t: t[NORM].fill_(torch.inf))
    with pytest.raises(GridError, match=rf"{NORM} \[64\] holds NaN or infinite"):
        lqedu.quantize_folder(folder, RTN(group_size=32), None, tmp_path / "out")
    _change(folder, lambda t: t[NORM].fill_(1e30))  # finite, and not in half precision
    with pytest.raises(GridError, match="holds NaN or infinite"):
        lqedu.quantize_folder(folder, RTN(group_size=32), None, tmp_path / "out", dtype=torch.float16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UnsupportedModelError, match=r"already quantized \(awq\)"):
        lqedu.quantize_folder(folder, RTN(group_size=32), None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", [GPTQ, QoQ, SmoothQuant, RTN])
@pytest.mark.parametrize("first", ["streamed", "resident"])
def test_an_interrupted_run_goes_on_to_the_same_bytes_streamed_or_not(
    kind: type[Method], first: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, windows, source = METHODS[kind.name], tiny_windows(), sources["three"]
    model, _ = lqedu.load_model(source)
    whole = lqedu.save(lqedu.quantize(model, method, windows), tmp_path / "whole")
    run = tmp_path / "run"

    def resident() -> Path:
        return lqedu.save(lqedu.quantize(model, method, windows, resume_dir=run), tmp_path / "out")

    def streamed() -> Path:
        return lqedu.quantize_folder(source, method, windows, tmp_path / "out", resume_dir=run)

    original, seen = pipeline_module._quantize_block, []

    def dies_at_the_third(*args, **kwargs):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(pipeline_module, "_quantize_block", dies_at_the_third)
    runs = (streamed, resident) if first == "streamed" else (resident, streamed)
    with pytest.raises(KeyboardInterrupt):
        runs[0]()
    assert not (tmp_path / "out").exists() and (run / "block-0001.safetensors").is_file()
    assert_same_folder(whole, runs[1]())
    assert len(seen) == 4  # only the third block was worked on again
    assert run.exists() == (first == "streamed")  # the caller of lqedu.quantize deletes it


def test_another_request_does_not_go_on(sources: dict[str, Path], tmp_path: Path) -> None:
    windows, source = tiny_windows(), sources["three"]
    model, _ = lqedu.load_model(source)
    lqedu.quantize(model, GPTQ(group_size=32), windows, resume_dir=tmp_path / "out.unfinished")
    with pytest.raises(CheckpointError, match="differs in: method"):
        lqedu.quantize_folder(source, GPTQ(bits=3, group_size=32), windows, tmp_path / "out")
    with pytest.raises(CheckpointError, match="differs in: model"):
        lqedu.quantize_folder(source, GPTQ(group_size=32), windows, tmp_path / "out", dtype=torch.float64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["embeddings", "block-0000", "block-0002", "head"])
def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on(
    file: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, windows, source = GPTQ(bits=3, group_size=32), tiny_windows(), sources["three"]
    model, _ = lqedu.load_model(source)
    whole = lqedu.save(lqedu.quantize(model, method, windows), tmp_path / "whole")
    save = unfinished_module.save_safetensors

    def full(tensors, path, metadata):
        if f".{file}.safetensors." in path.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(unfinished_module, "save_safetensors", full)
    with pytest.raises(
        CheckpointError, match=rf"cannot write .*{file}.safetensors: No space left on device; free space"
    ):
        lqedu.quantize_folder(source, method, windows, tmp_path / "out")
    run = tmp_path / "out.unfinished"
    assert not (tmp_path / "out").exists()
    assert not any(path.name.startswith(".") or path.stem == file for path in run.glob("*.safetensors*"))
    monkeypatch.undo()
    assert_same_folder(whole, lqedu.quantize_folder(source, method, windows, tmp_path / "out"))
    assert not run.exists()


def test_a_disk_that_fills_at_the_very_end_costs_no_block(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lqedu.methods import streaming

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    method, windows, source = GPTQ(bits=3, group_size=32), tiny_windows(), sources["three"]
    with monkeypatch.context() as patched:
        patched.setattr(streaming.os, "link", full)
        patched.setattr(streaming.shutil, "copyfile", full)
        with pytest.raises(CheckpointError, match="No space left"):
            lqedu.quantize_folder(source, method, windows, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    monkeypatch.setattr(pipeline_module, "_quantize_block", lambda *args: pytest.fail("a block was done again"))
    assert lqedu.load_model(lqedu.quantize_folder(source, method, windows, tmp_path / "out"))


def test_a_disk_without_links_gets_copies(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lqedu.methods import streaming

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    folder = lqedu.quantize_folder(sources["three"], RTN(group_size=32), None, tmp_path / "linked")
    monkeypatch.setattr(streaming.os, "link", refuse)
    assert_same_folder(folder, lqedu.quantize_folder(sources["three"], RTN(group_size=32), None, tmp_path / "copied"))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "model-00003-of-00005.safetensors").unlink(), "model-00003.* missing or damaged"),
        (lambda f: _truncate(f / "model-00003-of-00005.safetensors"), "model-00003.* missing or damaged"),
        (lambda f: _reindex(f, lambda m: m.update({NORM: "../x.safetensors"})), "which is no safetensors file"),
        (lambda f: _change(f, lambda t: t.update({NORM: torch.ones(63)})), r"shape \[63\], expected \[64\]"),
        (
            lambda f: shutil.copy(f / "model-00002-of-00005.safetensors", f / "model-00003-of-00005.safetensors"),
            "is not the shard that the index describes",
        ),
    ],
)
def test_a_damaged_shard_of_our_own_is_refused(damage, match: str, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = lqedu.quantize_folder(sources["three"], RTN(group_size=32), None, tmp_path / "out")
    damage(folder)
    with pytest.raises(CheckpointError, match=match):
        lqedu.load_model(folder)


def test_a_head_that_equals_the_embedding_is_tied_and_one_that_does_not_is_kept(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Folders that say the head is tied and hold one all the same, as transformers reads them."""
    model = tiny_model(tied=True)
    for name, change in (("same", 0.0), ("other", 1.0)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        dense, _ = lqedu.load_model(tmp_path / name)
        resident = lqedu.save(lqedu.quantize(dense, replace(METHODS["rtn"])), tmp_path / f"{name}-resident")
        streamed = lqedu.quantize_folder(tmp_path / name, METHODS["rtn"], None, tmp_path / f"{name}-streamed")
        assert StreamedModel(tmp_path / name).tied == (name == "same")
        assert_same_folder(resident, streamed)
