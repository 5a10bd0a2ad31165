"""The whole bench model quantized by the peers' rounding, on our data and Hessians, beside ours: whose perplexity is lower?

Run in the environment of requirements.txt, from the repository root:
``PYTHONPATH=. peers/bin/python tests/parity/model_quality.py --out book/results/peers_gptq_smollm2.json``.
Everything but the rounding of a layer is ours: calibration windows, order of layers, damping, order of columns. Peers
keep float32 scales, the package stores float16 ones, so ours runs with both: one row is what a user gets, the other is
the same arithmetic as theirs. Several seeds draw the calibration windows anew: the difference between two equally good
solutions of a layer grows from block to block, and one seed alone would show that as a difference of implementations.
"""

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import ClassVar

import torch
from torch import Tensor

import lqedu
from lqedu.book.results import write_result
from lqedu.evaluation import Perplexity, paired
from lqedu.formats import IntGrid, QTensor
from lqedu.methods import GPTQ
from lqedu.models import weights_sha256
from lqedu.rounding import RoundingReport, proxy_loss

CALIBRATION, EVALUATION, LENGTH = 32, 64, 512
WEIGHT_TOLERANCE = 1e-5  # between a peer's weights and the same weights as codes, scales and zero points


@dataclass(frozen=True, kw_only=True)
class Float32Scales(GPTQ):
    """Ours, with scales that are not rounded."""

    name: ClassVar[str] = "lqedu_float32_scales"

    def grid(self) -> IntGrid:
        return replace(super().grid(), scale_dtype=torch.float32)


class Peer(Float32Scales):
    """A peer rounds; its answer is kept exactly, as codes on the grid that it used."""

    def answer(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """The peer's dequantized weight."""
        raise NotImplementedError

    def quantize_linear(self, weight: Tensor, hessian: Tensor) -> tuple[QTensor, RoundingReport]:
        w_hat, grid = self.answer(weight, hessian), self.grid()
        scale, zero = grid.fit(weight)
        quantized = QTensor(grid.encode(w_hat, scale, zero), scale, zero, grid)
        torch.testing.assert_close(quantized.dequantize(), w_hat, rtol=0, atol=WEIGHT_TOLERANCE)
        return quantized, RoundingReport(proxy_loss(weight - w_hat, hessian), self.damping)


@dataclass(frozen=True, kw_only=True)
class LLMCompressor(Peer):
    """llmcompressor's quantize_weight on scales of compressed-tensors."""

    name: ClassVar[str] = "llmcompressor"

    def answer(self, weight: Tensor, hessian: Tensor) -> Tensor:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.utils import calculate_qparams
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

        args = QuantizationArgs(
            num_bits=self.bits, type="int", symmetric=False, strategy="group", group_size=self.group_size,
            actorder="weight",
        )  # fmt: skip
        grouped = weight.view(len(weight), -1, self.group_size)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        w_hat, _, fell_back = quantize_weight(
            weight.clone()[None], hessian.clone()[None], scale[None], zero[None], None, args, percdamp=self.damping
        )
        assert not fell_back.any(), "llmcompressor could not factor the Hessian and rounded to nearest"
        return w_hat[0]


@dataclass(frozen=True, kw_only=True)
class GPTQModel(Peer):
    """gptqmodel's GPTQ object, handed our Hessian instead of activations."""

    name: ClassVar[str] = "gptqmodel"

    def answer(self, weight: Tensor, hessian: Tensor) -> Tensor:
        from gptqmodel.quantization import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ as Theirs

        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        config = QuantizeConfig(
            bits=self.bits, group_size=self.group_size, sym=False, desc_act=True, static_groups=True,
            act_group_aware=False, damp_percent=self.damping, offload_to_disk=False,
        )  # fmt: skip
        theirs = Theirs(linear, config)
        theirs.quantizer = theirs.create_quantizer("layer")
        theirs.quantizer.configure(perchannel=True)
        theirs.H = hessian.clone()
        theirs.nsamples = theirs._hessian_total_samples = 1
        w_hat, _, _, _, _, loss, damping, _ = theirs.quantize(blocksize=128)
        assert not str(loss).startswith("fallback") and damping == self.damping, "gptqmodel fell back or damped more"
        return w_hat.float()


IMPLEMENTATIONS = {"lqedu": GPTQ, "lqedu, float32 scales": Float32Scales,
                   "llmcompressor": LLMCompressor, "gptqmodel": GPTQModel}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    model, tokenizer = lqedu.load_model("smollm2-135m")
    texts = {split: lqedu.load_corpus("sotu", split=split) for split in ("calibration", "evaluation")}
    evaluation = lqedu.token_windows(tokenizer, texts["evaluation"], length=LENGTH, count=EVALUATION)
    digest = weights_sha256(model)
    configuration = {
        "model": "smollm2-135m", "weights_sha256": digest, "corpus": "sotu", "length": LENGTH,
        "calibration_windows": CALIBRATION, "seeds": arguments.seeds, "evaluation_windows": EVALUATION,
        "group_size": 64, "symmetric": False, "order": "activation", "damping": 0.01, "block_size": 128,
        "peers": {name: version(name) for name in ("gptqmodel", "llmcompressor", "compressed-tensors")},
    }  # fmt: skip

    rows: list[dict] = []
    for seed in arguments.seeds:
        calibration = lqedu.token_windows(tokenizer, texts["calibration"], length=LENGTH, count=CALIBRATION, seed=seed)
        for bits in arguments.bits:
            ours: Perplexity | None = None
            for implementation, method in IMPLEMENTATIONS.items():
                start = time.monotonic()
                quantized = lqedu.quantize(model, method(bits=bits, group_size=64, order="activation"), calibration)
                loss = statistics.fmean(report.proxy_loss for report in quantized.lqedu_reports.values())
                result = lqedu.perplexity(quantized, evaluation)
                ours = ours or result
                difference = paired(result, ours)
                row = {"implementation": implementation, "bits": bits, "group_size": 64, "seed": seed,
                       "ppl": result.ppl, "nll": result.nll, "delta_to_lqedu": difference.delta_nll,
                       "delta_stderr": difference.stderr, "mean_proxy_loss": loss,
                       "samples": [round(x, 6) for x in result.window_nll], "unit": "nats per token, by window"}  # fmt: skip
                shown = {key: value for key, value in row.items() if key not in ("samples", "unit")}
                print(shown, f"{time.monotonic() - start:.0f} s", flush=True)
                rows.append(row)
                del quantized
                gc.collect()
            # Written after every setting, so that a long run that is stopped leaves what it has measured.
            write_result(
                arguments.out,
                title="GPTQ of the whole model by three implementations on the same data and settings",
                kind="measured", configuration=configuration, values=rows,
            )  # fmt: skip


if __name__ == "__main__":
    main()
