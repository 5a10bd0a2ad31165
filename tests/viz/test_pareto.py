"""The front that nobody dominates, against its definition; the explorer of chapter 22, which finds the same one."""

import itertools
import math
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqedu.viz
from lqedu.book.matrix import Matrix, read_matrix
from lqedu.book.pareto import AXES, QUALITIES, pareto_data, pareto_front, signed
from lqedu.errors import UsageError
from tests.viz.js import assert_every_control_matters, compute, explorer_page, picture

START = {"row": "gptq_w4_g64"}
KINDS = ("all", "weights", "both")
FEW = st.lists(st.tuples(*2 * [st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, math.inf, -math.inf])]), max_size=12)
MANY = st.lists(st.tuples(*2 * [st.floats(allow_nan=False)]), max_size=30)


@cache
def _matrix() -> Matrix:
    return read_matrix("smollm2-135m", same_commit=False)


@cache
def _numbers() -> dict:
    return {row["name"]: row for row in _matrix().summary()}


@cache
def _data() -> dict:
    return pareto_data(_matrix())


def _example():
    return lqedu.viz.explorer("pareto", _data() | START, title="Quality against cost", description="Point at a row.")


def _dominates(a, b) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and (a[0] < b[0] or a[1] < b[1])


# --- the front --------------------------------------------------------------------------------------------------------


@given(FEW | MANY)
def test_the_front_is_its_definition(points) -> None:
    want = [i for i, p in enumerate(points) if not any(_dominates(q, p) for q in points)]
    assert pareto_front(points) == want
    assert bool(want) == bool(points)


@given(FEW, st.randoms())
def test_the_order_of_the_points_is_no_matter(points, random) -> None:
    order = random.sample(range(len(points)), len(points))
    assert sorted(order[i] for i in pareto_front([points[j] for j in order])) == pareto_front(points)


def test_ties_and_equal_points() -> None:
    assert pareto_front([(1, 1), (1, 1), (1, 2), (2, 1)]) == [0, 1]  # equal ones stay, a tie in one coordinate decides
    assert pareto_front([(1, 2), (2, 1), (2, 2)]) == [0, 1]
    assert pareto_front([(math.inf, math.inf)]) == [0]


@pytest.mark.parametrize("bad", [(1.0, math.nan), (math.nan, 1.0), (1.0, 2.0, 3.0)])
def test_what_is_no_point_is_refused(bad) -> None:
    with pytest.raises(UsageError, match=r"point 1 is .*leave out"):
        pareto_front([(1.0, 1.0), bad])


def test_any_iterable_of_pairs_will_do_and_nothing_else() -> None:
    assert pareto_front(iter([(1, 2), [2, 1], (2, 2)])) == [0, 1]
    for bad in (None, 3, "abc", [1.0, 2.0], ["ab"], [(1.0, None)]):
        with pytest.raises(UsageError, match="a front needs"):
            pareto_front(bad)


def test_numbers_that_are_not_there_are_refused() -> None:
    row = {"name": "a", "bits_per_weight": 4.0, "mean_acc_norm": None}
    with pytest.raises(UsageError, match="there is no 'bits' to compare by; choose among bits_per_weight"):
        signed(row, "bits", "mean_acc_norm")
    with pytest.raises(UsageError, match="there is no 'ppl' to compare by; choose among wikitext2_ppl"):
        signed(row, "bits_per_weight", "ppl")
    with pytest.raises(UsageError, match="the row 'a' has no mean_acc_norm"):
        signed(row, "bits_per_weight", "mean_acc_norm")


# --- the data ---------------------------------------------------------------------------------------------------------


def test_every_row_has_its_numbers_or_says_why_not() -> None:
    numbers = _numbers()
    assert [row["name"] for row in _data()["rows"]] == [name for name in numbers if name != "fp"]
    for row in _data()["rows"]:
        mine = numbers[row["name"]]
        assert set(row["values"]) | set(row["why"]) == {*QUALITIES, *AXES}
        assert not set(row["values"]) & set(row["why"])
        assert all(value == mine[key] for key, value in row["values"].items())
        assert all(why and "model.layers" not in why for why in row["why"].values())
        assert row["moved"]["piqa_acc_norm"] == [mine["piqa_acc_norm_delta"], mine["piqa_acc_norm_delta_stderr"]]
        assert row["moved"]["sotu_ppl"] == [mine["sotu_delta"], mine["sotu_delta_stderr"]]
        # titles say it in another way than the files' online work, which decides
        assert (row["kind"] == "both") == ("A8" in row["title"] or "A4" in row["title"] or row["method"] == "FP8")
    assert "bits_per_weight" not in _data()["dense"]
    assert _data()["dense"]["wikitext2_ppl"] == numbers["fp"]["wikitext2_ppl"]


def test_reasons_are_those_of_the_files() -> None:
    matrix = Matrix("tiny", {name: _matrix().files[name] for name in ("fp", "rtn_w3_g64")})
    lines = [line for line in matrix.files["rtn_w3_g64"]["values"] if line["name"] not in ("sotu", "decode")]
    changed = {"name": "decode", "batch": 16, "reason": "model.layers.0.q_proj: no kernel, got 3 bits; pass 4. Really."}
    file = matrix.files["rtn_w3_g64"] | {"values": [*lines, changed]}
    (row,) = pareto_data(Matrix("tiny", matrix.files | {"rtn_w3_g64": file}))["rows"]
    assert row["why"] == {"sotu_ppl": "not measured", "tokens_per_s_1": "not measured", "tokens_per_s_16": "no kernel"}
    refused = {"name": "refused", "reason": "too large. Take another"}
    (row,) = pareto_data(Matrix("tiny", matrix.files | {"rtn_w3_g64": file | {"values": [refused]}}))["rows"]
    assert set(row["why"].values()) == {"too large"} and not row["values"]


