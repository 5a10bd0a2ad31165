"""The checkers of chapter 12-progressive pass the right answers and tell the usual wrong ones apart."""

from tests.book.answers import right_and_wrong

_ONES, _WORD = 0x01010101, 1 << 32


def _add(a, b):
    return ((a & 0x7F7F7F7F) + (b & 0x7F7F7F7F)) ^ ((a ^ b) & 0x80808080)


RIGHT = {
    "12-progressive.1": (111, 124),
    "12-progressive.2": _add,
    "12-progressive.3": lambda words, s, z: _add(words * s, (-z * s) % 256 * _ONES),
    "12-progressive.4": lambda words, s, lo: (words * s + (128 + lo) * _ONES) ^ 0x80808080,
    "12-progressive.5": lambda r: max(0, r - 15 * max(1, round(r / 15))),
}
WRONG = {
    "12-progressive.1": [(119, 120), (111, 120), (110, 124), (111,)],
    "12-progressive.2": [lambda a, b: (a + b) % _WORD, lambda a, b: a + b, lambda a, b: a ^ b],
    "12-progressive.3": [
        lambda words, s, z: ((words - z * _ONES) * s) % _WORD,  # subtraction first
        lambda words, s, z: (words * s - z * s * _ONES) % _WORD,  # borrows between bytes
        lambda words, s, z: _add(words * s, (-z) % 256 * s * _ONES % _WORD),  # negated before it was multiplied
    ],
    "12-progressive.4": [
        lambda words, s, lo: (words * s + (lo % 256) * _ONES) % _WORD,  # no exclusive or, and carries
        lambda words, s, lo: (words * s + 128 * _ONES) ^ 0x80808080,
    ],
    "12-progressive.5": [lambda r: max(0, r - 15 * round(r / 15)), lambda r: r % 15, lambda r: 0],
}


test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
