"""What every test runs under."""

import os
import sys

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs a real model goes first: at the end one worker would wait for the other's."""
    items.sort(key=lambda item: item.get_closest_marker("model") is None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """The explorers' tests share one browser."""
    if (js := sys.modules.get("tests.viz.js")) is not None:
        js.close_browser()
