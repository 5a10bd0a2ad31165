"""The built pages, as files: alt texts, links, buttons, API entries. Runs on what ``make site`` has built."""

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from tests.site.pages import CHAPTERS, PAGES, ROOT, public_objects

pytestmark = pytest.mark.site


@cache
def _soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@cache
def _anchors(path: Path) -> set[str | None]:
    """Where in a page a link can lead."""
    return {t.get("id") for t in _soup(path).find_all(id=True)} | {t.get("name") for t in _soup(path).find_all("a")}


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_has_an_alternative_text(page: str, html: Path) -> None:
    for image in _soup(html / page).find_all("img"):
        alt = image.get("alt", "")
        assert len(alt) >= 5, f"{page}: {image.get('src')} has no alt text"
        assert not re.search(r"\.(png|svg|jpe?g)$|[0-9a-f]{16}", alt), f"{page}: the alt text {alt!r} is a file name"


@pytest.mark.parametrize("page", PAGES)
def test_nothing_was_left_unrendered(page: str, html: Path) -> None:
    article = _soup(html / page).find("article")
    assert not article.select(".system-message, .problematic"), f"{page} shows a message of the builder"
    for code in article.find_all(["pre", "code", "script"]):
        code.extract()
    _soup.cache_clear()  # the tree above has lost its code
    assert not re.search(r"^:::|\{(?:ref|doc|cite:[pt]|term|glue:text)\}", article.get_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_internal_links_lead_somewhere(page: str, html: Path) -> None:
    for tag in _soup(html / page).find_all(["a", "link", "script", "img"]):
        target = tag.get("href") or tag.get("src") or ""
        parts = urlsplit(target)
        if parts.scheme or parts.netloc or target.startswith("#!") or not target:
            continue
        file = (html / page).parent / unquote(parts.path) if parts.path else html / page
        if file.is_dir():
            file = file / "index.html"
        assert file.is_file(), f"{page}: {target} does not exist"
        if parts.fragment and tag.name == "a" and file.suffix == ".html":
            assert unquote(parts.fragment) in _anchors(file), f"{page}: {target} has no such anchor"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapters_open_in_colab_and_download(chapter: str, html: Path) -> None:
    targets = [a["href"] for a in _soup(html / f"book/chapters/{chapter}.html").find_all("a", href=True)]
    colab = re.compile(
        rf"https://colab\.research\.google\.com/github/lqedu/lqedu/blob/[\w.]+/book/chapters/{chapter}\.ipynb"
    )
    assert any(map(colab.fullmatch, targets)), "no Colab button"
    assert any(target.endswith(f"{chapter}.ipynb") and "://" not in target for target in targets), "no download button"


def test_the_notebook_that_downloads_is_the_committed_one(html: Path) -> None:
    for chapter in CHAPTERS:
        source = (ROOT / "book" / "chapters" / f"{chapter}.ipynb").read_bytes()
        assert (html / "_sources" / "book" / "chapters" / f"{chapter}.ipynb").read_bytes() == source


def test_every_public_object_has_an_entry(html: Path) -> None:
    anchors = {t["id"] for page in html.glob("book/api/*.html") for t in _soup(page).find_all(id=True)}
    assert not [name for name in public_objects() if name not in anchors]


def test_front_page_leads_to_the_introduction(html: Path) -> None:
    assert "book/intro.html" in (html / "index.html").read_text(encoding="utf-8")
