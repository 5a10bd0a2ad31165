"""Rounding: which grid point does each weight get? (chapters ``02-grids``, ``04-gptq``)"""

# Functions share their names with their modules: importing them here, eagerly, makes the function win every time.
from lqedu.rounding.gptq import gptq
from lqedu.rounding.greedy import refine
from lqedu.rounding.hqq import hqq
from lqedu.rounding.ldlq import ldlq
from lqedu.rounding.nearest import nearest
from lqedu.rounding.report import RoundingReport, proxy_loss

__all__ = ["RoundingReport", "gptq", "hqq", "ldlq", "nearest", "proxy_loss", "refine"]
