"""The explorer of published perplexities and the sortable tables of chapter 23."""

import math
import statistics

import pytest

import lqedu.viz
from lqedu.book.published import PERPLEXITIES, WINDOWS_2048, explorer_rows, published
from lqedu.viz.sortable import sortable
from tests.viz.js import assert_every_control_matters, browser, compute, explorer_page

START = {"model": "Llama-2-7B", "metric": "wikitext2_ppl", "kind": "weights", "measure": "difference", "mix": False}
ROWS = [
    {"method": "B", "ppl": 5.61, "source": "<one>"},
    {"method": "a", "ppl": 10.2, "source": "two"},
    {"method": "C", "ppl": None, "source": "three"},
    {"method": "d", "ppl": -0.5, "source": "four"},
]


@pytest.fixture(scope="module")
def data():
    return {"rows": explorer_rows(published(), ["Llama-2-7B", "Llama-3-8B", "Mistral-7B"])}


def test_points_equal_python(data) -> None:
    inputs = [
        data | {"model": model, "metric": metric, "kind": kind, "measure": measure, "mix": mix}
        for model in ("Llama-2-7B", "Llama-3-8B", "Mistral-7B")
        for metric in PERPLEXITIES
        for kind in ("weights", "both")
        for measure in ("difference", "nll")
        for mix in (False, True)
    ]
    some = 0
    for one, got in zip(inputs, compute("published", inputs), strict=True):
        rows = [r for r in published() if r.model == one["model"] and r.metric == one["metric"] and r.fp16 and r.bits]
        usual = [r.fp16 for r in rows if r.protocol == WINDOWS_2048]
        want = []
        for r in rows:
            if (r.bits.activations == 16) != (one["kind"] == "weights") or not (
                one["mix"] or r.protocol == WINDOWS_2048
            ):
                continue
            fp16 = r.fp16 if r.protocol == WINDOWS_2048 or not usual else statistics.median_high(usual)
            want.append(math.log(r.value / fp16) if one["measure"] == "nll" else r.value - fp16)
        assert [p["y"] for p in got["points"]] == pytest.approx(sorted(want))
        assert got["below"] == sum(y < 0 for y in want)
        some += len(want)
    assert some > 300


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(data, width: int) -> None:
    made = lqedu.viz.explorer("published", data | START, title="Published", description="Choose.")
    assert_every_control_matters(made, width=width, order=(4, 3, 2, 0, 1))


def test_the_words_say_where_mixing_leads(data) -> None:
    made = lqedu.viz.explorer("published", data | START | {"mix": True}, title="Published", description="Choose.")
    (result,) = compute("published", [made.data])
    with explorer_page(made, theme="dark") as page:
        assert f"{result['below']} lie below zero" in page.inner_text("[aria-live]") and result["below"] > 3


def test_a_sortable_table_is_complete_without_its_script() -> None:
    made = sortable(ROWS, caption="Figures & sources", formats={"ppl": ".2f"})
    text = made._repr_html_()
    assert "&lt;one&gt;" in text and "Figures &amp; sources" in text and text.count("<tr>") == 5
    assert text.count('scope="col"') == 3 and text.count('scope="row"') == 4 and "http" not in text
    assert made._repr_html_() == text and repr(made) == "Figures & sources: 4 rows of method, ppl, source"


def test_a_keyboard_sorts_and_the_order_is_announced(tmp_path) -> None:
    body = sortable(ROWS, caption="one", formats={"ppl": ".2f"})._repr_html_()
    path = tmp_path / "page.html"
    path.write_text(f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><body>{body}{body}</body></html>', "utf-8")
    with browser() as chromium, chromium.new_context(viewport={"width": 320, "height": 700}) as context:
        page = context.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: complaints.append(r.url) if r.url != path.as_uri() else None)
        page.goto(path.as_uri())
        assert page.locator("thead button").count() == 6  # each table once, though its script stands there twice

        def first_column() -> list[str]:
            return page.locator(".lqedu-sortable").first.locator("tbody th").all_inner_texts()

        number = page.locator("thead button", has_text="ppl").first
        number.focus()
        for key, order, direction in (("Enter", "d B a C", "ascending"), ("Space", "a B d C", "descending")):
            page.keyboard.press(key)
            assert first_column() == order.split()  # the one without a value stays last
            assert page.locator("thead th").nth(1).get_attribute("aria-sort") == direction
            assert page.locator(".lqedu-sorted").first.inner_text() == f"Sorted by ppl, {direction}."
        page.locator("thead button", has_text="method").first.click()
        assert first_column() == ["a", "B", "C", "d"]
        assert page.locator("thead th").nth(1).get_attribute("aria-sort") == "none"
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0 and not complaints
