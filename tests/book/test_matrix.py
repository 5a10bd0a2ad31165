"""One table from result files: paired numbers against closed forms, and everything that must not become a table."""

import json
import math
import statistics
from pathlib import Path

import pytest

from lqedu.book import write_result
from lqedu.book.matrix import (
    COLUMNS,
    DENSE,
    ROWS,
    TASKS,
    TEXTS,
    answers_table,
    disagreements,
    matrix_table,
    pack_bits,
    problems,
    read_matrix,
    row_numbers,
    select,
    slug,
    unpack_bits,
)
from lqedu.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NLL = {"fp": [3.0, 2.0, 2.5, 3.5], "rtn_w4_channel": [3.5, 2.25, 3.0, 4.5], "gptq_w4_channel": [3.25, 2.0, 2.75, 4.0]}
RIGHT = {
    "fp": [True, True, False, True, False],
    "rtn_w4_channel": [True, False, False, False, False],
    "gptq_w4_channel": [True, True, False, False, True],
}
NAMES = list(NLL)


def _mean_and_error(values):
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _lines(name):
    mean, error = _mean_and_error(NLL[name])
    text = {"nll": mean, "stderr": error, "ppl": math.exp(mean), "samples": NLL[name], "unit": "nats per token"}
    share, share_error = _mean_and_error([float(flag) for flag in RIGHT[name]])
    bits = pack_bits(RIGHT[name])
    task = {"acc": share, "acc_stderr": share_error, "acc_norm": share, "acc_norm_stderr": share_error}
    task |= {"items": 5, "items_sha256": "a"}
    lines = [{"name": text_name, **text} for text_name in TEXTS]
    lines += [{"name": task_name, **task, "correct": bits, "correct_norm": bits} for task_name in TASKS]
    if name != DENSE:
        lines.append({"name": "quantize", "seconds": 2.0, "samples": [2.0], "unit": "s"})
    lines.append({"name": "storage", "bits_per_weight": 32.0 if name == "fp" else 4.25})
    lines.append({"name": "decode", "batch": 1, "tokens_per_s": 4.0, "samples": [0.25, 0.2], "unit": "s"})
    lines.append({"name": "decode", "batch": 16, "reason": "no kernel"})
    return lines


