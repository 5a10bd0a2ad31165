"""Figures of the book: one style, the few plots that chapters share, and explorers that move without a kernel.

Importing it loads neither torch nor matplotlib.
"""

from lqedu.viz.explorer import Explorer, explorer
from lqedu.viz.plots import bars, histogram_with_grid, matrix
from lqedu.viz.style import PALETTE, figure, series, use_style

__all__ = ["PALETTE", "Explorer", "bars", "explorer", "figure", "histogram_with_grid", "matrix", "series", "use_style"]
