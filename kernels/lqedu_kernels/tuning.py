"""Launch configurations: measured ones shipped as data, a documented default elsewhere. Nothing is tuned at run time.

``configs/<gpu>.json`` holds, for each operation and variant, the fastest configuration found for each shape and number
of rows by ``python -m lqedu_kernels.bench.tune``. A wrapper asks :func:`configuration`: on a GPU with a file, the entry of
the nearest shape and the next larger number of rows; on any other GPU, and for shapes unlike all that were measured,
``None``, and the operation's own ``default_config``, a pure function of the shape, decides.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from importlib import resources

from lqedu_kernels._tensors import Target

__all__ = ["Config", "Target", "configuration"]

#: Start of a device's name -> file of measured configurations.
_FILES = {"NVIDIA H100": "h100.json", "NVIDIA H200": "h100.json"}

#: A shape is like a measured one if its sides differ by no more than these factors: outputs are more or fewer of the same
#: tiles (two layers of one input, multiplied as one, have twice as many), inputs change what a tile does.
_NEAR_OUTPUTS, _NEAR_INPUTS = 2.7, 1.6

#: A launch configuration: names and values of what a kernel is compiled and launched with, see each ``default_config``.
Config = Mapping[str, int | str | bool]


@functools.cache
def _table(file: str) -> Mapping[str, list[dict]]:
    return json.loads((resources.files("lqedu_kernels") / "configs" / file).read_text(encoding="utf-8"))


def configuration(operation: str, m: int, n: int, k: int, *, gpu: str) -> Config | None:
    """The measured configuration for ``[m, k] x [n, k]`` on a GPU of this name, or ``None`` where nothing like it was measured.

    Args:
        operation: operation and variant, ``"w4a8/group128"``.
        m, n, k: rows of the activations, output features, input features.
        gpu: the device's name as torch spells it.
    """
    file = next((f for start, f in _FILES.items() if gpu.startswith(start)), None)
    return None if file is None else _nearest(_table, file, operation, m, n, k)


@functools.lru_cache(maxsize=1 << 14)  # a search takes a hundred times as long as finding what it found
def _nearest(
    table: Callable[[str], Mapping[str, list[dict]]], file: str, operation: str, m: int, n: int, k: int
) -> Config | None:
    entries = table(file).get(operation, [])

    def factors(entry: dict) -> tuple[float, float]:
        return tuple(max(entry[side] / size, size / entry[side]) for side, size in (("n", n), ("k", k)))

    near = [e for e in entries if factors(e)[0] <= _NEAR_OUTPUTS and factors(e)[1] <= _NEAR_INPUTS]
    if not near:
        return None
    nearest = min(math.prod(factors(entry)) for entry in near)
    shape = [entry for entry in near if math.prod(factors(entry)) == nearest]
    larger = [entry for entry in shape if entry["m"] >= m]
    entry = min(larger, key=lambda e: e["m"]) if larger else max(shape, key=lambda e: e["m"])
    return entry["config"]
