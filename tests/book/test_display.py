"""Glue as MyST-NB reads it, and tables that a screen reader can follow."""

from html.parser import HTMLParser

import nbformat
import pytest
import torch
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

from lqedu.book import glue, table
from lqedu.errors import UsageError


@pytest.fixture
def shell(monkeypatch):
    shell = InteractiveShell()
    shell.display_pub = CapturingDisplayPublisher()
    monkeypatch.setattr(InteractiveShell, "_instance", shell)  # what get_ipython returns
    return shell


def _published(shell):
    (output,) = shell.display_pub.outputs
    shell.display_pub.outputs.clear()
    return output["data"], output["metadata"]


def _glued(shell, name, value):
    glue(name, value)
    return _published(shell)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.5, "2.5"),
        (3, "3"),
        ("words", "'words'"),
        (torch.tensor(0.5), "0.5"),
        (torch.tensor([[7]]), "7"),
        (torch.tensor(0.5).numpy(), "0.5"),
    ],
)
def test_glue_stores_numbers_that_a_sentence_can_format(shell, value, text):
    data, metadata = _glued(shell, "x", value)
    assert data == {"application/papermill.record/text/plain": text}
    assert metadata["scrapbook"] == {"name": "x", "mime_prefix": "application/papermill.record/"}


def test_mystnb_reads_what_glue_stores(shell):
    myst_glue = pytest.importorskip("myst_nb.ext.glue")
    from myst_nb.core.variables import format_plain_text

    data, metadata = _glued(shell, "ppl", 28.1234)
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data=data, metadata=metadata)])
    found = dict(myst_glue.extract_glue_data(nbformat.v4.new_notebook(cells=[cell]), [0], None))
    assert format_plain_text(found["ppl"]["data"]["text/plain"], ".2f") == "28.12"


def test_glue_stores_exactly_what_mystnb_would(shell):
    myst_glue = pytest.importorskip("myst_nb.ext.glue")
    rich = table([{"a": 1}])
    ours = _glued(shell, "t", rich)
    myst_glue.glue("t", rich, display=False)
    assert ours == _published(shell)
    assert "application/papermill.record/text/html" in ours[0]


@pytest.mark.parametrize("name", ["", "a:b", "a`b", 'a"b', "a\nb"])
def test_names_that_the_role_cannot_refer_to_are_refused(name):
    with pytest.raises(UsageError, match="a glued name"):
        glue(name, 1)


def test_glue_outside_a_notebook_does_nothing(capsys):
    glue("x", 1)
    assert capsys.readouterr().out == ""


# --- tables -----------------------------------------------------------------------------------------------------------

ROWS = [
    {"method": "FP32", "group": None, "ppl": 22.512345, "exact": True},
    {"method": "RTN <W4>", "group": 64, "ppl": 28.1, "exact": False, "extra": torch.tensor(3)},
]


def test_text_is_aligned():
    lines = repr(table(ROWS, caption="Perplexity")).splitlines()
    assert lines == [
        "Perplexity",
        "method    group    ppl  exact  extra",
        "--------  -----  -----  -----  -----",
        "FP32          –  22.51  yes        –",
        "RTN <W4>     64   28.1  no         3",
    ]


def test_columns_choose_order_and_rename():
    shown = table(ROWS, columns={"ppl": "perplexity", "method": "Method"}, formats={"ppl": lambda x: f"{x:.0f}!"})
    assert shown.headers == ["perplexity", "Method"]
    assert shown.cells == [["23!", "FP32"], ["28!", "RTN <W4>"]]


def test_a_word_among_numbers_takes_no_number_format():
    assert table([{"g": 64}, {"g": "channel"}], formats={"g": ".1f"}).cells == [["64.0"], ["channel"]]


def test_html_has_scopes_a_caption_and_escaped_text():
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags = []

        def handle_starttag(self, tag, attrs):
            self.tags.append((tag, dict(attrs)))

    page = table(ROWS, columns=["method", "ppl"], caption="Perplexity & <bits>")._repr_html_()
    parser = Tags()
    parser.feed(page)
    scopes = [attrs.get("scope") for tag, attrs in parser.tags if tag == "th"]
    assert scopes == ["col", "col", "row", "row"]
    assert [attrs["style"].startswith("text-align:right") for tag, attrs in parser.tags if tag == "td"] == [True, True]
    assert "RTN &lt;W4&gt;" in page
    assert "<caption" in page
    wrapper = parser.tags[0][1]
    assert "overflow-x:auto" in wrapper["style"]
    assert wrapper["tabindex"] == "0"


def test_empty_tables_and_unknown_columns_are_refused():
    with pytest.raises(UsageError, match="at least one row"):
        table([])
    with pytest.raises(UsageError, match="no row has 'nll'; the rows have 'method'"):
        table(ROWS, columns=["method", "nll"])
    with pytest.raises(UsageError, match="no row has 'nll'"):
        table(ROWS, formats={"nll": ".2f"})
