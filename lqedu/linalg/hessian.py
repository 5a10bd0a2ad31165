"""The Hessian of the layer-wise loss: accumulate it, damp it, factor it.

For a linear layer ``y = x W^T`` the squared output error of a rounded row is ``Δw H Δw^T`` with
``H = (1/T) Σ_t x_t^T x_t``. (The reference GPTQ keeps 2/N with N counting sequences; damping is relative to the mean of
the diagonal, so the factor changes no code.)

Derived in chapter ``04-gptq``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lqedu.errors import CalibrationError, NotPositiveDefiniteError


class HessianAccumulator:
    """Streaming ``h = (1/T) Σ_t x_t^T x_t`` in float32 (float64 if the activations are).

    >>> acc = HessianAccumulator(2)
    >>> acc.add(torch.tensor([[1.0, 2.0]])); acc.add(torch.tensor([[3.0, 0.0]]))
    >>> acc.result()
    tensor([[5., 1.],
            [1., 2.]])
    """

    def __init__(self, features: int) -> None:
        self.features = features
        self.tokens = 0
        self._sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add activations ``[..., features]``; leading axes are tokens.

        Raises:
            CalibrationError: a wrong last axis, or values that are not finite.
        """
        if x.shape[-1] != self.features:
            raise CalibrationError(f"activations must have {self.features} features, got {list(x.shape)}")
        x = x.detach().reshape(-1, self.features)
        x = x if x.dtype == torch.float64 else x.to(torch.float32)  # float16 outliers would overflow when squared
        gram = x.T @ x
        if not bool(torch.isfinite(gram).all()):
            raise CalibrationError("the calibration activations hold NaN or infinite values")
        self._sum = gram if self._sum is None else self._sum + gram
        self.tokens += x.shape[0]

    def result(self, total: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        """``h``, ``[features, features]``.

        Args:
            total: makes a sum of this process one of all, as :func:`lqedu.calibration.distributed.all_sum`.

        Raises:
            CalibrationError: no token was added.
        """
        if self._sum is None or self.tokens == 0:
            raise CalibrationError("a Hessian needs at least one calibration token")
        return total(self._sum) / int(total(torch.tensor(self.tokens)))


def damp(hessian: Tensor, damping: float) -> Tensor:
    """``h + damping * mean(diag h) * I``: a ridge relative to the average input power.

    >>> damp(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), 0.5)
    tensor([[2., 0.],
            [0., 4.]])
    """
    ridge = damping * hessian.diagonal().mean()
    return hessian + ridge * torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper-triangular ``u`` with ``h^-1 = u^T u``: row i holds all that GPTQ needs to know at column i.

    ``u`` is the inverse of the upper factor ``r`` of ``h = r r^T``, and ``r`` is the Cholesky factor of ``h`` with rows
    and columns reversed. One factorization and one triangular solve, where the reference inverts and factors twice.

    Returns:
        float64 ``[in, in]`` with a positive diagonal.

    Raises:
        NotPositiveDefiniteError: ``h`` cannot be factored.
    """
    r = _upper_factor(hessian)
    eye = torch.eye(r.shape[0], dtype=r.dtype, device=r.device)
    return torch.linalg.solve_triangular(r, eye, upper=True)


def ldl_upper(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """``(l, d)`` with ``h = l diag(d) l^T``, ``l`` unit *upper* triangular: the factors of LDLQ, first column first.

    Returns:
        float64 ``l [in, in]`` and ``d [in]``.

    Raises:
        NotPositiveDefiniteError: ``h`` cannot be factored.
    """
    r = _upper_factor(hessian)
    diagonal = r.diagonal()
    return r / diagonal, diagonal.square()


def _upper_factor(hessian: Tensor) -> Tensor:
    """Upper-triangular ``r`` with ``h = r r^T``, in float64."""
    flipped = hessian.to(torch.float64).flip(0, 1)
    lower, failed_at = torch.linalg.cholesky_ex(flipped)
    if int(failed_at) != 0 or not bool(torch.isfinite(lower).all()):
        raise NotPositiveDefiniteError(
            f"the Hessian [{hessian.shape[0]}, {hessian.shape[0]}] is not positive definite; "
            "use more calibration tokens or more damping"
        )
    return lower.flip(0, 1)
