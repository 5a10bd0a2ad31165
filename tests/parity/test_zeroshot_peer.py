"""Our zero-shot scoring against lm-eval's on the same items (goldens/zeroshot.json): what it asks, what it gets, what it decides."""

import json
from pathlib import Path

import pytest

import lqedu
from lqedu.evaluation import load_task, score
from lqedu.evaluation.tasks import TASKS
from lqedu.models import weights_sha256
from tests.parity.compare_zeroshot import differences

KEPT = json.loads((Path(__file__).parent / "goldens" / "zeroshot.json").read_text(encoding="utf-8"))


def items(name: str, folder: Path):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in KEPT["rows"][name]))
    return load_task(file)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_asks_what_the_peer_asks(name, tmp_path):
    asked = [
        [[context, f" {text}"] for context, text in zip(item.contexts, item.continuations, strict=True)]
        for item in items(name, tmp_path)
    ]
    assert asked == [item["requests"] for item in KEPT["peer"][name]]


def test_the_bench_model_answers_as_it_answers_the_peer(tmp_path):
    model, tokenizer = lqedu.load_model("smollm2-135m")
    assert weights_sha256(model) == KEPT["weights_sha256"]
    for name in TASKS:
        result = score(model, tokenizer, items(name, tmp_path))
        for got, want in zip(result.log_likelihoods, KEPT["peer"][name], strict=True):
            assert got == pytest.approx(want["log_likelihoods"], abs=1e-3), name
        assert [int(right) for right in result.correct] == [item["acc"] for item in KEPT["peer"][name]]
        if TASKS[name].normalized:
            assert [int(right) for right in result.correct_norm] == [item["acc_norm"] for item in KEPT["peer"][name]]


@pytest.mark.parametrize("name", ["piqa", "arc_easy", "arc_challenge", "hellaswag"])
def test_what_compare_zeroshot_compares_with(name):
    """Enough items of each task, on which the two metrics do not always agree; and a difference is seen."""
    kept = KEPT["long"][name]
    assert len(kept["acc"]) == len(kept["acc_norm"]) == len(kept["log_likelihoods"]) >= 200
    assert kept["acc"] != kept["acc_norm"] and 0.2 < sum(kept["acc"]) / len(kept["acc"]) < 0.8
    assert differences(kept, kept) == (0.0, [])
    other = kept | {"acc_norm": [1 - right if item == 3 else right for item, right in enumerate(kept["acc_norm"])]}
    assert differences(other, kept)[1] == [3]
