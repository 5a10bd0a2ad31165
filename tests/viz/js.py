"""Run an explorer's pure functions, and its picture, from a test.

``compute(name, inputs)`` calls the module's ``compute`` once for each input, in one process: Node, or else headless
Chromium. ``explorer_page(explorer)`` opens an explorer from a file, as the book's pages do, and fails if it logs an
error, asks the network for anything, or scrolls sideways.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lqedu.viz.explorer import Explorer, module_source

_THEMES = {  # the variables of the book's theme that explorers read
    "light": "--pst-color-background:#ffffff;--pst-color-text-base:#222832;--pst-color-text-muted:#48566b;"
    "--pst-color-surface:#f3f4f5;--pst-color-border:#d1d5da;--pst-color-accent:#8045e5",
    "dark": "--pst-color-background:#14181e;--pst-color-text-base:#ced6dd;--pst-color-text-muted:#9ca4af;"
    "--pst-color-surface:#222832;--pst-color-border:#48566b;--pst-color-accent:#b295ff",
}
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
_ARGUMENTS = ["--no-sandbox", "--disable-gpu"]


def compute(name: str, inputs: Sequence[Any], *, function: str = "compute") -> list[Any]:
    """``function(input)`` of the explorer ``name`` (or of the kit, with name ``_kit``), for each input."""
    return evaluate(source(name), f"(xs) => xs.map((x) => module.{function}(x))", list(inputs))


def source(name: str) -> str:
    """The module of an explorer as one that stands by itself."""
    if name == "_kit":
        return module_source("grid")  # any module has the kit in front
    return module_source(name)


def evaluate(module: str, expression: str, argument: Any) -> Any:
    """The value of a function (JavaScript that may say ``module``) of ``argument``, both as JSON has them."""
    node = shutil.which("node")
    if node is None:
        return _evaluate_in_browser(module, expression, argument)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "module.mjs")
        path.write_text(module, encoding="utf-8")
        script = (
            f"import * as module from {json.dumps(path.as_uri())};"
            "import { readFileSync } from 'node:fs';"
            f"const f = {expression};"
            "process.stdout.write(JSON.stringify(f(JSON.parse(readFileSync(0, 'utf8')))));"
        )
        command = [node, "--input-type=module", "-e", script]
        done = subprocess.run(command, input=json.dumps(argument), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _evaluate_in_browser(module: str, expression: str, argument: Any) -> Any:
    with browser() as chromium, chromium.new_context() as context:
        page = context.new_page()
        code = (
            "async ([source, argument]) => {"
            "const module = await import(URL.createObjectURL(new Blob([source], { type: 'text/javascript' })));"
            f"return ({expression})(argument); }}"
        )
        return page.evaluate(code, [module, argument])


@contextmanager
def explorer_page(explorer: Explorer, *, width: int = 1280, theme: str = "light") -> Iterator[Any]:
    """A playwright page that shows ``explorer`` from a file; ``page.locator(".lqedu-explorer")`` is its root."""
    html = (
        f'<!DOCTYPE html><html lang="en" data-theme="{theme}" style="{_THEMES[theme]}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Test</title>'
        "<style>body{margin:16px auto;max-width:760px;padding:0 16px;font-family:sans-serif;"
        "background:var(--pst-color-background);color:var(--pst-color-text-base)}</style></head>"
        f"<body>{explorer.html()}</body></html>"
    )
    viewport = {"width": width, "height": 900}
    with (
        tempfile.TemporaryDirectory() as folder,
        browser() as chromium,
        chromium.new_context(viewport=viewport) as context,
    ):
        path = Path(folder, "page.html")
        path.write_text(html, encoding="utf-8")
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector(".lqedu-explorer[data-ready]")
        assert not complaints, f"the explorer {explorer.name} failed to start: {complaints}"
        # A frame later the picture has been measured and drawn.
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        yield page
        sideways = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert not complaints, f"the explorer {explorer.name} logged {complaints}"
        assert requests == [path.as_uri()], f"the explorer {explorer.name} asked for {requests[1:]}"
        assert sideways <= 0, f"the explorer {explorer.name} scrolls sideways by {sideways} px at {width} px"


def picture(page: Any) -> str:
    """The markup of the pictures on a page, to see whether it changed."""
    return page.eval_on_selector_all(".lqedu-explorer .picture svg", "nodes => nodes.map(n => n.innerHTML).join('')")


def move(page: Any, index: int) -> None:
    """Change the ``index``-th control of the page, as a reader with a keyboard would."""
    control = page.locator(".lqedu-explorer .control").nth(index).locator("input, select")
    if control.evaluate("node => node.tagName") == "SELECT":
        count = control.locator("option").count()
        control.select_option(index=(control.evaluate("node => node.selectedIndex") + 1) % count)
    elif control.get_attribute("type") == "checkbox":
        control.press("Space")
    else:
        before = control.input_value()
        control.press("ArrowRight")
        if control.input_value() == before:
            control.press("ArrowLeft")


def assert_every_control_matters(explorer: Explorer, *, width: int, order: Sequence[int]) -> None:
    """Moving each control, in this order, changes the picture and the words; ``order`` names them all."""
    with explorer_page(explorer, width=width) as page:
        assert page.locator(".lqedu-explorer .control").count() == len(order)
        for index in order:
            before = picture(page), page.inner_text("[aria-live]")
            move(page, index)
            assert picture(page) != before[0]
            assert page.inner_text("[aria-live]") != before[1]


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium, started once a process: what needs a clean one opens a context of its own.

    The test is skipped where there is none, unless LQEDU_REQUIRE_BROWSER=1. ``close_browser`` ends it.
    """
    if not _started or not _started[0].is_connected():
        close_browser()
        _started.append(_running.enter_context(_launched()))
    yield _started[0]


def close_browser() -> None:
    """End the browser, if one was started; tests/conftest.py does so after the last test."""
    _started.clear()
    _running.close()


_started: list[Any] = []  # the browser of this process, once there is one
_running = ExitStack()


@contextmanager
def _launched() -> Iterator[Any]:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        _no_browser("playwright is missing; pip install playwright")
    system = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=system, args=_ARGUMENTS)
        except Error as error:
            _no_browser(f"no Chromium: {error.message.splitlines()[0]}")
        try:
            yield chromium
        finally:
            chromium.close()


def _no_browser(reason: str) -> None:
    if os.environ.get("LQEDU_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
