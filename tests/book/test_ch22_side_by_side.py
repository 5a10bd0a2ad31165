"""The checkers of chapter 22-side-by-side pass the right answers and tell the usual wrong ones apart."""

import math
import statistics

from lqedu.book.exercises.ch22_side_by_side import LINEARS, ROW, flags
from lqedu.book.matrix import DENSE, read_matrix
from tests.book.answers import right_and_wrong


def _errors(mine, theirs):
    n, differences = len(mine), [a - b for a, b in zip(mine, theirs, strict=True)]
    apart = math.hypot(*(statistics.stdev(map(float, row)) / math.sqrt(n) for row in (mine, theirs)))
    return statistics.stdev(differences) / math.sqrt(n), apart


def _mcnemar(mine, theirs):
    return math.sqrt(sum(a != b for a, b in zip(mine, theirs, strict=True))) / len(mine), _errors(mine, theirs)[1]


def _population(mine, theirs):
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    return statistics.pstdev(differences) / math.sqrt(len(mine)), _errors(mine, theirs)[1]


def _added(mine, theirs):
    n = len(mine)
    return _errors(mine, theirs)[0], sum(statistics.stdev(map(float, row)) / math.sqrt(n) for row in (mine, theirs))


def _front(rows, *, key=lambda row: row[1:], keep=lambda ppl, best: ppl < best):
    front, best = [], math.inf
    for name, _, ppl in sorted(rows, key=key):
        if keep(ppl, best):
            front.append(name)
            best = ppl
    return front


def _bits(bits, group, scale, zero, linears, *, unit=8, weigh=True):
    total, weights = 0.0, 0
    for rows, inputs in linears:
        groups = inputs // (group or inputs)
        stored = rows * (inputs * bits + groups * scale + unit * math.ceil(groups * zero / unit))
        total, weights = (
            (total + stored, weights + rows * inputs) if weigh else (total + stored / rows / inputs, weights + 1)
        )
    return total / weights


def _items(stderr, items, difference, *, errors=2, power=2, up=math.ceil, scale=1.0):
    return up(items * (errors * stderr / (scale * difference)) ** power - 1e-9)


RIGHT = {
    "22-side-by-side.1": _errors,
    "22-side-by-side.2": _front,
    "22-side-by-side.3": _bits,
    "22-side-by-side.4": _items,
    "22-side-by-side.5": "QQQ W4A8 channel, rotated",
}
WRONG = {
    "22-side-by-side.1": [
        lambda mine, theirs: _errors(mine, theirs)[::-1],
        lambda mine, theirs: (_errors(mine, theirs)[1],) * 2,
        lambda mine, theirs: (_errors(mine, theirs)[0] * math.sqrt(len(mine)), _errors(mine, theirs)[1]),
        lambda mine, theirs: (_errors(mine, theirs)[0],) * 2,
        _mcnemar,
        _population,
        _added,
    ],
    "22-side-by-side.2": [
        lambda rows: _front(rows, key=lambda row: row[1]),
        lambda rows: _front(rows, keep=lambda ppl, best: ppl <= best),
        lambda rows: _front(rows, key=lambda row: (-row[1], row[2])),
        lambda rows: [row[0] for row in rows],
        lambda rows: _front(rows)[:1],
    ],
    "22-side-by-side.3": [
        lambda *args: _bits(*args, unit=1),
        lambda *args: _bits(*args, unit=32),
        lambda *args: _bits(*args, weigh=False),
        lambda bits, group, scale, zero, linears: _bits(bits, group, scale, 0, linears),
        lambda bits, group, scale, zero, linears: bits,
    ],
    "22-side-by-side.4": [
        lambda *args: _items(*args, errors=1),
        lambda *args: _items(*args, power=1),
        lambda *args: _items(*args, power=-2),
        lambda *args: _items(*args, scale=100),
        lambda *args: _items(*args, up=math.floor),
        lambda *args: _items(*args, up=float),
    ],
    "22-side-by-side.5": ["FP8 channel, token", "RTN W4A8 channel", "nobody", 3],
}

test_right_and_wrong = right_and_wrong(RIGHT, WRONG)


def test_the_exercises_are_about_what_the_files_hold() -> None:
    matrix = read_matrix("smollm2-135m", rows=(DENSE, ROW), same_commit=False)
    number = next(row for row in matrix.summary() if row["name"] == ROW)
    paired, apart = _errors(flags(ROW, "hellaswag"), flags(DENSE, "hellaswag"))
    assert math.isclose(paired, number["hellaswag_acc_norm_delta_stderr"], rel_tol=1e-9)
    assert 1.5 * paired < apart  # pairing helps, as the text says
    storage = matrix.part(ROW, "storage")
    assert storage["weights"] % sum(rows * inputs for rows, inputs in LINEARS) == 0
    assert math.isclose(_bits(4, 64, 16, 4, LINEARS), storage["bits_per_weight"], rel_tol=1e-12)


def test_hints_name_the_mistake(capsys) -> None:
    from lqedu.book import check

    for name, answer, hint in (
        ("22-side-by-side.1", _mcnemar, "mean difference to be zero"),
        ("22-side-by-side.1", _population, "n - 1"),
        ("22-side-by-side.2", WRONG["22-side-by-side.2"][0], "equal bits"),
        ("22-side-by-side.2", WRONG["22-side-by-side.2"][1], "equal perplexity"),
        ("22-side-by-side.3", WRONG["22-side-by-side.3"][0], "fill whole bytes"),
        ("22-side-by-side.3", WRONG["22-side-by-side.3"][1], "words of 32 bits"),
        ("22-side-by-side.3", WRONG["22-side-by-side.3"][2], "counts more"),
        ("22-side-by-side.4", WRONG["22-side-by-side.4"][0], "two were asked for"),
        ("22-side-by-side.4", WRONG["22-side-by-side.4"][1], "squared"),
        ("22-side-by-side.5", "FP8 channel, token", "does not decode faster"),
    ):
        assert not check(name, answer)
        assert hint in capsys.readouterr().out
