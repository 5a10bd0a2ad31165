"""The checkers of chapter 24-choose pass the right answers and tell the usual wrong ones apart."""

from lqedu.evaluation.memory import page_bytes, weight_bytes
from lqedu.evaluation.random_models import FORMATS, SHAPES
from tests.book.answers import right_and_wrong

SHAPE = SHAPES["llama-3-8b"]
FULL, FEW = (weight_bytes(SHAPE, FORMATS[name]) - 2 * SHAPE.embedding_weights for name in ("fp16", "w4a16"))
TEXT = 1024 * page_bytes(SHAPE, FORMATS["fp16"]) / 64


def _frontier(points, *, strict=False, self_beats=False, sign=-1):
    keys = [(sign * s, loss, size) for s, loss, size in points]

    def beats(i, j):
        pairs = list(zip(keys[i], keys[j], strict=True))
        if strict:
            return all(x < y for x, y in pairs)
        return i != j and all(x <= y for x, y in pairs) and (self_beats or keys[i] != keys[j])

    return [j for j in range(len(keys)) if not any(beats(i, j) for i in range(len(keys)))]


def _choose(rows, budget, *, errors=2, fastest=True):
    kept = [row for row in rows if row[2] + errors * row[3] <= budget]
    return max(kept, key=lambda row: row[1])[0] if fastest else min(kept, key=lambda row: row[2])[0]


RIGHT = {
    "24-choose.1": (FULL - 2 * FEW) / TEXT,
    "24-choose.2": _frontier,
    "24-choose.3": _choose,
    "24-choose.4": lambda fixed, each, base: fixed / (base - each),
    "24-choose.5": 0.2,
}
WRONG = {
    "24-choose.1": [1024 * (FULL - 2 * FEW) / TEXT, FULL / TEXT, FEW / TEXT, (FULL / 2 - FEW) / TEXT, 2.0],
    "24-choose.2": [
        lambda points: _frontier(points, strict=True),
        lambda points: _frontier(points, self_beats=True),
        lambda points: _frontier(points, sign=1),
    ],
    "24-choose.3": [
        lambda rows, budget: _choose(rows, budget, errors=0),
        lambda rows, budget: _choose(rows, budget, fastest=False),
    ],
    "24-choose.4": [
        lambda fixed, each, base: fixed / base,
        lambda fixed, each, base: fixed / (each - base),
        lambda fixed, each, base: base / fixed,
    ],
    "24-choose.5": [0.15, 0.5],
}

test_right_and_wrong = right_and_wrong(RIGHT, WRONG)
