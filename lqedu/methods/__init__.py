"""Methods: one file each, named as its chapter. The registry of these classes is the book's summary table."""

from lqedu.methods.awq import AWQ
from lqedu.methods.base import Answers, Method, available, build, get
from lqedu.methods.fp8 import FP8
from lqedu.methods.gptq import GPTQ
from lqedu.methods.hqq import HQQ
from lqedu.methods.qoq import QoQ
from lqedu.methods.qqq import QQQ
from lqedu.methods.quarot import QuaRot
from lqedu.methods.quip import QuIP
from lqedu.methods.rtn import RTN
from lqedu.methods.smoothquant import SmoothQuant
from lqedu.methods.spinquant import SpinQuant

__all__ = [
    "AWQ",
    "FP8",
    "GPTQ",
    "HQQ",
    "QQQ",
    "RTN",
    "Answers",
    "Method",
    "QoQ",
    "QuIP",
    "QuaRot",
    "SmoothQuant",
    "SpinQuant",
    "available",
    "build",
    "get",
]
