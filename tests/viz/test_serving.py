"""The explorer of chapter 21 serves as the package does, and moves."""

import itertools

import numpy as np
import pytest

import lqedu.viz
from lqedu.evaluation.serving import Limits, Memory, Request, StepCost, batch_by_batch, serve, step_by_step
from tests.viz.js import assert_every_control_matters, compute

FIRST = dict(rows=[1, 16, 256], seconds=[0.004, 0.005, 0.01], cached_token=2e-8, prompt_pair=1e-9, head_bytes=4e-4, head_row=1e-5, tokens=4000)  # fmt: skip
SMALL = FIRST | dict(seconds=[0.002, 0.003, 0.008], tokens=1600)
DRAWN = np.random.default_rng(0)
DATA = {
    "costs": {"first": FIRST, "small": SMALL},
    "gaps": DRAWN.exponential(1, 60).cumsum().tolist(),
    "prompts": DRAWN.integers(1, 200, 60).tolist(),
    "outputs": DRAWN.integers(1, 120, 60).tolist(),
    "page": 16, "longest": 400, "sequences": 24, "prompt_tokens": 256,
}  # fmt: skip


def test_numbers_equal_python() -> None:
    choices = list(itertools.product(("first", "small"), ("continuous", "static"), ("pages", "reserved"), (0, 14, 26)))
    keys = ("format", "batching", "cache", "pace")
    inputs = [DATA | dict(zip(keys, choice, strict=True)) for choice in choices]
    pushed_out = 0
    for one, got in zip(inputs, compute("serving", inputs), strict=True):
        fields = dict(one["costs"][one["format"]])
        memory = Memory(fields.pop("tokens"), one["page"], one["longest"] if one["cache"] == "reserved" else None)
        cost = StepCost(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        rate = 2 ** (one["pace"] / 4)
        load = [Request(g / rate, p, o) for g, p, o in zip(one["gaps"], one["prompts"], one["outputs"], strict=True)]
        joins = one["batching"] == "continuous"
        limits = Limits(one["sequences"], one["prompt_tokens"] if joins else 10**9)
        want = serve(load, cost, memory, limits=limits, admit=step_by_step if joins else batch_by_batch)
        assert len(got["steps"]) == len(want.steps)
        assert np.allclose(got["steps"], want.steps, rtol=1e-9)
        assert (got["tokens"], got["repeated"]) == (want.tokens, want.repeated)
        assert got["batch"] == pytest.approx(want.batch, rel=1e-9)
        assert got["wait"] == pytest.approx(np.mean(want.first), rel=1e-9)
        assert got["seconds"] == pytest.approx(want.seconds, rel=1e-9)
        pushed_out += want.repeated
    assert pushed_out  # the hardest branch was taken


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(width: int) -> None:
    data = DATA | {"format": "first", "batching": "continuous", "cache": "pages", "pace": 16}
    example = lqedu.viz.explorer("serving", data, title="A server under load", description="Move the sliders.")
    assert_every_control_matters(example, width=width, order=range(4))
