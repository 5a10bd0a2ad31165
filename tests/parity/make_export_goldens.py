"""Let other tools write small checkpoints, and keep them with what the tools make of them.

Run in the environment of requirements.txt, from the repository root: ``peers/bin/python
tests/parity/make_export_goldens.py``. Writes goldens/export.safetensors (tensors of each checkpoint, one dequantized
weight, logits) and goldens/export.json (each config.json, versions, digest). test_export_peers.py reads both.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from gptqmodel.nn_modules.qlinear.gemm_awq import _pack_awq_columns
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

PACKAGES = ("compressed-tensors", "gptqmodel", "torch", "transformers")
SHOWN = "model.layers.0.mlp.down_proj"
WINDOW = torch.arange(24).view(2, 12)

TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
COMPRESSED = {
    "w4a16": ({"num_bits": 4, "strategy": "group", "group_size": 16}, None),
    "w4a16_asym": ({"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}, None),
    "w3a16": ({"num_bits": 3, "strategy": "channel"}, None),
    "w8a8": ({"num_bits": 8, "strategy": "channel"}, TOKEN),
    "w8a8_asym": ({"num_bits": 8, "strategy": "channel", "symmetric": False}, TOKEN | {"symmetric": False}),
    "w8a8_static": ({"num_bits": 8, "strategy": "tensor"}, TOKEN | {"symmetric": False, "strategy": "tensor", "dynamic": False}),
    "fp8": (FLOAT | {"strategy": "tensor"}, FLOAT | {"strategy": "tensor", "dynamic": False}),
    "fp8_dynamic": (FLOAT | {"strategy": "channel"}, FLOAT | {"strategy": "token", "dynamic": True}),
    "fp8_block": (
        FLOAT | {"strategy": "block", "block_structure": [16, 16]},
        FLOAT | {"strategy": "group", "group_size": 16, "dynamic": True},
    ),
    "fp8_a16": (FLOAT | {"strategy": "channel"}, None),
}  # fmt: skip
GPTQ = {  # bits, symmetric, group size, act-order, version
    "gptq": (4, True, 16, False, 1),
    "gptq_asym": (4, False, 16, False, 1),
    "gptq_v2": (4, False, 16, False, 2),
    "gptq_act_order": (4, False, 16, True, 1),
    "gptq_w8": (8, True, -1, False, 1),
}


def dense() -> LlamaForCausalLM:
    """A Llama of 9,000 weights, large enough to matter."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else float("norm" in name) + 0.1 * noise)
    return model.eval()


def fitted(w: Tensor, args) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight by compressed-tensors, of the shape it stores."""
    if args.strategy == "group":
        x = w.unflatten(1, (-1, args.group_size))
    elif args.strategy == "block":
        high, wide = args.block_structure
        x = w.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).permute(0, 2, 1, 3).flatten(2)
    else:
        x = w[:, None] if args.strategy == "channel" else w.flatten()[None, None]
    scale, zero = calculate_qparams(x.amin(-1), x.amax(-1), args)
    return (scale.reshape(1), zero.reshape(1)) if args.strategy == "tensor" else (scale, zero)


def compressed(weights: dict, inputs: dict | None) -> tuple[dict[str, Tensor], dict, Tensor, Tensor]:
    """Tensors and config.json of a checkpoint, the weight shown, logits."""
    model = dense()
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for i, layer in enumerate(m for m in model.modules() if hasattr(m, "quantization_scheme")):
        scale, zero = fitted(layer.weight.data, layer.quantization_scheme.weights)
        layer.weight_scale.data = scale
        layer.weight_zero_point.data = zero
        if hasattr(layer, "input_scale"):
            layer.input_scale.data.fill_(0.05 if inputs["type"] == "int" else 0.02)
            layer.input_zero_point.data.fill_(0 if inputs["symmetric"] else 5 * i - 11)
        layer.quantization_status = QuantizationStatus.FROZEN
    with torch.no_grad():
        logits = model(WINDOW).logits
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        compressor.update_config(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        said = json.loads((Path(folder) / "config.json").read_text())
    compressor.decompress_model(model)
    return tensors, said, model.get_submodule(SHOWN).weight.data, logits


def packed(model: LlamaForCausalLM, said: dict, pack) -> tuple[dict[str, Tensor], dict, Tensor, Tensor]:
    """The same for a layout that replaces each linear layer; ``pack`` gives its tensors and dequantizes them."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "proj" not in name}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            found, w_hat = pack(linear)
            tensors |= {f"{name}.{key}": tensor for key, tensor in found.items()}
            linear.weight.data = w_hat.float()
    with torch.no_grad():
        logits = model(WINDOW).logits
    config = model.config.to_diff_dict() | {"quantization_config": said, "dtype": "float32"}
    return tensors, config, model.get_submodule(SHOWN).weight.data, logits


