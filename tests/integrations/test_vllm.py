"""The vLLM plugin: its classes against the interface read from vLLM's sources, its layers against ours, every refusal."""

import ast
import importlib.util
import inspect
import json
import logging
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import lqedu.integrations.vllm as plugin
from lqedu.checkpoint import load, save
from lqedu.checkpoint.folder import read_record
from lqedu.errors import CheckpointError, UnsupportedModelError, UsageError
from lqedu.methods import QQQ, RTN, QoQ, QuaRot, SmoothQuant
from lqedu.methods.pipeline import quantize
from lqedu.runtime import quantize_kv
from lqedu.runtime.packed import pack_layer
from tests.integrations import vllm_stand_in as stand_in
from tests.models_tiny import tiny_windows

pytest.importorskip("triton", reason="the layouts of kernels are defined in lqedu_kernels, which needs Triton")
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
METHODS = {
    "qoq": QoQ(group_size=64, kv_bits=None),
    "qqq groups": QQQ(group_size=64),
    "qqq channels": QQQ(group_size=None),
    "quarot": QuaRot(activation_bits=8),  # transforms the inputs of down_proj while it runs
}
SPLIT = [name for name in METHODS if name != "quarot"]


@pytest.fixture
def vllm(monkeypatch):
    stand_in.install(monkeypatch)
    monkeypatch.setattr(stand_in.TP, "rank", 0)
    monkeypatch.setattr(stand_in.TP, "size", 1)
    plugin.register()
    from lqedu.integrations import vllm_classes

    yield vllm_classes
    del sys.modules[vllm_classes.__name__], sys.modules["lqedu.integrations"].vllm_classes


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")))
    root = tmp_path_factory.mktemp("vllm")
    dense = _model()
    return {
        n: save(quantize(dense, m, tiny_windows()), root / n.replace(" ", "-"), words) for n, m in METHODS.items()
    } | {
        "rtn": save(quantize(dense, RTN(group_size=64)), root / "rtn", words),
        "static": save(quantize(dense, SmoothQuant(activation="static"), tiny_windows()), root / "static", words),
        "kv": save(quantize_kv(quantize(dense, METHODS["qoq"], tiny_windows()), 4), root / "kv", words),
        "centred": save(
            quantize_kv(quantize(dense, METHODS["qoq"], tiny_windows()), 4, centre=tiny_windows(2, 8)),
            root / "c",
            words,
        ),
    }


