"""The checkers of chapter 19-integer-gemm pass the right answers and tell the usual wrong ones apart."""

from tests.book.answers import right_and_wrong


def _add(words, b, *, carry=False):
    four = b * 0x01010101
    if carry:
        return (words + four) % 2**32
    return ((words & 0x7F7F7F7F) + (four & 0x7F7F7F7F)) ^ ((words ^ four) & 0x80808080)


RIGHT = {
    "19-integer-gemm.1": lambda total, x_sum, z: total - x_sum[:, None] * z,
    "19-integer-gemm.2": _add,
    "19-integer-gemm.3": lambda s, z: (128 - z * s) % 256,
    "19-integer-gemm.4": lambda i: 32 * i,
    "19-integer-gemm.5": 36,
}
WRONG = {
    "19-integer-gemm.1": [
        lambda total, x_sum, z: total + x_sum[:, None] * z,
        lambda total, x_sum, z: total - z,
        lambda total, x_sum, z: total,
    ],
    "19-integer-gemm.2": [lambda words, b: _add(words, b, carry=True), lambda words, b: words],
    "19-integer-gemm.3": [lambda s, z: (127 - z * s) % 256, lambda s, z: (-z * s) % 256],
    "19-integer-gemm.4": [lambda i: 4096 * i, lambda i: i / 32, lambda i: 16 * i, lambda i: 64 * i, lambda i: 1.0],
    "19-integer-gemm.5": [17, 31, 85, 18, 255],
}

test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
