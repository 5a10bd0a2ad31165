"""A stand-in for the parts of vLLM 0.33 that our plugin touches: abstract bases as vllm_interface.json describes them, and
layers that cut, stack and load as vLLM's ``linear.py`` and ``parameter.py`` do. For one process that plays rank ``TP.rank``.
"""

import abc
import json
import sys
import types
from pathlib import Path

import torch
from torch import nn

INTERFACE = json.loads(Path(__file__).with_name("vllm_interface.json").read_text())
REGISTERED: dict[str, type] = {}
V2: list[str] = []


class TP:
    """Which of how many processes this is."""

    rank, size = 0, 1


def _abstract(module: str, name: str, *bases: type) -> type:
    methods = {m: abc.abstractmethod(lambda *a, **k: None) for m in INTERFACE[module][name]["abstract"]}
    return abc.ABCMeta(name, bases, methods)


QuantizeMethodBase = _abstract("vllm.model_executor.layers.quantization.base_config", "QuantizeMethodBase")
LinearMethodBase = _abstract("vllm.model_executor.layers.linear", "LinearMethodBase", QuantizeMethodBase)
_ConfigBase = _abstract("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig")


class QuantizationConfig(_ConfigBase):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, *args, **kwargs) -> None: ...

    def apply(self, layer, x, bias=None):
        return x


class Parameter(nn.Parameter):
    def __new__(cls, data, **kwargs):
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data, weight_loader, output_dim, input_dim=None) -> None:
        self.weight_loader, self.output_dim, self.input_dim = weight_loader, output_dim, input_dim

    def _copy(self, into: torch.Tensor, loaded: torch.Tensor) -> None:
        assert into.shape == loaded.shape, (into.shape, loaded.shape)
        into.copy_(loaded)

    def load_column_parallel_weight(self, loaded_weight) -> None:
        size = self.data.shape[self.output_dim]
        self._copy(self.data, loaded_weight.narrow(self.output_dim, TP.rank * size, size))

    def load_stacked(self, loaded_weight, offset: int, size: int, part: int) -> None:
        into = self.data.narrow(self.output_dim, offset, size)
        self._copy(into, loaded_weight.narrow(self.output_dim, part * size, size))

    def load_row_parallel_weight(self, loaded_weight) -> None:
        if self.input_dim is not None:
            size = self.data.shape[self.input_dim]
            loaded_weight = loaded_weight.narrow(self.input_dim, TP.rank * size, size)
        self._copy(self.data, loaded_weight)


class ChannelQuantScaleParameter(Parameter):
    def __init__(self, *, output_dim, data, weight_loader) -> None:
        super().__init__(data, weight_loader, output_dim)


class GroupQuantScaleParameter(Parameter):
    def __init__(self, *, output_dim, input_dim, data, weight_loader) -> None:
        super().__init__(data, weight_loader, output_dim, input_dim)


class PackedvLLMParameter(GroupQuantScaleParameter):
    def __init__(self, *, packed_factor, packed_dim, **kwargs) -> None:
        super().__init__(**kwargs)
        assert packed_dim != self.output_dim and packed_factor == 2


class LinearBase(nn.Module):
    def __init__(self, inputs, outputs, config, prefix, parts, inputs_here) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        self.parts = parts
        self.bias = None
        assert type(self.quant_method).__name__ in V2
        self.quant_method.create_weights(
            layer=self, input_size_per_partition=inputs_here, output_partition_sizes=parts, input_size=inputs,
            output_size=outputs, params_dtype=torch.float16, weight_loader=self.weight_loader_v2,
        )  # fmt: skip

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias)


class StackedColumnLinear(LinearBase):
    """q, k and v, or gate and up: each cut by outputs, stacked. ``replicas`` processes share a part where there are fewer."""

    def __init__(self, inputs, outputs, config, prefix, replicas=None) -> None:
        self.replicas = replicas or [1] * len(outputs)
        parts = [n * r // TP.size for n, r in zip(outputs, self.replicas, strict=True)]
        super().__init__(inputs, sum(outputs), config, prefix, parts, inputs)

    def weight_loader_v2(self, param, loaded_weight, shard: int) -> None:
        param.load_stacked(loaded_weight, sum(self.parts[:shard]), self.parts[shard], TP.rank // self.replicas[shard])


class RowLinear(LinearBase):
    def __init__(self, inputs, outputs, config, prefix) -> None:
        super().__init__(inputs, outputs, config, prefix, [outputs], inputs // TP.size)

    def weight_loader_v2(self, param, loaded_weight) -> None:
        param.load_row_parallel_weight(loaded_weight=loaded_weight)


def register_quantization_config(quantization: str):
    return lambda cls: REGISTERED.setdefault(quantization, cls)


def register_weight_loader_v2_supported_method(cls):
    V2.append(cls.__name__)
    return cls


def install(monkeypatch) -> None:
    """Make ``import vllm...`` find this; undone after the test."""
    here = vars(sys.modules[__name__])
    modules = {name: list(content) for name, content in INTERFACE.items() if name.startswith("vllm")}
    for name in list(modules):
        parents = name.split(".")[:-1]
        modules |= {
            ".".join(parents[: i + 1]): [] for i in range(len(parents)) if ".".join(parents[: i + 1]) not in modules
        }
    for name in sorted(modules):
        module = types.ModuleType(name)
        vars(module).update({attribute: here[attribute] for attribute in modules[name] if attribute in here})
        monkeypatch.setitem(sys.modules, name, module)
    REGISTERED.clear()
    V2[:] = ["UnquantizedLinearMethod"]
