"""Figures and exercises are numbered by chapter: the first exercise of 04-gptq is Exercise 4.1, as its check says."""

import re

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


def number_by_chapter(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Replace the numbers that run through the book, page by page."""
    for page, kinds in env.toc_fignumbers.items():
        if match := re.fullmatch(r"book/chapters/(\d\d)-[\w-]+", page):
            for numbers in kinds.values():
                for n, name in enumerate(sorted(numbers, key=numbers.get), 1):
                    numbers[name] = (int(match[1]), n)
    return []


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-get-updated", number_by_chapter, priority=900)  # after Sphinx has counted
    return {"parallel_read_safe": True, "parallel_write_safe": True}
