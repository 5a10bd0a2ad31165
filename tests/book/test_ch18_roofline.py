"""The checkers of chapter 18-roofline pass the right answers and tell the usual wrong ones apart."""

import itertools

import torch

from tests.book.answers import right_and_wrong


def _unpack(words, i, *, mask=True, subtract=True):
    bits = (words >> 4 * i) & 0xF if mask else words >> 4 * i
    return (bits | 0x6400).view(torch.float16) - (1024 if subtract else 0)


def _program(s, blocks, programs):
    run, longer = divmod(blocks, programs)
    in_longer = longer * (run + 1)
    return s // (run + 1) if s < in_longer else longer + (s - in_longer) // run


def _runs(blocks, programs, *, rest=True):
    starts = [p * (blocks // programs) + min(p, blocks % programs) * rest for p in range(programs + 1)]
    return list(itertools.pairwise(starts))


RIGHT = {
    "18-roofline.1": lambda bits, beta, pi: pi / beta,
    "18-roofline.2": _unpack,
    "18-roofline.3": _program,
    "18-roofline.4": _runs,
    "18-roofline.5": lambda beta, iota: 0.75 * iota * 3 / (8 * beta),
}
WRONG = {
    "18-roofline.1": [
        lambda bits, beta, pi: pi * bits / 16 / beta,
        lambda bits, beta, pi: pi / (2 * beta),
        lambda bits, beta, pi: 2 * pi / beta,
        lambda bits, beta, pi: 300.0,
    ],
    "18-roofline.2": [
        lambda words, i: _unpack(words, i, mask=False),
        lambda words, i: _unpack(words, i, subtract=False),
        lambda words, i: ((words >> 4 * i) & 0xF).float(),
    ],
    "18-roofline.3": [
        lambda s, blocks, programs: min(s // max(blocks // programs, 1), programs - 1),
        lambda s, blocks, programs: s % programs,
    ],
    "18-roofline.4": [
        lambda blocks, programs: _runs(blocks, programs, rest=False),
        lambda blocks, programs: [
            (p * -(-blocks // programs), (p + 1) * -(-blocks // programs)) for p in range(programs)
        ],
        lambda blocks, programs: [*_runs(blocks, programs)[:-1], (0, 0)],
    ],
    "18-roofline.5": [
        lambda beta, iota: iota * 3 / (8 * beta),
        lambda beta, iota: 0.25 * iota * 3 / (8 * beta),
        lambda beta, iota: 0.75 * iota * 8 / (3 * beta),
        lambda beta, iota: 0.75 * iota / beta,
    ],
}

test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
