"""Matrices that the methods are made of: Hessians (chapter ``04-gptq``) and orthogonal ones (``07-quip``, ``10-quarot``)."""

from lqedu.linalg.hadamard import (
    fast_hadamard,
    hadamard_factors,
    hadamard_matrix,
    hadamard_operations,
    randomized_hadamard,
)
from lqedu.linalg.hessian import HessianAccumulator, damp, inverse_factor, ldl_upper

__all__ = [
    "HessianAccumulator", "damp", "fast_hadamard", "hadamard_factors", "hadamard_matrix", "hadamard_operations",
    "inverse_factor", "ldl_upper", "randomized_hadamard",
]  # fmt: skip
