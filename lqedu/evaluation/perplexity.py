"""Perplexity with its error bar, and the paired comparison that makes small differences visible.

The protocol is the GPTQ reference's: non-overlapping windows, the mean cross-entropy over the ``length - 1`` predicted
positions of each, and ``ppl = exp(mean over windows)``. Chapter ``03-bench``.
"""

import hashlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lqedu.errors import CalibrationError, LqeduError, UsageError


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on windows of text.

    Attributes:
        ppl: ``exp(nll)``.
        nll: mean negative log-likelihood per predicted token, in nats.
        stderr: standard error of ``nll`` over windows, in nats; NaN for a single window.
        tokens: tokens in all windows.
        window_nll: nll of each window, in order.
        windows_sha256: digest of the token ids, so that only like is compared with like.
    """

    ppl: float
    nll: float
    stderr: float
    tokens: int
    window_nll: tuple[float, ...] = field(repr=False)
    windows_sha256: str = field(repr=False)


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two models on the same windows.

    Attributes:
        delta_nll: mean of ``a - b`` per window, in nats; positive means that a is worse.
        stderr: its standard error; far smaller than either model's own, because hard windows are hard for both.
        windows: how many.
    """

    delta_nll: float
    stderr: float
    windows: int


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, *, batch_size: int = 4, progress: bool = False) -> Perplexity:
    """Perplexity of a causal language model.

    Args:
        model: maps int64 ids ``[n, length]`` to ``.logits [n, length, vocabulary]``.
        windows: int64 ``[n, length]``, as :func:`lqedu.token_windows` returns them.
        batch_size: windows in one forward pass; memory and speed only.
        progress: show a progress bar on stderr.

    Raises:
        CalibrationError: no windows, or windows too short to predict a token.
        LqeduError: the model's logits are not finite.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2 or windows.dtype != torch.int64:
        raise CalibrationError(
            f"evaluation needs int64 windows [n, length] with length at least 2, got {windows.dtype} {list(windows.shape)}"
        )
    device = next(model.parameters()).device
    losses: list[float] = []
    for ids in tqdm(windows.split(batch_size), desc="perplexity", unit="batch", disable=not progress):
        logits = model(ids.to(device), use_cache=False).logits
        for row, target in zip(logits, ids.to(device), strict=True):  # a window at a time: float32 logits are large
            losses.append(float(nn.functional.cross_entropy(row[:-1].float(), target[1:])))
    if not all(map(math.isfinite, losses)):
        raise LqeduError(f"{sum(not math.isfinite(x) for x in losses)} of {len(losses)} windows have no finite loss")
    nll, stderr = _mean(losses)
    return Perplexity(math.exp(nll), nll, stderr, windows.numel(), tuple(losses), _digest(windows))


def paired(a: Perplexity, b: Perplexity) -> PairedDifference:
    """``a - b``, window by window.

    Raises:
        UsageError: the two were measured on different windows.

    >>> a = Perplexity(1.0, 0.0, 0.0, 8, (2.0, 3.0), "x")
    >>> b = Perplexity(1.0, 0.0, 0.0, 8, (1.5, 2.7), "x")
    >>> d = paired(a, b); round(d.delta_nll, 3), round(d.stderr, 3)
    (0.4, 0.1)
    """
    if a.windows_sha256 != b.windows_sha256:
        raise UsageError("the two perplexities were measured on different windows; measure both on the same ones")
    delta, stderr = _mean([x - y for x, y in zip(a.window_nll, b.window_nll, strict=True)])
    return PairedDifference(delta, stderr, len(a.window_nll))


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error, in float64."""
    x = torch.tensor(values, dtype=torch.float64)
    stderr = float(x.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(x.mean()), stderr


def _digest(windows: Tensor) -> str:
    return hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest()
