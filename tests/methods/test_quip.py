"""QuIP on whole models: better than its parts, exact when saved, loaded and resumed, clear about what it cannot do."""

import json
from pathlib import Path

import pytest
import torch

import lqedu
from lqedu.errors import CalibrationError, GridError, UsageError
from lqedu.methods import GPTQ, RTN, QuIP, build
from lqedu.methods import pipeline as pipeline_module
from lqedu.methods.pipeline import quantize
from lqedu.models.anatomy import linears
from lqedu.rounding import gptq
from lqedu.runtime import quantized_linears
from lqedu.runtime.incoherent import IncoherentLinear
from lqedu.transforms.incoherence import gaussian_range
from tests import problems
from tests.compare import assert_codes_equal, relative_error
from tests.models_tiny import ARCHITECTURES, tiny_model, tiny_windows
from tests.test_cli import run, text_file, tiny_folder  # noqa: F401  (fixtures)


def difficult(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with outliers and correlated inputs of uneven size: coherent in both senses."""
    return problems.weight(rows, columns, seed=seed), problems.hessian(columns, seed=seed + 50)


def test_beats_rtn_and_gptq_where_weights_are_coherent() -> None:
    """One scale for a matrix with outliers ruins them both; rotated, it does not."""
    for seed in range(4):
        w, h = difficult(48, 96, seed)
        quip = QuIP().quantize_linear(w, h)[1].proxy_loss
        plain = QuIP(rotate=False).quantize_linear(w, h)[1].proxy_loss
        channel = GPTQ(bits=2, group_size=None).quantize_linear(w, h)[1].proxy_loss
        rtn = RTN(bits=2, group_size=None).quantize_linear(w, h)[1].proxy_loss
        assert quip < 0.8 * min(plain, channel, rtn)


def test_ldlq_in_the_rotated_basis_is_gptq_there() -> None:
    w, h = difficult(24, 48, 1)
    method = QuIP(passes=0, grid_range="reference")
    stored, _ = method.quantize_linear(w.double(), h.double())
    t = stored.transforms
    want = gptq(t.weight(w.double()), t.hessian(h.double()), method.grid())[0]
    assert_codes_equal(stored.rotated.codes, want.codes)


def test_reports_the_loss_of_the_undone_weight() -> None:
    w, h = difficult(24, 48, 2)
    for method in (QuIP(), QuIP(rescale=True), QuIP(rotate=False), QuIP(passes=0), QuIP(bits=4)):
        stored, report = method.quantize_linear(w, h)
        error = w - stored.dequantize()
        assert report.proxy_loss == pytest.approx(lqedu.rounding.proxy_loss(error, h), rel=1e-3)
        assert 0 < report.flips < 1


def test_range_and_passes() -> None:
    w, h = difficult(24, 48, 3)
    for bits in (2, 3, 4):
        scale, zero = QuIP(bits=bits).fit(w)
        rms = float(w.square().mean().sqrt())
        assert float(scale) * (2**bits - 1) / 2 == pytest.approx(gaussian_range(bits) * rms, rel=1e-3)
        assert float(zero) == (2**bits - 1) / 2
        reference = QuIP(bits=bits, grid_range="reference").fit(w)[0]
        assert float(reference) * (2**bits - 1) / 2 == pytest.approx(2.4 * rms, rel=1e-3)
    losses = [QuIP(passes=p).quantize_linear(w, h)[1].proxy_loss for p in (0, 1, 5)]
    assert losses[2] < losses[0]
    for reach in ("gaussian", "reference"):
        zeros = QuIP(grid_range=reach).quantize_linear(torch.zeros(4, 6), torch.eye(6))[0]
        assert not zeros.dequantize().any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str) -> None:
    model, windows = tiny_model(architecture), tiny_windows()
    result = quantize(model, QuIP(bits=4), windows)
    layers = quantized_linears(result)
    assert set(layers) == set(linears(model))
    assert all(isinstance(layer, IncoherentLinear) for layer in layers.values())
    dense = {name: layer.quantized.dequantize() for name, layer in layers.items()}
    with torch.no_grad():
        packed = result(windows).logits
        for name, layer in layers.items():
            linear = torch.nn.Linear(layer.in_features, layer.out_features)
            linear.weight, linear.bias = torch.nn.Parameter(dense[name]), layer.bias
            result.set_submodule(name, linear)
        assert relative_error(packed, result(windows).logits) <= 1e-5


def test_a_rank_deficient_hessian_is_damped_and_a_singular_one_refused() -> None:
    w = problems.weight(8, 48, seed=4)
    h = problems.hessian(48, seed=5, tokens=3)  # rank 3
    stored, report = QuIP().quantize_linear(w, h)
    assert bool(torch.isfinite(stored.dequantize()).all())
    assert report.damping == 0.01
    with pytest.raises(CalibrationError, match="not positive definite"):
        QuIP().quantize_linear(w, torch.zeros(48, 48) - torch.eye(48))
    model, windows = tiny_model(blocks=1), tiny_windows(1, 3)
    result = quantize(model, QuIP(), windows)
    assert {report.damping for report in result.lqedu_reports.values()} == {0.01}  # 3 tokens, and no damping raised
    with torch.no_grad():
        assert bool(torch.isfinite(result(windows).logits).all())


def test_dead_inputs_are_counted_and_cost_nothing() -> None:
    w, h = difficult(8, 24, 6)
    h[3], h[:, 3] = 0.0, 0.0
    for rescale in (False, True):
        _, report = QuIP(rescale=rescale).quantize_linear(w, h)
        assert report.dead_columns == 1


def test_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model(blocks=3), tiny_windows()
    whole = quantize(model, QuIP(), windows)
    original, seen = pipeline_module._quantize_block, []

    def dies_at_the_third(*args, **kwargs):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(pipeline_module, "_quantize_block", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, QuIP(), windows, resume_dir=tmp_path / "run")
    resumed = quantize(model, QuIP(), windows, resume_dir=tmp_path / "run")
    assert len(seen) == 4
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert whole.lqedu_reports == resumed.lqedu_reports


def test_command_line_saves_and_loads_the_same_bits(
    tiny_folder: Path,  # noqa: F811
    text_file: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ("--calibration", text_file, "--windows", 4, "--length", 32, "--set", "passes=2")
    status, stdout, stderr = run(
        "quantize", tiny_folder, "--method", "quip", "--bits", 3, "--out", out, *arguments, "--json", capsys=capsys
    )
    assert status == 0, stderr
    record = json.loads((out / "lqedu.json").read_text())
    assert record["method"]["options"]["passes"] == 2
    assert {layer["kind"] for layer in record["layers"].values()} == {"incoherent"}
    loaded, tokenizer = lqedu.load_model(out)
    dense, _ = lqedu.load_model(tiny_folder)
    windows = lqedu.token_windows(tokenizer, text_file.read_text(), length=32, count=4, seed=0)
    again = quantize(dense, build("quip", {"bits": 3, "passes": 2}), windows)
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, again(windows).logits)
    stored = sum(layer.nbytes for layer in quantized_linears(loaded).values())
    weights = sum(layer.in_features * layer.out_features for layer in quantized_linears(loaded).values())
    assert json.loads(stdout)["bits_per_weight"] == pytest.approx(8 * stored / weights)
    for command in (("eval", out), ("compare", tiny_folder, "--methods", "rtn,quip")):
        extra = ("--calibration", text_file, "--windows", 4) if command[0] == "compare" else ()
        status, stdout, stderr = run(
            *command, "--corpus", text_file, "--length", 32, "--tokens", 128, *extra, "--json", capsys=capsys
        )
        assert status == 0, stderr


@pytest.mark.parametrize(
    "options",
    [
        *({"damping": value} for value in (0.0, float("inf"), "x")),
        *({"passes": value} for value in (-1, 1.5)),
        *({"seed": value} for value in (-1, 1.5, 2**62)),
        *({"bits": value} for value in (1, 9)),
        {"grid_range": "wide"},
    ],
)
def test_bad_options(options: dict) -> None:
    with pytest.raises((UsageError, GridError)):
        QuIP(**options)


def test_seeds_change_the_rotation_only() -> None:
    w, h = difficult(24, 48, 7)
    one, same, other = (QuIP(seed=s).quantize_linear(w, h) for s in (0, 0, 1))
    assert torch.equal(one[0].dequantize(), same[0].dequantize())
    assert not torch.equal(one[0].dequantize(), other[0].dequantize())
    assert other[1].proxy_loss == pytest.approx(one[1].proxy_loss, rel=0.5)
