"""QuaRot: rotate a model with Hadamard matrices until no channel sticks out, then quantize everything; ``10-quarot``.

Grid: INT4 weights, activations, keys and values. Move: rotate. Round: GPTQ or nearest. Run: W4A4KV4, online Hadamards.
Ashkboos et al., 2024, arXiv:2404.00456 (reference: spcl/QuaRot, commit 5008669). Where this file differs, and why:

- a head count without a Hadamard matrix (9) gets a transform over the whole width of ``o_proj``'s input instead of one
  across heads, and a width without one a block-diagonal transform;
- embeddings are not centred: a norm without a mean does not pass that (chapter ``09-invariance``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lqedu.errors import GridError, UsageError
from lqedu.formats import IntGrid, QTensor, ScaleConvention
from lqedu.formats.activation import ActivationGrid
from lqedu.linalg.hadamard import hadamard_block, randomized_hadamard
from lqedu.methods.base import Answers, QuantizedActivations, kv_path
from lqedu.models.anatomy import block_list
from lqedu.options import check_count, check_number
from lqedu.rounding import RoundingReport, gptq, nearest
from lqedu.rounding.gptq import check_schedule
from lqedu.runtime.inputs import InputPath, TransformedLinear
from lqedu.transforms.moves import Move
from lqedu.transforms.rotation import head_dim, rotation_move

if TYPE_CHECKING:
    from lqedu.runtime.attention import AttentionPath


@dataclass(frozen=True, kw_only=True)
class Rotated(QuantizedActivations):
    """What methods share that rotate a model and quantize weights, activations, keys and values.

    Attributes:
        bits: of the weights, symmetric per channel.
        rounding: of the weights, "gptq" or "nearest".
        activation_clip, kv_clip: the ranges of activations and of keys and values are multiplied by these.
        search: of the weights' ranges, "mse" (the reference's ``--w_clip``) or "none".
        damping, block_size, order: see :class:`lqedu.methods.GPTQ`.
        seed: of the random signs.
    """

    bits: int = 4
    rounding: str = "gptq"
    activation_bits: int | None = 4
    kv_bits: int | None = 4
    activation_clip: float = 1.0
    kv_clip: float = 1.0
    search: str = "mse"
    damping: float = 0.01
    block_size: int = 128
    order: str = "natural"
    seed: int = 0

    quantizes: ClassVar[tuple[str, ...]] = ("weights", "activations", "KV cache")
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("activation_clip", "kv_clip"):  # before the grids, which know them as "clip_ratio"
            check_number(name, getattr(self, name), above=0, most=1, error=GridError)
        super().__post_init__()
        check_schedule(self.grid(), self.block_size, self.order)
        if self.rounding not in ("gptq", "nearest"):
            raise UsageError(f"rounding is 'gptq' or 'nearest', got {self.rounding!r}")
        check_number("damping", self.damping, above=0)
        check_count("seed", self.seed, most=2**63 - 1)

    @property
    def needs_hessian(self) -> bool:
        """Only GPTQ looks at it."""
        return self.rounding == "gptq"

    def grid(self) -> IntGrid:
        """The weights' grid."""
        return IntGrid(self.bits, True, convention=ScaleConvention.MAX_CODE, search=self.search)

    def quantize_linear(self, weight: Tensor, hessian: Tensor | None) -> tuple[QTensor, RoundingReport]:
        """Round one rotated weight ``[out, in]``; ``hessian`` is that of its rotated inputs."""
        if self.rounding == "nearest":
            return nearest(weight, self.grid())
        return gptq(weight, hessian, self.grid(), damping=self.damping, block_size=self.block_size, order=self.order)


