"""Matrices that the methods are made of: Hessians (chapter ``04-gptq``) and orthogonal ones (``07-quip``, ``10-quarot``)."""

from lqedu.linalg.hadamard import (
    fast_hadamard,
    hadamard_block,
    hadamard_factors,
    hadamard_matrix,
    hadamard_operations,
    randomized_hadamard,
)
from lqedu.linalg.hessian import HessianAccumulator, damp, inverse_factor, ldl_upper
from lqedu.linalg.orthogonal import KroneckerRotation, kronecker_sizes, random_orthogonal

__all__ = [
    "HessianAccumulator", "KroneckerRotation", "damp", "fast_hadamard", "hadamard_block", "hadamard_factors", "hadamard_matrix",
    "hadamard_operations", "inverse_factor", "kronecker_sizes", "ldl_upper", "random_orthogonal",
    "randomized_hadamard",
]  # fmt: skip
