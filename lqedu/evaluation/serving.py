"""Serving under load, simulated: requests arrive, wait for memory, share steps; chapter ``21-serving``.

A server adds one token to every sequence it holds in each *step*, and takes new prompts into the same step. How long a step
lasts is read off measured kernels (:class:`StepCost`); how many sequences fit is counted in pages of the cache
(:class:`Memory`). Between the two stands the scheduler, which is all that is simulated here: whom it admits, and whom it
puts back when pages run out. Orca (Yu et al., 2022) brought step-wise batching, vLLM (Kwon et al., 2023) the pages.

Left out: tokenising, sampling, the network, and the host's work between steps. So the result is a bound for a real server.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lqedu.errors import UsageError


@dataclass(frozen=True)
class Request:
    """A text to go on with: when it arrives (seconds), tokens of its prompt, tokens it will be given."""

    arrival: float
    prompt: int
    output: int


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step of a model in one format on one GPU.

    Attributes:
        rows: numbers of rows (tokens in a step) at which the linear layers were timed, increasing.
        seconds: time of all linear layers of all blocks at these.
        cached_token: seconds to attend to one cached token: its bytes in all blocks over the rate of the attention kernel.
        prompt_pair: seconds of one pair of prompt tokens in attention: its operations over the rate of products.
        head_bytes: seconds to read the output head once.
        head_row: seconds of the head's operations for one row.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    cached_token: float
    prompt_pair: float
    head_bytes: float
    head_row: float

    def __post_init__(self) -> None:
        if not 0 < len(self.rows) == len(self.seconds) or list(self.rows) != sorted(set(self.rows)):
            raise UsageError(f"one time for each of the increasing numbers of rows, got {self.rows} and {self.seconds}")
        if min(self.rows) < 1 or min(self.seconds) <= 0:
            raise UsageError("numbers of rows and their times must be positive")

    def linear(self, rows: int) -> float:
        """Linear layers at ``rows``: straight lines between the measured points, proportional beyond the last.

        >>> StepCost((1, 3), (1.0, 2.0), 0, 0, 0, 0).linear(2)
        1.5
        """
        if rows > self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, self.seconds))

    def step(self, decoded: int, cached: int, prompts: Sequence[int]) -> float:
        """One step that decodes ``decoded`` sequences with ``cached`` tokens together and takes ``prompts`` in whole."""
        outputs = decoded + len(prompts)
        pairs = sum(p * (p + 1) // 2 for p in prompts)
        attention = cached * self.cached_token + pairs * self.prompt_pair
        head = max(self.head_bytes, outputs * self.head_row)
        return self.linear(decoded + sum(prompts)) + attention + head


@dataclass(frozen=True)
class Memory:
    """Where keys and values go.

    Attributes:
        tokens: tokens that fit beside the weights.
        page: tokens of a page; a sequence holds whole pages.
        reserve: tokens kept for a sequence when it is admitted, however short it turns out to be: the longest that the
            server allows, for a cache that must lie in one piece. ``None``: pages are taken as they fill.
    """

    tokens: int
    page: int = 64
    reserve: int | None = None

    def needed(self, length: int) -> int:
        """Tokens of memory that a sequence of ``length`` tokens holds.

        >>> Memory(1000).needed(65), Memory(1000, reserve=512).needed(65)
        (128, 512)
        """
        return math.ceil(max(length, self.reserve or 0) / self.page) * self.page


@dataclass(frozen=True)
class Limits:
    """Most sequences in a step, and most tokens of prompts that one step takes in (at least one prompt goes)."""

    sequences: int = 256
    prompt_tokens: int = 4096


@dataclass
class Served:
    """What happened: per request, in the order they came, and per step.

    Attributes:
        first: seconds from arrival to the first token.
        finished: time of the last token.
        steps: ``(start, seconds, sequences, tokens of memory held, requests waiting)`` of each step.
        repeated: prompts that were taken in again because their pages had been given away.
        tokens: tokens given out.
    """

    first: list[float]
    finished: list[float]
    steps: list[tuple[float, float, int, int, int]] = field(default_factory=list)
    repeated: int = 0
    tokens: int = 0

    @property
    def seconds(self) -> float:
        """From time zero to the end of the last step."""
        return self.steps[-1][0] + self.steps[-1][1]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def batch(self) -> float:
        """Sequences in a step, averaged over time."""
        return sum(s * n for _, s, n, _, _ in self.steps) / sum(s for _, s, _, _, _ in self.steps)


def requests(rate: float, count: int, *, prompt: int, output: int, generator: np.random.Generator) -> list[Request]:
    """``count`` independent requests, ``rate`` a second on average (Poisson), of exponentially distributed lengths.

    Lengths have the means ``prompt`` and ``output``, at least 1 and at most four times as much.

    Raises:
        UsageError: a rate or length that is not positive.
    """
    for name, value in {"rate": rate, "count": count, "prompt": prompt, "output": output}.items():
        if not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{name} must be positive and finite, got {value!r}")
    arrivals = generator.exponential(1 / rate, count).cumsum()
    lengths = [np.clip(np.ceil(generator.exponential(mean, count)), 1, 4 * mean) for mean in (prompt, output)]
    return [Request(float(a), int(p), int(o)) for a, p, o in zip(arrivals, *lengths, strict=True)]


Admit = Callable[[int], bool]  #: may a request join when so many sequences are running?


def step_by_step(running: int) -> bool:
    """Continuous batching: a request joins whichever step has room."""
    return True


def batch_by_batch(running: int) -> bool:
    """Static batching: nobody joins until the whole batch has ended (give it limits that let a whole batch start)."""
    return running == 0


def serve(
    load: Sequence[Request],
    cost: StepCost,
    memory: Memory,
    *,
    limits: Limits = Limits(),
    admit: Admit = step_by_step,
) -> Served:
    """Run a server until every request has its tokens.

    Each step first takes in waiting prompts, first come first served, as far as ``limits`` and memory allow, and decodes
    one token for every sequence. A sequence that needs a page when none is free pushes out the one that came last; that
    one waits at the head of the queue and starts again with the tokens it already had (vLLM's preemption by recomputing).

    Raises:
        UsageError: no requests, or one that does not fit into an empty cache.
    """
    if not load:
        raise UsageError("there are no requests to serve")
    for i, r in enumerate(load):
        if memory.needed(r.prompt + r.output) > memory.tokens:
            raise UsageError(
                f"request {i} of {r.prompt} + {r.output} tokens never fits into a cache of {memory.tokens} tokens"
            )
    order = sorted(range(len(load)), key=lambda i: load[i].arrival)
    coming, waiting, running = deque(order), deque(), []  # running: in the order they were admitted
    done = [0] * len(load)  # tokens given out
    held = 0
    result = Served([0.0] * len(load), [0.0] * len(load))
    now = load[order[0]].arrival

    def length(i: int) -> int:
        return load[i].prompt + done[i]

    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, load[coming[0]].arrival)
        while coming and load[coming[0]].arrival <= now:
            waiting.append(coming.popleft())

        # 1. who goes on: each needs room for the token this step adds; the last to come gives way
        decoding: list[int] = []
        for i in list(running):
            if i not in running:
                continue
            more = memory.needed(length(i) + 1) - memory.needed(length(i))
            while held + more > memory.tokens and i in running:
                last = running.pop()
                held -= memory.needed(length(last))
                waiting.appendleft(last)
            if i in running:
                held += more
                decoding.append(i)

        # 2. who comes in
        joins = admit(len(running))
        prompts: list[int] = []
        while joins and waiting and len(running) < limits.sequences:
            i = waiting[0]
            room = memory.needed(length(i) + 1)
            tokens = sum(length(j) for j in prompts) + length(i)
            if held + room > memory.tokens or (prompts and tokens > limits.prompt_tokens):
                break
            result.repeated += done[i] > 0
            prompts.append(waiting.popleft())
            running.append(i)
            held += room

        # 3. the step
        seconds = cost.step(len(decoding), sum(length(i) for i in decoding), [length(i) for i in prompts])
        result.steps.append((now, seconds, len(running), held, len(waiting)))
        now += seconds
        for i in [*decoding, *prompts]:
            if done[i] == 0:
                result.first[i] = now - load[i].arrival
            done[i] += 1
            result.tokens += 1
            if done[i] == load[i].output:
                running.remove(i)
                held -= memory.needed(length(i))
                result.finished[i] = now
    return result
