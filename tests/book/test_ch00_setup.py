"""The checkers of chapter 00-setup pass the right answers and explain the usual wrong ones."""

import math

from tests.book.answers import right_and_wrong

RIGHT = {
    "00-setup.1": lambda out, inputs, bits, g: (out * inputs * bits + out * inputs // g * (16 + bits)) // 8,
    "00-setup.2": math.exp,
}
WRONG = {
    "00-setup.1": lambda out, inputs, bits, g: (out * inputs * bits + out * inputs // g * 16) // 8,  # no zero point
    "00-setup.2": lambda delta: 1 + delta,
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
