"""The built book, served from this machine, and a browser to look at it."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.viz.js import browser

HTML = Path(__file__).resolve().parents[2] / "_build" / "html"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def html() -> Path:
    """Folder of the built pages."""
    assert (HTML / "index.html").is_file(), "there is no built book to look at; run `make site`"
    return HTML


@pytest.fixture(scope="session")
def address(html: Path) -> Iterator[str]:
    """Where the built pages are served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(html)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium; skips without one, fails instead where LQEDU_REQUIRE_BROWSER=1."""
    with browser() as chromium:
        yield chromium
