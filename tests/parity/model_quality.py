"""The whole bench model quantized by peers' rounding, on our data and Hessians, beside ours: who has the lower perplexity?

Run in the environment of requirements.txt, from the repository root:
``PYTHONPATH=. peers/bin/python tests/parity/model_quality.py --out book/results/peers_gptq_smollm2.json``.
Everything but the rounding of a layer is ours: calibration windows, order of layers, damping, order of columns.
"""

import argparse
from dataclasses import dataclass
from importlib.metadata import version
from typing import ClassVar

import torch
from torch import Tensor

import lqedu
from lqedu.book.results import write_result
from lqedu.evaluation import Perplexity, paired
from lqedu.formats import QTensor
from lqedu.methods import GPTQ
from lqedu.models import weights_sha256
from lqedu.rounding import RoundingReport, proxy_loss

CALIBRATION, EVALUATION, LENGTH = 32, 64, 512


@dataclass(frozen=True, kw_only=True)
class LLMCompressor(GPTQ):
    """llmcompressor's quantize_weight on scales of compressed-tensors."""

    name: ClassVar[str] = "llmcompressor"

    def quantize_linear(self, weight: Tensor, hessian: Tensor) -> tuple[QTensor, RoundingReport]:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.utils import calculate_qparams
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

        args = QuantizationArgs(
            num_bits=self.bits, type="int", symmetric=False, strategy="group", group_size=self.group_size,
            actorder="weight",
        )  # fmt: skip
        grouped = weight.view(len(weight), -1, self.group_size)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        answer = quantize_weight(weight.clone()[None], hessian.clone()[None], scale[None], zero[None], None, args)
        return self._wrap(weight, hessian, answer[0][0])

    def _wrap(self, weight: Tensor, hessian: Tensor, w_hat: Tensor) -> tuple[QTensor, RoundingReport]:
        """The peer's weights as codes on our stored grid (its scales, rounded to float16)."""
        grid = self.grid()
        scale, zero = grid.fit(weight)
        quantized = QTensor(grid.encode(w_hat, scale, zero), scale, zero, grid)
        return quantized, RoundingReport(proxy_loss(weight - quantized.dequantize(), hessian), self.damping)


@dataclass(frozen=True, kw_only=True)
class GPTQModel(LLMCompressor):
    """gptqmodel's GPTQ object, handed our Hessian."""

    name: ClassVar[str] = "gptqmodel"

    def quantize_linear(self, weight: Tensor, hessian: Tensor) -> tuple[QTensor, RoundingReport]:
        from gptqmodel.quantization import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ as Peer

        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        config = QuantizeConfig(
            bits=self.bits, group_size=self.group_size, sym=False, desc_act=True, static_groups=True,
            act_group_aware=False, damp_percent=self.damping, offload_to_disk=False,
        )  # fmt: skip
        peer = Peer(linear, config)
        peer.quantizer = peer.create_quantizer("layer")
        peer.quantizer.configure(perchannel=True)
        root = torch.linalg.cholesky(hessian.double() + 1e-9 * hessian.diagonal().mean() * torch.eye(len(hessian)))
        peer.add_batch(root.T.float()[None], None)  # its Hessian is then 2 root root^T: ours, but for a factor
        return self._wrap(weight, hessian, peer.quantize(blocksize=128)[0].float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    out = parser.parse_args().out
    model, tokenizer = lqedu.load_model("smollm2-135m")
    texts = {split: lqedu.load_corpus("sotu", split=split) for split in ("calibration", "evaluation")}
    calibration = lqedu.token_windows(tokenizer, texts["calibration"], length=LENGTH, count=CALIBRATION, seed=0)
    evaluation = lqedu.token_windows(tokenizer, texts["evaluation"], length=LENGTH, count=EVALUATION)

    rows = []
    for bits in (3, 4):
        ours: Perplexity | None = None
        for method in (GPTQ, LLMCompressor, GPTQModel):
            quantized = lqedu.quantize(model, method(bits=bits, group_size=64, order="activation"), calibration)
            result = lqedu.perplexity(quantized, evaluation)
            ours = ours or result
            difference = paired(result, ours)
            row = {"implementation": "lqedu" if method is GPTQ else method.name, "bits": bits, "group_size": 64,
                   "ppl": result.ppl, "nll": result.nll, "delta_to_lqedu": difference.delta_nll,
                   "delta_stderr": difference.stderr, "samples": [round(x, 6) for x in result.window_nll],
                   "unit": "nats per token, by window"}  # fmt: skip
            print({key: value for key, value in row.items() if key != "samples"}, flush=True)
            rows.append(row)
    configuration = {
        "model": "smollm2-135m", "weights_sha256": weights_sha256(model), "corpus": "sotu", "length": LENGTH,
        "calibration_windows": CALIBRATION, "seed": 0, "evaluation_windows": EVALUATION, "order": "activation",
        "damping": 0.01, "peers": {name: version(name) for name in ("gptqmodel", "llmcompressor", "compressed-tensors")},
    }  # fmt: skip
    title = "GPTQ of the whole model by three implementations on the same data and settings"
    write_result(out, title=title, kind="measured", configuration=configuration, values=rows)


if __name__ == "__main__":
    main()
