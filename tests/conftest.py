"""What every test runs under."""

import os
import sys

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The explorers' tests share one browser."""
    if (js := sys.modules.get("tests.viz.js")) is not None:
        js.close_browser()
