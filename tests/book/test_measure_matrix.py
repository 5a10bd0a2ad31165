"""Rows of the matrix from end to end on tiny models, resumed, shared by processes, refused where a method does not fit."""

import json

import pytest
import torch

import lqedu
from lqedu.book import measure_matrix as matrix
from lqedu.book.matrix import ROWS, TASKS, TEXTS, disagreements, matrix_table, problems, read_matrix, unpack_bits
from lqedu.book.results import host, validate
from lqedu.errors import MissingDependencyError, UsageError
from lqedu.evaluation import Item, score
from tests.models.on_kernels import SIZES
from tests.models.tiny import VOCABULARY, tiny_model

LIMITS = matrix.Limits(windows=3, items=4)
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
HOST = dict.fromkeys(("gpu", "driver", "triton"))
OPTIONS = {"device": "cpu", "dtype": "float32"} | dict.fromkeys(
    ("part", "wikitext2", "tasks_folder", "windows", "items", "length", "tokens_per_batch", "minutes", "name")
)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<unk>")


def _text(count, seed):
    ids = torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{i}" for i in ids)


def _items(seed):
    g = torch.Generator().manual_seed(seed)
    word = lambda: f"w{int(torch.randint(1, VOCABULARY, (), generator=g))}"  # noqa: E731
    choices = [(word(), f"{word()} {word()}", word()) for _ in range(4)]
    return tuple(Item((f"{word()} {word()}",) * 3, three, int(torch.randint(3, (), generator=g))) for three in choices)


def _setting(model, tokenizer, limits=LIMITS):
    texts = {name: _text(400, seed) for seed, name in enumerate(TEXTS)}
    tasks = {name: _items(seed) for seed, name in enumerate(TASKS)}
    return matrix.make_setting("org/tiny", model, tokenizer, texts, tasks, _text(2100, 9), limits=limits)


@pytest.fixture(scope="module")
def setting(tokenizer):
    return _setting(tiny_model("llama", **TINY, head_dim=16).requires_grad_(False), tokenizer)


@pytest.fixture(autouse=True)
def _provenance(monkeypatch):
    """Of a made-up commit."""
    monkeypatch.setenv("LQEDU_COMMIT", "1" * 40)
    monkeypatch.setitem(matrix.write_result.__globals__, "host", host)


def _by_name(lines):
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize(
    "name",
    ["fp", "rtn_w8_g64", "gptq_w3_channel", "quip_w2", "rtn_w4a8kv4_g64", "smoothquant_w8a8_static", "qoq_w4a8kv4_g64", "fp8_block_group"],
)  # fmt: skip
def test_a_row_holds_what_its_parts_measure(setting, name):
    said = []
    row = ROWS[name]
    lines = matrix.measure_row(setting, row, said.append)
    found = _by_name(lines)
    method = matrix.method_of(row, "llama")
    model = setting.model if method is None else lqedu.quantize(setting.model, method, setting.windows(row))
    for text, windows in setting.texts.items():
        want = lqedu.perplexity(model, windows)
        assert windows.shape == (3, 64) and found[text]["ppl"] == pytest.approx(want.ppl, rel=1e-4)
        assert found[text]["samples"] == pytest.approx(want.window_nll, abs=1e-4)
    for task, items in setting.tasks.items():
        want = score(model, setting.tokenizer, items)
        assert found[task]["acc"] == want.acc
        assert setting.shared["tasks"][task] == {"items": 4, "items_sha256": want.items_sha256}
        assert unpack_bits(found[task]["correct_norm"], 4) == list(want.correct_norm)
    quantized = [layer for layer in model.modules() if hasattr(layer, "quantized")]
    assert len(quantized) == (0 if method is None else 7)
    weights = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    stored = sum(layer.nbytes for layer in quantized) or 4 * weights
    assert found["storage"]["bits_per_weight"] == 8 * stored / weights
    assert ("quantize" in found) == (method is not None)
    if method is not None:
        peak = found["quantize"]
        assert peak["seconds"] > 0 and (peak["peak_bytes"] is None or peak["peak_bytes"] >= peak["held_bytes"] > 1e6)
        assert said[0] == "quantizing"
    assert [line["batch"] for line in lines if line["name"] == "decode"] == [1, 16]
    assert "no GPU" in found["decode"]["reason"]


