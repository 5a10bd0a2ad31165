"""The simulated server against queueing theory, against sums by hand, and its invariants over random loads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqedu.errors import UsageError
from lqedu.evaluation.serving import (
    Limits,
    Memory,
    Request,
    StepCost,
    batch_by_batch,
    requests,
    serve,
    step_by_step,
)

FLAT = StepCost((1,), (1.0,), 0.0, 0.0, 0.0, 0.0)  # proportional to rows
ONE_SECOND = StepCost((1, 10**6), (1.0, 1.0), 0.0, 0.0, 0.0, 0.0)  # a step takes a second, whatever is in it
LARGE = Memory(10**9)


def test_one_request_takes_the_steps_that_can_be_counted_by_hand():
    cost = StepCost((1, 100), (1.0, 100.0), 0.5, 0.25, 3.0, 2.0)
    served = serve([Request(7.0, 3, 2)], cost, LARGE)
    prompt = 3.0 + 6 * 0.25 + 3.0  # linear, pairs, head
    decode = 1.0 + 4 * 0.5 + 3.0  # the second step attends to three tokens of the prompt and one that was given
    assert served.first == [prompt]
    assert served.finished == [7.0 + prompt + decode]
    assert served.tokens == 2 and len(served.steps) == 2


def test_the_head_is_bound_by_bytes_or_by_operations():
    cost = StepCost((1, 100), (1.0, 1.0), 0.0, 0.0, 3.0, 2.0)
    assert cost.step(1, 10, []) == 1.0 + 3.0
    assert cost.step(4, 10, []) == 1.0 + 8.0


def test_linear_time_is_proportional_beyond_the_last_measured_point():
    cost = StepCost((1, 4), (2.0, 5.0), 0, 0, 0, 0)
    assert [cost.linear(rows) for rows in (1, 2, 4, 8)] == [2.0, 3.0, 5.0, 10.0]


def test_waiting_agrees_with_the_formula_of_pollaczek_and_khinchine():
    """One sequence at a time and steps of a second: a queue M/G/1, whose mean wait is known."""
    rate, count = 0.05, 20_000
    load = requests(rate, count, prompt=1, output=8, generator=np.random.default_rng(0))
    served = serve(load, ONE_SECOND, LARGE, limits=Limits(sequences=1))
    times = np.array([r.output for r in load], dtype=float)
    wait = np.mean(served.first) - 1.0  # the first token comes one step after the wait
    used = rate * times.mean()
    assert wait == pytest.approx(rate * np.mean(times**2) / (2 * (1 - used)), rel=0.05)


def test_joining_running_batches_gives_more_tokens_a_second_than_waiting_for_them():
    load = requests(0.5, 200, prompt=20, output=40, generator=np.random.default_rng(1))
    all_in = Limits(prompt_tokens=10**9)
    continuous = serve(load, ONE_SECOND, LARGE, limits=all_in)
    static = serve(load, ONE_SECOND, LARGE, limits=all_in, admit=batch_by_batch)
    assert continuous.rate > 1.2 * static.rate
    assert np.mean(continuous.first) < np.mean(static.first) / 10
    assert continuous.tokens == static.tokens


def test_pages_hold_more_sequences_than_reserved_pieces():
    load = requests(5.0, 300, prompt=30, output=60, generator=np.random.default_rng(2))
    paged = serve(load, ONE_SECOND, Memory(4096, page=16))
    reserved = serve(load, ONE_SECOND, Memory(4096, page=16, reserve=512))
    assert paged.batch > 3 * reserved.batch
    assert max(n for _, _, n, _, _ in reserved.steps) == 4096 // 512


def test_a_sequence_that_is_pushed_out_comes_back_and_is_finished():
    load = [Request(0.0, 60, 60), Request(0.0, 60, 60)]
    served = serve(load, ONE_SECOND, Memory(128, page=4))
    assert served.repeated > 0
    assert served.tokens == 120 and min(served.finished) > 0
    assert served.finished[0] < served.finished[1]  # who came first is not pushed out


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=25),
    st.integers(1, 9),
    st.integers(80, 400),
    st.integers(1, 8),
    st.sampled_from([step_by_step, batch_by_batch]),
)
def test_every_token_is_given_out_in_order_and_memory_is_never_exceeded(drawn, page, tokens, sequences, admit):
    load = [Request(*r) for r in drawn]
    memory = Memory(tokens, page=page)
    limits = Limits(sequences=sequences, prompt_tokens=60)
    cost = StepCost((1, 8), (1.0, 2.0), 0.001, 0.001, 0.5, 0.1)
    served = serve(load, cost, memory, limits=limits, admit=admit)
    assert served.tokens == sum(r.output for r in load)
    assert all(held <= tokens and 0 < n <= sequences for _, _, n, held, _ in served.steps)
    for request, first, finished in zip(load, served.first, served.finished, strict=True):
        assert first > 0 and finished >= request.arrival + first
    starts = [start for start, *_ in served.steps]
    ends = [start + seconds for start, seconds, *_ in served.steps]
    assert all(a <= b + 1e-9 for a, b in zip(ends, starts[1:], strict=False))


def test_lengths_and_arrivals_have_the_means_asked_for():
    load = requests(4.0, 20_000, prompt=100, output=50, generator=np.random.default_rng(3))
    clipped = 1 - np.exp(-4)  # of an exponential length cut at four times its mean
    assert np.mean([r.prompt for r in load]) == pytest.approx(100 * clipped + 0.5, rel=0.02)
    assert load[-1].arrival / len(load) == pytest.approx(1 / 4.0, rel=0.03)
    assert max(r.output for r in load) <= 200 and min(r.output for r in load) >= 1


def test_refusals():
    with pytest.raises(UsageError, match="no requests"):
        serve([], FLAT, LARGE)
    with pytest.raises(UsageError, match="request 0 of 90 \\+ 20 tokens never fits into a cache of 100"):
        serve([Request(0.0, 90, 20)], FLAT, Memory(100))
    with pytest.raises(UsageError, match="rate must be positive"):
        requests(0.0, 3, prompt=1, output=1, generator=np.random.default_rng(0))
    with pytest.raises(UsageError, match="increasing"):
        StepCost((4, 1), (1.0, 2.0), 0, 0, 0, 0)
    with pytest.raises(UsageError, match="positive"):
        StepCost((1, 4), (1.0, 0.0), 0, 0, 0, 0)
