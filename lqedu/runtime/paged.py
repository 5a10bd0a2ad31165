"""Keys and values of a batch in pages of 64 tokens, 16 bits or quantized; chapters ``20-hadamard-kv`` and ``21-serving``.

Texts of different lengths share one pool: a block table says which pages are a text's, so none of them pays for the longest.
What arrives is written at once, and decode attention reads the codes where they lie. On a GPU by the kernels, elsewhere by
their references.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats.kv import KVFloat8, KVGrid, KVInt, KVStaticFloat8
from lqedu.runtime.attention import AttentionPath
from lqedu.runtime.backend import kernel_function, kernels

PAGE = 64


class PagedCache:
    """Pages of all layers, the block table, and how many tokens each text has.

    Args:
        layers, kv_heads, head_dim: of the model.
        capacities: tokens that each text may reach.
        path: how keys and values are stored; ``None`` for the floats of ``dtype``.
        dtype: of keys and values as they arrive.
        device: where the pages lie.

    Attributes:
        table: int32 ``[texts, pages of the longest]``.
        lengths: int32 ``[texts]``, changed in place.

    Raises:
        GridError: keys and values stored as no kernel reads them; the sentence says which ones do.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacities: Sequence[int],
        path: AttentionPath | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacities = tuple(capacities)
        self._options = append_options(path, head_dim)
        used = [pages_of(tokens) for tokens in self.capacities]
        table, first = torch.zeros(len(used), max(used), dtype=torch.int32), 0
        for row, count in zip(table, used, strict=True):
            row[:count] = torch.arange(first, first + count)
            first += count
        self.table = table.to(device)
        self.lengths = torch.zeros(len(used), dtype=torch.int32, device=device)
        if self._options is None:
            shape = (first, kv_heads, PAGE, head_dim)
            empty = lambda role: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
        else:
            kinds = {"key": kind_of(path.key), "value": kind_of(path.value)}
            pages = kernels("kv_pages").empty_pages
            empty = lambda role: pages(kinds[role], role, first, kv_heads, head_dim, device=device)  # noqa: E731
        self.layers = [(empty("key"), empty("value")) for _ in range(layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, with their scales and zero points, filled or not."""
        return sum(t.nbytes for pair in self.layers for pages in pair for t in _tensors(pages))

    def append(self, layer: int, key: Tensor, value: Tensor, table: Tensor, lengths: Tensor) -> None:
        """Write new keys and values ``[texts, kv_heads, new, head_dim]`` of a layer.

        Args:
            layer: its index.
            key, value: as they are to be stored, transformed and centred where the path says so.
            table, lengths: of these texts; the new tokens are the last of ``lengths``.
        """
        keys, values = self.layers[layer]
        if self._options is None:
            kernel_function("kv16", "kv16_append", "kv16_append_reference", key)(
                key, value, keys, values, table, lengths
            )
        else:
            run = kernel_function("kv_pages", "kv_append", "kv_append_reference", key)
            run(key, value, keys, values, table, lengths, **self._options)

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """Attention of one new token of each text, ``[texts, heads, head_dim]``."""
        keys, values = self.layers[layer]
        if self._options is None:
            run = kernel_function("kv16", "kv16_attention", "kv16_attention_reference", query)
            return run(query, keys, values, self.table, self.lengths, scaling=scaling)
        run = kernel_function("kv_attention", "kv_attention", "kv_attention_reference", query)
        return run(query[:, :, None], keys, values, self.table, self.lengths, scaling=scaling)[:, :, 0]


def pages_of(tokens: int) -> int:
    """Pages of so many tokens.

    >>> pages_of(64), pages_of(65)
    (1, 2)
    """
    return -(-tokens // PAGE)


def append_options(path: AttentionPath | None, head_dim: int) -> dict[str, Any] | None:
    """How the append kernel rounds, ``None`` for keys and values in floating point (GridError as :class:`PagedCache`)."""
    if path is None or (path.key is None and path.value is None):
        return None
    kinds = [kind_of(path.key), kind_of(path.value)]
    if head_dim % 32 or not 32 <= head_dim <= 256:
        raise GridError(
            f"pages of codes hold heads of 32 to 256 features, a multiple of 32, got {head_dim}; use kv_bits=None"
        )
    rules = {(grid.clip_ratio, grid.zero_point) for grid in (path.key, path.value) if isinstance(grid, KVInt)}
    if len(rules) > 1:
        raise GridError(f"the append kernel rounds keys and values by one rule, got {path.key} and {path.value}")
    clip_ratio, zero_point = rules.pop() if rules else (1.0, "float")
    return {"clip_ratio": clip_ratio, "zero_point": zero_point} if set(kinds) != {"fp8"} else {}


def kind_of(grid: KVGrid | None) -> str:
    """The kind of pages that hold codes of this grid.

    Raises:
        GridError: none does.

    >>> kind_of(KVInt(4)), kind_of(KVFloat8())
    ('kv4', 'fp8')
    """
    if isinstance(grid, KVStaticFloat8):
        raise GridError(
            "pages hold keys and values with a scale a token, and these have constants of their block; use generate of "
            "transformers with a PackedCache, or store them as they come: lqedu.runtime.quantize_kv(model, 16)"
        )
    if isinstance(grid, KVFloat8):
        return "fp8"
    if isinstance(grid, KVInt) and grid.bits in (4, 8):
        return f"kv{grid.bits}"
    raise GridError(
        f"pages hold keys and values of 4 or 8 bits or E4M3, or both in floating point, got {grid}; "
        "generate of transformers with a PackedCache stores other grids"
    )


def _tensors(pages: Any) -> tuple[Tensor, ...]:
    return (pages,) if isinstance(pages, Tensor) else (pages.codes, pages.numbers)