def _model() -> torch.nn.Module:
    """Hidden size 128 and an MLP of 256: two and four groups of 64."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def _config(vllm, folder: Path):
    config = stand_in.REGISTERED["lqedu_w4a8"].from_config({"quant_method": "lqedu", "format_version": 1})
    config.packed_modules_mapping = MERGED
    config.maybe_update_config(str(folder), hf_config=None, revision=None)
    return config


def _fill(layer, tensors: dict[str, torch.Tensor], block: str, names: list[str]) -> None:
    for shard, name in enumerate(names):
        for key, parameter in list(layer.named_parameters()):
            arguments = () if len(names) == 1 else (shard,)
            parameter.weight_loader(parameter, tensors[f"{block}.{name}.{key}"], *arguments)
    layer.quant_method.process_weights_after_loading(layer)


# --- the interface ----------------------------------------------------------------------------------------------------


def _accepts(function, wanted: list[str]) -> bool:
    """Whether a call that vLLM may make of its own method can be made of ours: same names, same order."""
    ours = list(inspect.signature(function).parameters.values())
    theirs = [name.rstrip("=") for name in wanted if name not in ("self", "cls")]
    names = [("**" if p.kind is p.VAR_KEYWORD else "*" if p.kind is p.VAR_POSITIONAL else "") + p.name
             for p in ours if p.name not in ("self", "cls")]  # fmt: skip
    optional = {p.name for p in ours if p.default is not p.empty}
    return names == theirs and all(name.rstrip("=") in optional for name in wanted if name.endswith("="))


@pytest.mark.parametrize(
    ("ours", "module", "theirs"),
    [
        ("LqeduW4A8Config", "vllm.model_executor.layers.quantization.base_config", "QuantizationConfig"),
        ("LqeduW4A8LinearMethod", "vllm.model_executor.layers.linear", "LinearMethodBase"),
    ],
)
def test_our_classes_have_the_methods_and_arguments_of_vllm(vllm, ours: str, module: str, theirs: str) -> None:
    cls, described = getattr(vllm, ours), stand_in.INTERFACE[module][theirs]
    assert not inspect.isabstract(cls) and set(described["abstract"]) <= set(vars(cls))
    for name, arguments in described["methods"].items():
        if name in vars(cls) and name != "__init__":
            assert _accepts(getattr(cls, name), arguments), (name, arguments)


def test_what_is_imported_of_vllm_is_there() -> None:
    tree = ast.parse(Path(plugin.__file__).with_name("vllm_classes.py").read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module.startswith("vllm")]
    assert len(imports) == 4
    for node in imports:
        for alias in node.names:
            assert alias.name in stand_in.INTERFACE[node.module], alias.name


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("ChannelQuantScaleParameter", {"data", "output_dim", "weight_loader"}),
        ("GroupQuantScaleParameter", {"data", "output_dim", "weight_loader", "input_dim"}),
        ("PackedvLLMParameter", {"data", "output_dim", "weight_loader", "input_dim", "packed_dim", "packed_factor"}),
    ],
)
def test_parameters_take_the_arguments_that_are_given(name: str, given: set[str]) -> None:
    classes, known, required = stand_in.INTERFACE["vllm.model_executor.parameter"], set(), set()
    open_ = [name]
    while open_:
        described = classes.get(open_.pop(), {"bases": [], "methods": {}})
        arguments = [a for a in described["methods"].get("__init__", []) if a != "self" and a[0] != "*"]
        known |= {a.rstrip("=") for a in arguments}
        required |= {a for a in arguments if a[-1] != "="}
        open_ += described["bases"]
    assert given <= known and required <= given


def test_the_description_is_that_of_the_wheel() -> None:
    """Where a wheel of vLLM lies in the folder VLLM_WHEELS points to."""
    import os

    from tests.integrations.make_vllm_interface import describe

    wheels = sorted(Path(os.environ.get("VLLM_WHEELS", "nowhere")).glob("vllm-*.whl"))
    if not wheels:
        pytest.skip("no wheel of vLLM: pip download --no-deps vllm==0.33.0, then VLLM_WHEELS=its folder")
    assert describe(wheels[-1]) == stand_in.INTERFACE


def test_the_entry_point_is_the_group_vllm_reads() -> None:
    group = stand_in.INTERFACE["vllm.plugins"]["DEFAULT_PLUGINS_GROUP"]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"][group]["lqedu"].partition(":")
    assert (module, function) == (plugin.__name__, plugin.register.__name__)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm")
@pytest.mark.filterwarnings("ignore")  # of its packages
def test_the_real_vllm_knows_the_method() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    plugin.register()
    plugin.register()
    assert get_quantization_config("lqedu_w4a8").__name__ == "LqeduW4A8Config"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm")
@pytest.mark.filterwarnings("ignore")  # of its packages
def test_the_layers_of_the_real_vllm_load_and_compute_what_ours_do(folders) -> None:
    """Its own classes and weight loaders; they ask for a device, so where there is no GPU it must be vLLM's CPU build."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.quantization import get_quantization_config

    plugin.register()
    block, common = "model.layers.0", dict(bias=False, params_dtype=torch.float16)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29655", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        for method in METHODS:
            config = get_quantization_config("lqedu_w4a8").from_config({"quant_method": "lqedu"})
            config.packed_modules_mapping = MERGED
            config.maybe_update_config(str(folders[method]))
            model, _ = load(folders[method])
            common |= {"quant_config": config}
            qkv = QKVParallelLinear(128, 32, 4, 2, prefix=f"{block}.self_attn.qkv_proj", **common)
            both = MergedColumnParallelLinear(128, [256, 256], prefix=f"{block}.mlp.gate_up_proj", **common)
            down = RowParallelLinear(256, 128, prefix=f"{block}.mlp.down_proj", **common)
            for layer, names, shards, where in (
                (qkv, MERGED["qkv_proj"], ["q", "k", "v"], "self_attn"),
                (both, MERGED["gate_up_proj"], [0, 1], "mlp"),
                (down, ["down_proj"], [None], "mlp"),
            ):
                for name, shard in zip(names, shards, strict=True):
                    for key, parameter in list(layer.named_parameters()):
                        arguments = () if shard is None else (shard,)
                        tensor = model.state_dict()[f"{block}.{where}.{name}.{key}"]
                        parameter.weight_loader(parameter, tensor, *arguments)
                layer.quant_method.process_weights_after_loading(layer)
                x = torch.randn(5, layer.input_size, generator=torch.Generator().manual_seed(1)).half()
                parts = [pack_layer(model.get_submodule(f"{block}.{where}.{name}"))(x) for name in names]
                assert torch.equal(layer(x)[0], torch.cat(parts, -1)), (method, names)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_stacked_layers_compute_what_ours_do(vllm, folders, method: str, dtype: torch.dtype) -> None:
    config = _config(vllm, folders[method])
    model, _ = load(folders[method])
    tensors, block = model.state_dict(), "model.layers.0"
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    for prefix, names, outputs in (
        (f"{block}.self_attn", MERGED["qkv_proj"], [128, 64, 64]),
        (f"{block}.mlp", MERGED["gate_up_proj"], [256, 256]),
    ):
        merged = "qkv_proj" if "attn" in prefix else "gate_up_proj"
        layer = stand_in.StackedColumnLinear(128, outputs, config, f"{prefix}.{merged}")
        _fill(layer, tensors, prefix, names)
        expected = torch.cat([pack_layer(model.get_submodule(f"{prefix}.{name}"))(x) for name in names], -1)
        assert torch.equal(layer(x), expected) and layer(x).dtype == dtype
        assert layer(x.view(1, 5, 128)).shape == (1, 5, sum(outputs))
    row = stand_in.RowLinear(256, 128, config, f"{block}.mlp.down_proj")
    _fill(row, tensors, f"{block}.mlp", ["down_proj"])
    row.bias = torch.randn(128, generator=torch.Generator().manual_seed(2)).to(dtype)
    wide, ours = (
        torch.randn(3, 256, generator=torch.Generator().manual_seed(3)).to(dtype),
        pack_layer(model.get_submodule(f"{block}.mlp.down_proj")),
    )
    ours.bias = torch.nn.Parameter(row.bias, requires_grad=False)
    assert torch.equal(row(wide), ours(wide))


