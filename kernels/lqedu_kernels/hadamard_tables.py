"""The matrices behind ``hadamard.py``: tables of signs, and how a vector becomes a matrix between two of them."""

import functools
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

import torch
import triton
from torch import Tensor

_TILE = 32768  # elements of a tile at most: 128 float32 sums a thread of eight warps


@functools.cache
def _tables() -> Mapping[str, str]:
    return json.loads((resources.files("lqedu_kernels") / "tables" / "hadamard.json").read_text(encoding="utf-8"))


@functools.cache
def table(m: int) -> Tensor:
    """The Hadamard matrix of a factor of :func:`factors`, ± 1, float64 ``[m, m]``: from Paley's and Williamson's constructions."""
    bits = "0" if m == 1 else bin(int("1" + _tables()[str(m)], 16))[3:]
    return 1 - 2 * torch.tensor([int(bit) for bit in bits], dtype=torch.float64).view(m, m)


def factors(length: int) -> tuple[int, int]:
    """``(m, 2^k)`` of a length: the smallest m that has a table, 1 for powers of two.

    Raises:
        ValueError: no factor of the length has a table.

    >>> factors(4096), factors(11008), factors(14336)
    ((1, 4096), (172, 64), (28, 512))
    """
    m = length // (length & -length) if length > 0 else 0
    while 0 < m <= length and m <= 172:
        if m == 1 or str(m) in _tables():
            return m, length // m
        m *= 2
    raise ValueError(
        f"length {length} has no Hadamard matrix here: it must be 2^k or m · 2^k with m = 12, 20, 28, … 172"
    )


class Split(NamedTuple):
    """A tile of ``vectors`` vectors of ``left · pieces · columns`` elements, as ``rows + more`` rows of the two products.

    >>> split(14336)
    Split(left=56, pieces=4, columns=64, vectors=1, rows=64, more=0)
    """

    left: int  #: order of L, m · 2^j
    pieces: int  #: 1, 2 or 4: what lies side by side in a row, and is added and subtracted
    columns: int  #: order of R; in a strided transform, columns that have nothing to do with each other
    vectors: int  #: vectors in a tile, one below the other
    rows: int  #: 64 or 128, the last ones empty unless left · vectors fills them
    more: int  #: 64 where a vector needs more than 128 rows, else 0

    @property
    def elements(self) -> int:
        """Elements of the tile, empty rows counted: as many float32 sums are in registers."""
        return (self.rows + self.more) * self.pieces * self.columns

    def shared(self, stride: int) -> int:
        """Bytes of the tile and of the tables: L, and R unless the transform is strided."""
        return 2 * (self.elements + (self.rows + self.more) ** 2 + (self.columns**2 if stride == 1 else 0))


def split(length: int, stride: int = 1, *, pieces: int | None = None, token: int | None = None) -> Split | None:
    """The matrix of a vector: 64 columns, and no more rows than the tensor cores' 64 if four pieces allow it.

    Args:
        length, stride: of the transform.
        pieces: instead of the number chosen so.
        token: elements that share a scale, a multiple of length · stride: a tile then holds whole tokens.

    Returns:
        ``None`` where no tile holds that.
    """
    m, power = factors(length)
    columns = min(64, power) if stride == 1 else min(64 if length > 128 else 128, triton.next_power_of_2(stride))
    rest = length // columns if stride == 1 else length
    if pieces is None:
        pieces = 1
        while stride == 1 and pieces < 4 and rest // pieces > max(64, m):
            pieces *= 2
    if rest % pieces or (rest // pieces) % m or (stride > 1 and pieces > 1):
        return None
    left, group = rest // pieces, 1 if token is None else token // (length * stride)
    fitting = max(1, 64 // (left * group))
    if token is not None and (left * group) & (left * group - 1):
        fitting = 1  # the kernel finds the scales of several tokens in a tile where their rows are powers of two
    used = left * group * fitting
    rows, more = (64, 0) if used <= 64 else (128, 0) if used <= 128 else (128, 64)
    if columns < 16 or used > 192:
        return None
    if token is not None and stride > columns:
        return None
    s = Split(left, pieces, columns, group * fitting, rows, more)
    return s if s.elements <= _TILE else None


@functools.cache
def operands(s: Split, stride: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """L ``[rows + more, rows + more]``, R ``[columns, columns]``, and what is missing to an orthonormal transform."""
    down = round(math.log2(math.sqrt(s.left * s.pieces)))
    right = round(math.log2(math.sqrt(s.columns))) if stride == 1 else 0
    m, power = factors(s.left)
    one = torch.kron(table(m), _sylvester(power)) * 2.0**-down
    size = s.rows + s.more
    b_left = torch.zeros(size, size, dtype=torch.float64)
    b_left[: s.vectors * s.left, : s.vectors * s.left] = torch.block_diag(*[one] * s.vectors)
    b_right = _sylvester(s.columns) * 2.0**-right
    length = s.left * s.pieces * (s.columns if stride == 1 else 1)
    return b_left.to(device, dtype), b_right.to(device, dtype), 2.0 ** (down + right) / math.sqrt(length)


def _sylvester(order: int) -> Tensor:
    h, step = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    while len(h) < order:
        h = torch.kron(step, h)
    return h
