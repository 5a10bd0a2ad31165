"""Let independent GPTQ implementations quantize one small problem, and keep what they answered.

Run in the environment of requirements.txt, from the repository root: ``peers/bin/python tests/parity/make_goldens.py``.
Writes goldens/gptq.safetensors (inputs and answers) and goldens/gptq.json (configurations and versions).
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import save_file

ROWS, COLUMNS, SEQUENCES, TOKENS = 48, 128, 6, 96

# name: (symmetric, group size or -1, block size, activation order with static groups)
GPTQMODEL = {
    "asym_channel": (False, -1, 128, False),
    "sym_channel": (True, -1, 128, False),
    "asym_g64_block64": (False, 64, 64, False),
    "sym_g32_block32": (True, 32, 32, False),
    "asym_g32_block128_stale": (False, 32, 128, False),
    "asym_g32_actorder": (False, 32, 128, True),
    "sym_g32_actorder": (True, 32, 128, True),
}
LLMCOMPRESSOR = {
    "asym_channel": (False, -1, False),
    "sym_channel": (True, -1, False),
    "asym_g32_actorder": (False, 32, True),
    "sym_g32_actorder": (True, 32, True),
}


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [out, in] and activations [sequences, tokens, in] with correlated, uneven channels."""
    g = torch.Generator().manual_seed(7)
    w = 0.05 * torch.randn(ROWS, COLUMNS, generator=g)
    mixing = torch.eye(COLUMNS) + 1.5 * torch.randn(COLUMNS, COLUMNS, generator=g) / COLUMNS**0.5
    channels = torch.exp(0.7 * torch.randn(COLUMNS, generator=g))
    x = torch.randn(SEQUENCES, TOKENS, COLUMNS, generator=g) @ mixing * channels
    return w, x


def gptqmodel_answer(
    w: torch.Tensor, x: torch.Tensor, symmetric: bool, group: int, block: int, order: bool
) -> torch.Tensor:
    """Dequantized weights of gptqmodel."""
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = w.clone()
    config = QuantizeConfig(
        bits=4, group_size=group, sym=symmetric, desc_act=order, static_groups=order, act_group_aware=False,
        damp_percent=0.01, offload_to_disk=False,
    )  # fmt: skip
    gptq = GPTQ(linear, config)
    gptq.quantizer = gptq.create_quantizer("layer")
    gptq.quantizer.configure(perchannel=True)
    for sequence in x:
        gptq.add_batch(sequence[None], None)
    return gptq.quantize(blocksize=block)[0].float().clone()


def llmcompressor_answer(w: torch.Tensor, h: torch.Tensor, symmetric: bool, group: int, order: bool) -> torch.Tensor:
    """Dequantized weights of llmcompressor, on scales that compressed-tensors computes."""
    fields = {"strategy": "channel"} if group < 0 else {"strategy": "group", "group_size": group}
    args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, actorder="weight" if order else None, **fields)
    grouped = w.view(ROWS, -1, COLUMNS if group < 0 else group)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    return quantize_weight(w.clone()[None], h.clone()[None], scale[None], zero[None], None, args)[0][0].clone()


def _named(cases: dict[str, tuple], *fields: str) -> dict[str, dict]:
    return {name: dict(zip(fields, case, strict=True)) for name, case in cases.items()}


def main() -> None:
    w, x = problem()
    flat = x.flatten(0, 1)
    h = flat.T @ flat / len(flat)
    answers = {f"gptqmodel.{name}": gptqmodel_answer(w, x, *case) for name, case in GPTQMODEL.items()}
    answers |= {f"llmcompressor.{name}": llmcompressor_answer(w, h, *case) for name, case in LLMCOMPRESSOR.items()}
    folder = Path(__file__).parent / "goldens"
    save_file({"weight": w, "activations": x, **answers}, folder / "gptq.safetensors")
    packages = ("gptqmodel", "llmcompressor", "compressed-tensors", "torch", "transformers")
    record = {
        "bits": 4,
        "damping": 0.01,
        "gptqmodel": _named(GPTQMODEL, "symmetric", "group", "block", "actorder"),
        "llmcompressor": _named(LLMCOMPRESSOR, "symmetric", "group", "actorder"),
        "versions": {name: version(name) for name in packages},
    }
    (folder / "gptq.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