@pytest.mark.parametrize("method", SPLIT)
def test_two_processes_together_compute_the_whole(vllm, folders, monkeypatch, method: str) -> None:
    """Outputs of columns are concatenated and exact; sums over split inputs differ by the finer scales of activations."""
    model, _ = load(folders[method])
    tensors, block = model.state_dict(), "model.layers.0"
    monkeypatch.setattr(stand_in.TP, "size", 2)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).half()
    wide = torch.randn(5, 256, generator=torch.Generator().manual_seed(2)).half()
    columns, total = [], 0
    for rank in range(2):
        monkeypatch.setattr(stand_in.TP, "rank", rank)
        config = _config(vllm, folders[method])
        layer = stand_in.StackedColumnLinear(128, [128, 64, 64], config, f"{block}.self_attn.qkv_proj")
        _fill(layer, tensors, f"{block}.self_attn", MERGED["qkv_proj"])
        columns.append(layer(x).split([64, 32, 32], -1))
        row = stand_in.RowLinear(256, 128, config, f"{block}.mlp.down_proj")
        _fill(row, tensors, f"{block}.mlp", ["down_proj"])
        total = total + row(wide[:, rank * 128 : rank * 128 + 128]).float()
    for part, name in enumerate(MERGED["qkv_proj"]):
        whole = pack_layer(model.get_submodule(f"{block}.self_attn.{name}"))(x)
        assert torch.equal(torch.cat([columns[0][part], columns[1][part]], -1), whole)
    down = model.get_submodule(f"{block}.mlp.down_proj")
    exact = wide.float() @ down.quantized.dequantize(torch.float32).T
    step = wide.float().abs().amax(1, keepdim=True) / 127  # of the coarser of two grids
    bound = 0.5 * step * down.quantized.dequantize(torch.float32).abs().sum(1)
    assert ((total - exact).abs() <= bound + 2e-3 * exact.abs().amax()).all() and (total - exact).abs().max() > 0