@pytest.mark.parametrize("name", ["rtn_w3_g64", "fp"])
def test_a_table_without_the_dense_model_or_without_others_is_refused(name) -> None:
    with pytest.raises(UsageError, match="read the table with its row fp and others"):
        pareto_data(Matrix("tiny", {name: _matrix().files[name]}))


def test_the_data_start_the_explorer_without_more() -> None:
    assert {key: _data()[key] for key in ("quality", "x", "kind", "row")} == {
        "quality": "wikitext2_ppl", "x": "bits_per_weight", "kind": "all", "row": "rtn_w8_g64",
    }  # fmt: skip


# --- the explorer -----------------------------------------------------------------------------------------------------


def test_fronts_equal_python() -> None:
    numbers = _numbers()
    kinds = {row["name"]: row["kind"] for row in _data()["rows"]}
    settings = list(itertools.product(QUALITIES, AXES, KINDS))
    inputs = [_data() | {"quality": quality, "x": x, "kind": kind} for quality, x, kind in settings]
    fronts, above = set(), 0
    for (quality, x, kind), got in zip(settings, compute("pareto", inputs), strict=True):
        rows = [numbers[name] for name, its in kinds.items() if kind in ("all", its)]
        shown = [row for row in rows if row[x] is not None and row[quality] is not None]
        points = [signed(row, x, quality) for row in shown]
        front = pareto_front(points)
        assert [p["name"] for p in got["points"]] == [row["name"] for row in shown]
        assert [p["front"] for p in got["points"]] == [i in front for i in range(len(shown))]
        assert got["front"] == [shown[i]["name"] for i in sorted(front, key=lambda i: points[i])]
        for p, mine in zip(got["points"], points, strict=True):
            assert p["beaten"] == [row["name"] for row, q in zip(shown, points, strict=True) if _dominates(q, mine)]
        assert len(got["missing"]) == len(rows) - len(shown)
        if quality.endswith("_ppl"):
            cap = 10 * numbers["fp"][quality]
            assert got["above"] == sum(row[quality] > cap for row in shown)
            above += got["above"]
        else:
            assert got["above"] == 0
        fronts.add(tuple(got["front"]))
    assert len(fronts) > 20 and above > 0


def test_equal_points_are_kept_together() -> None:
    row = {"title": "t", "method": "m", "kind": "both", "moved": {}, "why": {}}
    places = [(4.0, 9.0), (4.0, 9.0), (4.0, 9.5), (5.0, 9.0)]
    rows = [
        row | {"name": str(i), "values": {"bits_per_weight": x, "wikitext2_ppl": y}} for i, (x, y) in enumerate(places)
    ]
    (got,) = compute("pareto", [_data() | {"rows": rows} | START])
    assert got["front"] == ["0", "1"] == [str(i) for i in pareto_front(places)]


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(width: int) -> None:
    assert_every_control_matters(_example(), width=width, order=range(4))


@pytest.mark.parametrize("width", [320, 375])
def test_on_a_phone_no_text_is_cut_off_and_the_label_of_fp_covers_no_point(width: int) -> None:
    look = """() => {
      const box = (node) => node.getBoundingClientRect(), all = (what) => [...document.querySelectorAll(`.picture svg ${what}`)];
      const picture = box(document.querySelector(".picture")), points = all("path[class]").map(box);
      const over = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
      const cut = (a) => a.left < picture.left || a.right > picture.right;
      const texts = all("text"), fp = texts.filter((t) => t.textContent.startsWith("FP "));
      return { cut: texts.filter((t) => cut(box(t))).map((t) => t.textContent), points: points.length,
        fp: fp.map((t) => [t.textContent, points.filter((p) => over(p, box(t))).length]) };
    }"""
    with explorer_page(_example(), width=width) as page:
        selects = page.locator(".control select")
        for x, quality in itertools.product(AXES, QUALITIES):
            selects.nth(0).select_option(QUALITIES[quality]["label"])
            selects.nth(1).select_option(AXES[x]["label"])
            seen = page.evaluate(look)
            assert seen["cut"] == [] and seen["points"] > 20, (x, quality)
            (label, covered), *others = seen["fp"]
            assert not others and (" at " in label) == x.startswith("tokens")
            assert not x.startswith("tokens") or covered == 0, (x, quality)


def test_pointing_at_a_point_and_tapping_one_name_the_row() -> None:
    with explorer_page(_example(), width=375, theme="dark") as page:
        words = page.inner_text("[aria-live]")
        assert words.startswith("GPTQ W4 g64") and "QuIP W4" in words and "rows" in words
        assert not page.locator("details").is_visible()
        box = page.locator(".picture").bounding_box()
        x, y = (float(page.locator(".picture circle").get_attribute(key)) for key in ("cx", "cy"))
        before = picture(page)
        page.mouse.move(box["x"] + 4, box["y"] + 4)
        assert picture(page) == before  # nothing is near
        page.locator(".control select").nth(3).select_option("QuIP W2")
        page.mouse.move(box["x"] + x, box["y"] + y)
        assert page.inner_text("[aria-live]").startswith("GPTQ W4 g64")  # the very place
        assert picture(page) == before
        page.locator(".control select").nth(1).select_option("tokens/s, batch 1")
        page.locator(".control select").nth(3).select_option("QuIP W4")
        assert page.inner_text("[aria-live]").startswith("QuIP W4 is not shown: no kernel")
        page.locator("summary").press("Enter")
        assert "QuIP W2" in page.inner_text("details li >> nth=1")
