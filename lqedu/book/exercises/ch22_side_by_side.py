"""Checkers of chapter 22-side-by-side."""

import math
from functools import cache

from lqedu.book.exercises import exercise
from lqedu.book.matrix import DENSE, Matrix, read_matrix, unpack_bits
from lqedu.book.pareto import pareto_front

MODEL = "smollm2-135m"
ROW = "gptq_w4_g64"
LINEARS = [
    (576, 576),
    (192, 576),
    (192, 576),
    (576, 576),
    (1536, 576),
    (1536, 576),
    (576, 1536),
]  # [out, in] of one block


@cache
def _matrix(*rows: str) -> Matrix:
    return read_matrix(MODEL, rows=rows or None, same_commit=False)


def flags(row: str, task: str) -> list[bool]:
    """Whether a row answers each item of a task right, by acc_norm."""
    line = _matrix(DENSE, ROW).part(row, task)
    return unpack_bits(line["correct_norm"], line["items"])


@exercise("22-side-by-side.1", "the standard error of a difference, paired and unpaired")
def _errors(fn):
    toy = [True, True, True, False, True, False, True, True], [True, False, False, False, True, True, True, False]
    for name, mine, theirs in (
        ("eight items", *toy),
        ("an equal row", toy[0], toy[0]),
        ("HellaSwag", flags(ROW, "hellaswag"), flags(DENSE, "hellaswag")),
    ):
        n, better = len(mine), sum(a and not b for a, b in zip(mine, theirs, strict=True))
        worse = sum(b and not a for a, b in zip(mine, theirs, strict=True))
        squares = better + worse - (better - worse) ** 2 / n
        want = math.sqrt(squares / (n - 1) / n)
        p, q = sum(mine) / n, sum(theirs) / n
        apart = math.sqrt((p * (1 - p) + q * (1 - q)) / (n - 1))
        got, got_apart = (float(value) for value in fn(list(mine), list(theirs)))

        def near(a: float, b: float) -> bool:
            return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)

        if near(got, apart) and near(got_apart, want) and not near(want, apart):
            raise AssertionError(f"{name}: the two are exchanged; return the paired one first")
        for wrong, hint in (
            (apart, "that adds the variances of both rows, as if they had answered different items"),
            (math.sqrt((better + worse) / n**2), "that takes the mean difference to be zero; subtract its square"),
            (math.sqrt(squares) / n, "the variance of a sample divides by n - 1"),
            (math.sqrt(squares / (n - 1)), "that is the standard deviation of one item; the mean of n has less"),
        ):
            if near(got, wrong) and not near(wrong, want):
                raise AssertionError(f"{name}: {got:g} is not the paired standard error: {hint}")
        assert near(got, want), f"{name}: the paired standard error is {got:g}, expected {want:g}"
        if near(got_apart, math.sqrt(p * (1 - p) / (n - 1)) + math.sqrt(q * (1 - q) / (n - 1))) and p not in (0, 1):
            raise AssertionError(f"{name}: of independent numbers the variances add up, not the standard errors")
        if near(got_apart, apart * math.sqrt((n - 1) / n)):
            raise AssertionError(f"{name}: the unpaired one should divide by n - 1, too")
        assert near(got_apart, apart), f"{name}: the unpaired standard error is {got_apart:g}, expected {apart:g}"


@exercise("22-side-by-side.2", "the rows that nobody beats")
def _front(fn):
    names = ("rtn_w4_g64", "gptq_w4_g64", "awq_w4_g64", "rtn_w3_g64", "gptq_w3_g64", "awq_w3_g64", "quip_w4", "quip_w3")
    matrix = _matrix(DENSE, *names)
    measured = [
        (name, matrix.part(name, "storage")["bits_per_weight"], matrix.part(name, "wikitext2")["ppl"]) for name in names
    ]
    for title, rows in (
        ("a tie in bits", [("a", 4.0, 29.0), ("b", 4.0, 27.0), ("c", 3.0, 50.0)]),
        ("a tie in perplexity", [("a", 4.0, 27.0), ("b", 4.5, 27.0), ("c", 3.0, 50.0)]),
        ("no tie", [("a", 8.0, 22.0), ("b", 2.0, 90.0), ("c", 3.0, 95.0), ("d", 4.0, 30.0)]),
        ("eight rows of the table", measured),
    ):
        want = {rows[i][0] for i in pareto_front([(bits, ppl) for _, bits, ppl in rows])}
        got = [str(name) for name in fn(list(rows))]
        assert len(got) == len(set(got)), f"{title}: {', '.join(got)} names a row twice"
        assert set(got) <= {row[0] for row in rows}, f"{title}: return names of rows, got {', '.join(got)}"
        if title == "a tie in bits" and {"a", "b"} <= set(got):
            raise AssertionError("a and b have equal bits and b the smaller perplexity, so that b beats a")
        if title == "a tie in perplexity" and {"a", "b"} <= set(got):
            raise AssertionError("a and b have equal perplexity and a fewer bits, so that a beats b")
        lost, more = sorted(want - set(got)), sorted(set(got) - want)
        assert not more, f"{title}: {', '.join(more)} should not be on the front, another row beats it"
        assert not lost, f"{title}: {', '.join(lost)} should be on the front, no row beats it"


