"""The host of the explorers, and what every explorer keeps to."""

import json
import shutil

import numpy
import pytest
import torch

import lqedu.viz
from lqedu.errors import UsageError
from lqedu.viz.explorer import MAX_DATA, MAX_LINES, contract_problem, module_source, names
from tests.viz.js import browser, compute, evaluate, explorer_page, move, picture, source

DATA = {"weights": [0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.7, 0.8], "bits": 4, "symmetric": False, "group": 8, "outlier": 1}


def _grid(**changes):
    return lqedu.viz.explorer("grid", DATA | changes, title="A <grid>", description='Move "it".')


# --- every module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_every_module_keeps_the_contract(name):
    exports = evaluate(module_source(name), "() => [typeof module.compute, typeof module.default.render]", None)
    assert exports == ["function", "function"]


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        ("\n" * (MAX_LINES + 1), "more than 200 lines"),
        ("export function compute() {}\n", "one line that starts with"),
        ("export default { render() {} };\n", "must export compute"),
        ("import x from 'y';\nexport function compute() {}\nexport default {};\n", "must not import"),
        ("export function compute() { fetch('x'); }\nexport default {};\n", "must not import or fetch"),
        ("export function compute() { return '</script>'; }\nexport default {};\n", "ends or comments out"),
    ],
)
def test_modules_that_no_host_can_show_are_refused(module, problem):
    assert problem in contract_problem(module)


# --- the kit's numbers ------------------------------------------------------------------------------------------------


def test_float16_rounding_equals_numpy():
    generator = torch.Generator().manual_seed(0)
    halves = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).double()  # all finite ones
    midpoints = (halves[1:] + halves[:-1]) / 2
    some = torch.randn(5000, generator=generator, dtype=torch.float64).exp() * 1e-3
    edges = torch.tensor([65503.9, 65504.0, 65519.9, 65520.0, 1e30, 2.0**-24, 2.0**-25, 2.0**-25 * 1.001, 1e-30, 0.0])
    nudged = torch.cat([midpoints * (1 - 1e-12), midpoints * (1 + 1e-12)])
    x = torch.cat([halves, midpoints, nudged, some, edges.double()])
    x = torch.cat([x, -x])
    got = compute("_kit", x.tolist(), function="f16")
    with numpy.errstate(over="ignore"):  # infinities are the point
        want = x.numpy().astype(numpy.float16).astype(float)  # torch goes through float32 and rounds twice
    assert got == [None if numpy.isinf(value) else value for value in want]  # JSON has no infinity


def test_rounding_goes_to_the_even_integer_as_in_torch():
    x = torch.cat([torch.arange(-40, 41) / 4, torch.tensor([0.49999999999999994, 2.0**52 + 1])]).double()
    assert compute("_kit", x.tolist(), function="roundEven") == torch.round(x).tolist()


def test_ticks_and_numbers_read_well():
    assert evaluate(source("_kit"), "() => module.ticks(-0.31, 0.42, 5)", None) == [-0.2, 0, 0.2, 0.4]
    assert evaluate(source("_kit"), "() => module.ticks(2, 2, 5)", None) == [2]
    shown = compute("_kit", [0, 0.1 + 0.2, 12345.678, 1e-7, 2.5e9, -0.001], function="fmt")
    assert shown == ["0", "0.3", "12300", "1.00e-7", "2.50e9", "-0.001"]


# --- the host ---------------------------------------------------------------------------------------------------------


def test_html_is_the_same_bytes_every_time_and_stands_by_itself():
    page = _grid().html()
    assert page == _grid().html()
    assert "A &lt;grid&gt;" in page
    assert "https:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "export default" not in page
    assert repr(_grid()) == 'A <grid>: Move "it".'


def test_data_cannot_leave_their_script():
    text = "</script><b>&\u2028KEY"
    shown = _grid(note=text)
    assert text not in shown.html()
    with explorer_page(shown) as page:
        assert page.locator("b").count() == 0
        assert page.locator("figcaption strong").inner_text() == "A <grid>"


def test_tensors_and_arrays_become_lists_from_which_the_same_floats_come_back():
    w = torch.randn(200, generator=torch.Generator().manual_seed(0))
    for container in (w, w.numpy(), w.double()):
        values = _grid(weights=container).data["weights"]
        assert torch.tensor(values).equal(w)
    assert len(json.dumps(_grid(weights=w).data["weights"])) < 14 * 200
    assert _grid(weights=torch.arange(3)).data["weights"] == [0, 1, 2]
    assert _grid(rate=numpy.float64(0.5)).data["rate"] == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.tensor([1.0, float("nan")]), {"a": [-float("inf")]}])
