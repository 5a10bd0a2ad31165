"""Changes of a whole dense model that leave its function alone, made part by part; ``09-invariance``, ``21-serving``.

A rotation or a permutation of the residual stream touches every weight, and each weight on its own: what a block becomes
depends on the block and on the matrix, not on the other blocks. So such a move can be made with one part of the model in
memory: embeddings, then block after block, then the final norm and the head.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from lqedu.models.anatomy import block_list
from lqedu.models.copying import copy_sharing_tensors


def _nothing(*parts: object) -> None:
    """Leave a part as it is."""


@dataclass(frozen=True)
class Move:
    """Three functions, each of which replaces parameters of one part of a dense model and reads no other part's.

    Attributes:
        embeddings: of the model; reads and replaces what is before the first block.
        block: of a decoder block and its index.
        head: of the model; reads and replaces the final norm and the head, whose weight may be the embedding's.
    """

    embeddings: Callable[[nn.Module], object] = _nothing
    block: Callable[[nn.Module, int], object] = _nothing
    head: Callable[[nn.Module], object] = _nothing

    def __call__(self, model: nn.Module) -> nn.Module:
        """A copy of a model in memory with all parts moved; ``model`` itself where there is nothing to do."""
        if self == Move():
            return model
        model = copy_sharing_tensors(model)
        self.embeddings(model)
        for index, block in enumerate(block_list(model)):
            self.block(block, index)
        self.head(model)
        return model

    def begun(self, model: nn.Module, blocks: Iterable[nn.Module]) -> tuple[nn.Module, Iterator[nn.Module]]:
        """A copy of a model with its embeddings moved, and its blocks, each moved when its turn comes.

        Args:
            model: whose embeddings are in memory; its blocks and its head need not be.
            blocks: its dense blocks, in order; their parameters are replaced.
        """
        model = copy_sharing_tensors(model)
        self.embeddings(model)
        return model, self.each(blocks)

    def each(self, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """The blocks, in order, each moved when its turn comes."""
        for index, block in enumerate(blocks):
            self.block(block, index)
            yield block

    def then(self, other: "Move") -> "Move":
        """This move, and ``other`` behind it, part by part."""
        return Move(
            _both(self.embeddings, other.embeddings), _both(self.block, other.block), _both(self.head, other.head)
        )


def _both(first: Callable[..., object], second: Callable[..., object]) -> Callable[..., object]:
    if _nothing in (first, second):
        return second if first is _nothing else first

    def both(*parts: object) -> None:
        first(*parts)
        second(*parts)

    return both
