"""The guide: every answer stands on a row, no limit that is loosened takes a candidate away, nobody dominated is recommended."""

import itertools
import math
import statistics
from dataclasses import replace
from functools import cache

import pytest

from lqedu import methods
from lqedu.book.choosing import (
    EFFORTS,
    HARDWARE,
    LAYOUTS,
    OPTIONS,
    Situation,
    candidates,
    estimate,
    fits,
    frontier,
    memory,
    quality,
    recommend,
)  # fmt: skip
from lqedu.book.matrix import ROWS
from lqedu.book.results import read_result, result_folders, results
from lqedu.checkpoint.exporting import TABLE
from lqedu.errors import UsageError
from lqedu.evaluation.random_models import FORMATS, SHAPES
from lqedu.evaluation.roofline import kv_bytes_per_token

GRID = [
    Situation(hardware, shape, budget, batch, context, work, loss, effort, layout)
    for hardware, shape, budget, (batch, context), work, loss, effort, layout in itertools.product(
        HARDWARE, ("llama-3-8b",), (4e9, 7e9, 80e9), ((1, 1024), (64, 8192)), ("decode", "prefill"),
        (0.0, 0.03, 0.12, 2.0), EFFORTS, ("any", "awq"),
    )
]  # fmt: skip
ADVICE = {request: recommend(request) for request in GRID}


def _names(estimates):
    return {e.option.name for e in estimates}


def test_losses_are_those_of_the_result_files():
    for option in OPTIONS:
        got = quality(option)
        assert got.at_most >= got.loss and (option.method is None or got.bits < 9)
        if isinstance(option.evidence, str):
            assert got.source == f"matrix/smollm2_135m/{option.evidence}: sotu"
            moved = [a - b for a, b in zip(_windows(option.evidence), _windows("fp"), strict=True)]
            assert got.loss == pytest.approx(statistics.fmean(moved), abs=1e-12)
            assert got.stderr == pytest.approx(statistics.stdev(moved) / math.sqrt(len(moved)), abs=1e-12)
            assert got.other["method"] == (option.method or "dense") and got.other["sotu_delta"] == got.loss
        else:
            stem, where = option.evidence
            (row,) = [r for r in results(stem)["values"] if where.items() <= r.items()]
            assert (row["delta_nll"], row["delta_stderr"], row["bits_per_weight"]) == (got.loss, got.stderr, got.bits)
            assert got.source.startswith(stem) and got.other is None


@cache
def _row_file(name):
    (place,) = [
        p for folder in result_folders()[:1] if (p := folder / "matrix" / "smollm2_135m" / f"{name}.json").is_file()
    ]
    return read_result(place)


def _windows(name):
    (line,) = [line for line in _row_file(name)["values"] if line["name"] == "sotu"]
    return line["samples"]


def test_a_row_of_the_matrix_has_the_settings_of_its_option():
    """All but the group: the small model takes 64, larger ones 128. Options that name a file have settings of no row."""
    rows = {name: _row_file(name)["configuration"] for name in ROWS}
    for option in OPTIONS:
        if option.method is None:
            assert option.evidence == "fp"
            continue
        mine = dict(methods.build(option.method, option.settings).options())
        if mine.get("group_size") is not None:
            mine["group_size"] = 64
        same = [name for name, about in rows.items() if about["method"] == option.method and about["options"] == mine]
        assert same == ([option.evidence] if isinstance(option.evidence, str) else []), option.name


