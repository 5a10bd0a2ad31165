"""Generators of problems with their answers, seeded; shared by tests of several modules."""

import torch
from torch import Tensor


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(rows: int, columns: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian weights [rows, columns] with a few outliers, as trained layers have."""
    g = seeded(seed)
    w = torch.randn(rows, columns, generator=g, dtype=torch.float64) * 0.05
    spikes = torch.randint(rows * columns, (max(1, rows * columns // 200),), generator=g)
    w.view(-1)[spikes] *= 6
    return w.to(dtype)


def hessian(columns: int, *, seed: int, tokens: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(1/T) Σ x^T x`` of correlated activations with uneven channels: rounding is far from independent under it."""
    g = seeded(seed)
    tokens = tokens or 4 * columns
    mixing = torch.randn(columns, columns, generator=g, dtype=torch.float64) / columns**0.5
    channels = torch.exp(torch.randn(columns, generator=g, dtype=torch.float64))
    x = torch.randn(tokens, columns, generator=g, dtype=torch.float64) @ (torch.eye(columns) + 2 * mixing) * channels
    return (x.T @ x / tokens).to(dtype)
