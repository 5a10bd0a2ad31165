"""Let the hqq package quantize a small weight, and keep its iterates and its answers.

Run in the environment of requirements.txt, from the repository root: ``peers/bin/python tests/parity/make_hqq_goldens.py``.
Writes goldens/hqq.safetensors. Its groups along the outputs take rows that lie rows/64 apart; ours are consecutive, so
the weight is handed over with its rows permuted (``strided``) and the answer comes back in our order.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from hqq.core.optimize import optimize_weights_proximal_v2
from hqq.core.quantize import Quantizer
from safetensors.torch import save_file
from torch import Tensor

GROUP, BITS, STEPS = 64, (2, 3, 4, 8), (2, 3, 5, 10, 20)
OPTIONS = {"lp_norm": 0.7, "beta": 1e1, "kappa": 1.01, "tol": 0.0, "early_stop": False, "scale_gridsearch": False}


def weight() -> Tensor:
    """Heavy-tailed, [128, 192], of the size of real weights."""
    g = torch.Generator().manual_seed(11)
    return 0.02 * torch.randn(128, 192, generator=g) * torch.exp(0.5 * torch.randn(128, 192, generator=g))


def strided(w: Tensor) -> Tensor:
    """Rows permuted so that the peer's group of rows [r, r + rows/64, …] is our group of consecutive rows."""
    return w.view(-1, GROUP, w.shape[1]).transpose(0, 1).reshape(w.shape)


def main() -> None:
    """Ask, and write."""
    w = weight()
    tensors = {"weight": w}
    for axis in (1, 0):
        grouped = w.view(-1, GROUP) if axis == 1 else strided(w).view(GROUP, -1)
        for bits in BITS:
            top = 2**bits - 1
            low, high = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
            scale = top / (high - low)
            zero = -low * scale
            name = f"axis{axis}.w{bits}"
            tensors |= {f"{name}.inverse_scale": scale.flatten(), f"{name}.zero.0": zero.flatten()}
            for steps in STEPS:
                options = OPTIONS | {"iters": steps}
                _, _, z = optimize_weights_proximal_v2(grouped, scale, zero, [0, top], axis, opt_params=options)
                tensors[f"{name}.zero.{steps}"] = z.flatten()
            q, meta = Quantizer.quantize(
                w if axis == 1 else strided(w), nbits=bits, group_size=GROUP, axis=axis, optimize=True,
                round_zero=bits == 4, device="cpu", compute_dtype=torch.float32,
            )  # fmt: skip
            meta["compute_dtype"] = torch.float32
            w_hat = Quantizer.dequantize(q, meta).float()
            tensors[f"{name}.mean_error"] = (w_hat - (w if axis == 1 else strided(w))).abs().mean()
    path = Path(__file__).parent / "goldens" / "hqq.safetensors"
    tensors = {k: v.contiguous().clone() for k, v in tensors.items()}
    save_file(tensors, path, {"versions": json.dumps({p: version(p) for p in ("hqq", "torch")})})
    path.chmod(0o644)


if __name__ == "__main__":
    main()
