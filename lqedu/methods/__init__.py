"""Methods: one file each, named as its chapter. The registry of these classes is the book's summary table."""

from lqedu.methods.awq import AWQ
from lqedu.methods.base import Answers, Method, available, build, get
from lqedu.methods.gptq import GPTQ
from lqedu.methods.hqq import HQQ
from lqedu.methods.quip import QuIP
from lqedu.methods.rtn import RTN

__all__ = ["AWQ", "GPTQ", "HQQ", "RTN", "Answers", "Method", "QuIP", "available", "build", "get"]
