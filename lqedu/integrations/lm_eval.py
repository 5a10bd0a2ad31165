"""Any task of lm-eval on a model of ours; chapter ``21-serving``.

    python -m lqedu.integrations.lm_eval --model lqedu --model_args pretrained=FOLDER --tasks piqa,hellaswag

takes every argument of the command ``lm_eval``, which has no way to find a model class that it does not bring along.
``lqedu eval FOLDER --tasks mmlu`` runs lm-eval on every task that ``lqedu.evaluation.load_task`` does not know: those it scores
itself, without lm-eval and to the same numbers. From Python there is :func:`evaluate`, and after ``register()`` lm-eval's own
functions know the name.

lm-eval (EleutherAI, pip install lm-eval) is imported when one of the two is called, not before. How it cuts, batches and
scores texts is its own class ``HFLM``; here the model gets loaded.
"""

import inspect
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from lqedu.errors import MissingDependencyError, UsageError
from lqedu.models import load_model

NAME = "lqedu"
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
_OURS = ("pretrained", "device", "dtype", "kernels")
_PASSED_ON = (  # arguments of HFLM that are not about loading
    "batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "softmax_dtype", "add_bos_token",
    "prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip


def load(
    pretrained: str, *, device: str | None = None, dtype: str | torch.dtype | None = None, kernels: bool | None = None
) -> tuple[nn.Module, Any]:
    """A model as lm-eval is to run it, and its tokenizer.

    Args:
        pretrained: whatever :func:`lqedu.load_model` takes: a folder that :func:`lqedu.save` wrote, or a dense model.
        device: "cpu" or a GPU; ``None`` is a GPU where there is one.
        dtype: of parameters and activations, "float32", "float16" or "bfloat16"; ``None`` is float16 on kernels and float32
            elsewhere.
        kernels: run quantized layers on ``lqedu_kernels``; ``None`` does so on a GPU.

    Raises:
        UsageError: another dtype, or kernels for a dense model; and what :func:`lqedu.load_model` raises.
    """
    from lqedu.runtime import quantized_linears, to_kernels

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = None if dtype in (None, "auto") else dtype
    if dtype is not None and dtype not in _DTYPES and dtype not in _DTYPES.values():
        raise UsageError(f"dtype is one of {', '.join(_DTYPES)}, got {dtype!r}")
    chosen = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    model, tokenizer = load_model(pretrained, dtype=chosen or torch.float32, device=device)
    quantized = bool(quantized_linears(model))
    if kernels and not quantized:
        raise UsageError(f"{pretrained} is dense, no kernel of ours runs it; leave out kernels=True")
    if quantized and (torch.device(device).type == "cuda" if kernels is None else kernels):
        model = to_kernels(model, chosen or torch.float16)
        for note in model.lqedu_notes:
            print(f"note: {note}", file=sys.stderr)
    return model, tokenizer


def arguments(given: dict[str, Any], known: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the model class, split into those of :func:`load` and those of lm-eval's ``HFLM``.

    Args:
        given: by name.
        known: the names that this version of ``HFLM`` has.

    Raises:
        UsageError: no ``pretrained``, or a name that is neither.

    >>> arguments({"pretrained": "out", "batch_size": 8, "dtype": "float16"}, {"batch_size"})
    ({'pretrained': 'out', 'dtype': 'float16'}, {'batch_size': 8})
    """
    possible = [name for name in _PASSED_ON if name in known]
    unknown = sorted(set(given) - {*_OURS, *possible})
    if unknown:
        raise UsageError(f"the model lqedu has no argument {unknown[0]!r}; it has {', '.join([*_OURS, *possible])}")
    if not given.get("pretrained"):
        raise UsageError("say which model: --model_args pretrained=FOLDER")
    return {k: given[k] for k in _OURS if k in given}, {k: given[k] for k in possible if k in given}


@cache
def register() -> type:
    """Make lm-eval know the model "lqedu"; returns its class, and again the same one.

    Raises:
        MissingDependencyError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingDependencyError(
            f"the package {error.name!r} is missing; pip install lm-eval (and accelerate, which its models need)"
        ) from error
    known = set(inspect.signature(HFLM.__init__).parameters)

    class LqeduLM(HFLM):
        """lm-eval's own class around a model that :func:`load` returned; arguments as :func:`arguments` splits them."""

        def __init__(self, **given: Any) -> None:
            ours, theirs = arguments(given, known)
            model, tokenizer = load(**ours)
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **theirs)

    return register_model(NAME)(LqeduLM)


def evaluate(pretrained: str, tasks: Sequence[str], **arguments: Any) -> dict[str, dict[str, float]]:
    """Scores of a model on tasks of lm-eval.

    Args:
        pretrained: as for :func:`load`.
        tasks: their names.
        arguments: of the model class, such as ``batch_size`` and ``max_length``, or ``limit`` and ``task_manager`` of
            ``lm_eval.simple_evaluate``.

    Returns:
        For each task its numbers by name: metrics with the filter behind a comma, and their standard errors.

    Raises:
        UsageError: a task that lm-eval does not know; and what :func:`load`, :func:`register` and :func:`arguments` raise.
    """
    cls = register()
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = arguments.pop("task_manager", None) or TaskManager()
    limit = arguments.pop("limit", None)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UsageError(f"lm-eval has no task {unknown[0]!r}; 'lm_eval ls tasks' lists them")
    model = cls(pretrained=pretrained, **arguments)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
    )
    return {
        task: {name: value for name, value in scores.items() if isinstance(value, int | float)}
        for task, scores in found["results"].items()
    }


def main() -> None:
    """lm-eval's command line, with our model in it."""
    from lqedu.errors import LqeduError

    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except LqeduError as error:
        print(f"lqedu: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
