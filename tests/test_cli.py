"""The command line: exit status 2 and one sentence for whatever is wrong; JSON that parses; Python's own numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lqedu
from lqedu import cli
from lqedu.checkpoint.card import Calibration, Quality
from tests.models_tiny import tiny_model


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-sized word tokenizer, as a folder in the Hub's layout."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    words = Tokenizer(WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, 128)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tiny_model(blocks=2).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = torch.randint(1, 128, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in ids))
    return path


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command in this process: (exit status, stdout, stderr)."""
    old = sys.argv
    sys.argv = ["lqedu", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = old
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def quantize_arguments(folder: Path, text: Path, out: Path, *more: object) -> list[object]:
    return ["quantize", folder, "--method", "gptq", "--bits", 3, "--calibration", text, "--windows", 4, "--length", 32,
            "--out", out, *more]  # fmt: skip


def test_quantize_eval_round_trip(
    tiny_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    quality = ["--quality", text_file, "--tokens", 256]
    status, stdout, _ = run(*quantize_arguments(tiny_folder, text_file, out, "--json", *quality), capsys=capsys)
    assert status == 0
    summary = json.loads(stdout)
    assert summary["method"]["options"]["group_size"] == 32  # auto: the largest of 128, 64, 32 that divides 64 and 96
    assert summary["bits_per_weight"] == pytest.approx(3 + 16 / 32 + 8 / 64, abs=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing unfinished is left

    model, tokenizer = lqedu.load_model(tiny_folder)
    windows = lqedu.token_windows(tokenizer, text_file.read_text(), length=32, count=4, seed=0)
    quantized = lqedu.quantize(model, lqedu.methods.GPTQ(bits=3, group_size=32), windows)
    evaluation = lqedu.token_windows(tokenizer, text_file.read_text(), length=32, count=8)
    want = lqedu.perplexity(quantized, evaluation)
    status, stdout, _ = run(
        "eval", out, "--corpus", text_file, "--length", 32, "--tokens", 256, "--json", capsys=capsys
    )
    assert status == 0
    assert json.loads(stdout)["ppl"] == want.ppl  # to the last bit
    facts = lqedu.load_model(out)[0].lqedu_facts
    assert (facts.base_model, facts.base_sha256) == (tiny_folder.name, lqedu.models.load.weights_sha256(model))
    assert facts.calibration == Calibration.of(text_file.name, windows, 0)
    assert facts.quality == (Quality.of(text_file.name, want, lqedu.perplexity(model, evaluation)),)
    assert f"| {want.ppl:.3f} |" in (out / "README.md").read_text()
    one_window = ["eval", out, "--corpus", text_file, "--length", 32, "--tokens", 32, "--json"]
    assert json.loads(run(*one_window, capsys=capsys)[1])["stderr"] is None


def test_streaming_says_and_writes_the_same(
    tiny_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for name, stream in (("a", []), ("b", ["--stream"])):
        arguments = quantize_arguments(
            tiny_folder, text_file, tmp_path / name, "--dtype", "bfloat16", "--json", *stream
        )
        status, stdout, stderr = run(*arguments, capsys=capsys)
        assert status == 0, stderr
        said.append(json.loads(stdout) | {"out": ""})
        said[-1]["bytes"].pop("files")
    assert said[0] == said[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a" / "README.md").read_bytes() == (tmp_path / "b" / "README.md").read_bytes()
    model, _ = lqedu.load_model(tmp_path / "b", dtype=torch.bfloat16)
    want = lqedu.load_model(tmp_path / "a", dtype=torch.bfloat16)[0].state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    for options, sentence in (
        (["--method", "spinquant", "--stream"], "SpinQuant trains with gradients through the whole model"),
        (["--method", "rtn", "--quality", "sotu", "--stream"], "--quality needs the whole models in memory"),
        (["--method", "rtn", "--dtype", "int8"], "--dtype is float32, bfloat16 or float16, got 'int8'"),
        (["--method", "rtn", "--device", "nonsense", "--stream"], "unknown device 'nonsense'"),
    ):
        status, _, stderr = run("quantize", tiny_folder, *options, "--out", tmp_path / "c", capsys=capsys)
        assert status == 2 and sentence in stderr and len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / "c").exists()


def test_compare_and_methods(tiny_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--calibration", text_file, "--corpus", text_file, "--windows", 4, "--length", 32, "--tokens", 256]
    status, stdout, _ = run("compare", tiny_folder, "--methods", "rtn,gptq", *options, "--json", capsys=capsys)
    assert status == 0
    rows = json.loads(stdout)["rows"]
    assert [row["method"] for row in rows] == ["dense", "rtn", "gptq"]
    assert rows[1]["bits_per_weight"] == rows[2]["bits_per_weight"]
    status, stdout, _ = run("compare", tiny_folder, "--methods", "rtn", *options, capsys=capsys)
    assert status == 0
    assert "bits per weight" in stdout

    status, stdout, _ = run("methods", "--json", capsys=capsys)
    assert status == 0
    assert {row["name"] for row in json.loads(stdout)["methods"]} == set(lqedu.methods.available())
    assert run("methods", capsys=capsys)[0] == 0
    status, stdout, _ = run("doctor", "--json", capsys=capsys)
    assert status == 0
    assert json.loads(stdout)["torch"] == torch.__version__


def test_compare_scores_tasks_paired_by_item(tiny_folder, text_file, tmp_path, capsys):
    rows = [
        {"goal": f"w{i} w{i + 1}", "sol1": f"w{3 * i + 1} w{i + 2}", "sol2": f"w{2 * i + 5}", "label": i % 2}
        for i in range(1, 13)
    ]
    task = tmp_path / "piqa.jsonl"
    task.write_text("\n".join(map(json.dumps, rows)))
    options = ["--calibration", text_file, "--corpus", text_file, "--windows", 4, "--length", 32, "--tokens", 64]
    options += ["--methods", "rtn,fp8,hqq", "--bits", 2, "--group-size", 32, "--tasks", task, "--items", 10]
    status, stdout, stderr = run("compare", tiny_folder, *options, "--json", capsys=capsys)
    assert status == 0, stderr
    assert "note: --bits says nothing to fp8, which has no choice of bits" in stderr
    found = json.loads(stdout)
    assert found["items"] == {"piqa": 10}
    model, tokenizer = lqedu.load_model(tiny_folder)
    items = lqedu.evaluation.load_task(task, limit=10)
    rtn = lqedu.quantize(model, lqedu.methods.RTN(bits=2, group_size=32))
    dense, rounded = (lqedu.evaluation.score(m, tokenizer, items) for m in (model, rtn))
    moved = lqedu.evaluation.paired_scores(rounded, dense)
    first, second = (row["tasks"]["piqa"] for row in found["rows"][:2])
    assert (first["acc"], first["delta_acc"], first["delta_acc_norm_stderr"]) == (dense.acc, 0.0, 0.0)
    assert (second["acc_norm"], second["acc_norm_stderr"]) == (rounded.acc_norm, rounded.acc_norm_stderr)
    assert (second["delta_acc"], second["delta_acc_stderr"]) == (moved.delta_acc, moved.acc_stderr)
    assert (second["delta_acc_norm"], second["delta_acc_norm_stderr"]) == (moved.delta_acc_norm, moved.acc_norm_stderr)

    status, stdout, stderr = run("compare", tiny_folder, *options, capsys=capsys)
    assert status == 0, stderr
    page = " ".join(stdout.split())
    assert "piqa" in page and f"{100 * first['acc_norm']:.1f} ± {100 * first['acc_norm_stderr']:.1f}" in stdout
    assert f"{100 * second['acc_norm']:.1f}" in stdout and f"({100 * second['delta_acc_norm']:+.1f}" in stdout
    for more, message in (
        (["--tasks", "nothing"], "no task 'nothing'; there are piqa"),
        (["--tasks", ","], "--tasks names no task"),
        (["--items", "3"], "--items says how many items of --tasks"),
    ):
        status, stdout, stderr = run("compare", tiny_folder, *options[:10], *more, capsys=capsys)
        assert status == 2 and message in stderr and stdout == ""


def test_without_bits_a_method_has_its_own(tiny_folder, text_file, tmp_path, capsys):
    for method, bits in (("quip", 2), ("rtn", 4), ("smoothquant", 8)):
        out = str(tmp_path / method)
        arguments = ("--calibration", str(text_file), "--windows", "4", "--length", "32", "--json")
        status, stdout, _ = run(
            "quantize", str(tiny_folder), "--method", method, "--out", out, *arguments, capsys=capsys
        )
        assert status == 0
        assert json.loads(stdout)["method"]["options"]["bits"] == bits


def test_what_a_method_did_otherwise_is_printed_and_saved(tiny_folder, text_file, tmp_path, capsys):
    _, tokenizer = lqedu.load_model(tiny_folder)
    config = tiny_model().config
    config.intermediate_size = 94
    type(tiny_model())(config).save_pretrained(tmp_path / "odd")
    tokenizer.save_pretrained(tmp_path / "odd")
    note = "the input of down_proj is transformed in blocks of 2: no Hadamard matrix of order 94 is constructed here"
    options = ("--method", "quarot", "--set", "rounding=nearest", "--out", tmp_path / "out", "--json")
    status, stdout, stderr = run("quantize", tmp_path / "odd", *options, capsys=capsys)
    assert status == 0, stderr
    assert f"note: quarot: {note}" in stderr.splitlines()
    assert json.loads(stdout)["notes"] == [note]
    assert lqedu.load_model(tmp_path / "out")[0].lqedu_notes == (note,)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["quantize", "MODEL", "--method", "magic", "--out", "OUT"], "unknown method 'magic'"),
        (["quantize", "no-such-model", "--method", "rtn", "--out", "OUT"], "no-such-model"),
        (
            ["quantize", "MODEL", "--method", "rtn", "--out", "OUT", "--bits", "1"],
            "bits is a whole number, from 2 to 8",
        ),
        (["quantize", "MODEL", "--method", "rtn", "--out", "OUT", "--group-size", "48"], "does not divide"),
        (["quantize", "MODEL", "--method", "rtn", "--out", "OUT", "--group-size", "many"], "--group-size"),
        (["quantize", "MODEL", "--method", "quip", "--out", "OUT", "--group-size", "32"], "has no groups"),
        (["quantize", "MODEL", "--method", "fp8", "--out", "OUT", "--bits", "4"], "no choice of bits"),
        (["quantize", "MODEL", "--method", "fp8", "--out", "OUT", "--set", "keep=dwn_proj"], "are q_proj, k_proj"),
        (["quantize", "MODEL", "--method", "rtn", "--out", "OUT", "--set", "sped=1"], "no option 'sped'"),
        (["quantize", "MODEL", "--method", "rtn", "--out", "OUT", "--set", "bits=four"], "must be int"),
        (["quantize", "MODEL", "--method", "rtn", "--out", "OUT", "--set", "bits"], "field=value"),
        (["quantize", "MODEL", "--method", "gptq", "--out", "OUT", "--set", "order=up"], "order is"),
        (["quantize", "MODEL", "--method", "gptq", "--out", "OUT", "--calibration", "EMPTY"], "no text"),
        (
            ["quantize", "MODEL", "--method", "gptq", "--out", "OUT", "--calibration", "TEXT", "--windows", "9000"],
            "9000",
        ),
        (["quantize", "MODEL", "--method", "gptq", "--out", "OUT", "--calibration", "nothing.txt"], "nothing.txt"),
        (["quantize", "MODEL", "--method", "rtn", "--out", "MODEL"], "exists already"),
        (["quantize", "MODEL", "--method", "rtn"], "--out"),
        (["quantize", "MODEL", "--method", "rtn", "--out", "OUT", "--speed", "9"], "--speed"),
        (["eval", "MODEL", "--corpus", "TEXT", "--tokens", "16", "--length", "32"], "less than one window"),
        (["eval", "EMPTYDIR"], "config"),
        (["compare", "MODEL", "--methods", ","], "no method"),
        (["fly"], "fly"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: list[str], match: str, tiny_folder: Path, text_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "emptydir").mkdir()
    stand_ins = {"MODEL": tiny_folder, "TEXT": text_file, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty.txt",
                 "EMPTYDIR": tmp_path / "emptydir"}  # fmt: skip
    status, stdout, stderr = run(*[stand_ins.get(a, a) for a in arguments], capsys=capsys)
    message = [line for line in stderr.splitlines() if line.startswith("lqedu: ")]
    assert status == 2
    assert stdout == ""
    assert len(message) == 1
    assert match in message[0]
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def test_killed_and_started_again_ends_with_identical_bytes(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """A real process, a real SIGKILL as soon as the first block is on disk, and the same command again."""
    deep = tmp_path / "deep"
    _, tokenizer = lqedu.load_model(tiny_folder)
    tiny_model(blocks=12).save_pretrained(deep)
    tokenizer.save_pretrained(deep)

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "lqedu", *map(str, quantize_arguments(deep, text_file, tmp_path / name))]

    environment = os.environ | {"PYTHONPATH": str(Path(lqedu.__file__).parents[1])}
    subprocess.run(command("whole"), check=True, env=environment, capture_output=True)
    killed = subprocess.Popen(command("again"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    unfinished = tmp_path / "again.unfinished"
    while not list(unfinished.glob("block-*.safetensors")) and killed.poll() is None:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "again").exists()
    assert 1 <= len(list(unfinished.glob("block-*.safetensors"))) < 12
    subprocess.run(command("again"), check=True, env=environment, capture_output=True)
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert not unfinished.exists()


def test_export(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, out = tmp_path / "made", tmp_path / "out"
    status, *_ = run("quantize", tiny_folder, "--method", "rtn", "--out", made, capsys=capsys)
    assert status == 0
    status, stdout, _ = run("export", made, "--format", "gptq", "--out", out, "--json", capsys=capsys)
    assert status == 0
    summary = json.loads(stdout)
    assert (summary["format"], summary["method"]["name"]) == ("gptq", "rtn")
    assert summary["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    want, got = lqedu.load_model(made)[0], lqedu.load_model(out)[0]
    assert all(torch.equal(tensor, got.state_dict()[name]) for name, tensor in want.state_dict().items())
    status, stdout, _ = run("export", out, "--format", "awq", "--out", tmp_path / "again", capsys=capsys)
    assert status == 0 and "every code, scale and zero point" in stdout


def test_export_refuses_in_one_sentence(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    assert run("quantize", tiny_folder, "--method", "hqq", "--out", made, capsys=capsys)[0] == 0
    status, stdout, stderr = run("export", made, "--format", "awq", "--out", tmp_path / "x", "--json", capsys=capsys)
    *table, sentence = stderr.strip().splitlines()
    assert (status, stdout) == (2, "")
    assert sentence.startswith("lqedu: model.layers.0.self_attn.q_proj: its zero points are floats")
    assert table[0] == "What goes where (- is refused):" and any(line.split()[0] == "smoothquant" for line in table)
    for arguments, match in [
        ((made, "--format", "gguf", "--out", tmp_path / "x"), "--format is one of compressed-tensors, gptq"),
        (
            (tiny_folder, "--format", "awq", "--out", tmp_path / "x"),
            "holds no quantized model; 'lqedu quantize' writes one",
        ),
        ((tmp_path / "nowhere", "--format", "awq", "--out", tmp_path / "x"), "holds no quantized model"),
        ((made, "--format", "awq", "--out", made), "exists already"),
    ]:
        status, stdout, stderr = run("export", *arguments, capsys=capsys)
        assert (status, stdout) == (2, "") and match in stderr and len(stderr.strip().splitlines()) == 1, stderr
    assert not (tmp_path / "x").exists()
