"""A plugin of pytest: chapters run in the order of the time their title cell states, so that none is left for the end."""

import re
from functools import cache
from pathlib import Path

import pytest


@cache
def stated_seconds(notebook: Path) -> int:
    """The "about N s" of a chapter's badge row; 0 where there is none.

    >>> stated_seconds(Path("no such chapter"))
    0
    """
    text = notebook.read_text("utf-8") if notebook.is_file() else ""
    found = re.search(r"runs on [^\"\n]*about (\d+) s\b", text)
    return int(found[1]) if found else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: -stated_seconds(item.path))  # cells of a chapter stay together and in order
