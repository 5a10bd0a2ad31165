"""Let independent GPTQ implementations quantize small problems, and keep what they answered.

Run in the environment of requirements.txt, from the repository root: ``peers/bin/python tests/parity/make_goldens.py``.
Writes goldens/gptq.safetensors (problems and answers) and goldens/gptq.json (cases, versions, digest). README.md has the
table of cases.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import save
from torch import Tensor

DAMPING = 0.01
PACKAGES = ("gptqmodel", "llmcompressor", "compressed-tensors", "torch", "transformers")


@dataclass(frozen=True)
class Case:
    """One question to one peer.

    Attributes:
        group: columns that share a scale; 0 is one scale a row.
        block: columns per lazy block.
        static: group scales come from the original weight, not from the updated one.
        actorder: columns in descending order of the Hessian's diagonal.
    """

    peer: str
    problem: str
    bits: int = 4
    symmetric: bool = False
    group: int = 0
    block: int = 128
    static: bool = False
    actorder: bool = False


CASES = {
    "gptqmodel.asym_channel": Case("gptqmodel", "mixed"),
    "gptqmodel.sym_channel": Case("gptqmodel", "mixed", symmetric=True),
    "gptqmodel.asym_3bit_channel": Case("gptqmodel", "mixed", bits=3),
    "gptqmodel.asym_g128": Case("gptqmodel", "mixed", group=128),
    "gptqmodel.sym_g128": Case("gptqmodel", "mixed", symmetric=True, group=128),
    "gptqmodel.asym_g64_block64": Case("gptqmodel", "mixed", group=64, block=64),
    "gptqmodel.sym_g64_block64": Case("gptqmodel", "mixed", symmetric=True, group=64, block=64),
    "gptqmodel.sym_g32_block32": Case("gptqmodel", "mixed", symmetric=True, group=32, block=32),
    "gptqmodel.asym_g32_block128_stale": Case("gptqmodel", "mixed", group=32),
    "gptqmodel.asym_g32_actorder": Case("gptqmodel", "mixed", group=32, static=True, actorder=True),
    "gptqmodel.sym_g32_actorder": Case("gptqmodel", "mixed", symmetric=True, group=32, static=True, actorder=True),
    "gptqmodel.wide_asym_channel": Case("gptqmodel", "descending"),
    "gptqmodel.wide_sym_g64_block64": Case("gptqmodel", "descending", symmetric=True, group=64, block=64),
    "gptqmodel.wide_asym_3bit_g64_block64": Case("gptqmodel", "descending", bits=3, group=64, block=64),
    "gptqmodel.wide_asym_g64_static": Case("gptqmodel", "descending", group=64, static=True),
    "llmcompressor.asym_channel": Case("llmcompressor", "mixed", static=True),
    "llmcompressor.sym_channel": Case("llmcompressor", "mixed", symmetric=True, static=True),
    "llmcompressor.sym_g32_actorder": Case("llmcompressor", "mixed", 4, True, 32, static=True, actorder=True),
    "llmcompressor.asym_g32_actorder": Case("llmcompressor", "mixed", group=32, static=True, actorder=True),
    "llmcompressor.asym_3bit_g64_actorder": Case("llmcompressor", "mixed", 3, group=64, static=True, actorder=True),
    "llmcompressor.wide_asym_g64_static": Case("llmcompressor", "descending", group=64, static=True),
    "llmcompressor.wide_sym_g64_static": Case("llmcompressor", "descending", symmetric=True, group=64, static=True),
}


def problems() -> dict[str, tuple[Tensor, Tensor]]:
    """Weights [out, in] and activations [sequences, tokens, in] with correlated channels of uneven power.

    In "descending" the power of the channels falls from the first to the last, so that activation order is the natural
    order: the way to compare static groups in natural order, which lqedu does not offer, with its activation order.
    """
    g = torch.Generator().manual_seed(7)
    result = {}
    for name, (rows, columns, sequences, tokens) in {
        "mixed": (48, 128, 6, 64),
        "descending": (64, 192, 4, 64),
    }.items():
        w = 0.05 * torch.randn(rows, columns, generator=g)
        mixing = torch.eye(columns) + 1.5 * torch.randn(columns, columns, generator=g) / columns**0.5
        x = torch.randn(sequences, tokens, columns, generator=g) @ mixing
        if name == "mixed":
            x *= torch.exp(0.7 * torch.randn(columns, generator=g))
        else:
            x *= torch.linspace(2.0, 0.1, columns) / x.square().mean((0, 1)).sqrt()
        result[name] = w, x
    return result


def ask_gptqmodel(case: Case, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantized weight, scale and zero point (of unsigned codes)."""
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data = w.clone()
    config = QuantizeConfig(
        bits=case.bits, group_size=case.group or -1, sym=case.symmetric, desc_act=case.actorder,
        static_groups=case.static, act_group_aware=False, damp_percent=DAMPING, offload_to_disk=False,
    )  # fmt: skip
    gptq = GPTQ(linear, config)
    gptq.quantizer = gptq.create_quantizer("layer")
    gptq.quantizer.configure(perchannel=True)
    for sequence in x:
        gptq.add_batch(sequence[None], None)
    w_hat, scale, zero, _, _, loss, damping, _ = gptq.quantize(blocksize=case.block)
    assert damping == DAMPING and not str(loss).startswith("fallback"), "gptqmodel took a fallback"
    return w_hat.float(), scale.float(), zero.float()


