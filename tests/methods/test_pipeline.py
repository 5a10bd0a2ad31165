"""The pipeline: every architecture, the right activations, nothing changed that should not be, errors with names."""

import copy
from pathlib import Path

import pytest
import torch

from lqedu.calibration.capture import block_inputs, run_block
from lqedu.errors import CalibrationError, CheckpointError, GridError, NotPositiveDefiniteError, UsageError
from lqedu.linalg import HessianAccumulator
from lqedu.methods import GPTQ, RTN
from lqedu.methods import pipeline as pipeline_module
from lqedu.methods.pipeline import auto_group_size, quantize
from lqedu.models.anatomy import block_list, describe, linears
from lqedu.rounding import gptq, nearest
from lqedu.runtime import quantized_linears
from tests.models_tiny import ARCHITECTURES, tiny_model, tiny_windows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [RTN(group_size=32), GPTQ(group_size=32, bits=3)], ids=["rtn", "gptq"])
def test_every_architecture(architecture: str, method: RTN) -> None:
    model = tiny_model(architecture)
    before = copy.deepcopy(model.state_dict())
    windows = tiny_windows()
    result = quantize(model, method, windows)
    assert set(quantized_linears(result)) == set(linears(model)) == set(result.lqedu_reports)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.get_input_embeddings().weight is model.get_input_embeddings().weight  # shared, not copied
    with torch.no_grad():
        dense, quantized = model(windows).logits, result(windows).logits
    assert bool(torch.isfinite(quantized).all())
    assert not torch.equal(dense, quantized)


def test_finer_grids_are_nearer_to_the_dense_model() -> None:
    """Four more bits make steps 17 times smaller; the output error falls by about as much."""
    model, windows = tiny_model(), tiny_windows()
    with torch.no_grad():
        dense = model(windows).logits
        errors = [
            float((quantize(model, GPTQ(bits=bits, group_size=32), windows)(windows).logits - dense).norm())
            for bits in (4, 8)
        ]
    assert errors[1] < errors[0] / 10


def test_rtn_is_nearest_on_every_layer() -> None:
    model = tiny_model()
    method = RTN(bits=4, group_size=32)
    result = quantize(model, method)
    for name, layer in quantized_linears(result).items():
        want, _ = nearest(linears(model)[name].weight, method.grid())
        assert torch.equal(layer.quantized.codes, want.codes)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_hessians_come_from_what_each_layer_really_sees(true_sequential: bool) -> None:
    """An independent, slow driver: one plain forward pass for each stage, everything before it already quantized."""
    model, windows = tiny_model(blocks=2), tiny_windows()
    method = GPTQ(bits=3, group_size=32, true_sequential=true_sequential)
    result = quantize(model, method, windows)

    slow = copy.deepcopy(model)
    for index in range(2):
        for stages in [[s] for s in describe(model).stages] if true_sequential else [describe(model).stages]:
            inputs: dict[str, torch.Tensor] = {}
            names = [f"model.layers.{index}.{name}" for stage in stages for name in stage.linears]
            hooks = [
                slow.get_submodule(name).register_forward_pre_hook(lambda m, a, n=name, d=inputs: d.update({n: a[0]}))
                for name in names
            ]
            with torch.no_grad():
                slow(windows)
            for hook in hooks:
                hook.remove()
            for name in names:
                accumulator = HessianAccumulator(inputs[name].shape[-1])
                accumulator.add(inputs[name])
                linear = slow.get_submodule(name)
                want, _ = gptq(linear.weight.detach(), accumulator.result(), method.grid())
                got = quantized_linears(result)[name].quantized
                assert torch.equal(got.codes, want.codes), name
                assert torch.equal(got.scale, want.scale), name
                linear.weight = torch.nn.Parameter(want.dequantize(), requires_grad=False)


def test_each_submodule_runs_once_in_a_calibration_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model(blocks=2), tiny_windows()
    calls: dict[str, int] = {}

    def counting_copy(original: torch.nn.Module) -> torch.nn.Module:
        result = copy.deepcopy(original)
        for name, module in result.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda *_, n=name: calls.update({n: calls.get(n, 0) + 1}))
        return result

    monkeypatch.setattr(pipeline_module, "copy_sharing_tensors", counting_copy)
    quantize(model, GPTQ(bits=4, group_size=32), windows)
    in_blocks = {name: count for name, count in calls.items() if name.startswith("model.layers.")}
    assert in_blocks
    assert set(in_blocks.values()) == {1}


