"""The built pages, in a browser: no network, equations, search, dark mode, narrow screens, explorers that move."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.site.pages import CHAPTERS, PAGES

pytestmark = pytest.mark.site

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 375, "height": 800}
# sphinx-thebe writes its constants twice into every page, whether thebe is used or not.
KNOWN_NOISE = ("has already been declared",)


@contextmanager
def _open(chromium: Any, url: str, viewport: dict[str, int]) -> Iterator[tuple[Any, list[str]]]:
    """A loaded page, and the list in which its complaints and its requests to other hosts collect."""
    context = chromium.new_context(viewport=viewport)
    page = context.new_page()
    complaints: list[str] = []
    host = url.split("/book/")[0].split("/search")[0]
    page.on(
        "request",
        lambda r: complaints.append(f"asked for {r.url}") if not r.url.startswith((host, "data:", "blob:")) else None,
    )
    page.on("response", lambda r: complaints.append(f"{r.status} for {r.url}") if r.status >= 400 else None)
    page.on("pageerror", lambda e: complaints.append(str(e)) if not any(n in str(e) for n in KNOWN_NOISE) else None)
    try:
        page.goto(url, wait_until="load")
        yield page, complaints
    finally:
        context.close()


def _equations(page: Any) -> int:
    """Equations that MathJax has set, once it has set them all."""
    page.wait_for_function(
        "() => document.querySelectorAll('.math').length === 0 || document.querySelectorAll('.math:not(:has(mjx-container))').length === 0",
        timeout=30_000,
    )
    return page.locator("mjx-container").count()


@pytest.mark.parametrize("page_name", PAGES)
def test_page_loads_without_a_network_and_fits_a_phone(page_name: str, chromium: Any, address: str) -> None:
    with _open(chromium, f"{address}/{page_name}", WIDE) as (page, complaints):
        _equations(page)
        assert page.locator("mjx-merror").count() == 0, "an equation with an error"
        assert not complaints
        page.set_viewport_size(NARROW)
        page.wait_for_timeout(100)
        sideways = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        widest = page.evaluate(
            "() => [...document.querySelectorAll('article *')].filter(n => n.getBoundingClientRect().right > innerWidth + 1)"
            ".slice(0, 3).map(n => n.outerHTML.slice(0, 120))"
        )
        assert sideways <= 0, f"the page scrolls sideways by {sideways} px: {widest}"


def test_equations_are_set(chromium: Any, address: str) -> None:
    with _open(chromium, f"{address}/book/notation.html", WIDE) as (page, _):
        assert _equations(page) > 10


def test_search_finds_a_page(chromium: Any, address: str) -> None:
    with _open(chromium, f"{address}/search.html", WIDE) as (page, complaints):
        box = page.locator("form.bd-search input[name=q]:visible").first
        box.fill("hessian")
        box.press("Enter")
        page.wait_for_selector("#search-results li a", timeout=30_000)
        assert page.locator("#search-results li a").count() > 0
        assert not complaints


def test_dark_mode_changes_the_page(chromium: Any, address: str) -> None:
    with _open(chromium, f"{address}/book/intro.html", WIDE) as (page, _):
        background = "getComputedStyle(document.body).backgroundColor"
        seen = {page.evaluate(background)}
        for _click in range(3):  # light, dark, and what the system says
            page.locator("button.theme-switch-button:visible").first.click()
            seen.add(page.evaluate(background))
        assert len(seen) == 2


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_moving_a_control_changes_the_picture(chapter: str, chromium: Any, address: str) -> None:
    with _open(chromium, f"{address}/book/chapters/{chapter}.html", WIDE) as (page, complaints):
        explorers = page.locator(".lqedu-explorer")
        for number in range(explorers.count()):
            explorer = explorers.nth(number)
            explorer.scroll_into_view_if_needed()
            controls = explorer.locator("input, select")
            assert controls.count() > 0, "an explorer without a native control"
            before = _picture(explorer)
            for index in range(controls.count()):
                _move(controls.nth(index))
                page.wait_for_timeout(50)
            assert _picture(explorer) != before, f"explorer {number} of {chapter} stays the same whatever is moved"
        assert not complaints


def _picture(explorer: Any) -> str:
    return explorer.evaluate(
        "n => [...n.querySelectorAll('svg')].map(s => s.innerHTML).join('') + [...n.querySelectorAll('canvas')].map(c => c.toDataURL()).join('')"
    )


def _move(control: Any) -> None:
    """Change a native control as a reader with a keyboard would."""
    if control.evaluate("n => n.tagName") == "SELECT":
        count = control.locator("option").count()
        control.select_option(index=(control.evaluate("n => n.selectedIndex") + 1) % count)
    elif control.get_attribute("type") in ("checkbox", "radio"):
        control.press("Space")
    else:
        before = control.input_value()
        control.press("ArrowRight")
        if control.input_value() == before:
            control.press("ArrowLeft")
