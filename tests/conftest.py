"""What every test runs under."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