def test_numbers_that_json_does_not_have_are_refused(bad):
    with pytest.raises(UsageError, match=r"hold -?(nan|inf) at extra"):
        _grid(extra=bad)


def test_unknown_types_names_and_empty_titles_are_refused():
    with pytest.raises(UsageError, match="hold a value of type object at extra"):
        _grid(extra=object())
    with pytest.raises(UsageError, match=r"no explorer 'nothing'; there are .*grid"):
        lqedu.viz.explorer("nothing", {}, title="t", description="d")
    with pytest.raises(UsageError, match="needs a title and a description"):
        lqedu.viz.explorer("grid", DATA, title="t", description=" ")
    with pytest.raises(UsageError, match="keys are identifiers"):
        lqedu.viz.explorer("grid", {"a b": 1}, title="t", description="d")


def test_too_much_data_are_refused():
    with pytest.raises(UsageError, match=f"at most {MAX_DATA} fit"):
        _grid(extra=[0.123456789] * 20_000)


def test_a_missing_starting_value_is_an_error_that_names_it():
    data = {key: value for key, value in DATA.items() if key != "bits"}
    shown = lqedu.viz.explorer("grid", data, title="t", description="d")
    with pytest.raises(AssertionError, match=r'failed to start.*lack "bits"'), explorer_page(shown):
        pass


def test_the_same_explorer_twice_on_a_page_starts_both(monkeypatch):
    shown = _grid()
    twice = shown.html() * 2
    monkeypatch.setattr(shown, "html", lambda: twice)
    with explorer_page(shown) as page:
        figures = page.locator(".lqedu-explorer")
        assert figures.count() == 2
        texts = [figures.nth(i).locator("[aria-live]").inner_text() for i in range(2)]
        assert texts[0] == texts[1] != ""
        move(page, 0)  # moves the first one only
        assert figures.nth(0).locator("[aria-live]").inner_text() != texts[0]
        assert figures.nth(1).locator("[aria-live]").inner_text() == texts[1]


def test_controls_have_names_and_visible_focus():
    with explorer_page(_grid(), width=320) as page:
        assert page.locator("figure.lqedu-explorer").get_attribute("aria-label") == "A <grid>"
        for label in ("bits", "grid", "weights a scale", "largest weight"):
            assert page.get_by_label(label).count() >= 1
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.type") == "range"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
        before = picture(page)
        page.keyboard.press("ArrowRight")
        assert picture(page) != before
        sizes = page.eval_on_selector_all("svg text", "all => all.map((x) => parseFloat(getComputedStyle(x).fontSize))")
        assert min(sizes) >= 12


def test_the_widget_has_the_same_module_and_synchronized_data():
    pytest.importorskip("anywidget")
    widget = _grid().widget()
    assert widget.bits == 4
    assert {"bits", "weights", "symmetric", "_title"} <= set(widget.keys)
    exports = evaluate(str(widget._esm), "() => [typeof module.compute, typeof module.default.render]", None)
    assert exports == ["function", "function"]
    widget.bits = 3
    assert widget.bits == 3


def test_the_widgets_module_renders_for_a_live_model():
    pytest.importorskip("anywidget")
    widget = _grid().widget()
    state = {key: getattr(widget, key) for key in (*DATA, "_title", "_description")}
    live = """async ([source, state]) => {
      const module = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
      module.default.render({ model: { get: (key) => state[key], on() {} }, el: document.body });
      const figure = document.querySelector("figure");
      return [figure.getAttribute("aria-label"), figure.querySelectorAll(".control").length];
    }"""
    with browser() as chromium, chromium.new_context() as context:
        assert context.new_page().evaluate(live, [str(widget._esm), state]) == ["A <grid>", 4]


def test_without_node_the_browser_computes_the_same(monkeypatch):
    with_node = compute("grid", [DATA]) if shutil.which("node") else None
    monkeypatch.setattr("tests.viz.js.shutil.which", lambda name: None if name == "node" else _which(name))
    without = compute("grid", [DATA])
    assert with_node in (None, without)


_which = shutil.which
