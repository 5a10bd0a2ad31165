"""The model card: what it says is what the model, the windows and the perplexities say, and nothing breaks its form."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast

import lqedu
from lqedu.checkpoint import load, save
from lqedu.checkpoint.card import CARD, Calibration, Facts, Quality, card_of, model_card
from lqedu.errors import CheckpointError, UsageError
from lqedu.evaluation.perplexity import Perplexity, paired
from lqedu.methods import GPTQ, RTN
from lqedu.methods.pipeline import quantize
from lqedu.runtime import quantize_kv, quantized_linears
from tests.models_tiny import tiny_model, tiny_windows

METHOD = {"name": "gptq", "options": {"bits": 4, "group_size": 64, "order": "natural"}}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")))


def _facts() -> Facts:
    dense, windows = tiny_model(), tiny_windows(3, 16, seed=1)
    quantized = quantize(dense, RTN(bits=2, group_size=32))
    quality = Quality.of("sotu", lqedu.perplexity(quantized, windows), lqedu.perplexity(dense, windows))
    return Facts("org/some-model", "0" * 64, Calibration.of("c4", tiny_windows(2, 8), 7), (quality,))


def test_how_zero_points_are_loaded_is_said_where_it_matters() -> None:
    cards = {
        name: model_card(METHOD, bits_per_weight=4.25, format=name) for name in ("compressed-tensors", "gptq", "lqedu")
    }
    assert [name for name, card in cards.items() if "CompressedTensorsConfig(dequantize=True)" in card] == [
        "compressed-tensors"
    ]


def test_the_head_is_what_the_hub_reads() -> None:
    facts = _facts()
    card = ModelCard(model_card(METHOD, bits_per_weight=4.25, facts=facts))
    assert card.data.base_model == "org/some-model"
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "lqedu"
    assert {"lqedu", "quantized", "gptq", "4-bit"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        "sotu",
        "perplexity",
        facts.quality[0].ppl,
    )
    assert (
        ModelCard(model_card(METHOD, bits_per_weight=4.25, facts=facts, format="gptq")).data.library_name
        == "transformers"
    )


def test_what_was_measured_is_paired_by_window() -> None:
    dense, windows = tiny_model(), tiny_windows(3, 16, seed=1)
    a = lqedu.perplexity(quantize(dense, RTN(bits=2, group_size=32)), windows)
    b = lqedu.perplexity(dense, windows)
    quality = Quality.of("sotu", a, b)
    assert (quality.ppl, quality.dense_ppl, quality.tokens, quality.windows) == (a.ppl, b.ppl, 48, 3)
    assert (quality.delta_nll, quality.delta_stderr) == (paired(a, b).delta_nll, paired(a, b).stderr)
    row = next(line for line in model_card(METHOD, bits_per_weight=4, facts=Facts(quality=(quality,))).splitlines()
               if line.startswith("| sotu"))  # fmt: skip
    for number in (f"{a.ppl:.3f}", f"{b.ppl:.3f}", f"{quality.delta_nll:+.4f} ± {quality.delta_stderr:.4f}"):
        assert number in row
    with pytest.raises(UsageError, match="different windows"):
        Quality.of("sotu", a, lqedu.perplexity(dense, windows.flip(0)))


def test_numbers_that_do_not_exist_are_not_printed() -> None:
    one = Perplexity(math.inf, 800.0, math.nan, 8, (800.0,), "0")
    facts = Facts(quality=(Quality.of("sotu", one),))
    json.dumps(facts.to_dict(), allow_nan=False)
    text = model_card(METHOD, bits_per_weight=4.0, facts=facts)
    assert "above any float" in text and "nan" not in text and "model-index" not in text
    assert "Not measured" in model_card(METHOD, bits_per_weight=4.0)


def test_a_path_of_this_machine_is_not_published(tmp_path: Path) -> None:
    windows = tiny_windows(2, 8)
    assert Calibration.of(str(tmp_path / "my.txt"), windows).text == "my.txt"
    model = quantize(tiny_model(), RTN(group_size=32))
    model.config.name_or_path = str(tmp_path / "model")
    assert str(tmp_path) not in card_of(model) and "# model, quantized by rtn" in card_of(model)


def test_no_name_and_no_note_breaks_the_form() -> None:
    hostile = "a | b\n# c <script> --- \"': {"
    facts = Facts(base_model=hostile, quality=(Quality(hostile, 1, 2, 3.0, 1.0, None, None, None, None, "0"),))
    text = model_card(METHOD, bits_per_weight=4.0, facts=facts, notes=(hostile,))
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["model-index"][0]["results"][0]["dataset"]["name"] == hostile
    assert "<script>" not in body and "a \\| b # c" in body
    (title,) = (line for line in body.split("```")[0].splitlines() if line.startswith("# "))
    assert title.endswith("quantized by gptq")


@pytest.mark.parametrize("facts", [Facts(), _facts()], ids=["nothing known", "all known"])
def test_facts_survive_the_folder(facts: Facts, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = quantize(tiny_model(), GPTQ(group_size=32), tiny_windows())
    model = quantize_kv(model, 4)
    folder = save(model, tmp_path / "a", tokenizer, facts=facts)
    back, _ = load(folder)
    assert back.lqedu_facts == facts
    again = save(back, tmp_path / "b")
    assert (again / CARD).read_bytes() == (folder / CARD).read_bytes()
    text = (folder / CARD).read_text()
    for name, value in back.lqedu_method["options"].items():
        assert f"| {name} | {value} |" in text
    layers = quantized_linears(model).values()
    bits = sum(8 * layer.nbytes for layer in layers) / sum(layer.quantized.codes.numel() for layer in layers)
    assert f"{bits:.3f} bits per weight" in text and lqedu.__version__ in text
    assert '"bits": 4' in text  # of keys and values


def test_a_folder_without_facts_loads(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save(quantize(tiny_model(), RTN(group_size=32)), tmp_path / "a", tokenizer)
    record = json.loads((folder / "lqedu.json").read_text())
    del record["facts"]
    (folder / "lqedu.json").write_text(json.dumps(record))
    assert load(folder)[0].lqedu_facts == Facts()


@pytest.mark.parametrize(
    "facts", [3, {"more": 1}, {"calibration": {"text": "c4"}}, {"quality": [3]}, {"base_model": 3}, {"quality": 3}]
)
def test_facts_of_another_shape_are_refused(facts: object, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save(quantize(tiny_model(), RTN(group_size=32)), tmp_path / "a", tokenizer)
    record = json.loads((folder / "lqedu.json").read_text())
    (folder / "lqedu.json").write_text(json.dumps(record | {"facts": facts}))
    with pytest.raises(CheckpointError, match="model card"):
        load(folder)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError, match="no model card for the format 'pickle'"):
        model_card(METHOD, bits_per_weight=4.0, format="pickle")


def test_the_digest_is_of_shape_and_ids() -> None:
    a, b = (
        Calibration.of("c4", torch.zeros(2, 6, dtype=torch.int64)),
        Calibration.of("c4", torch.zeros(3, 4, dtype=torch.int64)),
    )
    assert a.sha256 != b.sha256 and (a.windows, a.length, a.seed) == (2, 6, None)