def gptq(bits: int, symmetric: bool, size: int, act_order: bool, layout: int):
    """A checkpoint of gptqmodel."""
    said = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act_order, "sym": symmetric}
    said |= {"lm_head": False, "checkpoint_format": "gptq" if layout == 1 else "gptq_v2"}

    def pack(linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        w = linear.weight.data
        columns = w.shape[1]
        group = columns if size == -1 else size
        order = (
            torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
            if act_order
            else torch.arange(columns)
        )
        x = w[:, order].unflatten(1, (-1, group))
        top = 2**bits - 1
        if symmetric:
            scale, zero = 2 * x.abs().amax(-1) / top, torch.full(x.shape[:-1], 2.0 ** (bits - 1))
        else:
            scale = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / top
            zero = torch.round(-x.amin(-1).clamp(max=0) / scale)
        if layout == 1:
            zero = zero.clamp(min=1)  # -1 is not to be written
        scale = scale.half().float()
        g_idx = torch.empty(columns, dtype=torch.int32)
        g_idx[order] = (torch.arange(columns) // group).to(torch.int32)
        layer = TorchLinear(bits, size, symmetric, act_order, columns, w.shape[0], bias=False)
        layer.pack_original(linear, scale, zero, g_idx)
        layer.post_init()
        w_hat = layer.dequantize_weight().T
        if layout == 1:
            convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=size))
        return {name: getattr(layer, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}, w_hat

    return packed(dense(), said, pack)


def awq():
    """A checkpoint in the layout of AutoAWQ, by gptqmodel."""
    said = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 16, "zero_point": True}

    def pack(linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        x = linear.weight.data.unflatten(1, (-1, 16))
        scale = ((x.amax(-1) - x.amin(-1)) / 15).half().float()
        zero = torch.round(-x.amin(-1) / scale).clamp(0, 15)
        q = torch.round(x / scale[..., None] + zero[..., None]).clamp(0, 15)
        t = {  # its layer packs by this function, and only on a GPU
            "qweight": _pack_awq_columns(q.flatten(1).T.to(torch.int32).contiguous(), 4),
            "qzeros": _pack_awq_columns(zero.T.to(torch.int32).contiguous(), 4),
            "scales": scale.T.half().contiguous(),
        }
        return t, dequantize_gemm(t["qweight"], t["qzeros"], t["scales"], 4, 16).T

    return packed(dense(), said, pack)


def main() -> None:
    made = {f"compressed-tensors.{name}": compressed(*case) for name, case in COMPRESSED.items()}
    made |= {name: gptq(*case) for name, case in GPTQ.items()} | {"awq": awq()}
    tensors, configs = {}, {}
    for case, (found, said, w_hat, logits) in made.items():
        tensors |= {f"{case}|{name}": tensor.contiguous().clone() for name, tensor in found.items()}
        tensors |= {f"{case}#weight": w_hat.float().contiguous(), f"{case}#logits": logits}
        configs[case] = said
    folder = Path(__file__).parent / "goldens"
    data = save(tensors)
    (folder / "export.safetensors").write_bytes(data)
    record = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "command": "python tests/parity/make_export_goldens.py",
        "seed": 3,
        "versions": {name: version(name) for name in PACKAGES},
        "shown": SHOWN,
        "configs": configs,
    }
    (folder / "export.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