def _write(folder, name, lines=None, commit=COMMIT, **about):
    row = ROWS[name]
    configuration = {
        "row": name, "method": row.method or "dense", "options": dict(row.options), "baseline": row.baseline,
        "model": "org/tiny", "weights_sha256": "0" * 64, "dtype": "float32", "device": "cuda",
        "texts": {text: {"length": 8, "windows": 4} for text in TEXTS}, "tasks": {task: {"items": 5, "items_sha256": "a"} for task in TASKS},
        "decode": {"batches": [1, 16], "context": 8, "steps": 1},
    } | about  # fmt: skip
    return write_result(
        folder / f"{name}.json", title=row.title, kind="measured", configuration=configuration, commit=commit,
        values=_lines(name) if lines is None else lines, command="python -m lqedu.book.measure_matrix org/tiny",
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        _write(tmp_path, name)
    return tmp_path


def _read(folder, **options):
    return read_matrix("org/tiny", rows=NAMES, folder=folder, **options)


def test_differences_are_paired_by_window_and_by_item(folder):
    rows = {row["name"]: row for row in _read(folder).summary()}
    rtn, gptq = rows["rtn_w4_channel"], rows["gptq_w4_channel"]
    assert rows["fp"]["sotu_delta"] == 0 and rows["fp"]["sotu_delta_stderr"] == 0
    moved = [0.5, 0.25, 0.5, 1.0]
    assert (rtn["sotu_delta"], rtn["sotu_delta_stderr"]) == pytest.approx(_mean_and_error(moved))
    gained = [-0.25, -0.25, -0.25, -0.5]  # against rounding to nearest, its baseline
    assert (gptq["wikitext2_gain"], gptq["wikitext2_gain_stderr"]) == pytest.approx(_mean_and_error(gained))
    wins = [0, 0, 0, -1, 1]
    pair = gptq["piqa_acc_norm_delta"], gptq["piqa_acc_norm_delta_stderr"]
    assert pair == pytest.approx(_mean_and_error(wins))
    assert gptq["mean_acc_delta_stderr"] == pytest.approx(_mean_and_error(wins)[1] / 2)  # of four independent tasks
    assert gptq["mean_acc"] == pytest.approx(0.6) and rtn["mean_acc_norm_delta"] == pytest.approx(-0.4)
    assert (gptq["tokens_per_s_1"], gptq["tokens_per_s_16"]) == (4.0, None)
    assert (gptq["bits"], gptq["bits_per_weight"], gptq["quantize_seconds"]) == (4, 4.25, 2.0)


def test_a_missing_row_is_named(folder):
    with pytest.raises(UsageError, match=r"1 of 4 rows of org/tiny are missing: quip_w2; .*--rows quip_w2"):
        read_matrix("org/tiny", rows=[*NAMES, "quip_w2"], folder=folder)
    with pytest.raises(UsageError, match="55 of 58 rows"):
        read_matrix("org/tiny", folder=folder)
    with pytest.raises(UsageError, match=r"no results of org/nowhere \(book/results/matrix/nowhere\)"):
        read_matrix("org/nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "org/other"}, "differ in model: org/tiny and org/other"),
        ({"weights_sha256": "1" * 64}, "differ in weights_sha256"),
        ({"dtype": "bfloat16"}, "differ in dtype"),
        ({"tasks": {task: {"items": 5, "items_sha256": "b"} for task in TASKS}}, "differ in tasks"),
        ({"commit": "1" * 40}, "measured by different commits"),
        ({"commit": COMMIT + "-dirty"}, "measured by different commits"),
        ({"texts": {text: {"length": 9, "windows": 4} for text in TEXTS}}, "differ in texts"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(folder, change, message):
    _write(folder, "gptq_w4_channel", **change)
    with pytest.raises(UsageError, match=f"the rows fp and gptq_w4_channel of org/tiny .*{message}"):
        _read(folder)
    if "commit" in change:
        assert len(_read(folder, same_commit=False).commits) == 2


def test_a_number_edited_by_hand_is_found(folder):
    path = folder / "gptq_w4_channel.json"
    sound = json.loads(path.read_text())
    assert problems(sound) == []
    changes = (
        ("sotu", "nll", 2.9, "sotu nll is 2.9"),
        ("sotu", "ppl", 20.0, "sotu ppl is 20.0"),
        ("piqa", "acc", 0.7, "piqa acc is 0.7, its samples say 0.6"),
        ("piqa", "acc_norm_stderr", 0.1, "piqa acc_norm_stderr is 0.1"),
        ("piqa", "correct", "e8", "piqa acc is 0.6, its samples say 0.8"),
        ("piqa", "correct", "f", "1 characters are no hexadecimal digits of 5 flags"),
        ("piqa", "items_sha256", "b", "piqa was measured on 5 items, the configuration names others"),
        ("decode", "tokens_per_s", 5.0, "decode tokens_per_s is 5.0"),
    )
    for line, key, value, message in changes:
        result = json.loads(path.read_text())
        next(v for v in result["values"] if v["name"] == line)[key] = value
        assert any(message in problem for problem in problems(result)), message
    result = json.loads(path.read_text())
    result["configuration"]["row"] = "fp"
    assert "holds the row fp" in problems(result)[0]
    path.write_text(
        json.dumps(sound | {"values": [v | ({"nll": 9.0} if v["name"] == "sotu" else {}) for v in sound["values"]]})
    )
    with pytest.raises(UsageError, match=r"gptq_w4_channel of org/tiny contradicts itself: sotu nll is 9\.0"):
        _read(folder)


def test_what_a_file_lacks_is_found(folder):
    sound = json.loads((folder / "gptq_w4_channel.json").read_text())
    for name in (*TEXTS, *TASKS, "storage", "quantize"):
        fewer = [line for line in sound["values"] if line["name"] != name]
        assert problems(sound | {"values": fewer}) == [f"lacks the line {name}"]
    fewer = [line for line in sound["values"] if line.get("batch") != 16]
    assert problems(sound | {"values": fewer}) == ["lacks the line decode of batch 16"]
    for name, key in (("sotu", "nll"), ("piqa", "items"), ("piqa", "correct_norm"), ("storage", "bits_per_weight")):
        lines = [{k: v for k, v in line.items() if (line["name"], k) != (name, key)} for line in sound["values"]]
        assert problems(sound | {"values": lines}) == [f"{name} lacks {key}"]


def test_names_that_are_not_there_are_refused(folder):
    with pytest.raises(UsageError, match="no row 'zz'; the table has fp, rtn_w4_channel"):
        _read(folder).part("zz", "sotu")
    with pytest.raises(UsageError, match=r"pass rows=\['fp'\]"):
        read_matrix("org/tiny", rows="fp", folder=folder)
    with pytest.raises(UsageError, match=r"the files in .* are of org/tiny, not gpt2"):
        read_matrix("gpt2", rows=NAMES, folder=folder)


def test_a_row_that_was_refused_is_a_row_with_its_reason(folder):
    _write(folder, "gptq_w4_channel", lines=[{"name": "refused", "reason": "heads of 3 features"}])
    matrix = _read(folder)
    row = matrix.summary()[2]
    assert row["reason"] == "heads of 3 features" and row["sotu_ppl"] is None and row["mean_acc_delta_stderr"] is None
    assert "heads of 3 features" in str(matrix_table(matrix, ["sotu_ppl", "reason"], caption="All"))
    lines = [line for line in _lines(DENSE) if line["name"] != "sotu"]
    _write(folder, DENSE, lines=[*lines, {"name": "sotu", "reason": "no text"}])  # nothing to compare with
    assert _read(folder).summary()[1]["sotu_delta"] is None


def test_a_table_that_its_files_no_longer_say_is_found(folder):
    matrix = _read(folder)
    columns = [key for key in COLUMNS if key not in ("title", "reason")]
    page = matrix_table(matrix, columns, caption="Everything")._repr_html_()
    assert "+0.5625 ± 0.1573" in page and "GPTQ W4 channel" in page
    assert disagreements(page, matrix) == []
    assert disagreements(page.replace("org/tiny", "x").replace("matrix/tiny", "matrix/other"), matrix) == []
    [found] = disagreements(page.replace("+0.5625", "+0.5624", 1), matrix)
    assert found.startswith(
        "Everything (book/results/matrix/tiny): RTN W4 channel, WikiText-2, NLL against FP is +0.5624"
    )
    assert "no column is called" in disagreements(page.replace("bits per weight", "bits"), matrix)[0]
    assert "no row is called" in disagreements(page.replace("RTN W4 channel", "RTN"), matrix)[0]
    lines = _lines("gptq_w4_channel")
    _write(folder, "gptq_w4_channel", lines=[*lines[:-3], lines[-3] | {"bits_per_weight": 4.5}, *lines[-2:]])
    [found] = disagreements(page, _read(folder))
    assert "bits per weight is 4.250, the files say 4.500" in found
    with pytest.raises(UsageError, match="no column speed; there are title, bits_per_weight"):
        matrix_table(matrix, ["speed"], caption="x")
    with pytest.raises(UsageError, match="no row quip_w2; the table has fp"):
        matrix_table(matrix, ["sotu_ppl"], caption="x", rows=["quip_w2"])


def test_committed_files_are_sound_and_say_what_the_pages_show():
    """Works on the files that are there: none, some rows of a model, or all of them."""
    pages = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("book/chapters/*.ipynb"))]
    outputs = [output for page in pages for cell in page["cells"] for output in cell.get("outputs", [])]
    shown = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    shown = [page for page in shown if "(book/results/matrix/" in page]
    folders = sorted(path for path in ROOT.glob("book/results/matrix/*") if path.is_dir())
    for folder in folders:
        rows = [name for name in ROWS if (folder / f"{name}.json").is_file()]
        assert {path.stem for path in folder.iterdir()} == set(rows), f"{folder.name} holds files of no row"
        model = json.loads((folder / f"{rows[0]}.json").read_text(encoding="utf-8"))["configuration"]["model"]
        assert slug(model) == folder.name
        matrix = read_matrix(model, rows=rows, folder=folder, same_commit=False)
        assert [problem for page in shown for problem in disagreements(page, matrix)] == []
    for page in shown:
        assert any(f"(book/results/matrix/{folder.name})" in page for folder in folders), page[:300]


def test_the_page_shows_every_row_and_files_say_how_to_measure_them_again():
    page = json.loads((ROOT / "book/chapters/22-side-by-side.ipynb").read_text(encoding="utf-8"))
    shown = "".join(
        "".join(output.get("data", {}).get("text/html", ""))
        for cell in page["cells"]
        for output in cell.get("outputs", [])
    )
    matrix = read_matrix("smollm2-135m", same_commit=False)
    for row in matrix.summary():
        assert row["wikitext2_nll"] is not None and row["mean_acc_norm"] is not None
        assert shown.count(f">{row['title']}<") >= 3, row["title"]  # quality, tasks, cost
    for name, file in matrix.files.items():
        assert file["command"] == f"python -m lqedu.book.measure_matrix smollm2-135m --rows {name} --device cuda"
        assert not file["dirty"]
    card = {
        "hellaswag": 40.9,
        "piqa": 66.3,
    }  # the model card of SmolLM2-135M-Instruct; the average of ARC's parts is 37.3
    dense = matrix.summary()[0]
    assert all(abs(100 * dense[f"{task}_acc_norm"] - value) <= 2 for task, value in card.items())
    assert abs(50 * (dense["arc_easy_acc_norm"] + dense["arc_challenge_acc_norm"]) - 37.3) <= 2
    assert dict(row_numbers("smollm2-135m", "gptq_w4_g64")) == matrix.summary()[
        list(ROWS).index("gptq_w4_g64")
    ] | dict.fromkeys([key for key in dense if "_gain" in key])


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 1001])
def test_bits_come_back(count):
    flags = [(3 * i * i + i // 5) % 7 < 3 for i in range(count)]
    assert unpack_bits(pack_bits(flags), count) == flags
    assert len(pack_bits(flags)) == -(-count // 4)
    if count % 4:
        with pytest.raises(UsageError, match="behind the last"):
            unpack_bits("f" * -(-count // 4), count)


def test_rows_have_methods_baselines_and_names_that_can_be_chosen():
    from lqedu.methods import available, build

    assert {row.method for row in ROWS.values()} == {None, *available()}
    assert all(row.baseline in ROWS for row in ROWS.values()) and len({row.title for row in ROWS.values()}) == len(ROWS)
    for row in ROWS.values():
        if row.method is not None:
            build(row.method, row.options_for("opt"))
            method = build(row.method, row.options_for("llama"))
            four = getattr(method, "bits", None) == 4 and getattr(method, "group_size", None) is not None
            assert not four or method.group_size == 64  # below it, 4 bits are lossless on the embedded model
    assert ROWS["smoothquant_w8a8"].options_for("opt")["alpha"] == 0.5
    assert [row.name for row in select("gptq-w4-*, FP".lower())] == ["fp", "gptq_w4_g64", "gptq_w4_channel"]
    assert len(select("*")) == len(ROWS)
    for patterns, message in (("gptq,rtn*", "no row is called gptq;"), (" ,", "no row is called nothing")):
        with pytest.raises(UsageError, match=message):
            select(patterns)


def test_the_table_of_answers_has_a_line_for_every_method():
    from lqedu.methods import available

    page = repr(answers_table("What each method answers"))
    assert all(cls.title in page and cls.answers.calibration in page for cls in available().values())