def test_key_heads_that_two_processes_share(vllm, folders, monkeypatch) -> None:
    model, _ = load(folders["qoq"])
    prefix, x = "model.layers.0.self_attn", torch.randn(2, 128, generator=torch.Generator().manual_seed(1)).half()
    monkeypatch.setattr(stand_in.TP, "size", 4)
    whole = pack_layer(model.get_submodule(f"{prefix}.k_proj"))(x)
    for rank in range(4):
        monkeypatch.setattr(stand_in.TP, "rank", rank)
        config = _config(vllm, folders["qoq"])
        layer = stand_in.StackedColumnLinear(128, [128, 64, 64], config, f"{prefix}.qkv_proj", replicas=[1, 2, 2])
        _fill(layer, model.state_dict(), prefix, MERGED["qkv_proj"])
        assert torch.equal(layer(x)[:, 32:64], whole[:, rank // 2 * 32 : rank // 2 * 32 + 32])


def test_torch_compile_takes_the_operator_as_it_is(vllm, folders) -> None:
    config = _config(vllm, folders["qqq groups"])
    layer = stand_in.RowLinear(256, 128, config, "model.layers.0.mlp.down_proj")
    _fill(layer, load(folders["qqq groups"])[0].state_dict(), "model.layers.0.mlp", ["down_proj"])
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3)).half()
    arguments = (x, layer.codes, layer.scale, layer.groups, None, 128, 64, layer.quant_method.path)
    torch.library.opcheck(torch.ops.lqedu.w4a8_linear.default, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda t: layer(t) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x) + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_in_a_graph_of_cuda(vllm, folders, method: str) -> None:
    """As vLLM runs a layer: tensors loaded on the GPU, the product captured once and replayed on other inputs."""
    model, prefix = load(folders[method])[0], "model.layers.0.mlp"
    with torch.device("cuda"):
        layer = stand_in.StackedColumnLinear(128, [256, 256], _config(vllm, folders[method]), f"{prefix}.gate_up_proj")
    _fill(layer, model.state_dict(), prefix, MERGED["gate_up_proj"])
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(8, 128, generator=generator).half() for _ in range(2))
    x = first.cuda()
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(second)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, layer(second.cuda()))
    names = MERGED["gate_up_proj"]
    expected = torch.cat([pack_layer(model.get_submodule(f"{prefix}.{name}"))(second) for name in names], -1)
    assert torch.allclose(y.cpu().float(), expected.float(), rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_layers_left_in_floating_point_are_those_of_vllm(vllm, folders) -> None:
    config = _config(vllm, folders["qoq"])
    linear = stand_in.LinearBase.__new__(stand_in.LinearBase)
    assert type(config.get_quant_method(linear, "vision.proj")) is stand_in.UnquantizedLinearMethod
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


# --- registration -----------------------------------------------------------------------------------------------------


def test_registering_in_every_process_and_twice(vllm) -> None:
    first = stand_in.REGISTERED["lqedu_w4a8"]
    plugin.register()
    assert stand_in.REGISTERED["lqedu_w4a8"] is first and plugin.operator() is plugin.operator()


def test_a_vllm_of_another_interface_goes_on_without_us(monkeypatch, caplog) -> None:
    stand_in.install(monkeypatch)
    monkeypatch.delattr(sys.modules["vllm.model_executor.parameter"], "PackedvLLMParameter")
    with caplog.at_level(logging.WARNING, "vllm.lqedu"):
        plugin.register()
    assert "lqedu_w4a8 is not there" in caplog.text and "PackedvLLMParameter" in caplog.text


def test_a_folder_of_ours_chooses_the_method_by_itself(vllm, folders) -> None:
    cls = stand_in.REGISTERED["lqedu_w4a8"]
    mark = json.loads((folders["qoq"] / "config.json").read_text())["quantization_config"]
    assert cls.override_quantization_method(mark, None, hf_config=None) == "lqedu_w4a8"
    assert cls.override_quantization_method({"quant_method": "gptq"}, None) is None
    assert cls().get_name() == "lqedu_w4a8" and cls.get_min_capability() == 80 and cls.get_config_filenames() == []
    with pytest.raises(UsageError, match="got a gptq model"):
        cls.from_config({"quant_method": "gptq"})


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "match"), [("rtn", "inputs None"), ("static", "static=True")])
def test_other_kinds_of_models_are_refused_by_name(folders, name: str, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match) as refused:
        plugin.plans(read_record(folders[name]))
    assert "lqedu export" in str(refused.value)