#: The rows with the settings of an option in the methods' own result files, which chapters 04 to 16 show.
OWN_FILES = {
    "RTN W8A16": ("weight_only_smollm2", {"method": "rtn", "bits": 8, "group_size": 64}),
    "RTN W4A16": ("weight_only_smollm2", {"method": "rtn", "search": "none", "symmetric": False, "bits": 4, "group_size": 64}),
    "HQQ W4A16": ("hqq_smollm2", {"method": "hqq", "axis": 1, "bits": 4, "group_size": 64}),
    "GPTQ W4A16": ("weight_only_smollm2", {"method": "gptq", "bits": 4, "group_size": 64, "order": "activation"}),
    "AWQ W4A16": ("awq_smollm2", {"alphas": 20, "duo_scaling": False, "clip": True, "bits": 4, "group_size": 64}),
    "QuIP W4A16": ("quip_smollm2", {"method": "quip", "bits": 4}),
    "AWQ W3A16": ("awq_smollm2", {"alphas": 20, "duo_scaling": False, "clip": True, "bits": 3, "group_size": 64}),
    "GPTQ W3A16": ("weight_only_smollm2", {"method": "gptq", "bits": 3, "group_size": 64, "order": "activation"}),
    "QuIP W3A16": ("quip_smollm2", {"method": "quip", "bits": 3}),
    "QuIP W2A16": ("quip_smollm2", {"bits": 2, "passes": 1, "rotate": True, "grid_range": "gaussian"}),
    "RTN W8A8": ("smoothquant_smollm2", {"method": "rtn", "bits": 8, "symmetric": True, "activation": "token", "activation_bits": 8}),
    "SmoothQuant W8A8": ("smoothquant_smollm2", {"granularity": "channel", "alpha": 0.8, "folds": "norms", "activation": "token",
                                                 "activation_bits": 8}),
    "FP8": ("fp8_smollm2", {"name": "FP8", "granularity": "channel", "activation": "token"}),
    "QQQ W4A8": ("qqq_smollm2", {"name": "KV16", "method": "qqq", "group_size": 64, "move": "smooth"}),
    "QoQ W4A8KV4": ("qoq_smollm2", {"name": "KV4", "method": "qoq", "group_size": 64}),
}  # fmt: skip


def test_the_matrix_says_what_the_chapters_said():
    """Two measurements of one quantity: by the bench of all methods, and by each method's own script at another commit."""
    assert set(OWN_FILES) == {o.name for o in OPTIONS if o.method and isinstance(o.evidence, str)}
    for option in OPTIONS:
        if option.name in OWN_FILES:
            stem, where = OWN_FILES[option.name]
            (row,) = [r for r in results(stem)["values"] if where.items() <= r.items()]
            got = quality(option)
            assert abs(got.loss - row["delta_nll"]) < 0.01 * got.stderr, option.name
            assert got.stderr == pytest.approx(row["delta_stderr"], rel=1e-4)
            assert got.bits == row["bits_per_weight"]


def test_memory_is_what_was_recorded():
    """The formula against the allocator of the recorded runs, and against the bytes of chapter 01 where there is no kernel."""
    checked = 0
    for shape in SHAPES:
        for row in results(f"throughput_{shape.replace('-', '_')}")["values"]:
            (option,) = [o for o in OPTIONS if o.form == row["format"]][:1] or [None]
            if option is None:
                continue
            if row["name"] == "decode":
                got = memory(option, SHAPES[shape], batch=row["batch"], context=row["context"] + 24)
                assert got == pytest.approx(row["measured_bytes"], rel=0.01)
                checked += 1
            elif row["name"] == "memory":
                asked = Situation(shape=shape, context=row["context"], memory=row["budget_bytes"])
                assert fits(option, asked) == row["largest_batch"]
    assert checked > 40
    (quip,) = [o for o in OPTIONS if o.name == "QuIP W2A16"]
    shape = SHAPES["llama-2-7b"]
    more = memory(quip, shape, batch=1, context=128) - memory(quip, shape, batch=1, context=64)
    assert more == 64 * kv_bytes_per_token(shape)
    dense = memory(OPTIONS[0], shape, batch=1, context=64) - memory(quip, shape, batch=1, context=64)
    assert dense == pytest.approx(shape.linear_weights * (16 - quality(quip).bits) / 8)


def test_every_number_of_a_recommendation_is_in_a_row():
    for request, advice in ADVICE.items():
        for e in (advice.best,) if advice.best else ():
            assert e.sources[0] == quality(e.option).source
            if e.speed is not None:
                rows = [
                    r for r in results("throughput_llama_3_8b")["values"]
                    if r["name"] == request.work and r["format"] == e.option.form
                    and (r["batch"], r["context"]) == (e.speed.batch, e.speed.context)
                ]  # fmt: skip
                assert len(rows) == 1 and rows[0]["tokens_per_s"] == e.score == e.speed.tokens
            assert (e.speed is None) == (e.option.form is None or request.hardware != "hopper")


def test_what_is_recommended_keeps_every_limit_and_is_not_dominated():
    for request, advice in ADVICE.items():
        if advice.best is None:
            continue
        e = advice.best
        assert e.bytes <= request.memory and e.quality.at_most <= request.loss and request.hardware in e.option.hardware
        assert EFFORTS.index(e.option.effort) <= EFFORTS.index(request.effort)
        for other in advice.candidates:
            values = [(-x.score, x.quality.loss, x.bytes, EFFORTS.index(x.option.effort)) for x in (other, e)]
            assert values[0] == values[1] or any(a > b for a, b in zip(*values, strict=True)), (request, other, e)
        assert advice.frontier[0] is e and set(map(id, advice.frontier)) <= set(map(id, advice.candidates))
        assert e.score >= 0.95 * max(c.score for c in advice.candidates)


