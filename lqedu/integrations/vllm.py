"""An out-of-tree vLLM plugin: W4A8 models of ours in vLLM, on our kernels; chapter ``21-serving``.

    vllm serve FOLDER            # a folder that lqedu.save wrote, of QoQ or QQQ; needs vLLM, a GPU and nothing else

vLLM runs :func:`register` in each of its processes, because the distribution names it in the entry-point group
``vllm.general_plugins``. It makes the quantization method "lqedu_w4a8" known, and a folder whose config.json says "lqedu" is
given to it. vLLM keeps scheduling, attention and its own cache of keys and values; the linear layers are ours:

    create_weights                    parameters of the stored tensors, which vLLM fills shard by shard (q, k and v into one)
    process_weights_after_loading     the same weight in the layout of the kernel, losslessly
    apply                             an online Hadamard transform if there is one, INT8 codes, the W4A8 product

Here is what needs no vLLM; the classes it calls are in ``lqedu.integrations.vllm_classes``, imported by :func:`register`.

The interface is that of vLLM 0.33 (``vllm/model_executor/layers/quantization/base_config.py``, ``linear.py``,
``parameter.py``); ``tests/integrations/vllm_interface.json`` holds its names and arguments.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lqedu.errors import CheckpointError, GridError, UnsupportedModelError, UsageError
from lqedu.formats.activation import ActivationGrid
from lqedu.runtime.backend import KernelWeight, kernel_product, kernel_weight
from lqedu.runtime.codes import transform_and_encode
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.kinds import rebuild

METHOD = "lqedu_w4a8"
_SCHEMA = "(Tensor x, Tensor codes, Tensor scale, Tensor? groups, Tensor? bias, int outputs, int group_size, str path) -> Tensor"
_ALONG_INPUTS = ("codes", "group_scale", "zero")  # the other stored tensor, the channel scale, has one column


@dataclass(frozen=True)
class LayerPlan:
    """How one linear layer is stored and run, all but its size.

    Attributes:
        kind: of the stored weight, see ``lqedu.runtime.kinds``.
        grid: its grid as JSON keeps it, fields sorted, so that plans can be compared.
        path: what happens to the inputs.
        group_size: inputs that share a scale; ``None`` for one scale a row.
    """

    kind: str
    grid: str
    path: InputPath
    group_size: int | None

    def weight(self, shape: tuple[int, int], tensors: dict[str, Tensor] | None = None) -> Any:
        """The stored weight ``[out, in]``, or a frame of zeros (GridError for tensors that do not fit)."""
        return rebuild({"kind": self.kind, "grid": json.loads(self.grid), "shape": list(shape)}, tensors)


@dataclass(frozen=True)
class StoredTensor:
    """What vLLM has to know of a stored tensor ``[out, width]`` to cut it.

    Attributes:
        shape, dtype: of this process's part.
        per_input: inputs behind one column, where a split of the inputs splits the columns; ``None`` where it does not.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    per_input: int | None


def plans(record: Mapping[str, Any]) -> dict[str, LayerPlan]:
    """The plan of each quantized linear, by the name it has in the folder.

    Args:
        record: what ``lqedu.json`` says.

    Raises:
        UnsupportedModelError: a layer that is no W4A8 layer with symmetric INT8 codes a token.
        CheckpointError: a record that is not understood.
    """
    result = {}
    for name, layer in record["layers"].items():
        try:
            path = InputPath.from_dict(layer["input"])
            grid = json.dumps(layer["grid"], sort_keys=True)
            plan = LayerPlan(layer["kind"], grid, path, layer["grid"].get("group_size"))
            shape = (8, plan.group_size or 128)
            frame = plan.weight(shape)
            if not _is_w4a8(plan, frame):
                raise GridError(f"got {layer['kind']} weights with inputs {path.activation!r}")
            kernel_weight(frame, integer_inputs=True)
        except GridError as error:
            raise UnsupportedModelError(
                f"{METHOD} runs 4-bit weights (QoQ, QQQ) with symmetric INT8 activations per token; {name}: {error}. "
                "For other models: lqedu export --format compressed-tensors"
            ) from error
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"lqedu.json: layer {name!r} is not understood: {error}") from error
        result[name] = plan
    return result


def plan_of(known: Mapping[str, LayerPlan], prefix: str, merged: Mapping[str, Sequence[str]]) -> LayerPlan | None:
    """The plan of one of vLLM's layers, which may hold several of the folder's, stacked along their outputs.

    Args:
        known: from :func:`plans`.
        prefix: the layer's name in vLLM, such as ``model.layers.0.self_attn.qkv_proj``.
        merged: what vLLM stacks: ``{"qkv_proj": ["q_proj", "k_proj", "v_proj"], ...}``.

    Returns:
        ``None`` for a layer that was left in floating point.

    Raises:
        UnsupportedModelError: parts that differ, so that they cannot run as one.
    """
    block, _, last = prefix.rpartition(".")
    parts = [f"{block}.{part}" if block else part for part in merged.get(last, (last,))]
    found = {part: known.get(part) for part in parts}
    different = set(found.values())
    if len(different) > 1:
        raise UnsupportedModelError(
            f"vLLM runs {', '.join(parts)} as one layer, and they are not quantized alike; quantize all of them the same way"
        )
    return different.pop()


