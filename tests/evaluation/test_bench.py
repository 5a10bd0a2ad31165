"""``lqedu bench``: rows that parse, a result file with its origin, one sentence for what is wrong."""

import json
from pathlib import Path

import pytest
import torch

from lqedu.book.results import read_result
from lqedu.evaluation import bench, throughput
from lqedu.evaluation.roofline import ModelShape
from tests.models_tiny import tiny_model
from tests.test_cli import run

pytest.importorskip("triton", reason="the engine runs lqedu_kernels, or their references, which need Triton")

TINY = ModelShape(layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=32, vocabulary=97)
SMALL = ["--batches", "1,2", "--contexts", "40", "--steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)


def test_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LQEDU_COMMIT", "0" * 40)
    out = tmp_path / "throughput_tiny.json"
    status, stdout, stderr = run(
        "bench", "--shape", "tiny", "--formats", "fp16,w4a8kv4", *SMALL, "--json", "--out", out, capsys=capsys
    )
    printed, stored = json.loads(stdout), read_result(out)
    assert status == 0
    assert printed["weights"] == "random" and any("random numbers" in note for note in printed["notes"])
    assert "references" in printed["notes"][1] and "random numbers" in stored["notes"] and "random numbers" in stderr
    kinds = ["memory", "prefill", "decode", "decode"]
    assert [row["name"] for row in printed["rows"]] == [row["name"] for row in stored["values"]] == 2 * kinds
    assert stored["kind"] == "measured" and stored["configuration"]["sizes"]["hidden"] == 128
    decode = stored["values"][2]
    assert decode["tokens_per_s"] == pytest.approx(1 / sorted(decode["samples"])[1])
    columns, lines = bench.table(printed["rows"])
    assert [line[columns.index("x")] for line in lines] == [
        "",
        "1.00",
        "1.00",
        "1.00",
        "",
        *(line[5] for line in lines[5:]),
    ]
    assert all(line[5] for line in lines[5:])


def test_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    tiny_model(blocks=2).save_pretrained(folder)
    _tokenizer(folder)
    status, stdout, _ = run("bench", folder, *SMALL, "--json", capsys=capsys)
    printed = json.loads(stdout)
    assert status == 0 and "weights" not in printed
    assert [row["name"] for row in printed["rows"]] == ["prefill", "decode", "decode"]
    status, stdout, _ = run("bench", folder, *SMALL, capsys=capsys)
    assert status == 0 and "tokens/s" in stdout and "GB" in stdout


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def test_what_is_done_stays_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that breaks off has written the formats before."""
    monkeypatch.setenv("LQEDU_COMMIT", "0" * 40)
    real = throughput._decode

    def breaks(decoder, *args):
        if decoder.path is not None:
            raise KeyboardInterrupt
        return real(decoder, *args)

    monkeypatch.setattr(throughput, "_decode", breaks)
    out = tmp_path / "partial.json"
    status, _, _ = run("bench", "--shape", "tiny", "--formats", "fp16,w4a8kv4", *SMALL, "--out", out, capsys=capsys)
    assert status == 130
    assert {row["format"] for row in read_result(out)["values"] if row["name"] == "decode"} == {"fp16"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "one of the two"),
        (["MODEL", "--shape", "tiny"], "one of the two"),
        (["--shape", "llama-9"], "--shape is llama-2-7b or llama-3-8b"),
        (["--shape", "tiny", "--formats", "w3"], "formats are fp16-transformers"),
        (["--shape", "tiny", "--formats", ","], "formats are fp16-transformers"),
        (["smollm2-135m", "--formats", "fp16"], "a model is measured in the format it has"),
        (["--shape", "tiny", "--batches", "1,x"], "--batches takes whole numbers"),
        (["--shape", "tiny", "--contexts", "0"], "--contexts takes whole numbers"),
        (["--shape", "tiny", "--steps", "0"], "steps"),
        (["--shape", "tiny", "--device", "tpu"], "--device is cpu, cuda or cuda:N"),
        (["--shape", "tiny", "--out", "Big.json"], "--out is a file such as"),
        (["--shape", "tiny", "--out", "out.txt"], "--out is a file such as"),
    ],
)
def test_bad_input(arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, stdout, stderr = run("bench", *arguments, capsys=capsys)
    message = [line for line in stderr.splitlines() if line.startswith("lqedu: ")]
    assert (status, stdout, len(message)) == (2, "", 1)
    assert match in message[0] and "Traceback" not in stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, stderr = run("bench", "--shape", "tiny", "--device", "cuda", capsys=capsys)
    assert status == 2 and "torch finds none" in stderr