def test_quantized_blocks_feed_the_next_block() -> None:
    model, windows = tiny_model(blocks=3), tiny_windows()
    result = quantize(model, GPTQ(bits=4, group_size=32), windows)
    hidden, kwargs = block_inputs(result, windows)
    for block in block_list(result):
        hidden = run_block(block, hidden, kwargs)
    with torch.no_grad():
        want = result(windows).logits
        got = result.lm_head(result.model.norm(hidden))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_hessian_that_cannot_be_factored_gets_more_damping_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from lqedu.methods import gptq as module

    def needs(least: float):
        def rounding(weight, hessian, grid, *, damping, **options):
            if damping < least:
                raise NotPositiveDefiniteError("the Hessian is not positive definite; use more damping")
            return gptq(weight, hessian, grid, damping=damping, **options)

        return rounding

    model, windows = tiny_model(blocks=1), tiny_windows()
    monkeypatch.setattr(module, "gptq", needs(0.5))
    result = quantize(model, GPTQ(group_size=32), windows)
    report = result.lqedu_reports["model.layers.0.self_attn.q_proj"]
    assert report.attempts == 3
    assert report.damping == pytest.approx(1.0)
    monkeypatch.setattr(module, "gptq", needs(2.0))
    with pytest.raises(NotPositiveDefiniteError, match=r"layers.0.self_attn.q_proj \[64, 64\], GPTQ: .*more damping"):
        quantize(model, GPTQ(group_size=32), windows)


def test_requests_are_refused_before_any_work(tmp_path: Path) -> None:
    model, windows = tiny_model(), tiny_windows()
    with pytest.raises(CalibrationError, match="needs calibration"):
        quantize(model, GPTQ(group_size=32))
    with pytest.raises(CalibrationError, match="int64"):
        quantize(model, GPTQ(group_size=32), windows.float())
    with pytest.raises(CalibrationError, match="no tokens"):
        quantize(model, GPTQ(group_size=32), windows[:0])
    with pytest.raises(CalibrationError, match="vocabulary of 128"):
        quantize(model, GPTQ(group_size=32), windows + 100)
    with pytest.raises(GridError, match=r"q_proj \[64, 64\], GPTQ: group_size 128 does not divide"):
        quantize(model, GPTQ(group_size=128), windows)
    with pytest.raises(UsageError, match="already quantized"):
        quantize(quantize(model, RTN(group_size=32)), RTN(group_size=32))
    broken = tiny_model()
    broken.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(GridError, match=r"model.layers.1.mlp.up_proj \[96, 64\], RTN: .*1 NaN"):
        quantize(broken, RTN(group_size=32), resume_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    broken = tiny_model()
    broken.model.norm.weight[0] = torch.inf
    with pytest.raises(GridError, match=r"model.norm.weight \[64\] holds NaN or infinite"):
        quantize(broken, RTN(group_size=32))
    for no_method in ("gptq", GPTQ):
        with pytest.raises(UsageError, match="method is an instance"):
            quantize(model, no_method)


def test_resumes_to_the_same_bits_and_refuses_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model(blocks=3), tiny_windows()
    method = GPTQ(bits=3, group_size=32)
    whole = quantize(model, method, windows)

    original, seen = pipeline_module._quantize_block, []

    def dies_at_the_third(*args, **kwargs):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(pipeline_module, "_quantize_block", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, method, windows, resume_dir=tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "block-0000.json", "block-0000.safetensors", "block-0001.json", "block-0001.safetensors", "run.json",
    ]  # fmt: skip
    seen.clear()
    seen.extend([1, 1, 1])  # never dies again
    resumed = quantize(model, method, windows, resume_dir=tmp_path / "run")
    assert len(seen) == 4  # only the third block was worked on
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert whole.lqedu_reports == resumed.lqedu_reports

    with pytest.raises(CheckpointError, match="differs in: method"):
        quantize(model, GPTQ(bits=4, group_size=32), windows, resume_dir=tmp_path / "run")
    with pytest.raises(CheckpointError, match="differs in: calibration"):
        quantize(model, method, windows.flip(0), resume_dir=tmp_path / "run")
    (tmp_path / "run" / "block-0001.safetensors").write_bytes(b"\x08truncated")
    with pytest.raises(CheckpointError, match=r"block-0001\.safetensors is damaged"):
        quantize(model, method, windows, resume_dir=tmp_path / "run")


def test_auto_group_size() -> None:
    assert auto_group_size(tiny_model()) == 32  # widths 64 and 96
