"""Compile tests say which rounding they want of Triton: 3.9 warns where nobody does, and warnings are errors."""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