def ask_llmcompressor(case: Case, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of llmcompressor; compressed-tensors computes its scales."""
    strategy = {"strategy": "group", "group_size": case.group} if case.group else {"strategy": "channel"}
    order = "weight" if case.actorder else None
    args = QuantizationArgs(num_bits=case.bits, type="int", symmetric=case.symmetric, actorder=order, **strategy)
    grouped = w.view(len(w), -1, case.group or w.shape[1])
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    flat = x.flatten(0, 1)
    h = 2 * flat.T @ flat / len(x)  # its convention
    w_hat, _, fell_back = quantize_weight(
        w.clone()[None], h[None], scale[None], zero[None], None, args, blocksize=case.block, percdamp=DAMPING
    )
    assert not fell_back.any(), "llmcompressor took a fallback"
    return w_hat[0], scale, zero.float() + 2 ** (case.bits - 1)  # its codes are signed


def as_codes(case: Case, w_hat: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    """The answer in our letters: signed codes if symmetric, else unsigned codes and a zero point."""
    grouped = w_hat.view(*scale.shape, -1)
    q = torch.round(grouped / scale[..., None]) + zero[..., None]
    assert torch.allclose(scale[..., None] * (q - zero[..., None]), grouped, rtol=0, atol=1e-7), "not on its own grid"
    assert q.min() >= 0 and q.max() < 2**case.bits
    answer = {"scale": scale}
    if case.symmetric:
        assert (zero == 2 ** (case.bits - 1)).all()
        q = q - 2 ** (case.bits - 1)
    else:
        answer["zero"] = zero.to(torch.uint8)
    return answer | {"codes": q.to(torch.int8 if case.symmetric else torch.uint8).view(w_hat.shape)}


def main() -> None:
    tensors: dict[str, Tensor] = {}
    given = problems()
    for name, (w, x) in given.items():
        tensors |= {f"{name}.weight": w, f"{name}.activations": x}
    ask = {"gptqmodel": ask_gptqmodel, "llmcompressor": ask_llmcompressor}
    for name, case in CASES.items():
        answer = as_codes(case, *ask[case.peer](case, *given[case.problem]))
        tensors |= {f"{name}.{field}": tensor.contiguous().clone() for field, tensor in answer.items()}
    folder = Path(__file__).parent / "goldens"
    data = save(tensors)
    (folder / "gptq.safetensors").write_bytes(data)
    record = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "command": "python tests/parity/make_goldens.py",
        "seed": 7,
        "damping": DAMPING,
        "versions": {name: version(name) for name in PACKAGES},
        "cases": {name: asdict(case) for name, case in CASES.items()},
    }
    (folder / "gptq.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