@dataclass(frozen=True, kw_only=True)
class QuaRot(Rotated):
    """QuaRot with the paper's settings, W4A4KV4.

    Its hyper-parameters are those of :class:`Rotated`; activations are symmetric per token, keys and values asymmetric per
    token and head.
    """

    name: ClassVar[str] = "quarot"
    title: ClassVar[str] = "QuaRot"
    chapter: ClassVar[str] = "10-quarot"
    citation: ClassVar[str] = "ashkboos2024quarot"
    answers: ClassVar[Answers] = Answers(
        grid="INT4 weights per channel, activations per token, KV per head",
        move="rotate with Hadamard matrices, offline and online",
        round="GPTQ, or nearest",
        run="W4A4KV4: online Hadamards, INT4 GEMM",
        calibration="a Hessian of each linear's rotated inputs",
        online=("quantize inputs", "transform inputs", "quantize keys and values", "transform queries and keys"),
    )

    activation_clip: float = 0.9
    kv_clip: float = 0.95

    @property
    def uses_calibration(self) -> bool:
        """Rounding to nearest on dynamic scales reads no text."""
        return self.needs_hessian or self.activation == "static"

    def activation_grid(self) -> ActivationGrid | None:
        """Symmetric, clipped."""
        grid = super().activation_grid()
        return None if grid is None else replace(grid, clip_ratio=self.activation_clip)

    def attention_path(self) -> "AttentionPath | None":
        """Keys in the Hadamard basis of each head, after RoPE."""
        return kv_path(self.kv_bits, clip_ratio=self.kv_clip, zero_point="integer", hadamard=True)

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        """Transforms that fall back to blocks, offline and online."""
        block = block_list(model)[0]
        heads, wide = block.self_attn.o_proj.in_features, block.mlp.down_proj.in_features
        mixed = across_heads(heads, head_dim(model))
        online = {
            "the input of o_proj is transformed": (heads, mixed.hadamard * mixed.stride),
            "the input of down_proj is transformed": (wide, hadamard_block(wide)),
        }
        return rotation_notes(model) + block_notes(online)

    def model_move(self, model: nn.Module, learned: Mapping[str, Tensor]) -> Move:
        """Rotate the residual stream and the values offline; transform the inputs of ``o_proj`` and ``down_proj`` online."""
        hidden, size = model.get_input_embeddings().embedding_dim, head_dim(model)
        generator = torch.Generator().manual_seed(self.seed)
        residual = hadamard_rotation(hidden, generator)
        # signs behind the matrix, not before it: a transform of the whole width would undo a part of a bare one
        values = hadamard_rotation(size, generator).T
        rotated = rotation_move(model, residual, [values] * len(block_list(model)))

        def online(block: nn.Module, index: int) -> None:
            transform_input(block, "self_attn.o_proj", across_heads(block.self_attn.o_proj.in_features, size))
            transform_input(block, "mlp.down_proj", full_width(block.mlp.down_proj.in_features))

        return rotated.then(Move(block=online))


def hadamard_rotation(n: int, generator: torch.Generator) -> Tensor:
    """A randomized Hadamard matrix, float64 ``[n, n]``; block-diagonal with the largest blocks where order ``n`` has none."""
    block = hadamard_block(n)
    return torch.block_diag(*(randomized_hadamard(block, generator) for _ in range(n // block)))


def rotate_offline(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a dense model with its residual stream and each value head in a randomized Hadamard basis.

    Nothing is left to do while the model runs: what :class:`lqedu.methods.QQQ` and :class:`lqedu.methods.QoQ` call rotation.
    """
    return offline_rotation(model, seed)(model)


def offline_rotation(model: nn.Module, seed: int) -> Move:
    """The same as a move that needs one part of the model in memory at a time."""
    generator = torch.Generator().manual_seed(seed)
    residual = hadamard_rotation(model.get_input_embeddings().embedding_dim, generator)
    return rotation_move(model, residual, [hadamard_rotation(head_dim(model), generator)] * len(block_list(model)))


def full_width(n: int) -> InputPath:
    """A transform of all ``n`` inputs, or of the largest blocks that have one."""
    return InputPath(hadamard=hadamard_block(n))


def across_heads(n: int, size: int) -> InputPath:
    """Mix the heads of ``o_proj``'s ``n`` inputs, whose values are in a Hadamard basis already.

    ``H_heads ⊗ I`` completes ``I ⊗ H_size`` to a transform of the whole width. A number of heads without a Hadamard matrix
    gets a transform of the whole width instead, which needs more operations; the signs behind the values' matrix keep the
    two from undoing each other (of 9 heads of 64, each output would see 12 of the 576 inputs).
    """
    heads = n // size
    return InputPath(hadamard=heads, stride=size) if hadamard_block(heads) == heads else full_width(n)


def transform_input(block: nn.Module, name: str, path: InputPath) -> None:
    """Replace a linear of a block by one with an online transform of its input; its function stays."""
    block.set_submodule(name, TransformedLinear(block.get_submodule(name), path))


def rotation_notes(model: nn.Module) -> tuple[str, ...]:
    """Whether :func:`hadamard_rotation` of the residual stream and of a model's values falls back to blocks."""
    hidden, size = model.get_input_embeddings().embedding_dim, head_dim(model)
    offline = {
        "the residual stream is rotated": (hidden, hadamard_block(hidden)),
        "the values of a head are rotated": (size, hadamard_block(size)),
    }
    return block_notes(offline)


def block_notes(transforms: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """A sentence for each transform that falls back to blocks, by what it does: its width, and the block it has."""
    return tuple(
        f"{what} in blocks of {block}: no Hadamard matrix of order {width} is constructed here"
        for what, (width, block) in transforms.items()
        if block < width
    )
