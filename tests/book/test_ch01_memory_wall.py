"""The checkers of chapter 01-memory-wall pass the right answers and explain the usual wrong ones."""

import math

from tests.book.answers import right_and_wrong


def _ridge(n, k, peak, bandwidth, weight_bits):
    return math.ceil(weight_bits * n * k / 8 / bandwidth / (2 * n * k / peak - 2 * (n + k) / bandwidth))


RIGHT = {
    "01-memory-wall.1": lambda m, n, k, b: 16 * m * n * k / (b * n * k + 16 * m * k + 16 * m * n),
    "01-memory-wall.2": _ridge,
    "01-memory-wall.3": lambda shape, bits: (
        2 * shape.layers * shape.kv_heads * (shape.head_dim * bits / 8 + (4 if bits < 16 else 0))
    ),
    "01-memory-wall.4": lambda share, shrink: 1 / (share + (1 - share) / shrink),
}
WRONG = {
    "01-memory-wall.1": lambda m, n, k, b: 16 * m / b,  # the limit
    "01-memory-wall.2": lambda n, k, peak, bandwidth, b: math.ceil(b / 16 * peak / bandwidth),  # the limit again
    "01-memory-wall.3": lambda shape, bits: 2 * shape.layers * shape.heads * shape.head_dim * bits / 8,
    "01-memory-wall.4": lambda share, shrink: share + (1 - share) * shrink,
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