def test_a_looser_limit_never_takes_a_candidate_away():
    for request in GRID[::7]:
        before = _names(candidates(request))
        looser = {
            "memory": 1.5 * request.memory, "loss": request.loss + 0.1, "effort": EFFORTS[-1], "layout": "any",
            "batch": max(1, request.batch // 4), "context": request.context // 2,
        }  # fmt: skip
        for key, value in looser.items():
            assert before <= _names(candidates(replace(request, **{key: value}))), (request, key)


def test_every_kind_of_answer_is_reached():
    advice = list(ADVICE.values())
    best = _names(a.best for a in advice if a.best)
    assert {
        "FP16",
        "RTN W4A16",
        "AWQ W4A16",
        "QuIP W2A16",
        "SmoothQuant W8A8",
        "FP8",
        "QoQ W4A8",
        "QoQ W4A8KV4",
    } <= best
    tried = [estimate(o, r) for r in GRID[::11] for o in OPTIONS]
    assert {key for e in tried for key in e.broken} == {"hardware", "memory", "loss", "effort", "layout"}
    assert all(len(e.broken) == len(e.why) for e in tried)
    possible = _names(c for a in advice for c in a.candidates)
    assert possible == {o.name for o in OPTIONS if o.hardware}
    assert any(a.best is None for a in advice)
    assert {len(a.notes) for a in advice} >= {0, 1, 2}


def test_an_impossible_request_is_answered_with_the_closest():
    tight = Situation(memory=15e9, loss=0.0)  # FP16 needs 16.3 GB, and nothing else loses nothing
    advice = recommend(tight)
    assert advice.best is None and advice.candidates == () and advice.frontier == ()
    assert advice.closest.option.name == "RTN W8A16" and advice.closest.broken == ("loss",)
    assert "of a budget of 0" in advice.closest.why[0]
    assert "measure more windows" in advice.notes[0]
    nothing = recommend(Situation(memory=1e9, loss=2.0))
    assert nothing.closest.option.name == "QuIP W2A16" and "GB of 1.0" in nothing.closest.why[0]


def test_dominated_options_leave_the_frontier():
    found = {e.option.name: e for e in candidates(Situation(loss=1.0, memory=80e9))}
    names = _names(frontier(list(found.values())))
    assert "AWQ W4A16" in names and "GPTQ W4A16" not in names  # the same kernel and effort, and a larger loss
    assert frontier([found["GPTQ W4A16"]]) == [found["GPTQ W4A16"]]


def test_unmeasured_hardware_gets_a_bound_for_decoding_and_none_for_prompts():
    (awq,) = [o for o in OPTIONS if o.name == "AWQ W4A16"]
    request = Situation(hardware="cpu", batch=1, context=1024)
    e = estimate(awq, request)
    weights = FORMATS["w4a16"]
    assert e.speed is None and 2.8 < e.score < 4 and weights.weight is not None
    assert estimate(awq, replace(request, work="prefill")).score == 0
    assert recommend(replace(request, work="prefill")).best.option.name == "FP16"
    assert "no speed was measured on cpu" in recommend(request).notes[0]


def test_layouts_are_those_of_the_export_table():
    lines = [line.split() for line in TABLE.splitlines()]
    rows = {words[0]: " ".join(words[1:]) for words in lines if words and words[0] in {o.method for o in OPTIONS}}
    for option in OPTIONS:
        assert set(option.layouts) <= set(LAYOUTS)
        if option.method is not None and option.layouts:
            assert not rows[option.method].startswith("- - - -"), option.name
        if option.method in ("hqq", "quip", "quarot"):
            assert option.layouts == () and rows[option.method].startswith("- - - -")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hardware": "tpu"}, "hardware is one of cpu, ampere, hopper, got 'tpu'"),
        ({"shape": "gpt-2"}, "shape is one of"),
        ({"work": "train"}, "work is one of"),
        ({"effort": "all"}, "effort is one of"),
        ({"layout": "gguf"}, "layout is one of"),
        ({"batch": 0}, "batch"),
        ({"context": 0}, "context"),
        ({"memory": 0}, "memory is a number of bytes above 0"),
        ({"memory": float("nan")}, "memory is a number of bytes above 0"),
        ({"loss": -0.1}, "loss is a number of nats, at least 0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(change, sentence):
    with pytest.raises(UsageError, match=sentence):
        Situation(**change)
