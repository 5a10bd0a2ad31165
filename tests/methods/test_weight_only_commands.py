"""AWQ, HQQ and QuIP through the same command line: saved, reloaded, resumed to the same bytes, evaluated, refused."""

import json
from pathlib import Path

import pytest
import torch

import lqedu
from lqedu.methods import HQQ, RTN, build
from lqedu.methods import pipeline as pipeline_module
from lqedu.methods.pipeline import quantize
from lqedu.rounding import hqq
from lqedu.runtime import quantized_linears
from tests.models_tiny import ARCHITECTURES, tiny_model
from tests.test_cli import run, text_file, tiny_folder  # noqa: F401  (fixtures)

METHODS = ("awq", "hqq", "quip")


def _arguments(folder: Path, text: Path, method: str, out: Path) -> list[object]:
    options = ["--group-size", 32] if method != "quip" else []
    options += ["--set", "search_tokens=64"] if method == "awq" else []
    return ["quantize", folder, "--method", method, "--bits", 3, *options, "--calibration", text, "--windows", 4,
            "--length", 32, "--out", out, "--json"]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_started_again_ends_with_the_same_bytes_and_is_evaluated(
    method: str, tiny_folder: Path, text_file: Path, tmp_path: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    status, stdout, stderr = run(*_arguments(tiny_folder, text_file, method, tmp_path / "whole"), capsys=capsys)
    assert status == 0, stderr
    options = json.loads(stdout)["method"]["options"]

    original, seen = pipeline_module._quantize_block, []

    def dies_at_the_second(*args: object, **kwargs: object) -> object:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(pipeline_module, "_quantize_block", dies_at_the_second)
    again = _arguments(tiny_folder, text_file, method, tmp_path / "again")
    status, stdout, stderr = run(*again, capsys=capsys)
    assert status == 130
    assert "the same command goes on where it stopped" in stderr
    assert not (tmp_path / "again").exists()
    assert run(*again, capsys=capsys)[0] == 0
    assert len(seen) == 3  # two blocks: the first was not computed again
    assert not (tmp_path / "again.unfinished").exists()
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name

    dense, tokenizer = lqedu.load_model(tiny_folder)
    calibration = lqedu.token_windows(tokenizer, text_file.read_text(), length=32, count=4, seed=0)
    windows = lqedu.token_windows(tokenizer, text_file.read_text(), length=32, count=8)
    want = lqedu.perplexity(quantize(dense, build(method, options), calibration), windows)
    evaluation = ["eval", tmp_path / "again", "--corpus", text_file, "--length", 32, "--tokens", 256, "--json"]
    status, stdout, stderr = run(*evaluation, capsys=capsys)
    assert status == 0, stderr
    assert json.loads(stdout)["nll"] == want.nll


@pytest.mark.parametrize(
    ("method", "option", "match"),
    [
        ("awq", "alphas=0", "alphas is a whole number"),
        ("awq", "alphas=2.5", "must be int"),
        ("awq", "clip=maybe", "must be bool"),
        ("awq", "search_tokens=-1", "search_tokens is a whole number"),
        ("hqq", "p=0", "p is a finite number, above 0 and at most 1"),
        ("hqq", "beta=-1", "beta is a finite number, above 0"),
        ("hqq", "kappa=0.5", "kappa is a finite number, at least 1"),
        ("hqq", "iterations=-1", "at least 0"),
        ("hqq", "axis=2", "axis is 0 or 1"),
        ("quip", "grid_range=wide", "grid_range is"),
        ("quip", "damping=Infinity", "damping is a finite number, above 0"),
        ("quip", "passes=-1", "passes is a whole number"),
        ("quip", "seed=9223372036854775808", "seed is a whole number"),
        ("quip", "group_size=64", "no option 'group_size'"),
    ],
)
def test_bad_options_are_one_sentence_before_any_work(
    method: str, option: str, match: str, tiny_folder: Path, text_file: Path, tmp_path: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = _arguments(tiny_folder, text_file, method, tmp_path / "out")
    status, stdout, stderr = run(*arguments, "--set", option, capsys=capsys)
    message = [line for line in stderr.splitlines() if line.startswith("lqedu: ")]
    assert (status, stdout, len(message)) == (2, "", 1)
    assert match in message[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_needs_no_text_and_is_the_function_on_every_layer(architecture: str, axis: int) -> None:
    model = tiny_model(architecture)
    method = HQQ(bits=3, group_size=32, axis=axis)
    layers = quantized_linears(quantize(model, method))
    nearest = quantized_linears(quantize(model, RTN(bits=3, group_size=32, zero_point="float")))
    assert layers.keys() == nearest.keys()
    for name, layer in layers.items():
        weight = model.get_submodule(name).weight.detach()
        assert torch.equal(layer.quantized.codes, hqq(weight, method.grid())[0].codes), name
