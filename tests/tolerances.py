"""Bounds used by several tests, each derived once; tests hold no such literals of their own."""

#: float64 algebra on well-conditioned problems of a few hundred columns: condition number ~1e4 times 1e-16, with room.
FP64_IDENTITY = 1e-10
#: Fraction of codes that may differ between two orders of the same float32 sums: only weights within rounding error
#: of a tie flip (and feed their flip forward).
FP32_TIES = 1e-3
