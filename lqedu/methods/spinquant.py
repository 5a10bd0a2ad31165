"""SpinQuant: learn the rotations, because not all of them are equal, then quantize as QuaRot does; ``11-spinquant``.

Grid: INT4 weights, activations, keys and values. Move: rotate by learned matrices. Round: GPTQ. Run: W4A4KV4.
Liu et al., 2024, arXiv:2405.16406. Derived from the paper's equations; where this file differs from the paper, and why:

- weights stay in floating point while rotations are learned, whatever rounds them later (the paper's choice for GPTQ);
- the model that is trained is not rotated: ``Q(x R)(w R)^T = (Q(x R) R^T) w^T``, so rotating, rounding and rotating back
  each activation computes the same at the price of two small products, and no weight needs a gradient.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lqedu.errors import CalibrationError, UsageError
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.kv import KVGrid
from lqedu.linalg.hadamard import fast_hadamard, hadamard_block
from lqedu.methods.base import Answers, kv_path
from lqedu.methods.quarot import Rotated, block_notes, full_width, hadamard_rotation, transform_input
from lqedu.models.anatomy import block_list
from lqedu.options import check_count, check_number
from lqedu.runtime.inputs import InputPath
from lqedu.transforms.cayley import cayley_step
from lqedu.transforms.moves import Move
from lqedu.transforms.rotation import head_dim, rotate_model, rotation_move

if TYPE_CHECKING:
    from lqedu.runtime.attention import AttentionPath

Grid = ActivationGrid | KVGrid
Rounding = Callable[[Tensor, Grid | None], Tensor]  # values on a grid, with the gradient of one's choice

_TOKENS_A_PASS = {"cpu": 2048, "cuda": 8192}  # of one forward and backward pass; a step adds up as many as it needs


@dataclass(frozen=True, kw_only=True)
class SpinQuant(Rotated):
    """SpinQuant with the paper's settings, W4A4KV4, on as much text as the caller gives.

    The hyper-parameters that are not listed here are those of :class:`lqedu.methods.quarot.Rotated`.

    Attributes:
        steps: of Cayley descent, with a learning rate that falls to zero along a cosine.
        learning_rate: of the first step; each step obeys the bound of :func:`lqedu.transforms.cayley.step_size` too.
        windows_per_step: calibration windows of a step, drawn without repetition until all were used. (The paper's steps
            hold 8 windows of 2,048 tokens.)
        activation: as in :class:`QuaRot`; with "static" the training itself rounds on the range of the text at hand.
        online: transform the input of ``down_proj``, and q and k of every head, while the model runs ("had"); without
            it only the learned rotations remain, which cost nothing ("no had").
    """

    name: ClassVar[str] = "spinquant"
    title: ClassVar[str] = "SpinQuant"
    chapter: ClassVar[str] = "11-spinquant"
    citation: ClassVar[str] = "liu2024spinquant"
    answers: ClassVar[Answers] = Answers(
        grid="INT4 weights per channel, activations per token, KV per head",
        move="rotate by learned matrices, offline; two online Hadamards",
        round="GPTQ, or nearest",
        run="W4A4KV4: online Hadamards, INT4 GEMM",
        calibration="gradients of the loss by the rotations, then a Hessian of each linear's rotated inputs",
        online=("quantize inputs", "transform inputs", "quantize keys and values", "transform queries and keys"),
    )

    learns_from_blocks: ClassVar[bool] = False

    steps: int = 100
    learning_rate: float = 1.5
    windows_per_step: int = 8
    online: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_number("learning_rate", self.learning_rate, above=0)
        check_count("windows_per_step", self.windows_per_step, least=1)
        if self.activation_bits is None and self.kv_bits is None:
            raise UsageError("rotations are learned for rounded activations; set activation_bits or kv_bits")

    def activation_grid(self) -> ActivationGrid | None:
        """Asymmetric."""
        grid = super().activation_grid()
        return None if grid is None else replace(grid, symmetric=False, clip_ratio=self.activation_clip)

    def attention_path(self) -> "AttentionPath | None":
        """Keys in the Hadamard basis of each head where online transforms are allowed."""
        return kv_path(self.kv_bits, clip_ratio=self.kv_clip, zero_point="integer", hadamard=self.online)

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        """Rotations that start from blocks, and an online transform that stays in blocks."""
        hidden, size = model.get_input_embeddings().embedding_dim, head_dim(model)
        wide = block_list(model)[0].mlp.down_proj.in_features
        transforms = {
            "the rotation of the residual stream starts": (hidden, hadamard_block(hidden)),
            "the rotations of values start": (size, hadamard_block(size)),
        }
        online = {"the input of down_proj is transformed": (wide, hadamard_block(wide))} if self.online else {}
        return block_notes(transforms | online)

    def learn(
        self,
        model: nn.Module,
        calibration: Tensor | None,
        *,
        progress: bool = False,
        blocks: Iterable[nn.Module] | None = None,
    ) -> dict[str, Tensor]:
        """The learned rotations, and the loss of each step."""
        found = learn_rotations(model, calibration, self, progress=progress)
        return {"residual": found.residual, "values": torch.stack(found.values), "losses": torch.tensor(found.losses)}

    def model_move(self, model: nn.Module, learned: Mapping[str, Tensor]) -> Move:
        """Rotate the residual stream and the values by what was learned; transform ``down_proj``'s input online."""
        rotated = rotation_move(model, learned["residual"], list(learned["values"]))
        if not self.online:
            return rotated

        def online(block: nn.Module, index: int) -> None:
            transform_input(block, "mlp.down_proj", full_width(block.mlp.down_proj.in_features))

        return rotated.then(Move(block=online))


