"""Perplexity by the protocol of GPTQ, and differences that carry their uncertainty; ``03-bench``.

    nll = mean over windows of  mean over t of  -log p(x[t+1] | x[1..t]),      ppl = exp(nll)

Each window is read on its own, from its first token; all have the same length, so this is also the mean over tokens.
Text differs far more from window to window than two versions of a model do on the same window: compare models by
:func:`paired`, never by two perplexities and their errors.
"""

import hashlib
import math
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from lqedu._statistics import mean_and_error
from lqedu.errors import CalibrationError, UsageError
from lqedu.models.modes import inference

_CHUNK = 512  # positions whose log-probabilities are held at once: 100 MB for a vocabulary of 49152


@dataclass(frozen=True)
class Perplexity:
    """What :func:`perplexity` measured.

    Attributes:
        ppl: exp(nll).
        nll: mean negative log-likelihood, in nats a token.
        stderr: standard error of ``nll`` over windows; NaN for a single window.
        tokens: tokens in all windows; each but a window's first is predicted.
        window_nll: the mean of each window.
        windows_sha256: of the token ids; :func:`paired` compares what was measured on the same ones only.
    """

    ppl: float
    nll: float
    stderr: float
    tokens: int
    window_nll: tuple[float, ...] = field(repr=False)
    windows_sha256: str = field(repr=False)


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two models on the same windows.

    Attributes:
        delta_nll: ``a.nll - b.nll``, in nats a token; exp of it is the ratio of the perplexities.
        stderr: standard error of ``delta_nll`` over windows; NaN for a single window.
        windows: how many there are.
    """

    delta_nll: float
    stderr: float
    windows: int


def perplexity(model: nn.Module, windows: Tensor, *, batch_size: int = 4, progress: bool = False) -> Perplexity:
    """Measure a causal language model on windows of tokens.

    Args:
        model: anything that maps token ids to ``.logits`` as transformers' models do, dense or quantized. Not changed.
        windows: token ids, int64 ``[count, length]``, on any device; see :func:`lqedu.token_windows`.
        batch_size: windows run at once; sets the memory (``batch_size * length * vocabulary`` logits), not the result.
        progress: show a progress bar on stderr.

    Raises:
        UsageError: windows that are no token ids of this model, or a batch size below 1.
        CalibrationError: a window whose likelihood is not a number.
    """
    _check(model, windows, batch_size)
    device = model.get_input_embeddings().weight.device
    window_nll: list[float] = []
    with (
        inference(model),
        tqdm(total=len(windows), desc="perplexity", unit="window", disable=not progress, file=sys.stderr) as bar,
    ):
        for batch in windows.split(batch_size):
            window_nll += _window_nll(model, batch.to(device))
            bar.update(len(batch))
    if bad := [index for index, value in enumerate(window_nll) if not math.isfinite(value)]:
        raise CalibrationError(
            f"the model gives no finite likelihood for {len(bad)} of {len(window_nll)} windows (first: {bad[0]}); "
            "its weights or activations overflow: try dtype float32, or a gentler quantization"
        )
    nll, stderr = mean_and_error(window_nll)
    return Perplexity(
        ppl=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        stderr=stderr,
        tokens=windows.numel(),
        window_nll=tuple(window_nll),
        windows_sha256=windows_sha256(windows),
    )


def windows_sha256(windows: Tensor) -> str:
    """Digest of token ids ``[count, length]``, of their shape and their bytes; in hex."""
    return hashlib.sha256(f"{list(windows.shape)}".encode() + windows.cpu().contiguous().numpy().tobytes()).hexdigest()


def paired(a: Perplexity, b: Perplexity) -> PairedDifference:
    """How much worse ``a`` is than ``b``, by the differences of each window.

    Raises:
        UsageError: the two were measured on different windows.

    >>> same = dict(ppl=1.0, stderr=0.1, tokens=4, windows_sha256="")
    >>> a = Perplexity(nll=3.0, window_nll=(2.0, 4.0), **same)
    >>> b = Perplexity(nll=2.5, window_nll=(1.75, 3.25), **same)
    >>> paired(a, b)
    PairedDifference(delta_nll=0.5, stderr=0.25, windows=2)
    """
    if a.windows_sha256 != b.windows_sha256:
        raise UsageError("the two perplexities were measured on different windows; measure both on the same ones")
    delta, stderr = mean_and_error([x - y for x, y in zip(a.window_nll, b.window_nll, strict=True)])
    return PairedDifference(delta, stderr, len(a.window_nll))


def _window_nll(model: nn.Module, batch: Tensor) -> list[float]:
    """Mean negative log-likelihood of each window of ``batch`` [n, length]."""
    logits = model(batch, use_cache=False).logits  # [n, length, vocabulary], in the model's dtype
    means = []
    for scores, ids in zip(logits, batch, strict=True):
        pairs = zip(scores[:-1].split(_CHUNK), ids[1:].split(_CHUNK), strict=True)
        losses = [cross_entropy(part.float(), target, reduction="none") for part, target in pairs]
        means.append(torch.cat(losses).double().mean().item())
    return means


def _check(model: nn.Module, windows: Tensor, batch_size: int) -> None:
    if not isinstance(windows, Tensor) or windows.dtype != torch.int64 or windows.dim() != 2:
        raise UsageError("windows must be int64 token ids of shape [count, length]; see lqedu.token_windows")
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(f"windows of shape {list(windows.shape)} hold nothing to predict; use longer or more windows")
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(windows.min()) < 0 or int(windows.max()) >= vocabulary:
        raise UsageError(f"windows hold token ids outside the model's {vocabulary}; use the model's own tokenizer")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
