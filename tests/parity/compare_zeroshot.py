"""Ours against lm-eval's on the first items of whole data sets, item by item (goldens/zeroshot.json).

From the repository root, with the files that make_zeroshot_goldens.py read (minutes a task on two cores):
``python tests/parity/compare_zeroshot.py data/zeroshot``. Exit status 1 if a decision differs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lqedu
from lqedu.evaluation import load_task, score

GOLDENS = Path(__file__).parent / "goldens" / "zeroshot.json"


def differences(mine: dict[str, Sequence[Any]], theirs: dict[str, Sequence[Any]]) -> tuple[float, list[int]]:
    """The largest difference of a log-likelihood, and the items that the two decide differently."""
    pairs = zip(mine["log_likelihoods"], theirs["log_likelihoods"], strict=True)
    largest = max(abs(a - b) for ours, peers in pairs for a, b in zip(ours, peers, strict=True))
    return largest, [
        item
        for item in range(len(theirs["acc"]))
        if any(int(mine[column][item]) != theirs[column][item] for column in ("acc", "acc_norm"))
    ]


def main() -> None:
    """Score, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    model, tokenizer = lqedu.load_model("smollm2-135m")
    apart = 0
    for name, theirs in json.loads(GOLDENS.read_text(encoding="utf-8"))["long"].items():
        found = score(model, tokenizer, load_task(given.data / f"{name}.jsonl", limit=len(theirs["acc"])))
        mine = {"log_likelihoods": found.log_likelihoods, "acc": found.correct, "acc_norm": found.correct_norm}
        largest, decided = differences(mine, theirs)
        apart += len(decided)
        print(
            f"{name}: {found.count} items, log-likelihoods within {largest:.1e}, decided differently: {decided}",
            flush=True,
        )
    sys.exit(apart > 0)


if __name__ == "__main__":
    main()