@dataclass(frozen=True)
class Rotations:
    """What training found.

    Attributes:
        residual: ``R_1`` of the residual stream, float32 ``[hidden, hidden]``.
        values: ``R_2`` of each block's value heads, float32 ``[head_dim, head_dim]``.
        losses: cross entropy of each step's windows before the step, in nats per token.
    """

    residual: Tensor
    values: tuple[Tensor, ...]
    losses: tuple[float, ...]


def learn_rotations(
    model: nn.Module, windows: Tensor, method: SpinQuant, *, rounded: Rounding | None = None, progress: bool = False
) -> Rotations:
    """Cayley descent on the cross entropy of the model with rounded activations, keys and values; weights stay dense.

    Args:
        model: a dense Llama-like causal language model. Not changed.
        windows: token ids, int64 ``[n, length]``.
        method: the grids, and how to train. Random signs of the first rotations and the order of windows come from its seed.
        rounded: another estimator of gradients in place of :func:`round_through`, with the same values.
        progress: show a progress bar on stderr.

    Raises:
        UnsupportedModelError: a model that no rotation passes.
        CalibrationError: fewer windows than a step takes, windows of one token, or a loss that is not finite.
    """
    if len(windows) < method.windows_per_step:
        raise CalibrationError(f"a step takes {method.windows_per_step} windows, calibration has {len(windows)}")
    if windows.shape[1] < 2:
        raise CalibrationError("a window of one token has no next token to predict; use longer windows")
    dense = _frozen(rotate_model(model))  # norms folded, nothing rotated
    device = dense.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(method.seed)
    sizes = [dense.get_input_embeddings().embedding_dim] + [head_dim(dense)] * len(block_list(dense))
    rotations = [hadamard_rotation(n, generator).to(device, torch.float32).requires_grad_() for n in sizes]
    order, losses = _endless(len(windows), generator), []
    with _rounded(dense, rotations, method, rounded or round_through):
        for step in tqdm(range(method.steps), desc="rotations", unit="step", disable=not progress):
            batch = list(itertools.islice(order, method.windows_per_step))
            loss, gradients = _loss_and_gradients(dense, rotations, windows[batch].to(device))
            if not math.isfinite(loss):
                remedy = "use a lower learning_rate" if step else "no step was taken: look at the model and its dtype"
                raise CalibrationError(f"the loss of step {step} is not finite; {remedy}")
            rate = method.learning_rate * (1 + math.cos(math.pi * step / method.steps)) / 2
            with torch.no_grad():
                for rotation, gradient in zip(rotations, gradients, strict=True):
                    rotation.copy_(cayley_step(rotation, gradient, rate))
            losses.append(loss)
    residual, *values = (rotation.detach() for rotation in rotations)
    return Rotations(residual, tuple(values), tuple(losses))


@torch.no_grad()
def rotated_loss(model: nn.Module, windows: Tensor, rotations: Rotations, method: SpinQuant) -> Tensor:
    """What training lowers, on any text: cross entropy of each window with rounded activations, keys and values.

    Args:
        model: a dense Llama-like causal language model. Not changed.
        windows: token ids, int64 ``[n, length]``.
        rotations: from :func:`learn_rotations`.
        method: the grids.

    Returns:
        Nats per token, float32 ``[n]``, on the CPU.
    """
    dense = _frozen(rotate_model(model))
    device = dense.get_input_embeddings().weight.device
    losses = []
    with _rounded(dense, [rotations.residual.to(device), *(r.to(device) for r in rotations.values)], method):
        for part in windows.to(device).split(4):
            logits = dense(part, use_cache=False).logits[:, :-1].float()
            each = nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
            losses.append(each.mean(1).cpu())
    return torch.cat(losses)


