"""A transformer small enough to train on two cores, and the loop that trains it; ``17-fp8-training``.

Everything follows from seeds, so that two runs that differ in their recipe see the same weights at first and the same
text in the same order, and their losses can be compared step by step.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lqedu.errors import CalibrationError, UsageError
from lqedu.options import check_count, check_number

VOCABULARY = 256  # bytes


class Training(NamedTuple):
    """A trained model and the loss of each step before its update, in nats per byte."""

    model: nn.Module
    losses: list[float]


def small_llama(seed: int = 0, *, hidden_size: int = 128, layers: int = 4) -> nn.Module:
    """A Llama over bytes with random float32 weights: 0.9 million at the defaults, the MLP three times as wide.

    Args:
        seed: of the weights, which are normal with a standard deviation of 0.02; gains of norms are 1.
        hidden_size: a multiple of 32, the size of a head.
        layers: decoder blocks.

    Raises:
        UsageError: a size that does not fit.
    """
    check_count("seed", seed)
    check_count("layers", layers, least=1)
    check_count("hidden_size", hidden_size, least=32)
    if hidden_size % 32:
        raise UsageError(f"hidden_size is a multiple of 32, got {hidden_size}")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32, num_key_value_heads=hidden_size // 32, max_position_embeddings=1024,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # building draws weights that are replaced below
        model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def byte_batches(text: str, *, steps: int, batch: int = 8, length: int = 128, seed: int = 0) -> Tensor:
    """Random windows of a text's bytes: int64 ``[steps, batch, length + 1]``, one byte more than is read.

    Raises:
        UsageError: a count that is not a positive whole number, or a text that is not ``str``.
        CalibrationError: the text is shorter than one window.
    """
    for name, count in (("steps", steps), ("batch", batch), ("length", length)):
        check_count(name, count, least=1)
    check_count("seed", seed)
    if not isinstance(text, str):
        raise UsageError(f"text is a str, got {type(text).__name__}")
    encoded = bytearray(text.encode("utf-8"))
    if len(encoded) <= length:
        raise CalibrationError(f"the text has {len(encoded)} bytes, a window needs {length + 1}; use a longer text")
    data = torch.frombuffer(encoded, dtype=torch.uint8)
    starts = torch.randint(0, len(data) - length, (steps, batch), generator=torch.Generator().manual_seed(seed))
    return data[starts[..., None] + torch.arange(length + 1)].long()


def _check_windows(name: str, windows: Tensor, dims: int) -> None:
    shape = "[steps, batch, length + 1]" if dims == 3 else "[count, length + 1]"
    whole = isinstance(windows, Tensor) and windows.dtype == torch.int64 and windows.dim() == dims
    if not whole or not windows.numel() or windows.shape[-1] < 2:
        got = f"{windows.dtype} {list(windows.shape)}" if isinstance(windows, Tensor) else type(windows).__name__
        raise UsageError(f"{name} is an int64 tensor {shape} that is not empty, as byte_batches makes, got {got}")


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss of every next byte in ``windows [batch, length + 1]``, in nats; differentiable."""
    windows = windows.to(next(model.parameters()).device)
    logits = model(windows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def train(
    model: nn.Module,
    batches: Tensor,
    *,
    learning_rate: float = 2e-3,
    warmup: int = 20,
    loss_scale: float = 1.0,
    after_step: Callable[[int, nn.Module], None] | None = None,
) -> Training:
    """Train a copy of ``model`` with AdamW: a linear warm-up, then a cosine down to a tenth; gradients clipped at norm 1.

    Args:
        model: of :func:`small_llama`, or what :func:`lqedu.training.convert` made of it; it is not changed.
        batches: of :func:`byte_batches`, one a step.
        learning_rate: at its largest.
        warmup: steps until then.
        loss_scale: the loss is multiplied by this before the backward pass and the gradients are divided by it after.
        after_step: called with the number of the step, from 0, and the model: to look, not to change.

    Raises:
        UsageError: a loss that is NaN or infinite; the sentence names the step. Batches that are empty or of another
            shape, and options out of their range.
    """
    _check_windows("batches", batches, 3)
    check_number("learning_rate", learning_rate, least=0)
    check_count("warmup", warmup)
    check_number("loss_scale", loss_scale, above=0)
    model = copy.deepcopy(model).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[Tensor] = []
    for step, windows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, len(batches), warmup)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, windows)
        if not torch.isfinite(loss.detach()):
            raise UsageError(
                f"the loss is {float(loss.detach())} at step {step}; lower the learning rate or the loss scale"
            )
        (loss * loss_scale).backward()
        for parameter in parameters:
            if loss_scale != 1 and parameter.grad is not None:
                parameter.grad /= loss_scale
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if after_step is not None:
            after_step(step, model)
    return Training(model.eval(), torch.stack(losses).tolist())


def _schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, *, batch: int = 64) -> float:
    """Mean loss over ``windows [count, length + 1]`` of bytes, nats per byte.

    Raises:
        UsageError: windows that are empty or of another shape, or a batch that is not a positive whole number.
    """
    _check_windows("windows", windows, 2)
    check_count("batch", batch, least=1)
    model.eval()
    return float(torch.stack([loss_of(model, part) * len(part) for part in windows.split(batch)]).sum() / len(windows))