def stored_tensors(plan: LayerPlan, rows: int, columns: int) -> dict[str, StoredTensor]:
    """Shapes and dtypes of the stored tensors of a weight ``[rows, columns]``, by name.

    >>> plan = LayerPlan("requantized", '{"group_size": 128}', InputPath(), 128)
    >>> {name: stored.shape for name, stored in stored_tensors(plan, 32, 256).items()}
    {'codes': (32, 128), 'scale': (32, 1), 'group_scale': (32, 2)}
    """
    result = {}
    for name, tensor in plan.weight((1, columns)).packed().items():
        width = tensor.shape[1]
        per_input = (columns // width if columns % width == 0 else columns) if name in _ALONG_INPUTS else None
        result[name] = StoredTensor((rows, width), tensor.dtype, per_input)
    return result


def check_split(plan: LayerPlan, name: str, part: int, whole: int) -> None:
    """Refuse (UsageError) a number of GPUs over which the inputs of a layer cannot be split.

    Args:
        plan: of the layer.
        name: of the layer.
        part, whole: inputs of this process, and of all of them.
    """
    if part == whole:
        return
    if plan.path.hadamard is not None:
        raise UsageError(
            f"{name} transforms its inputs while it runs, across all {whole} of them; serve it with --tensor-parallel-size 1"
        )
    for stored, tensor in stored_tensors(plan, 1, whole).items():
        if tensor.per_input is not None and part % tensor.per_input:
            raise UsageError(
                f"{name}: {whole} inputs do not split into parts of {part}, because a byte of {stored!r} holds "
                f"{tensor.per_input} inputs; serve it on fewer GPUs"
            )


def to_kernel(plan: LayerPlan, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> KernelWeight:
    """Loaded tensors in the layout of the kernel, losslessly.

    Raises:
        CheckpointError: tensors that were not loaded, or make no weight.
    """
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point()):
        raise CheckpointError(
            f"{name}: its scales were not in the folder, or are not finite; fetch or save the model again"
        )
    try:
        return kernel_weight(plan.weight(shape, dict(tensors)), integer_inputs=True)
    except (GridError, ValueError) as error:
        raise CheckpointError(f"{name} is damaged: {error}; fetch or save the model again") from error


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    groups: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    group_size: int,
    path: str,
) -> Tensor:
    """What ``apply`` computes: ``x [..., in]`` to ``[..., out]``, in the dtype of ``x``.

    Args:
        x: float16 or bfloat16.
        codes, scale, groups: tensors of a W4A8 :class:`KernelWeight`.
        bias: ``[out]`` or ``None``.
        outputs: rows of the weight.
        group_size: of ``groups``; not looked at without them.
        path: ``InputPath.to_dict()`` as JSON.
    """
    flat = x.reshape(-1, x.shape[-1])
    tensors = {"codes": codes, "scale": scale} | ({} if groups is None else {"groups": groups})
    options = {} if groups is None else {"group_size": group_size}
    weight = KernelWeight("w4a8", tensors, options, (outputs, x.shape[-1]))
    with torch.cuda.device_of(x):
        y = kernel_product(transform_and_encode(flat, _path(path)), weight, x.dtype, bias)
    return y.view(*x.shape[:-1], outputs)


@lru_cache(maxsize=1)
def operator() -> Any:
    """:func:`linear` as an operator of torch, which torch.compile takes as it is: ``torch.ops.lqedu.w4a8_linear``."""
    op = torch.library.custom_op("lqedu::w4a8_linear", linear, mutates_args=(), schema=_SCHEMA)
    op.register_fake(
        lambda x, codes, scale, groups, bias, outputs, group_size, path: x.new_empty(*x.shape[:-1], outputs)
    )
    return op


def register() -> None:
    """What vLLM calls in each of its processes; again does nothing new.

    A vLLM whose interface has changed is told of in one line of its log, and goes on without us: this function also runs
    for people who serve other models.
    """
    try:
        from lqedu.integrations import vllm_classes
    except ImportError as error:
        logging.getLogger("vllm.lqedu").warning(
            "lqedu: the quantization method %s is not there, because this vLLM lacks what it needs (%s)", METHOD, error
        )
        return
    vllm_classes.register()


@lru_cache
def _path(path: str) -> InputPath:
    return InputPath.from_dict(json.loads(path))


def _is_w4a8(plan: LayerPlan, weight: Any) -> bool:
    grid = plan.path.activation
    dynamic = isinstance(grid, ActivationGrid) and (grid.bits, grid.symmetric, grid.granularity) == (8, True, "token")
    four_bits = plan.kind in ("progressive", "requantized") or (
        plan.kind == "integer" and weight.grid.bits == 4 and weight.grid.symmetric
    )
    return dynamic and four_bits