def _endless(n: int, generator: torch.Generator) -> Iterator[int]:
    """All numbers below ``n`` in random order, again and again."""
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


def _loss_and_gradients(model: nn.Module, rotations: list[Tensor], ids: Tensor) -> tuple[float, list[Tensor]]:
    """Mean cross entropy of the next token over windows of equal length, and its gradients, a few windows at a time."""
    total, gradients = 0.0, [torch.zeros_like(rotation) for rotation in rotations]
    for part in ids.split(max(1, _TOKENS_A_PASS.get(ids.device.type, 2048) // ids.shape[1])):
        logits = model(part, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten())
        share = len(part) / len(ids)
        found = torch.autograd.grad(
            share * loss, rotations, allow_unused=True
        )  # unused: R_2 where nothing reads values
        for gradient, more in zip(gradients, found, strict=True):
            if more is not None:
                gradient += more
        total += share * float(loss.detach())
    return total, gradients


def round_through(x: Tensor, grid: Grid | None) -> Tensor:
    """The rounded values of ``x``, with the gradient of ``x`` itself (the straight-through estimator)."""
    return x if grid is None else x + (grid.round_trip(x.detach()) - x.detach())


def _there_and_back(x: Tensor, rotation: Tensor, grid: Grid | None, rounded: Rounding) -> Tensor:
    """``Q(x R) R^T``, for each run of ``len(R)`` features; the grid sees all of them at once."""
    dtype = torch.promote_types(x.dtype, rotation.dtype)  # 16-bit models turn in float32
    r = rotation.to(dtype)
    turned = (x.to(dtype).unflatten(-1, (-1, len(r))) @ r).flatten(-2)
    return (rounded(turned, grid).unflatten(-1, (-1, len(r))) @ r.T).flatten(-2).to(x.dtype)


class _TrainedPath:
    """An attention path (see ``lqedu.runtime.attention``) that values pass rotated by a learned matrix, with gradients."""

    def __init__(self, path: "AttentionPath", rotation: Tensor, rounded: Rounding) -> None:
        self._path, self._rotation, self._rounded, self.query = path, rotation, rounded, path.query

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key = fast_hadamard(key) if self._path.hadamard else key
        return self._rounded(key, self._path.key), _there_and_back(
            value, self._rotation, self._path.value, self._rounded
        )


@contextmanager
def _rounded(
    model: nn.Module, rotations: list[Tensor], method: SpinQuant, rounded: Rounding = round_through
) -> Iterator[None]:
    """Round what the quantized model will round, in the basis it will have there; the model itself is not rotated."""
    grid, path = method.activation_grid(), method.attention_path()
    residual, *values = rotations
    hooks = []
    if path is not None:
        from lqedu.runtime.attention import set_attention_path

        set_attention_path(model, path)
    for block, rotation in zip(block_list(model), values, strict=True):
        if path is not None:
            block.self_attn.lqedu_attention = _TrainedPath(path, rotation, rounded)
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            hooks.append(norm.register_forward_hook(_output(lambda x: _there_and_back(x, residual, grid, rounded))))
        down = full_width(block.mlp.down_proj.in_features) if method.online else InputPath()
        for linear, function in (
            (block.self_attn.o_proj, lambda x, rotation=rotation: _there_and_back(x, rotation, grid, rounded)),
            (block.mlp.down_proj, lambda x, down=down: _hadamard_and_back(x, down, grid, rounded)),
        ):
            hooks.append(linear.register_forward_pre_hook(_input(function)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hadamard_and_back(x: Tensor, path: InputPath, grid: Grid | None, rounded: Rounding) -> Tensor:
    """``Q(x H) H^T`` for the online transform of ``down_proj``'s input: runs of ``path.hadamard`` features."""
    if path.hadamard is None:
        return rounded(x, grid)
    turned = rounded(path.transform(x), grid)
    return fast_hadamard(turned.unflatten(-1, (-1, path.hadamard)), inverse=True).flatten(-2)


def _output(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda module, arguments, output: function(output)


def _input(function: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Any, ...]]:
    return lambda module, arguments: (function(arguments[0]), *arguments[1:])


def _frozen(model: nn.Module) -> nn.Module:
    """The same tensors as parameters that want no gradients."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach(), requires_grad=False))
    return model