def test_batches_change_speed_and_nothing_else(setting):
    small, large = (
        matrix.Setting(**{**vars(setting), "tokens_per_batch": tokens}) for tokens in (1, 4096)
    )  # fmt: skip
    ones, all_at_once = (_by_name(matrix.measure_row(s, ROWS["gptq_w4_channel"])) for s in (small, large))
    for text in TEXTS:
        assert ones[text]["samples"] == pytest.approx(all_at_once[text]["samples"], abs=2e-5)
    for task in TASKS:
        assert ones[task]["correct"] == all_at_once[task]["correct"]


def test_a_method_that_does_not_fit_an_architecture_is_a_row_that_says_why(tokenizer):
    changes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 1}
    setting = _setting(tiny_model("opt", **changes).requires_grad_(False), tokenizer)
    for name in ("quarot_w4a4kv4", "spinquant_w4a4kv4", "qqq_w4a8_g64_rotated", "qoq_w4a8kv4_channel"):
        [line] = matrix.measure_row(setting, ROWS[name])
        assert line["name"] == "refused" and len(line["reason"]) > 20, name
    found = _by_name(matrix.measure_row(setting, ROWS["smoothquant_w8a8"]))
    assert found["sotu"]["ppl"] > 1 and setting.configuration(ROWS["smoothquant_w8a8"])["options"]["alpha"] == 0.5
    assert (
        "not 'opt'"
        in matrix.decode_lines(setting.model, {"batches": [1], "context": 8, "steps": 1}, only_fast=False)[0]["reason"]
    )


def test_groups_that_do_not_divide_and_texts_that_overflow_are_reasons(setting, tokenizer, monkeypatch):
    odd = _setting(tiny_model("llama").requires_grad_(False), tokenizer)  # 32 and 48 inputs
    assert "group" in matrix.measure_row(odd, ROWS["rtn_w4_g64"])[0]["reason"]

    def overflow(*arguments, **options):
        raise lqedu.errors.CalibrationError("no finite likelihood")

    monkeypatch.setattr(lqedu, "perplexity", overflow)
    found = _by_name(matrix.measure_row(setting, ROWS["rtn_w2_channel"]))
    assert found["sotu"] == {"name": "sotu", "reason": "no finite likelihood"} and found["piqa"]["items"] == 4
    monkeypatch.undo()

    def no_memory(*arguments, **options):
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(lqedu, "quantize", no_memory)
    [line] = matrix.measure_row(setting, ROWS["rtn_w2_channel"])
    assert line["again"] and line["reason"] == "out of memory: tried to allocate"


def test_decoding_has_a_line_for_each_batch_or_says_what_no_kernel_reads():
    pytest.importorskip("triton", reason="the engine runs lqedu_kernels, or their references, which need Triton")
    about = {"batches": [1, 2], "context": 8, "steps": 2}
    model = tiny_model("llama", **SIZES)
    four = lqedu.quantize(model, lqedu.methods.RTN(bits=4, group_size=64))
    lines = matrix.decode_lines(four, about, only_fast=False)
    assert [(line["batch"], line["context"], len(line["samples"])) for line in lines] == [(1, 8, 2), (2, 8, 2)]
    assert all(line["tokens_per_s"] > 0 and line["weights_bytes"] > 1000 for line in lines)
    three = lqedu.quantize(model, lqedu.methods.RTN(bits=3, group_size=64))
    assert matrix._unread(four) is None and matrix._unread(three).startswith("model.layers.0.self_attn.q_proj: ")


def _rows(*names):
    return [ROWS[name] for name in names]


def _command(row):
    return matrix.command_of(
        "org/tiny", row, device="cuda:1", dtype="float32", limits=LIMITS, tokens_per_batch=None
    )  # fmt: skip


