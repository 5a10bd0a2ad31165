"""Matrices that the methods are made of (chapter ``04-gptq``: the Hessian)."""

from lqedu.linalg.hessian import HessianAccumulator, damp, inverse_factor, ldl_upper

__all__ = ["HessianAccumulator", "damp", "inverse_factor", "ldl_upper"]
