"""The README's first screen is true: its code runs and prints what it says, its picture shows the recorded numbers."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from lqedu.book.picture import label, series
from lqedu.book.results import read_result

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.model
def test_the_first_example_prints_what_it_says() -> None:
    """Perplexities agree to 2 %: GPTQ's codes flip at ties, so another processor's sums move the last digits."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    printed = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, "README.md", "exec"), {})

    def perplexities(text: str) -> dict[str, float]:
        return {name: float(ppl) for name, ppl in re.findall(r"^(\w+) Perplexity\(ppl=([\d.]+)", text, re.MULTILINE)}

    want, got = perplexities(printed), perplexities(output.getvalue())
    assert got == pytest.approx(want, rel=0.02)
    assert set(want) == {"RTN", "GPTQ"}
    assert got["GPTQ"] < 0.7 * got["RTN"]  # at 3 bits the method earns its chapter


def test_the_picture_shows_the_recorded_numbers() -> None:
    rows = read_result(ROOT / "book" / "results" / "weight_only_smollm2.json")["values"]
    picture = (ROOT / "book" / "_static" / "perplexity.svg").read_text("utf-8")
    labels = [label(ppl) for points in series(rows).values() for _, ppl in points]
    assert len(labels) == 4
    for text in [*labels, f"dense {label(rows[0]['ppl'])}"]:
        assert f">{text}<" in picture


def test_every_file_the_readme_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"^\| `([\w/]+)` \|", README, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