def test_a_cache_in_few_bits_is_told_of_or_refused(vllm, folders, caplog) -> None:
    with caplog.at_level(logging.WARNING, "vllm.lqedu"):
        _config(vllm, folders["kv"])
    assert "its own way" in caplog.text
    with pytest.raises(UsageError, match="less their mean"):
        _config(vllm, folders["centred"])


def test_parts_that_differ_are_refused() -> None:
    plan = plugin.LayerPlan("requantized", '{"group_size": 64}', plugin.InputPath(), 64)
    known = {"b.q_proj": plan, "b.k_proj": plan}
    with pytest.raises(UnsupportedModelError, match="not quantized alike"):
        plugin.plan_of(known, "b.qkv_proj", MERGED)
    assert plugin.plan_of(known, "b.q_proj", MERGED) is plan and plugin.plan_of(known, "c.q_proj", MERGED) is None


@pytest.mark.parametrize(
    ("plan", "part", "match"),
    [
        (plugin.LayerPlan("requantized", '{"group_size": 128}', plugin.InputPath(), 128), 64, "'group_scale' holds 128"),
        (plugin.LayerPlan("requantized", '{"group_size": 64}', plugin.InputPath(64), 64), 128, "parallel-size 1"),
        (
            plugin.LayerPlan(
                "progressive", json.dumps(METHODS["qoq"].grid().to_dict()), plugin.InputPath(), 64
            ), 64, "'zero' holds 128 inputs",
        ),
    ],
)  # fmt: skip
def test_inputs_that_do_not_split_are_refused(plan, part: int, match: str) -> None:
    plugin.check_split(plan, "down_proj", 256, 256)
    with pytest.raises(UsageError, match=match):
        plugin.check_split(plan, "down_proj", part, 256)


def test_what_was_not_loaded_does_not_run(vllm, folders) -> None:
    config = _config(vllm, folders["qqq groups"])
    layer = stand_in.RowLinear(256, 128, config, "model.layers.0.mlp.down_proj")
    with pytest.raises(CheckpointError, match="down_proj: its scales were not in the folder"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_folder_that_lacks_tensors_is_refused_before_it_is_served(vllm, folders, tmp_path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["qoq"], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.zero"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors \(first: model.layers.0.mlp.down_proj.zero\)"):
        _config(vllm, folder)


def test_a_vllm_that_names_no_folder_is_refused(vllm) -> None:
    linear = stand_in.LinearBase.__new__(stand_in.LinearBase)
    with pytest.raises(CheckpointError, match="which folder"):
        stand_in.REGISTERED["lqedu_w4a8"]().get_quant_method(linear, "model.layers.0.mlp.down_proj")
