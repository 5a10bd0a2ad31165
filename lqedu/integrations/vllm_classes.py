"""The two classes that vLLM calls for the method "lqedu_w4a8"; needs vLLM. See ``lqedu.integrations.vllm``."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, PackedvLLMParameter

from lqedu.checkpoint.folder import RECORD, read_record
from lqedu.errors import CheckpointError, UsageError
from lqedu.integrations.vllm import METHOD, LayerPlan, check_split, operator, plan_of, plans, stored_tensors, to_kernel
from lqedu.models.shards import INDEX, WEIGHTS, Shards

_LOG = logging.getLogger("vllm.lqedu")
_FOLDER_METHODS = ("lqedu", METHOD)  # in config.json


class LqeduW4A8Config(QuantizationConfig):
    """What is known of a model: the plan of each quantized layer, from the folder's ``lqedu.json``."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: dict[str, LayerPlan] | None = None

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LqeduW4A8Config":
        if config.get("quant_method") not in _FOLDER_METHODS:
            raise UsageError(f"{METHOD} serves folders that lqedu.save wrote, got a {config.get('quant_method')} model")
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        return METHOD if hf_quant_cfg.get("quant_method") in _FOLDER_METHODS else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        folder = Path(model_name)
        if not folder.is_dir():
            from huggingface_hub import hf_hub_download

            folder = Path(hf_hub_download(model_name, RECORD, revision=revision)).parent
        record = read_record(folder)
        self.plans = plans(record)
        if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
            _check_stored(folder, record, self.plans)
        if record["attention"] is not None:
            if record["attention"]["centred"]:
                raise UsageError(
                    f"{model_name} stores keys less their mean, which vLLM has no place for; quantize without"
                )
            _LOG.warning("lqedu: vLLM stores keys and values its own way, not as %s asks", folder / RECORD)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        if self.plans is not None:
            self.plans = hf_to_vllm_mapper.apply_dict(self.plans)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None  # embeddings, the head and attention are vLLM's
        if self.plans is None:
            raise CheckpointError("vLLM did not say which folder it serves; use vLLM 0.33 or newer")
        plan = plan_of(self.plans, prefix, self.packed_modules_mapping)
        return UnquantizedLinearMethod() if plan is None else LqeduW4A8LinearMethod(plan, prefix)


@register_weight_loader_v2_supported_method
class LqeduW4A8LinearMethod(LinearMethodBase):
    """One linear layer, or several that vLLM stacks along their outputs."""

    def __init__(self, plan: LayerPlan, prefix: str) -> None:
        self.plan, self.prefix = plan, prefix
        self.path = json.dumps(plan.path.to_dict())
        self.operator = operator()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        check_split(self.plan, self.prefix, input_size_per_partition, input_size)
        layer.lqedu_shape = (sum(output_partition_sizes), input_size_per_partition)
        for name, stored in stored_tensors(self.plan, *layer.lqedu_shape).items():
            data = torch.zeros(stored.shape, dtype=stored.dtype)
            if stored.dtype.is_floating_point:
                data.fill_(torch.nan)  # what is not loaded must not pass for a scale
            common = {"data": data, "output_dim": 0, "weight_loader": extra_weight_attrs["weight_loader"]}
            if stored.per_input is None:
                parameter = ChannelQuantScaleParameter(**common)
            elif name == "codes":
                parameter = PackedvLLMParameter(**common, input_dim=1, packed_dim=1, packed_factor=2)
            else:
                parameter = GroupQuantScaleParameter(**common, input_dim=1)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        names = stored_tensors(self.plan, *layer.lqedu_shape)
        weight = to_kernel(self.plan, self.prefix, layer.lqedu_shape, {n: getattr(layer, n).data for n in names})
        for name in names:
            delattr(layer, name)
        for name in ("codes", "scale", "groups"):
            tensor = weight.tensors.get(name)
            layer.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        group_size = self.plan.group_size or 0
        return self.operator(
            x, layer.codes, layer.scale, layer.groups, bias, layer.lqedu_shape[0], group_size, self.path
        )


def register() -> None:
    """Make vLLM know the method; again it replaces itself by itself."""
    operator()
    register_quantization_config(METHOD)(LqeduW4A8Config)


def _check_stored(folder: Path, record: dict[str, Any], known: dict[str, LayerPlan]) -> None:
    """Refuse (CheckpointError) a folder that lacks or misshapes stored tensors, which vLLM would not notice."""
    shards, problems = Shards(folder), []
    for layer, plan in known.items():
        for name, stored in stored_tensors(plan, *record["layers"][layer]["shape"]).items():
            header = shards.get(f"{layer}.{name}")
            if header is None or (header.shape, header.dtype) != (stored.shape, stored.dtype):
                problems.append(f"{layer}.{name}")
    if problems:
        raise CheckpointError(
            f"{folder} lacks or misshapes {len(problems)} tensors (first: {problems[0]}); fetch or save the model again"
        )