def test_an_interrupted_run_goes_on_and_keeps_what_is_there(setting, tmp_path, monkeypatch, capsys):
    rows, measure = _rows("fp", "rtn_w8_g64", "rtn_w4_channel"), matrix.measure_row

    def interrupted(setting, row, say):
        if row.name == "rtn_w8_g64":
            raise KeyboardInterrupt
        return measure(setting, row, say)

    monkeypatch.setattr(matrix, "measure_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        matrix.run(setting, rows, tmp_path, _command)
    folder = tmp_path / "tiny"
    assert [path.name for path in folder.iterdir()] == ["fp.json"]
    first = (folder / "fp.json").read_bytes()

    measured = []
    monkeypatch.setattr(matrix, "measure_row", lambda *a: measured.append(a[1].name) or measure(*a))
    assert matrix.run(setting, rows, tmp_path, _command, minutes=1, cost=lambda row: 61.0) == rows[1:]  # no time
    assert measured == []
    assert matrix.run(setting, rows, tmp_path, _command) == []
    assert measured == ["rtn_w8_g64", "rtn_w4_channel"] and (folder / "fp.json").read_bytes() == first
    assert "1 rows are there, 2 to measure" in capsys.readouterr().err
    result = json.loads((folder / "rtn_w8_g64.json").read_text())
    assert validate(result) == [] == problems(result)
    assert result["command"] == (
        "python -m lqedu.book.measure_matrix org/tiny --rows rtn_w8_g64 --device cuda --windows 3 --items 4"
    )

    table = read_matrix("org/tiny", rows=[row.name for row in rows], folder=folder)
    page = matrix_table(table, ["sotu_delta", "mean_acc_norm_delta", "peak_bytes"], caption="x")._repr_html_()
    assert disagreements(page, table) == []
    numbers = table.summary()[2]
    want = lqedu.evaluation.paired(
        *(lqedu.perplexity(m, setting.texts["sotu"]) for m in (
            lqedu.quantize(setting.model, lqedu.methods.RTN(bits=4, group_size=None)), setting.model
        ))
    )  # fmt: skip
    assert (numbers["sotu_delta"], numbers["sotu_delta_stderr"]) == pytest.approx(
        (want.delta_nll, want.stderr), abs=1e-5
    )

    other = _setting(setting.model, setting.tokenizer, matrix.Limits(windows=2, items=4))
    with pytest.raises(UsageError, match=r"fp\.json in tiny differs in texts from .*; choose another --out"):
        matrix.run(other, rows, tmp_path, _command)
    (folder / "fp.json").write_text((folder / "fp.json").read_text()[:100])
    with pytest.raises(UsageError, match=r"cannot read the result file fp\.json: .*; remove it and measure again"):
        matrix.run(setting, rows, tmp_path, _command)


def test_a_row_that_ran_out_of_memory_is_tried_again_and_a_refused_one_is_not(setting, tmp_path, monkeypatch):
    lines = {"fp": {"reason": "out of memory", "again": True}, "quip_w2": {"reason": "does not fit"}}
    measured = []

    def refuse(setting, row, say):
        measured.append(row.name)
        return [{"name": "refused", **lines[row.name]}]

    monkeypatch.setattr(matrix, "measure_row", refuse)
    for _ in range(2):
        matrix.run(setting, _rows("fp", "quip_w2"), tmp_path, _command)
    assert measured == ["fp", "quip_w2", "fp"]


def test_a_defect_of_one_row_does_not_end_the_others(setting, tmp_path, monkeypatch, capsys):
    def measure(setting, row, say):
        if row.name == "fp":
            raise ZeroDivisionError("a defect")
        return [{"name": "refused", "reason": "x"}]

    monkeypatch.setattr(matrix, "measure_row", measure)
    assert matrix.run(setting, _rows("fp", "quip_w2"), tmp_path, _command) == _rows("fp")
    assert "ZeroDivisionError: a defect" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["quip_w2.json"]

    def offline(setting, row, say):
        raise MissingDependencyError("Triton is missing")

    monkeypatch.setattr(matrix, "measure_row", offline)
    with pytest.raises(MissingDependencyError):  # of the machine, not of a row
        matrix.run(setting, _rows("fp"), tmp_path, _command)


def test_processes_share_the_rows_by_their_cost(setting, tmp_path):
    rows = list(ROWS.values())
    cost = lambda row: matrix.estimate(row, 10**8, 10**7, device="cuda", dtype="float32", limits=matrix.Limits())  # noqa: E731
    shares = [matrix.split(rows, f"{i}/3", cost) for i in (1, 2, 3)]
    assert sorted(row.name for share in shares for row in share) == sorted(ROWS)
    seconds = [sum(map(cost, share)) for share in shares]
    assert max(seconds) < 1.05 * min(seconds)
    mine = _rows("fp", "rtn_w8_g64")
    for part in ("1/2", "2/2"):
        assert matrix.run(setting, matrix.split(mine, part, cost), tmp_path, _command) == []
    assert len(read_matrix("org/tiny", rows=["fp", "rtn_w8_g64"], folder=tmp_path / "tiny").files) == 2
    for part in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(UsageError, match="--part is 1/4"):
            matrix.split(mine, part, cost)


def test_the_estimate_grows_with_what_is_read_and_done():
    about = {"device": "cuda", "dtype": "float32"}
    full, few = matrix.Limits(), matrix.Limits(windows=2, items=8)
    seconds = {name: matrix.estimate(row, 10**8, 10**7, **about, limits=full) for name, row in ROWS.items()}
    assert seconds["fp"] < seconds["rtn_w4_g64"] < seconds["gptq_w4_g64"] < seconds["spinquant_w4a4kv4"]
    row = ROWS["rtn_w4_g64"]
    assert matrix.estimate(row, 10**8, 10**7, **about, limits=few) < 20 < seconds["rtn_w4_g64"]
    assert matrix.estimate(row, 7 * 10**9, 10**8, device="cuda", dtype="float16", limits=full) > seconds["rtn_w4_g64"]


def test_a_folder_whose_files_could_name_no_commit_is_refused_before_a_model_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "weights_of", lambda model: pytest.fail("a model was read"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("LQEDU_COMMIT")
    options = OPTIONS | {"out": tmp_path / "new", "dry_run": False}
    with pytest.raises(
        UsageError, match=r"new is outside a git repository, .*; set LQEDU_COMMIT .* or choose a folder"
    ):
        matrix.main("smollm2-135m", rows="fp", **options)
    monkeypatch.setenv("LQEDU_COMMIT", "main")
    with pytest.raises(UsageError, match="commit must be 40 hex digits, got 'main'"):
        matrix.main("smollm2-135m", rows="fp", **options)
    monkeypatch.setenv("LQEDU_COMMIT", "0" * 40)
    (tmp_path / "new").write_text("a file, no folder")
    with pytest.raises(UsageError, match=r"no results can be written to .*new: .*; choose another --out"):
        matrix.main("smollm2-135m", rows="fp", **options)


def test_a_dry_run_names_rows_and_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "weights_of", lambda model: (10**8, 10**7))
    (tmp_path / "opt_125m").mkdir()
    (tmp_path / "opt_125m" / "fp.json").write_text("{}")
    options = OPTIONS | {"out": tmp_path, "device": "cuda"}
    matrix.main("facebook/opt-125m", rows="fp,quip-*", dry_run=True, **options)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].endswith("there") and lines[-1].startswith("4 of 5 rows to measure, about ")
    matrix.main("facebook/opt-125m", rows="fp", dry_run=True, **options)
    assert capsys.readouterr().out.endswith("0 of 1 rows to measure, about 0 min on one cuda\n")
    with pytest.raises(UsageError, match="--dtype is float32"):
        matrix.main("facebook/opt-125m", rows="*", dry_run=True, **(options | {"dtype": "int8"}))


def test_weights_are_counted_from_a_configuration_alone(tmp_path):
    model = tiny_model("opt")
    model.config.save_pretrained(tmp_path)
    counted = matrix.weights_of(str(tmp_path))
    assert counted == (3 * (4 * 32 * 32 + 2 * 32 * 48), VOCABULARY * 32)
    with pytest.raises(UsageError, match="no such folder"):
        matrix.weights_of(str(tmp_path / "nowhere"))
