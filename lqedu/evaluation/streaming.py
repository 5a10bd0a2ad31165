"""Memory while a model is quantized: measured in a process of its own, and the formula it is compared with; ``21-serving``.

Streamed, depth does not appear in it::

    peak = the larger of
        embeddings   an embedding, the hidden states it gives, and a copy of the part that is written
        a block      its dense weights, its codes, the activations of all calibration tokens,
                     and what the widest linear's rounding takes

Resident, the whole dense model stands beside the block, and the packed codes of those before it.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lqedu.errors import UsageError

_WORKER = "lqedu.evaluation.streaming"
#: For glibc: give every block of a megabyte and more back to the system when it is freed. By default it keeps up to 32 MB a
#: block, and what is measured would be its holes.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}


@dataclass(frozen=True)
class Shape:
    """A Llama-like model without biases, its head not tied.

    Attributes:
        layers: decoder blocks.
        hidden, intermediate: widths ``d`` and ``f``.
        heads, kv_heads: of attention; ``d`` is divided among the heads.
        vocabulary: tokens.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def block_weights(self) -> int:
        """Weights of the linears of one block."""
        kv = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """Of the model, norms left out."""
        return self.layers * self.block_weights + 2 * self.vocabulary * self.hidden


LLAMA_2_70B = Shape(80, 8192, 28672, 64, 8, 32000)
LLAMA_3_70B = Shape(80, 8192, 28672, 64, 8, 128256)


@dataclass(frozen=True)
class Peak:
    """Bytes at the largest moment of each phase of a streamed GPTQ run; see :func:`streamed_peak`.

    Attributes:
        embeddings: while the embedding is in memory, before the first block; the head is the same.
        block: its dense weights.
        codes: those of its linears that are done, a byte each, until the block is packed.
        activations: of the calibration tokens, where the last linear of the block reads them.
        rounding: of the widest linear: Hessian, its factors in float64, and copies of the weight.
    """

    embeddings: int
    block: int
    codes: int
    activations: int
    rounding: int

    @property
    def total(self) -> int:
        """The larger phase."""
        return max(self.embeddings, self.block + self.codes + self.activations + self.rounding)


def streamed_peak(shape: Shape, *, tokens: int, itemsize: int) -> Peak:
    """Peak memory of a streamed GPTQ run, on the device; the host's is the row ``embeddings`` at most.

    Counted from the code for the linear with the widest input (``down_proj``, ``[d, f]``), where the peak is:

    - activations: hidden states before the block, after attention, and behind the norm, ``3 T d``, and the product
      ``T f`` that ``down_proj`` reads;
    - the Hessian in float32, ``4 f^2``, and in float64 at the peak of its factorization five matrices: damped, permuted,
      flipped, factor and flipped factor, ``5 · 8 f^2``, with a sixth where LAPACK keeps a copy;
    - or, where that is more, the float32 copy of the product that the Hessian is built from, ``4 T f``, for 16 bits, or
      the two factors of the product, which are freed before;
    - after the factorization the sweep holds three copies of the weight in float32, less than the factors took.

    Args:
        shape: of the model.
        tokens: of calibration, all windows.
        itemsize: bytes of a parameter and of an activation.
    """
    d, f = shape.hidden, shape.intermediate
    embedding = shape.vocabulary * d * itemsize
    copy = 4 * tokens * f if itemsize < 4 else 0
    return Peak(
        embeddings=2 * embedding + itemsize * tokens * d,
        block=shape.block_weights * itemsize,
        codes=shape.block_weights - d * f,
        activations=itemsize * tokens * (3 * d + f),
        rounding=max(4 * f * f + 6 * 8 * f * f, copy + 8 * f * f, 2 * itemsize * tokens * f),
    )


def resident_peak(shape: Shape, *, tokens: int, itemsize: int, bits: float = 4.5) -> int:
    """Peak memory of the same run in memory: the dense model, the packed blocks, and what a block takes beside its weights.

    The dense weights of a block are those of the model, but rounding replaces them by a copy.
    """
    peak = streamed_peak(shape, tokens=tokens, itemsize=itemsize)
    packed = int(shape.layers * shape.block_weights * bits / 8)
    return shape.weights * itemsize + packed + peak.total


def write_random(shape: Shape, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """A folder in the Hub's layout with normal random weights, one shard a part: never more than one part in memory."""
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lqedu.models.shards import INDEX, index_of, shard_name

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=False, dtype=dtype,
    )  # fmt: skip
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    parts: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, tensor in model.state_dict().items():
        part = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name
        parts.setdefault(part, []).append((name, tensor.shape))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator, shards, total = torch.Generator(device).manual_seed(seed), {}, 0
    for index, tensors in enumerate(parts.values(), start=1):
        file = shard_name(index, len(parts))
        shards[file] = [name for name, _ in tensors]
        made = {
            name: (
                torch.ones(size)
                if len(size) == 1
                else torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(0.02).cpu()
            ).to(dtype)
            for name, size in tensors
        }
        save_file(made, folder / file, {"format": "pt"})
        total += sum(tensor.nbytes for tensor in made.values())
    (folder / INDEX).write_text(index_of(shards, total))


def measure(
    mode: str, source: Path, out: Path, *, windows: int, length: int, dtype: str, device: str
) -> dict[str, Any]:
    """Quantize a folder by GPTQ in a new process, and say how much memory that took above what it held before.

    Args:
        mode: "streamed" or "resident".
        source, out: folders.
        windows, length: of random calibration tokens.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".

    Returns:
        ``host_bytes``: the growth of the largest resident set; ``device_bytes``: the most that was allocated on a GPU, or
        ``None``; ``seconds``.

    Raises:
        UsageError: another mode, or the process failed.
    """
    if mode not in ("streamed", "resident"):
        raise UsageError(f"a run is 'streamed' or 'resident', got {mode!r}")
    arguments = [mode, str(source), str(out), str(windows), str(length), dtype, device]
    command = [sys.executable, "-m", _WORKER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ALLOCATOR)
    if done.returncode:
        raise UsageError(f"the {mode} run failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _work(mode: str, source: str, out: str, windows: str, length: str, dtype: str, device: str) -> None:
    """The process: import and warm up, forget the largest memory so far, run, print."""
    import tempfile

    import lqedu
    from lqedu.methods import GPTQ

    tokens = torch.randint(1, 1000, (int(windows), int(length)), generator=torch.Generator().manual_seed(0))
    options = {"dtype": getattr(torch, dtype), "device": device}

    def run(mode: str, source: str, out: str) -> None:
        method = GPTQ(group_size=128)
        if mode == "streamed":
            lqedu.quantize_folder(source, method, tokens, out, **options)
        else:
            lqedu.save(lqedu.quantize(lqedu.load_model(source, **options)[0], method, tokens), out)

    with tempfile.TemporaryDirectory() as folder:
        write_random(Shape(1, 128, 256, 2, 1, 1000), Path(folder) / "tiny")
        run(mode, f"{folder}/tiny", f"{folder}/out")
    before = _forget_largest()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run(mode, source, out)
    seconds = time.perf_counter() - began
    allocated = torch.cuda.max_memory_allocated() if device == "cuda" else None
    print(json.dumps({"host_bytes": _largest() - before, "device_bytes": allocated, "seconds": seconds}))


def _forget_largest() -> int:
    """Make the kernel count the largest resident set anew, and return the present one.

    ``getrusage`` cannot be told to, and starts at the size of the parent process.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return _largest()


def _largest() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    _work(*sys.argv[1:])
