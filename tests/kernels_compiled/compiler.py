"""Where the compile tests find their compiler: it ships with the bench, as a tool of its own."""

from lqedu_kernels.bench.compiled import SHARED, Compiled, compiling_for

__all__ = ["SHARED", "Compiled", "compiling_for"]
