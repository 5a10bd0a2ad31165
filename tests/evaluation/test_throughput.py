"""What is predicted of memory is what tensors take; rows hold what they say; random models are those of their formats."""

import pytest
import torch

from lqedu.errors import UsageError
from lqedu.evaluation.memory import largest_batch, page_bytes, predict, step_bytes, weight_bytes
from lqedu.evaluation.random_models import FORMATS, SHAPES, random_decoder
from lqedu.evaluation.roofline import ModelShape, kv_bytes_per_token
from lqedu.evaluation.throughput import (
    TRANSFORMERS,
    WARM,
    _Static,
    decoder_page_bytes,
    fill_pages,
    measure_model,
    measure_shape,
    timed,
)
from lqedu.formats.kv import KVFloat8
from lqedu.runtime import quantize_kv
from lqedu.runtime.attention import AttentionPath
from lqedu.runtime.decoder import decoder_of
from lqedu.runtime.engine import Engine
from tests.models.on_kernels import SIZES
from tests.models.tiny import tiny_model

pytest.importorskip("triton", reason="the engine runs lqedu_kernels, or their references, which need Triton")

TINY = ModelShape(layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=32, vocabulary=97)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_predicted_bytes_are_those_of_the_tensors(name: str, tied: bool) -> None:
    shape = ModelShape(**(vars(TINY) | {"tied": tied}))
    decoder = random_decoder(shape, FORMATS[name], device="cpu", positions=100)
    assert decoder.nbytes == weight_bytes(shape, FORMATS[name], positions=100)
    engine = Engine(decoder, [100, 64, 65])
    assert engine.cache.nbytes == 5 * page_bytes(shape, FORMATS[name])
    assert decoder_page_bytes(decoder) == page_bytes(shape, FORMATS[name])
    memory = predict(shape, FORMATS[name], batch=3, tokens=100, positions=100)
    assert memory.total == decoder.nbytes + 6 * page_bytes(shape, FORMATS[name]) + step_bytes(shape, 3)


@pytest.mark.parametrize("key", [4, 8, "fp8", 16])
def test_pages_of_a_model(key: int | str) -> None:
    decoder = decoder_of(quantize_kv(tiny_model("llama", **SIZES), key), torch.float16)
    assert Engine(decoder, [1]).cache.nbytes == decoder_page_bytes(decoder)


@pytest.mark.parametrize("name", FORMATS)
def test_random_models_are_not_zero_and_finite(name: str) -> None:
    decoder = random_decoder(TINY, FORMATS[name], device="cpu", positions=100)
    engine = Engine(decoder, [100, 100])
    fill_pages(engine)
    engine.take_pages_as_read([70, 70])
    engine.tokens.copy_(torch.tensor([5, 9]))
    logits = engine.step()
    assert torch.isfinite(logits).all() and logits.std() > 0.1 and not torch.equal(logits[0], logits[1])
    assert engine.cache.lengths.tolist() == [71, 71]
    for pair in engine.cache.layers:
        for pages in pair:
            tensor = pages if isinstance(pages, torch.Tensor) else pages.codes
            assert (tensor == 0).double().mean() < 0.01


def test_random_codes_of_fp8_pages_are_numbers() -> None:
    decoder = random_decoder(TINY, FORMATS["fp16"], device="cpu", positions=100)
    grid = KVFloat8()
    decoder = type(decoder)(**(vars(decoder) | {"path": AttentionPath(key=grid, value=grid)}))
    engine = Engine(decoder, [100])
    fill_pages(engine)
    engine.take_pages_as_read([90])
    assert torch.isfinite(engine.step()).all()


def test_the_largest_batch_is_the_largest() -> None:
    shape = SHAPES["llama-3-8b"]
    for form in FORMATS.values():
        most = largest_batch(shape, form, tokens=2000)
        assert (
            predict(shape, form, batch=most, tokens=2000).total
            <= 80e9
            < predict(shape, form, batch=most + 1, tokens=2000).total
        )
    assert largest_batch(shape, FORMATS["fp16"], tokens=1000, budget=1e9) == 0
    with pytest.raises(UsageError, match="budget"):
        largest_batch(shape, FORMATS["fp16"], tokens=1000, budget=-1)


