"""What is timed: an operation at some sizes, as calls of our kernel and of its peers on copies of the same operands."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]
OURS = "lqedu_kernels"
FP16 = "torch.matmul FP16"


@dataclass(frozen=True)
class Case:
    """One row of a table before it is measured.

    Attributes:
        operation: name and variant, ``"w4a8/group128"``; the key of its launch configurations too.
        sizes: ``{"m": 16, "n": 11008, "k": 4096}``.
        kernels: name -> the same call on each copy of the operands; ours under ``"lqedu_kernels"``.
        nbytes: fewest bytes the operation moves.
        operations: multiplications and additions.
        ceiling: name of the measured product whose rate bounds the operations; ``None`` where only bytes count.
        lookup: ``(m, n, k)`` under which the operation looks its launch configuration up.
        candidates: launch configurations worth timing.
        configured: our calls under a given configuration.
        reference: what our call must return (its first tensor, where it returns several), by the definition in plain torch.
    """

    operation: str
    sizes: Mapping[str, int]
    kernels: Mapping[str, Sequence[Call]]
    nbytes: int
    operations: int
    ceiling: str | None
    lookup: tuple[int, int, int] = (0, 0, 0)
    candidates: Sequence[Mapping[str, object]] = ()
    configured: Callable[[Mapping[str, object]], Sequence[Call]] | None = field(default=None, repr=False)
    reference: Call | None = field(default=None, repr=False)


#: A family: the device and the wanted variant (``None``: all) -> its cases, one after another, so that memory is reused.
Family = Callable[[torch.device, str | None], Iterator[Case]]