@exercise("22-side-by-side.3", "the bits per weight of a format, as stored")
def _bits(fn):
    names = {"gptq_w4_g64": (4, 64, 16, 4), "rtn_w3_g64": (3, 64, 16, 3), "hqq_w4_g64": (4, 64, 16, 16),
             "gptq_w4_channel": (4, None, 16, 4), "rtn_w4a8_g64": (4, 64, 16, 0)}  # fmt: skip
    matrix = _matrix(DENSE, *names)
    for name, (bits, group, scale, zero) in names.items():
        got = float(fn(bits, group, scale, zero, list(LINEARS)))
        want = matrix.part(name, "storage")["bits_per_weight"]
        each = {unit: [_stored(bits, group, scale, zero, inputs, unit) for _, inputs in LINEARS] for unit in (1, 8, 32)}
        for wrong, hint in (
            (_weighted(each[1]), "the zero points of a row of codes fill whole bytes; how many bits do those of 576 inputs have?"),
            (sum(each[8]) / len(LINEARS), "that is the mean over the linears; a large one has more weights and counts more"),
            (sum(each[1]) / len(LINEARS), "weigh each linear by its weights, and let the zero points of a row fill whole bytes"),
            (_weighted(each[32]), "zero points fill whole bytes here, not whole words of 32 bits"),
            (bits + (scale / group if group else 0), "the zero points are stored, too"),
        ):  # fmt: skip
            if math.isclose(got, wrong, rel_tol=1e-9) and not math.isclose(wrong, want, rel_tol=1e-9):
                raise AssertionError(f"{name}: {got:.4f}, and the file says {want:.4f}: {hint}")
        assert math.isclose(got, want, rel_tol=1e-9), f"{name}: {got:.6f}, and the file says {want:.6f}"


def _stored(bits: int, group: int | None, scale: int, zero: int, inputs: int, unit: int) -> float:
    """Bits per weight of a row whose zero points fill whole units."""
    groups = 1 if group is None else inputs // group
    return bits + (groups * scale + unit * math.ceil(groups * zero / unit)) / inputs


def _weighted(each: list[float]) -> float:
    sizes = [rows * inputs for rows, inputs in LINEARS]
    return sum(bits * size for bits, size in zip(each, sizes, strict=True)) / sum(sizes)


@exercise("22-side-by-side.4", "the items that a difference needs")
def _items(fn):
    matrix = _matrix(DENSE, ROW)
    line = matrix.part(ROW, "arc_challenge")
    number = next(row for row in matrix.summary() if row["name"] == ROW)["arc_challenge_acc_norm_delta_stderr"]
    for stderr, items, difference in (
        (0.005, 401, 0.02), (0.021, 101, 0.01), (0.003, 907, 0.01), (number, line["items"], 0.01),
    ):  # fmt: skip
        got, exact = float(fn(stderr, items, difference)), items * (2 * stderr / difference) ** 2
        want = math.ceil(exact)
        for wrong, hint in (
            (exact / 4, "that makes the difference one standard error; two were asked for"),
            (items * 2 * stderr / difference, "the error shrinks with the square root of the items, so that the ratio is squared"),
            ((2 * stderr / difference) ** 2, "that is by which factor more items are needed"),
            (items * (2 * stderr / (100 * difference)) ** 2, "a point is a hundredth; the standard error is of a share"),
            (items / (2 * stderr / difference) ** 2, "upside down: a larger error needs more items"),
        ):  # fmt: skip
            if got in {wrong, math.ceil(wrong)} and want not in {wrong, math.ceil(wrong)}:
                raise AssertionError(f"{got:g} items are not it: {hint}")
        assert got == int(got), f"{got:g} is no number of items: round up"
        assert got != math.floor(exact), f"{got:g} items are one too few: round up"
        assert got == want, f"{got:g} items for {difference:g}, from {stderr:g} with {items}; expected {want}"


@exercise("22-side-by-side.5", "the best of the rows that are faster than FP")
def _fastest(answer):
    matrix = _matrix()
    speed = {name: matrix.part(name, "decode", batch=1).get("tokens_per_s", 0.0) for name in matrix.files}
    loss = {name: matrix.part(name, "wikitext2")["ppl"] for name in matrix.files if speed[name] > speed[DENSE]}
    titles = {row["configuration"]["title"]: name for name, row in matrix.files.items()}
    names = {_plain(title): name for title, name in titles.items()} | {_plain(name): name for name in matrix.files}
    mine = names.get(_plain(str(answer)))
    assert mine is not None, f"no row is called {answer!r}; take a name from the list of the explorer"
    assert mine in loss, f"{answer} does not decode faster than FP: look for what lies to the right of the dashed line"
    best = min(loss, key=loss.__getitem__)
    assert mine == best, f"{answer} is faster than FP, and so is a row with less perplexity"


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