def test_bytes_of_a_token_are_those_of_the_roofline() -> None:
    shape = SHAPES["llama-3-8b"]
    assert page_bytes(shape, FORMATS["fp16"]) == 64 * kv_bytes_per_token(shape)
    assert page_bytes(shape, FORMATS["w4a8kv4"]) == 64 * kv_bytes_per_token(shape, bits=4)


def test_rows_of_a_shape() -> None:
    rows = list(
        measure_shape(TINY, ["fp16", "w4a8kv4", TRANSFORMERS], batches=[1, 3], contexts=[70], device="cpu", steps=2)
    )
    for name in ("fp16", "w4a8kv4", TRANSFORMERS):
        mine = [row for row in rows if row["format"] == name]
        kinds = [row["name"] for row in mine]
        assert kinds == ["memory", *(["prefill"] if name != TRANSFORMERS else []), "decode", "decode"]
        for row in mine[1:]:
            assert row["context"] == 70 and row["unit"] == "s" and min(row["samples"]) > 0
            assert row["tokens_per_s"] == pytest.approx(
                (70 if row["name"] == "prefill" else row["batch"]) / sorted(row["samples"])[len(row["samples"]) // 2]
            )
        assert [row["batch"] for row in mine if row["name"] == "decode"] == [1, 3]
        for row in mine:
            assert row["name"] != "decode" or row["measured_bytes"] is None
            assert ("predicted_bytes" in row) == (row["name"] == "decode" and name != TRANSFORMERS)


def test_what_does_not_fit_is_said_and_not_tried() -> None:
    rows = list(measure_shape(TINY, ["fp16"], batches=[1, 10**8], contexts=[70], device="cpu", steps=1))
    assert [row["name"] for row in rows] == ["memory", "prefill", "decode", "too large"]
    assert rows[-1]["batch"] == 10**8 and rows[-1]["predicted_bytes"] > 80e9 >= rows[-1]["room_bytes"]


def test_rows_of_a_model() -> None:
    decoder = decoder_of(tiny_model("llama", **SIZES))
    rows = list(measure_model(decoder, TINY, batches=[2], contexts=[30], steps=2))
    assert [row["name"] for row in rows] == ["prefill", "decode"]
    assert rows[1]["predicted_bytes"] == decoder.nbytes + 2 * decoder_page_bytes(decoder) + step_bytes(TINY, 2)
    with pytest.raises(UsageError, match="pass the model's 64 positions"):
        list(measure_model(decoder, TINY, batches=[2], contexts=[60], steps=2))


def test_the_baseline_of_transformers_continues_texts_as_generate_does() -> None:
    from transformers import StaticCache

    static = _Static(TINY, "cpu", 0)
    model = static.model.float()
    ids = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 10:]
    cache = StaticCache(config=static.config, max_cache_len=64)
    with torch.no_grad():
        tokens = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        found, step = [tokens.clone()], static._step(cache, tokens, torch.tensor([10]), 64)
        for _ in range(4):
            step()
            found.append(tokens.clone())
    assert torch.equal(torch.cat(found, 1), want)


def test_samples_are_of_calls_behind_the_warm_ones() -> None:
    calls = []
    assert len(timed(lambda: calls.append(0), 4, CPU)) == 4
    assert len(calls) == WARM + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["w3"]}, "formats are fp16-transformers, fp16, .* got 'w3'"),
        ({"formats": []}, "got none"),
        ({"batches": [0]}, "batches is a whole number, at least 1"),
        ({"steps": 0}, "steps is a whole number, at least 1"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    given = {"formats": ["fp16"], "batches": [1], "contexts": [8], "device": "cpu", "steps": 1} | options
    with pytest.raises(UsageError, match=message):
        next(measure_shape(TINY, given.pop("formats"), **given))
    odd = ModelShape(**(vars(TINY) | {"intermediate": 192}))
    with pytest.raises(UsageError, match="groups of 128 inputs do not divide"):
        random_decoder(odd, FORMATS["w4a8"], device="cpu")
