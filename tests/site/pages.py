"""What pages the book has, from its sources: lists that parametrize the tests of the built site."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _listed() -> list[str]:
    return re.findall(r"(?:file|root): *(\S+)", (ROOT / "_toc.yml").read_text(encoding="utf-8"))


CHAPTERS = [entry.rpartition("/")[2] for entry in _listed() if entry.startswith("book/chapters/")]
PAGES = [f"{entry}.html" for entry in _listed()]


def public_objects() -> list[str]:
    """Addresses of everything the API pages must show."""
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    try:
        import lqedu_api
    finally:
        sys.path.pop(0)
    found = []
    for package in lqedu_api.packages():
        module = lqedu_api.read_module(package)
        if module.path.name == "__init__.py":
            found += [f"{package}.{name}" for name in lqedu_api.public_names(module)]
    return found
