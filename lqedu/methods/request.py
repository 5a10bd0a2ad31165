"""What is refused before a model is quantized, and which of its linears a method takes; ``04-gptq``."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lqedu.calibration.capture import check_windows
from lqedu.calibration.distributed import my_windows, processes
from lqedu.errors import CalibrationError, GridError, LqeduError, UsageError
from lqedu.formats.integer import check_weight
from lqedu.methods.base import Method
from lqedu.models.anatomy import Stage, describe, linears
from lqedu.runtime.linear import quantized_linears


def check_request(model: nn.Module, method: Method, calibration: Tensor | None) -> None:
    """Refuse, before any work, what would fail later: see :func:`quantize` for the errors."""
    check_shapes(model, method, calibration)
    for name, linear in linears(model).items():
        with with_context(name, linear.weight, method):
            check_weight(linear.weight)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter)


def check_shapes(model: nn.Module, method: Method, calibration: Tensor | None) -> None:
    """The part of :func:`check_request` that reads no tensor of the model, which may be on the meta device."""
    if not isinstance(method, Method):
        raise UsageError(f"method is an instance such as lqedu.methods.GPTQ(bits=4), got {method!r}")
    if quantized_linears(model):
        raise UsageError("the model is already quantized; start from the dense one")
    if method.uses_calibration:
        _check_windows(model, calibration, method)
        my_windows(calibration)
    if processes().count > 1 and not method.learns_from_blocks:
        raise UsageError(
            f"{method.title} trains with gradients through the whole model, which this package does in one process; start it "
            "without torchrun"
        )
    for name, linear in linears(model).items():
        with with_context(name, linear.weight, method):
            method.check_shape(tuple(linear.weight.shape))
    quantized_stages(describe(model).stages, method)
    path = method.attention_path()
    if path is not None:
        from lqedu.runtime.attention import check_heads

        check_heads(model, path)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse (GridError) a tensor with NaN or infinite values; read in parts, so that no mask of its size is made."""
    if tensor.is_floating_point() and not all(bool(torch.isfinite(t).all()) for t in tensor.flatten().split(1 << 24)):
        raise GridError(f"{name} {list(tensor.shape)} holds NaN or infinite values")


def quantized_stages(stages: tuple[Stage, ...], method: Method) -> tuple[Stage, ...]:
    """The stages of a block less the linears that the method keeps.

    Raises:
        UsageError: nothing is left to quantize, or the method names a linear that is not there.
    """
    there = {name.rpartition(".")[2]: None for stage in stages for name in stage.linears}  # in the order they run
    unknown = [name for name in method.kept_names() if name not in there]
    if unknown:
        raise UsageError(
            f"{method.title} is asked to keep {', '.join(map(repr, unknown))}, which this model does not have; its "
            f"linears, to be separated by commas, are {', '.join(there)}"
        )
    wanted = [
        dataclasses.replace(stage, linears=tuple(name for name in stage.linears if not method.keeps(name)))
        for stage in stages
    ]
    if not any(stage.linears for stage in wanted):
        raise UsageError(f"{method.title} is asked to keep every linear layer; name fewer of them")
    return tuple(stage for stage in wanted if stage.linears)


def _check_windows(model: nn.Module, calibration: Tensor | None, method: Method) -> None:
    if calibration is None:
        raise CalibrationError(f"{method.title} needs calibration windows; pass calibration=lqedu.token_windows(...)")
    check_windows(model, calibration)


@contextmanager
def with_context(name: str, weight: Tensor, method: Method) -> Iterator[None]:
    """Add layer, shape and method to any error of ours from below, and keep its type."""
    try:
        yield
    except LqeduError as error:
        raise type(error)(f"{name} {list(weight.shape)}, {method.title}: {error}") from error
