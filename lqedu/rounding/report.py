"""What a rounding did: the same few numbers for every rounding, and the input checks that all of them share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lqedu.errors import CalibrationError
from lqedu.formats.integer import check_weight
from lqedu.options import check_number


@dataclass(frozen=True)
class RoundingReport:
    """Numbers that describe one rounded weight.

    Attributes:
        proxy_loss: ``tr(ΔW H ΔW^T)``, squared output error per token summed over outputs; ``None`` without a Hessian.
        damping: fraction of the mean diagonal that was added to the Hessian; ``None`` where none is used.
        dead_columns: inputs that were zero in every calibration token.
        flips: fraction of codes that differ from rounding to nearest on the same final grid.
        attempts: factorizations tried; above 1 the damping was raised because the Hessian was not positive definite.
    """

    proxy_loss: float | None
    damping: float | None = None
    dead_columns: int = 0
    flips: float = 0.0
    attempts: int = 1


def proxy_loss(error: Tensor, hessian: Tensor) -> float:
    """``tr(ΔW H ΔW^T)`` in float64, for ``error = w - w_hat`` of shape ``[out, in]`` (chapter ``04-gptq``).

    >>> proxy_loss(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    2.0
    """
    error = error.to(torch.float64)
    return float(((error @ hessian.to(torch.float64)) * error).sum())


def check_problem(weight: Tensor, hessian: Tensor, damping: float) -> None:
    """Refuse a weight and Hessian that do not belong together (GridError, CalibrationError, UsageError)."""
    check_weight(weight)
    columns = weight.shape[1]
    if not isinstance(hessian, Tensor) or hessian.shape != (columns, columns):
        got = list(hessian.shape) if isinstance(hessian, Tensor) else type(hessian).__name__
        raise CalibrationError(f"a weight {list(weight.shape)} needs a Hessian [{columns}, {columns}], got {got}")
    if hessian.device != weight.device:
        raise CalibrationError(
            f"the weight is on {weight.device} and its Hessian on {hessian.device}; move one of them"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(f"the Hessian [{columns}, {columns}] holds NaN or infinite values")
    check_number("damping", damping, least=0)
