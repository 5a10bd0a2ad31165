"""What a mean is worth, and how a file says so. Needs no torch, as pages that only read results do not."""

import math
import statistics
from collections.abc import Sequence


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is NaN."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def finite(number: float) -> float | None:
    """The number, or ``None`` for one that JSON cannot hold."""
    return number if math.isfinite(number) else None
