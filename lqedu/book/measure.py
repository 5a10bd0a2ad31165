"""The measurements behind the book's recorded tables: ``python -m lqedu.book.measure NAME --device cuda --out FILE``.

Each function returns what was configured and the rows that were measured; ``lqedu.book.results.write_result`` adds the
provenance. Timings are raw samples of a synchronized clock after a warm-up, never an assertion.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import nn

import lqedu
from lqedu import training
from lqedu.book.results import write_result
from lqedu.evaluation.perplexity import Perplexity
from lqedu.evaluation.streaming import (
    ALLOCATOR,
    LLAMA_2_70B,
    LLAMA_3_70B,
    Shape,
    resident_peak,
    streamed_peak,
    write_random,
)
from lqedu.evaluation.streaming import measure as memory_of_run
from lqedu.formats import IntGrid
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.kv import KVInt
from lqedu.formats.microscaling import MXFP4, MXFP8, NVFP4, BlockFormat, block_round_trip
from lqedu.formats.progressive import ProgressiveGrid, progressive_quantize
from lqedu.formats.smallfloat import E4M3
from lqedu.methods import AWQ, FP8, GPTQ, HQQ, QQQ, RTN, Method, QoQ, QuaRot, QuIP, SmoothQuant, SpinQuant
from lqedu.models import weights_sha256
from lqedu.models.anatomy import linears
from lqedu.models.copying import copy_sharing_tensors
from lqedu.rounding import nearest
from lqedu.runtime import QuantLinear
from lqedu.training.scaling import DelayedScaling, Recipe
from lqedu.transforms.rotation import rotate_model

CALIBRATION = {"corpus": "sotu", "split": "calibration", "windows": 32, "length": 512, "seed": 0}
EVALUATION = {"corpus": "sotu", "split": "evaluation", "windows": 256, "length": 512}
CPU_WINDOWS = 16  # of them without a GPU: half an hour instead of a night

Measurement = tuple[dict[str, Any], list[dict[str, Any]]]  # configuration, rows


def weight_only(device: str) -> Measurement:
    """Chapters 02 and 04: RTN and GPTQ of the whole model at 8, 4, 3 and 2 bits, by group and by channel."""
    bench = _Bench(device)
    rows = [bench.row(None)]
    for bits in (8, 4, 3, 2):
        for group_size in (64, None):
            rows.append(bench.row(RTN(bits=bits, group_size=group_size)))
    rows.append(bench.row(RTN(bits=4, group_size=None, symmetric=True)))
    for bits in (4, 3):
        rows.append(bench.row(RTN(bits=bits, group_size=64, search="mse")))
    for bits in (4, 3, 2):
        for group_size in (64, None):
            for order in ("natural", "activation"):
                rows.append(bench.row(GPTQ(bits=bits, group_size=group_size, order=order)))
    return bench.configuration(), _with_recovery(rows)


def gptq_study(device: str) -> Measurement:
    """Chapter 04: what each choice inside GPTQ is worth at 3 bits, one change at a time."""
    bench = _Bench(device)
    base = GPTQ(bits=3, group_size=64, order="activation")
    rows = [bench.row(None), bench.row(RTN(bits=3, group_size=64)), bench.row(base)]
    rows.append(bench.row(replace(base, true_sequential=False)))
    rows.append(bench.row(replace(base, search="mse")))
    for damping in (0.0001, 0.1, 1.0):
        rows.append(bench.row(replace(base, damping=damping)))
    for windows in (1, 4, 16, 128):
        rows.append(bench.row(base, windows=windows))
    return bench.configuration(), _with_recovery(rows)


def awq(device: str) -> Measurement:
    """Chapter 05: AWQ of the whole model, and what each of its parts is worth."""
    bench = _Bench(device)
    rows = [bench.row(None)]
    for bits in (4, 3):
        base = AWQ(bits=bits, group_size=64)
        rows += [bench.row(method) for method in (base, replace(base, clip=False), replace(base, duo_scaling=True))]
        rows.append(bench.row(replace(base, alphas=1)))  # clipping alone
    return bench.configuration(), rows


def hqq(device: str) -> Measurement:
    """Chapter 06: HQQ of the whole model at 8, 4, 3 and 2 bits, along both axes, and float zero points alone."""
    bench = _Bench(device)
    rows = [bench.row(None)]
    for bits in (8, 4, 3, 2):
        rows.append(bench.row(HQQ(bits=bits, group_size=64)))
        if bits < 8:
            rows.append(bench.row(RTN(bits=bits, group_size=64, zero_point="float")))
            rows.append(bench.row(HQQ(bits=bits, group_size=64, axis=0)))
    return bench.configuration(), rows


def hqq_study(device: str) -> Measurement:
    """Chapter 06: HQQ with value projections left to RTN, on shuffled columns, and at other settings, 32 windows."""
    bench = _Bench(device, windows=32)
    rows = [bench.row(None)]

    def add(name: str, bits: int, model: nn.Module) -> None:
        rows.append(bench.named(name, model) | {"bits": bits, "group_size": 64})

    nearest, ours = (lqedu.quantize(bench.model, method(bits=3, group_size=64)) for method in (RTN, HQQ))
    for name, model, other in (("rtn", nearest, ours), ("hqq", ours, nearest)):
        add(name, 3, model)
        with _exchanged(model, other, "v_proj"):
            add(f"{name}, values by {'hqq' if model is nearest else 'rtn'}", 3, model)
    for method in (RTN, HQQ):
        quantize = method(bits=4, group_size=64).quantize_linear
        shuffled = _by_shuffled_columns(bench.model, lambda w, quantize=quantize: quantize(w, None)[0].dequantize())
        add(f"{method.name}, shuffled columns", 4, shuffled)
    for method in (HQQ(bits=4, group_size=96), HQQ(bits=4, group_size=64, beta=100.0)):
        rows.append(bench.row(method))
    return bench.configuration(), rows


def quip(device: str) -> Measurement:
    """Chapter 07: QuIP of the whole model at 2, 3 and 4 bits, and at 2 bits without each of its parts."""
    bench = _Bench(device)
    rows = [bench.row(None)]
    rows += [bench.row(QuIP(bits=bits)) for bits in (2, 3, 4)]
    reference = {"grid_range": "reference"}
    for change in ({"passes": 0}, {"rotate": False}, reference, reference | {"rescale": True}):
        rows.append(bench.row(replace(QuIP(bits=2), **change)))
    return bench.configuration(), rows


def quantize_cost(device: str) -> Measurement:
    """Chapters 05 and 07: seconds and peak memory of the command line, a process for each method, 32 windows."""
    return _command_cost("awq", "quip")


def rotate_cost(device: str) -> Measurement:
    """Chapters 08 and 10: seconds and peak memory of the command line, a process for each method, 32 windows."""
    return _command_cost("smoothquant", "quarot")


def w4a8_cost(device: str) -> Measurement:
    """Chapters 13 and 14: seconds and peak memory of the command line, a process for each method, 32 windows."""
    return _command_cost("qqq", "qoq")


STREAMED = [Shape(layers, 1024, 2816, 16, 4, 32000) for layers in (1, 2, 4, 8)]
STREAMED_GPU = [Shape(layers, 8192, 28672, 64, 8, 32000) for layers in (1, 2)]  # a 70B model, less most of its depth


def streaming(device: str) -> Measurement:
    """Chapter 21: peak memory of GPTQ on random models of growing depth and width, streamed and resident, and its formula."""
    gpu = device.startswith("cuda")
    windows, length, dtype = (32, 512, "bfloat16") if gpu else (8, 256, "float32")
    sizes = {"tokens": windows * length, "itemsize": getattr(torch, dtype).itemsize}
    rows = []
    for shape in STREAMED_GPU if gpu else STREAMED:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "dense"
            write_random(shape, source, dtype=getattr(torch, dtype))
            for mode in ("streamed", "resident"):
                found = memory_of_run(
                    mode, source, Path(folder) / mode, windows=windows, length=length, dtype=dtype, device=device
                )
                shutil.rmtree(Path(folder) / mode)
                predicted = streamed_peak(shape, **sizes).total if mode == "streamed" else resident_peak(shape, **sizes)
                peak = found["device_bytes"] if gpu else found["host_bytes"]
                row = {"name": mode, **asdict(shape), "dense_bytes": shape.weights * sizes["itemsize"]}
                rows.append(row | found | {"predicted_bytes": predicted, "samples": [peak], "unit": "B"})
                print(f"{mode} {shape}: {peak / 1e9:.3f} GB, formula {predicted / 1e9:.3f} GB", flush=True)
    for name, shape in {"llama-2-70b": LLAMA_2_70B, "llama-3-70b": LLAMA_3_70B}.items():
        peak = streamed_peak(shape, tokens=32 * 512, itemsize=2)
        row = {"name": f"formula, {name}", **asdict(shape), "dense_bytes": 2 * shape.weights, "tokens": 32 * 512}
        rows.append(
            row | {f"{part}_bytes": size for part, size in asdict(peak).items()} | {"predicted_bytes": peak.total}
        )
    configuration = {
        "method": "gptq", **GPTQ(group_size=128).options(), "windows": windows, "length": length, "dtype": dtype,
        "weights": "random normal", "allocator": ALLOCATOR, "threads": torch.get_num_threads(),
    }  # fmt: skip
    return configuration, rows


def _command_cost(*names: str) -> Measurement:
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "lqedu", "quantize", "smollm2-135m", "--method", name]
            began = time.perf_counter()
            process = subprocess.Popen([*command, "--out", f"{folder}/out", "--json"], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
        if status:
            raise SystemExit(f"lqedu quantize --method {name} failed")
        peak = 1024 * usage.ru_maxrss
        rows.append({"name": name, "seconds": seconds, "samples": [seconds], "unit": "s", "peak_bytes": peak})
        print(f"{name}: {seconds:.0f} s, {peak / 1e9:.2f} GB", flush=True)
    return {"model": "smollm2-135m", "calibration": CALIBRATION, "threads": torch.get_num_threads()}, rows


def smoothquant(device: str) -> Measurement:
    """Chapter 08: naive and smoothed activations at 8 bits, migration strengths, the paper's three levels, and fewer bits."""
    bench = _Bench(device)
    naive = RTN(bits=8, group_size=None, symmetric=True, activation_bits=8)
    smooth = SmoothQuant(alpha=0.8)
    rows = [bench.row(None), bench.row(replace(naive, activation_bits=None))]
    rows += [bench.row(replace(naive, activation=activation)) for activation in ("token", "tensor", "static")]
    for activation in ("token", "static"):
        for tenth in range(1, 10):
            rows.append(bench.row(SmoothQuant(alpha=tenth / 10, activation=activation)))
    for level, activation in (("O1", "token"), ("O2", "tensor"), ("O3", "static")):
        for alpha in (0.5, 0.8):
            rows.append(bench.row(SmoothQuant(granularity="tensor", activation=activation, alpha=alpha), name=level))
    for activation in ("token", "static"):
        for alpha in (0.3, 0.5, 0.8):
            rows.append(bench.row(SmoothQuant(folds="all", activation=activation, alpha=alpha)))
    for bits in (6, 4):
        rows += [bench.row(replace(method, activation_bits=bits)) for method in (naive, smooth)]

    calibration = bench.calibration(CALIBRATION["windows"])
    floating = lqedu.quantize(bench.model, replace(naive, activation_bits=None))
    methods = {"naive": naive} | {f"smooth {alpha}": SmoothQuant(alpha=alpha) for alpha in (0.5, 0.8)}
    for name, method in methods.items():
        model = lqedu.quantize(bench.model, replace(method, activation="static"), calibration)
        for others in (("o_proj", "down_proj"), ("down_proj",)):
            with ExitStack() as stack:
                for other in others:
                    stack.enter_context(_exchanged(model, floating, other))
                words = " and ".join(other.removesuffix("_proj") for other in others)
                rows.append(bench.named(f"{name} static, {words} in W8A16", model))
    return bench.configuration(), rows


def invariance(device: str) -> Measurement:
    """Chapter 09: rounding to nearest of the same function in four bases: as it is, norms folded, and two rotations."""
    from lqedu.linalg import random_orthogonal, randomized_hadamard

    bench = _Bench(device)
    n = bench.model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    rotations = {
        "folded": None,
        "randomized Hadamard": randomized_hadamard(n, generator),
        "random orthogonal": random_orthogonal(n, generator=generator),
    }
    models = {"as it is": bench.model} | {name: rotate_model(bench.model, r) for name, r in rotations.items()}
    rows = [bench.row(None)]
    channel, group = {"group_size": None, "symmetric": True}, {"group_size": 64}
    for method in (RTN(bits=4, **channel), RTN(bits=4, **group), RTN(bits=3, **group), RTN(bits=8, **channel)):
        rows += [bench.row(method, model=model, name=name) for name, model in models.items()]
    eight = RTN(bits=8, activation_bits=8, **channel)
    for method in (eight, replace(eight, activation_bits=6), replace(eight, activation_bits=4)):
        rows += [bench.row(method, model=model, name=name) for name, model in models.items()]
    return bench.configuration(), rows


_WIDTHS = {  # weights, activations, keys and values
    "W8A8": (8, 8, None),
    "W6A6": (6, 6, None),
    "W4A8": (4, 8, None),
    "W4A4": (4, 4, None),
    "W4A4KV4": (4, 4, 4),
    "W16A4": (8, 4, None),
    "W16KV4": (8, None, 4),
}


def quarot(device: str) -> Measurement:
    """Chapter 10: naive rounding, QuaRot with nearest and QuaRot with GPTQ, at all widths, and what clipping is worth."""
    bench = _Bench(device)
    rows = [bench.row(None)]
    for name, (bits, activation_bits, kv_bits) in _WIDTHS.items():
        widths = {"bits": bits, "activation_bits": activation_bits, "kv_bits": kv_bits}
        methods = [RTN(group_size=None, symmetric=True, **widths), QuaRot(rounding="nearest", **widths)]
        if "W16" not in name:  # 8-bit weights stand for untouched ones
            methods.append(QuaRot(**widths))
        rows += [bench.row(method, name=name) for method in methods]
    rows.append(bench.row(QuaRot(activation_clip=1.0, kv_clip=1.0), name="W4A4KV4"))
    rows.append(bench.row(QuaRot(activation_clip=0.75), name="W4A4KV4"))  # the least squared error (chapter 10)
    rows.append(bench.row(QuaRot(seed=1), name="W4A4KV4"))
    return bench.configuration(), rows


def quarot_search(device: str) -> Measurement:
    """Chapter 10: 4-bit weights rounded to nearest, as they are and behind QuaRot's transforms, with and without a range search."""
    bench = _Bench(device)
    widths = {"bits": 4, "activation_bits": 8}
    rows = [bench.row(None)]
    for search in ("none", "mse"):
        plain = RTN(group_size=None, symmetric=True, search=search, **widths)
        rows += [
            bench.row(m, name="W4A8")
            for m in (plain, QuaRot(rounding="nearest", kv_bits=None, search=search, **widths))
        ]
    return bench.configuration(), rows


def spinquant(device: str) -> Measurement:
    """Chapter 11: training curves of learned rotations, and SpinQuant beside QuaRot on the same 256 calibration windows."""
    bench, windows = _Bench(device), 256
    rows = [bench.row(None)]
    shared = {"windows": windows, "name": "W4A4KV4"}
    learned = SpinQuant(windows_per_step=16)
    rows += [bench.row(method, **shared) for method in (QuaRot(), replace(learned, steps=0), learned)]
    rows.append(bench.row(replace(learned, online=False), **shared))
    shared["name"] = "W4A4"
    rows += [
        bench.row(replace(method, kv_bits=None), **shared) for method in (QuaRot(), replace(learned, steps=0), learned)
    ]
    return _with_windows(bench, windows) | {"tokens_per_step": 16 * CALIBRATION["length"]}, rows


def spinquant_clip(device: str) -> Measurement:
    """Chapter 11: QuaRot and SpinQuant once more with ranges clipped to three quarters, on 256 calibration windows."""
    bench = _Bench(device)
    methods = (SpinQuant(windows_per_step=16, activation_clip=0.75), QuaRot(activation_clip=0.75))
    rows = [bench.row(None)] + [bench.row(method, windows=256, name="W4A4KV4") for method in methods]
    return _with_windows(bench, 256), rows


def _with_windows(bench: "_Bench", windows: int) -> dict[str, Any]:
    return bench.configuration() | {"calibration": CALIBRATION | {"windows": windows}}


def spinquant_study(device: str) -> Measurement:
    """Chapter 11: the published gradient, one that follows the scale, and a larger step, on 32 windows held out."""
    from lqedu.methods.spinquant import learn_rotations, rotated_loss

    model, tokenizer = lqedu.load_model("smollm2-135m", device=device)
    text = lqedu.load_corpus(CALIBRATION["corpus"], split="calibration")
    windows = lqedu.token_windows(tokenizer, text, length=CALIBRATION["length"], count=288, seed=CALIBRATION["seed"])
    training, held_out = windows[:256], windows[256:]
    base = SpinQuant(windows_per_step=16)
    cases = [
        ("start", None, replace(base, steps=0)),
        ("straight through", None, base),
        ("follows the scale", _round_following, base),
        ("straight through", None, replace(base, learning_rate=10 * base.learning_rate)),
    ]
    rows: list[dict[str, Any]] = []
    for name, rounded, method in cases:
        began = time.perf_counter()
        found = learn_rotations(model, training, method, rounded=rounded)
        seconds = time.perf_counter() - began
        losses = rotated_loss(model, held_out, found, method)
        moved = losses - torch.tensor(rows[0]["samples"] if rows else losses.tolist())
        row = {"name": name, **method.options(), "nll": float(losses.mean()), "delta_nll": float(moved.mean())}
        row |= {
            "delta_stderr": float(moved.std() / len(moved) ** 0.5),
            "samples": [round(x, 6) for x in losses.tolist()],
        }
        row |= {"unit": "nats per token, by window", "losses": [round(x, 5) for x in found.losses], "seconds": seconds}
        rows.append(row)
        print(f"{name} {method}: {row['delta_nll']:+.4f} nats in {seconds:.0f} s", flush=True)
    return {"model": "smollm2-135m", "calibration": CALIBRATION | {"windows": 256, "held_out": 32}}, rows


def progressive(device: str) -> Measurement:
    """Chapter 12: one and two levels of 4-bit groups, two forms of the zero point, 8-bit activations, and wrapped weights.

    Groups are random columns of a weight, because SmolLM2's weights lie on a lattice of 32 neighbours (chapter 03), in four
    random orders. Activations are rounded and multiplied in float32, which is what an integer product returns.
    """
    bench = _Bench(device)
    group = {"granularity": "group", "group_size": 64}
    grids: dict[str, IntGrid | ProgressiveGrid] = {"channel": IntGrid(4)}
    grids |= {f"groups, {zero} zero": IntGrid(4, **group, zero_point=zero) for zero in ("integer", "float")}
    grids |= {f"two levels, {zero}": ProgressiveGrid(64, zero) for zero in ("code", "offset")}
    count = sum(linear.weight.numel() for linear in linears(bench.model).values())
    rows = [bench.row(None)]
    for name, grid in grids.items():
        for seed in range(1 if name == "channel" else 4):  # one scale a row does not see the order
            model = _by_shuffled_columns(bench.model, lambda w, grid=grid: _rounded(w, grid), seed)
            stored = sum(grid.nbytes(tuple(linear.weight.shape)) for linear in linears(model).values())
            labels = {"seed": seed, "activation_bits": None, "bits_per_weight": 8 * stored / count}
            rows.append(bench.named(name, model) | labels)
            if name.startswith("two levels") and seed == 0:
                for linear in linears(model).values():
                    linear.register_forward_pre_hook(lambda module, args: (ActivationGrid(8).round_trip(args[0]),))
                rows.append(bench.named(name, model) | labels | {"activation_bits": 8})
    wrapped = _by_shuffled_columns(bench.model, _wrapped)
    return bench.configuration(), [*rows, bench.named("two levels, code, without protection", wrapped) | {"seed": 0}]


def qqq(device: str) -> Measurement:
    """Chapter 13: QQQ smoothed and rotated, per channel and in groups, each with keys and values of three widths.

    "folded" is GPTQ alone on a model with folded norms: folding takes SmolLM2's weights off their lattice (chapter 03), which
    is no doing of the rotation that comes with it.
    """
    bench = _Bench(device)
    naive = RTN(bits=4, group_size=None, symmetric=True, activation_bits=8)
    rows = [bench.row(None), *bench.cache_rows(replace(naive, bits=8), "W8A8 ")]
    rows.append(bench.row(GPTQ(bits=4, group_size=64), name="W4A16"))
    for group_size in (None, 64):
        rows += bench.cache_rows(replace(naive, group_size=group_size), "W4A8 ")
        alone = QQQ(group_size=group_size, move="none")
        rows.append(bench.row(alone, name="KV16"))
        rows.append(bench.row(alone, model=rotate_model(bench.model), name="folded"))
        for move in ("smooth", "rotate"):
            rows += bench.cache_rows(replace(alone, move=move))
        for move, search in (("smooth", "mse"), ("rotate", "none")):  # the other way round
            rows.append(bench.row(replace(alone, move=move, search=search), name="ranges"))
    return bench.configuration(), rows


def qoq(device: str) -> Measurement:
    """Chapter 14: QoQ with keys and values of three widths behind the same weights, and its parts added one by one.

    Each row of the ablation carries ``gain``, its loss less that of the row before, window by window. Norms are folded in a
    row of their own: folding takes SmolLM2's weights off their lattice (chapter 03), which is not rotation's doing.
    """
    bench = _Bench(device)
    rows = [bench.row(None), bench.row(GPTQ(bits=4, group_size=64), name="W4A16")]
    full = QoQ(group_size=64)
    for method in (QoQ(group_size=None), full):
        rows += bench.cache_rows(method)
    rows += bench.cache_rows(replace(full, smooth_attention="none"), "without SmoothAttention, ")

    off = {"rotate": False, "reorder": "none", "smooth": "none", "smooth_attention": "none"}
    step = replace(full, **off, clip=False, rounding="nearest")
    rows.append(bench.row(step, name="ablation", added="nothing"))
    rows.append(bench.row(step, model=rotate_model(bench.model), name="ablation", added="folded norms"))
    for part in ("rotate", "reorder", "smooth", "smooth_attention", "clip", "rounding"):
        step = replace(step, **{part: getattr(full, part)})
        rows.append(bench.row(step, name="ablation", added=part))
    for before, row in pairwise([row for row in rows if row.get("name") == "ablation"]):
        row |= _gain(row["samples"], before["samples"])
    for change in (
        {"reorder": "all"},
        {"reorder": "none"},
        {"smooth": "outputs"},
        {"smooth_attention": "search"},
        {"clip": False},
        {"seed": 1},
    ):
        rows.append(bench.row(replace(full, **change), name="variant", changed=", ".join(change)))
    return bench.configuration(), rows


def kv_cache(device: str) -> Measurement:
    """Chapter 15: keys and values in few bits behind dense weights, what helps the keys, and how often the arg-max stays.

    The arg-max is teacher-forced: at every position of 32 prompts both models read the same text. Keys before RoPE and by
    channel (64 tokens share a scale) are simulated where attention reads them. Smoothing and centring are
    fitted to 8 windows, the search over exponents to one of them.
    """
    from lqedu.runtime import quantize_kv

    bench = _Bench(device)
    dense, integer = bench.model, KVInt(4, zero_point="integer")
    prompts = bench.windows.flatten()[: 32 * 256].view(-1, 256)
    text = bench.calibration(8)
    smoothed = _smoothed(dense, text, (0.25, 0.5, 0.75, 1.0, None))
    cases: dict[str, Callable[[], nn.Module]] = {
        "KV8": lambda: quantize_kv(dense, 8),
        "FP8": lambda: quantize_kv(dense, "fp8"),
        "KV4": lambda: quantize_kv(dense, 4),
        "keys 4 bits": lambda: quantize_kv(dense, 4, 16),
        "values 4 bits": lambda: quantize_kv(dense, 16, 4),
        "keys 8 bits, values 4": lambda: quantize_kv(dense, 8, 4),
        "KV4, integer zero point": lambda: quantize_kv(dense, integer),
        "KV4, Hadamard": lambda: quantize_kv(dense, 4, hadamard=True),
        "KV4, Hadamard, integer zero point": lambda: quantize_kv(dense, integer, hadamard=True),
        "KV4, centred": lambda: quantize_kv(dense, 4, centre=text),
        "KV4, centred, Hadamard": lambda: quantize_kv(dense, 4, hadamard=True, centre=text),
        "KV3, centred, Hadamard": lambda: quantize_kv(dense, 3, hadamard=True, centre=text),
        "KV4, keys before RoPE": lambda: _before_rope(dense, KVInt(4).round_trip),
        "KV4, keys by channel": lambda: _reading(dense, _by_channel),
        "KV4, keys by channel before RoPE": lambda: _before_rope(dense, _by_channel),
    }
    for alpha, model in smoothed.items():
        name = "SmoothAttention, searched" if alpha is None else f"SmoothAttention {alpha}"
        cases[f"KV4, {name}"] = lambda model=model: quantize_kv(model, 4)
    cases["KV4, SmoothAttention 0.5, Hadamard"] = lambda: quantize_kv(smoothed[0.5], 4, hadamard=True)

    rows, wanted = [bench.row(None)], _arg_max(dense, prompts)
    for name, make in cases.items():
        model = make()
        rows.append(bench.named(name, model))
        if name in ("KV8", "FP8", "KV4", "values 4 bits", "KV4, Hadamard", "KV4, centred, Hadamard"):
            same = float((_arg_max(model, prompts) == wanted).double().mean())
            rows[-1]["same_arg_max"] = same
            print(f"  same arg-max: {same:.4f}", flush=True)
    return bench.configuration() | {"prompts": {"count": len(prompts), "length": 256}, "smoothing_windows": 8}, rows


_SMALL = {  # what chapter 17 trains: on a GPU, and on two cores
    "cuda": {"layers": 3, "hidden_size": 192, "steps": 500, "batch": 16, "length": 128, "seeds": 6},
    "cpu": {"layers": 2, "hidden_size": 128, "steps": 300, "batch": 8, "length": 128, "seeds": 3},
}
_RECIPES: dict[str, tuple[Recipe | None, float]] = {  # and the scale of the loss
    "FP32": (None, 1.0),
    "FP32, nudged": (None, 1.0),  # weights changed by a millionth at the start: what differences mean nothing
    "hybrid, current": (Recipe(scaling="current"), 1.0),
    "hybrid, delayed": (Recipe(), 1.0),
    "hybrid, delayed, history 16": (Recipe(history=16), 1.0),
    "E4M3, current": (Recipe(gradient=E4M3, scaling="current"), 1.0),
    "E4M3, unscaled": (Recipe(gradient=E4M3, scaling="none"), 1.0),
    "hybrid, unscaled": (Recipe(scaling="none"), 1.0),
    "E4M3, loss scale 2^14": (Recipe(gradient=E4M3, scaling="none"), 2.0**14),
    "hybrid, loss scale 2^16": (Recipe(scaling="none"), 2.0**16),
    "hybrid, stale after step 10": (Recipe(), 1.0),  # no update from then on
}
_LOSSES_EVERY = 10  # steps, averaged
_FP8_WORKERS = 8  # processes that share a GPU, which one small model leaves idle


def fp8_training(device: str) -> Measurement:
    """Chapter 17: a small Llama over bytes trained with linear layers in FP8, by recipe, several seeds, beside FP32.

    Losses are means of ten steps in nats per byte, on the text that is trained on; the samples are losses on held-out
    text after the last step, a seed each. Differences are paired: a seed is the same weights and the same batches.
    """
    import numpy

    kind = "cuda" if device.startswith("cuda") else "cpu"
    small = _SMALL[kind]
    jobs = [(device, name, seed) for name in _RECIPES for seed in range(small["seeds"])]
    if kind == "cuda":
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(_FP8_WORKERS, mp_context=context) as pool:
            runs = list(pool.map(_train_small, jobs))
    else:
        runs = [_train_small(job) for job in jobs]
    rows, base = [], [held_out for _, held_out in runs[: small["seeds"]]]
    for i, (name, (recipe, loss_scale)) in enumerate(_RECIPES.items()):
        mine = runs[i * small["seeds"] : (i + 1) * small["seeds"]]
        difference = numpy.array([held_out for _, held_out in mine]) - numpy.array(base)
        rows.append({
            "name": name,
            "loss_scale": loss_scale,
            **({} if recipe is None else {k: getattr(v, "name", v) for k, v in vars(recipe).items()}),
            "losses": [losses for losses, _ in mine],
            "held_out": float(numpy.mean([held_out for _, held_out in mine])),
            "delta": float(difference.mean()),
            "delta_stderr": float(difference.std(ddof=1) / len(difference) ** 0.5),
            "samples": [round(held_out, 6) for _, held_out in mine],
            "unit": "nats per byte on held-out text, by seed",
        })  # fmt: skip
        print(
            f"{name}: {rows[-1]['held_out']:.4f}, {rows[-1]['delta']:+.4f} ± {rows[-1]['delta_stderr']:.4f}", flush=True
        )
    parameters = sum(p.numel() for p in _small_model(small, 0).parameters())
    return small | {
        "model": "small Llama over bytes", "parameters": parameters, "corpus": "sotu", "losses_every": _LOSSES_EVERY,
        "optimizer": "AdamW, 2e-3, 20 steps of warm-up, cosine to a tenth, gradients clipped at norm 1",
        "held_out_windows": 128,
    }, rows  # fmt: skip


def _small_model(small: dict[str, int], seed: int) -> nn.Module:
    return training.small_llama(seed, hidden_size=small["hidden_size"], layers=small["layers"])


def _train_small(job: tuple[str, str, int]) -> tuple[list[float], float]:
    """Losses of one run and its loss on held-out text; a function of its own, so that a process can run it."""
    device, name, seed = job
    if device.startswith("cuda"):
        torch.set_num_threads(1)
    small, (recipe, loss_scale) = _SMALL["cuda" if device.startswith("cuda") else "cpu"], _RECIPES[name]
    texts = {split: lqedu.load_corpus("sotu", split=split) for split in ("calibration", "evaluation")}
    shape = {"length": small["length"], "seed": seed}
    batches = training.byte_batches(texts["calibration"], steps=small["steps"], batch=small["batch"], **shape)
    held_out = training.byte_batches(texts["evaluation"], steps=1, batch=128, length=small["length"], seed=0)[0]
    model = _small_model(small, seed)
    if name == "FP32, nudged":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + 1e-6
    model = (model if recipe is None else training.convert(model, recipe)).to(device)
    stop = _stop_updates if "stale" in name else None
    done = training.train(model, batches, loss_scale=loss_scale, after_step=stop)
    losses = torch.tensor(done.losses).unfold(0, _LOSSES_EVERY, _LOSSES_EVERY).mean(1)
    return [round(loss, 4) for loss in losses.tolist()], training.evaluate(done.model, held_out)


def _stop_updates(step: int, model: nn.Module) -> None:
    """After step 10 the scales stay what they are, as when nothing calls the update any more."""
    if step == 10:
        for module in model.modules():
            if isinstance(module, DelayedScaling):
                module.interval = 10**9


def fp8(device: str) -> Measurement:
    """Chapter 16: INT8 and FP8 with every kind of scale, E5M2, caches, kept layers, and block formats behind a rotation.

    Block formats of weights and inputs are simulated. Without the rotation 4-bit blocks of 32 would be lossless: SmolLM2's
    weights lie on such a lattice (chapter 03).
    """
    from lqedu.linalg import randomized_hadamard
    from lqedu.runtime import quantize_kv

    bench = _Bench(device)
    int8 = RTN(bits=8, group_size=None, symmetric=True, activation_bits=8)
    rows = [bench.row(None)]
    rows += [bench.row(replace(int8, activation_bits=None), name="INT8")]
    rows += [
        bench.row(replace(int8, activation=activation), name="INT8") for activation in ("token", "tensor", "static")
    ]
    rows += [bench.row(SmoothQuant(alpha=0.8, activation=a), name="INT8, smoothed") for a in ("token", "static")]
    for granularity in ("tensor", "channel", "block"):
        for activation in ("none", "token", "group", "tensor", "static"):
            rows.append(bench.row(FP8(granularity=granularity, activation=activation), name="FP8"))
        for activation in ("none", "token"):
            searched = FP8(granularity=granularity, activation=activation, search="mse")
            rows.append(bench.row(searched, name="FP8, searched"))
    rows.append(bench.named("FP8 keys and values alone", quantize_kv(bench.model, "fp8")))
    rows.append(bench.row(FP8(kv="fp8"), name="FP8, keys and values too"))
    rows += [bench.row(FP8(activation=a, format="E5M2"), name="E5M2") for a in ("none", "token", "static")]
    rows += [bench.row(FP8(activation=a, keep="down_proj"), name="FP8, kept") for a in ("token", "static")]

    rotation = randomized_hadamard(bench.model.config.hidden_size, torch.Generator().manual_seed(0))
    rotated = rotate_model(bench.model, rotation)
    methods = [int8, replace(int8, activation="static"), FP8(), FP8(activation="static"), FP8(activation="none")]
    methods += [RTN(bits=4, group_size=32, symmetric=True, activation_bits=bits) for bits in (None, 4)]
    rows += [bench.row(method, model=rotated, name="rotated") for method in methods]
    for form in (MXFP8, MXFP4, NVFP4):
        for inputs in (False, True):
            row = bench.named(f"rotated, {form.name}", _in_blocks(rotated, form, inputs=inputs))
            rows.append(row | {"bits_per_weight": form.bits_per_element, "inputs": inputs})
    return bench.configuration(), rows


def fp8_scales(device: str) -> Measurement:
    """Chapter 16: FP8 weights with scales that differ by a random factor between one and two, the same error and other roundings.

    Each channel draws its own factor. Weights only.
    """
    from lqedu.formats.fp8 import Float8Grid

    bench = _Bench(device)
    rows = [bench.named("dense", bench.model)]
    for granularity in ("tensor", "channel"):
        for draw in range(1 if granularity == "tensor" else 9):  # draw 0 is the fitted scale
            model, g = copy_sharing_tensors(bench.model), torch.Generator().manual_seed(draw)
            grid, error, energy = Float8Grid(granularity), 0.0, 0.0
            for linear in linears(model).values():
                w = linear.weight.detach()
                scale = grid.fit(w)
                if draw:
                    scale = scale * torch.exp2(torch.rand(scale.shape, generator=g)).to(scale.device)
                w_hat = grid.decode(grid.encode(w, scale), scale)
                error += float((w_hat - w).double().square().sum())
                energy += float(w.double().square().sum())
                linear.weight = nn.Parameter(w_hat, requires_grad=False)
            row = bench.named(f"{granularity}, {f'draw {draw}' if draw else 'fitted'}", model)
            rows.append(row | {"granularity": granularity, "draw": draw, "weight_error": error / energy})
    return bench.configuration(), rows


def _in_blocks(model: nn.Module, form: BlockFormat, *, inputs: bool) -> nn.Module:
    """A dense copy whose linears, and where asked their inputs, are rounded to a microscaling format."""
    result = copy_sharing_tensors(model)
    for linear in linears(result).values():
        linear.weight = nn.Parameter(block_round_trip(linear.weight.detach(), form), requires_grad=False)
        if inputs:
            linear.register_forward_pre_hook(lambda _, x: (block_round_trip(x[0], form), *x[1:]))
    return result


def kv_length(device: str) -> Measurement:
    """Chapter 15: 4-bit caches of windows of 4,096 tokens, with mean keys from texts of 512 and of 4,096 tokens.

    Behind RoPE the mean key depends on the positions it is taken over.
    """
    from lqedu.runtime import quantize_kv

    length, windows = 4096, 32
    bench = _Bench(device, windows=windows)
    text = lqedu.load_corpus(EVALUATION["corpus"], split="evaluation")
    bench.windows = lqedu.token_windows(bench.tokenizer, text, length=length, count=windows)
    bench.batch_size = 8 if device == "cuda" else 1
    bench.dense = lqedu.perplexity(bench.model, bench.windows, batch_size=bench.batch_size)
    rows = [bench.row(None)]
    caches: dict[str, dict[str, Any]] = {"KV4": {}, "KV4, Hadamard": {"hadamard": True}}
    for size in (512, length):
        means = lqedu.token_windows(bench.tokenizer, bench.text, length=size, count=8192 // size, seed=0)
        caches[f"KV4, centred by {size}, Hadamard"] = {"hadamard": True, "centre": means}
    rows += [bench.named(name, quantize_kv(bench.model, 4, **options)) for name, options in caches.items()]
    configuration = bench.configuration()
    return configuration | {"evaluation": configuration["evaluation"] | {"length": length}}, rows


def _rounded(w: torch.Tensor, grid: IntGrid | ProgressiveGrid) -> torch.Tensor:
    """What a grid makes of a weight, rounded to nearest."""
    stored = progressive_quantize(w, grid) if isinstance(grid, ProgressiveGrid) else nearest(w, grid)[0]
    return stored.dequantize()


def _wrapped(w: torch.Tensor) -> torch.Tensor:
    """A weight as a kernel would decode it from channels of ± 127: modulo 256."""
    grid = ProgressiveGrid(64, protective=127)
    channel, group, zero = grid.fit(w)
    codes = grid.encode(w, channel, group, zero).view(*group.shape, -1).to(torch.int32)
    w8 = (codes - zero.to(torch.int32)[..., None]) * group.to(torch.int32)[..., None]
    return w8.to(torch.int8).view(w.shape).to(w.dtype) * channel.to(w.dtype)


def _arg_max(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """The likeliest next token at every position, ``[windows, length]``."""
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        return torch.cat([model(w.to(device), use_cache=False).logits.argmax(-1) for w in windows.split(4)])


def _smoothed(
    model: nn.Module, windows: torch.Tensor, alphas: tuple[float | None, ...]
) -> dict[float | None, nn.Module]:
    """Copies with smoothed keys, one an exponent (``None``: searched)."""
    from lqedu.calibration.capture import block_inputs, run_block
    from lqedu.models.anatomy import block_list
    from lqedu.transforms.smooth_attention import (
        Heads,
        attention_heads,
        attention_scales,
        fold_attention,
        search_attention,
    )

    copies = {alpha: copy_sharing_tensors(model) for alpha in alphas}
    hidden, kwargs = block_inputs(model, windows)
    for index, block in enumerate(block_list(model)):
        heads = attention_heads(block, hidden, kwargs)
        few = Heads(heads.query[:1], heads.key[:1], heads.value[:1])
        for alpha, copy in copies.items():
            scale = search_attention(few, KVInt(4)).scale if alpha is None else attention_scales(heads.key_max(), alpha)
            fold_attention(block_list(copy)[index], scale)
        hidden = run_block(block, hidden, kwargs)
    return copies


def _by_channel(key: torch.Tensor) -> torch.Tensor:
    """Keys ``[windows, heads, tokens, head_dim]`` at 4 bits, a scale for each channel of 64 tokens."""
    return KVInt(4).round_trip(key.unflatten(2, (-1, 64)).mT).mT.flatten(2, 3)


def _reading(model: nn.Module, rounded: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy that attends to keys ``rounded(key)`` behind RoPE, and to values of 4 bits."""
    from lqedu.models.anatomy import block_list
    from lqedu.runtime import quantize_kv

    class Path:
        def query(self, query: torch.Tensor) -> torch.Tensor:
            return query

        def store(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rounded(key), KVInt(4).round_trip(value)

    result = quantize_kv(model, 16)
    for block in block_list(result):
        block.self_attn.lqedu_attention = Path()
    return result


def _before_rope(model: nn.Module, rounded: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy whose keys are rounded where ``k_proj`` puts them out, and its values at 4 bits."""
    from lqedu.models.anatomy import block_list
    from lqedu.runtime import quantize_kv

    def hook(module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
        heads = output.unflatten(-1, (-1, head_dim)).transpose(1, 2)
        return rounded(heads).transpose(1, 2).flatten(2)

    result = quantize_kv(model, 16, 4)
    head_dim = block_list(result)[0].self_attn.head_dim
    for block in block_list(result):
        block.self_attn.k_proj.register_forward_hook(hook)
    return result


def _round_following(x: torch.Tensor, grid: ActivationGrid | KVInt | None) -> torch.Tensor:
    """Rounded activations, keys or values whose gradient knows that the scale follows the ends of the range."""
    if grid is None:
        return x
    if isinstance(grid, ActivationGrid):
        (scale, zero), least, most = grid.fit(x), grid.code_min, grid.code_max
    else:
        (_, scale, zero), least, most = grid.quantize(x), 0, (1 << grid.bits) - 1
    zero = torch.zeros_like(scale) if zero is None else zero.detach()
    u = torch.minimum(torch.maximum(x / scale, least - zero), most - zero)
    return scale * (u + (grid.round_trip(x) / scale - u).detach())


def hqq_layer(device: str) -> Measurement:
    """Chapter 06: one 11008 x 4096 weight at 4 bits in groups of 64, step by step and with the step compiled."""
    from lqedu.rounding import hqq as round_hqq

    generator = torch.Generator(device).manual_seed(0)
    weight = 0.02 * torch.randn(11008, 4096, device=device, generator=generator)
    grid = HQQ(bits=4, group_size=64).grid()
    cases = {"eager": False, "compiled": True}
    rows = []
    for name, compiled in cases.items():
        began = time.perf_counter()
        quantized, _ = round_hqq(weight, grid, compiled=compiled)
        error = float((weight - quantized.dequantize()).abs().mean())
        first = time.perf_counter() - began
        timing = _timed(
            lambda compiled=compiled: round_hqq(weight, grid, compiled=compiled)[0].packed(), device, repeats=10
        )
        rows.append({"name": name, "mean_error": error, "first_call_seconds": first, **timing})
    try:
        from hqq.core.quantize import Quantizer
    except ImportError:
        print("hqq is not installed, so its row is left out")
    else:
        options = {"nbits": 4, "group_size": 64, "axis": 1, "device": device, "compute_dtype": torch.float16}

        def ask() -> tuple[torch.Tensor, dict]:
            return Quantizer.quantize(weight.clone(), optimize=True, round_zero=True, **options)

        answer, meta = ask()
        meta["compute_dtype"] = torch.float32
        error = float((weight - Quantizer.dequantize(answer, meta).float()).abs().mean())
        rows.append({"name": "hqq package", "mean_error": error, **_timed(ask, device, repeats=10)})
    bytes_read = 20 * weight.nbytes
    return {"weight": [11008, 4096], "grid": grid.to_dict(), "iterations": 20, "bytes_read": bytes_read}, rows


def bench_noise(device: str) -> Measurement:
    """Chapter 03: the loss of every evaluation window, for the dense model and three roundings of it."""
    bench = _Bench(device)
    rows = [{"name": "fp32", **_quality(bench.dense, bench.dense)}]
    for bits in (8, 4, 3):
        result = bench.evaluate(RTN(bits=bits, group_size=64), CALIBRATION["windows"])[0]
        rows.append({"name": f"rtn-w{bits}-g64", **_quality(result, bench.dense)})
    return bench.configuration(), rows


def gptq_layer(device: str) -> Measurement:
    """Chapter 04: one 11008 x 4096 layer, part by part, and the floor: a Cholesky and as many matmul operations."""
    from lqedu.formats import IntGrid
    from lqedu.linalg import HessianAccumulator, damp, inverse_factor
    from lqedu.rounding import gptq

    rows_out, columns, tokens = 11008, 4096, 128 * 2048
    generator = torch.Generator(device).manual_seed(0)
    weight = 0.02 * torch.randn(rows_out, columns, device=device, generator=generator)
    mixing = torch.randn(columns, columns, device=device, generator=generator) / columns**0.5
    batches = [
        (torch.randn(2048, columns, device=device, generator=generator) @ mixing).half() for _ in range(tokens // 2048)
    ]
    grid = IntGrid(4, granularity="group", group_size=128)

    def build() -> torch.Tensor:
        accumulator = HessianAccumulator(columns)
        for x in batches:
            accumulator.add(x)
        return accumulator.result()

    hessian = build()
    other = torch.randn(columns, columns // 2, device=device, generator=generator)
    parts: dict[str, Callable[[], Any]] = {
        "hessian": build,
        "factor": lambda: inverse_factor(damp(hessian, 0.01)),
        "gptq": lambda: gptq(weight, hessian, grid),
        "floor_cholesky_fp32": lambda: torch.linalg.cholesky(damp(hessian, 0.01)),
        # 2 * rows * columns * columns / 2 flops: as many as the sweep's updates
        "floor_matmul_fp32": lambda: weight @ other,
        "floor_hessian_fp16_inputs": lambda: [x.T @ x for x in batches],
    }
    rows = [{"name": name, **_timed(part, device)} for name, part in parts.items()]
    configuration = {
        "weight": [rows_out, columns],
        "calibration_tokens": tokens,
        "input_dtype": "float16",
        "grid": grid.to_dict(),
        "block_size": 128,
        "sweep_flops": rows_out * columns**2,
        "hessian_flops": 2 * tokens * columns**2,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    return configuration, rows


def ceilings(device: str) -> Measurement:
    """Chapter 01: what this GPU reaches on a large copy and on large matrix products, the book's measured roof."""
    n = 8192
    generator = torch.Generator(device).manual_seed(0)
    source = torch.randint(0, 100, (2**32 // 4,), device=device, dtype=torch.int32, generator=generator)  # 4 GiB
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=device, generator=generator)
    half, eight = a.half(), (30 * a).clamp(-127, 127).to(torch.int8)
    fp8, one = a.to(torch.float8_e4m3fn), torch.ones((), device=device)
    operations = 2 * n**3
    cases: dict[str, tuple[Callable[[], Any], float, str]] = {
        "copy_read_write": (lambda: target.copy_(source), 2 * source.nbytes / 1e12, "TB/s"),
        "fp16_matmul_8192": (lambda: half @ half, operations / 1e12, "TFLOP/s"),
        "int8_matmul_8192": (lambda: torch._int_mm(eight, eight.T), operations / 1e12, "TOP/s"),
        "fp8_matmul_8192": (
            lambda: torch._scaled_mm(fp8, fp8.T, scale_a=one, scale_b=one, out_dtype=torch.float16),
            operations / 1e12,
            "TFLOP/s",
        ),
    }
    rows = []
    for name, (call, work, unit) in cases.items():
        timing = _timed(call, device, repeats=20)
        rows.append({"name": name, "value": work / timing["seconds"], "value_unit": unit, **timing})
    return {"matrix": n, "copy_bytes": source.nbytes}, rows


class _Bench:
    """The dense model, both texts, and the dense perplexity that every row is paired with."""

    def __init__(self, device: str, *, windows: int | None = None) -> None:
        windows = windows or (CPU_WINDOWS if device == "cpu" else EVALUATION["windows"])
        self.model, self.tokenizer = lqedu.load_model("smollm2-135m", device=device)
        self.digest = weights_sha256(self.model)
        text = lqedu.load_corpus(EVALUATION["corpus"], split="evaluation")
        self.windows = lqedu.token_windows(self.tokenizer, text, length=EVALUATION["length"], count=windows)
        self.text = lqedu.load_corpus(CALIBRATION["corpus"], split="calibration")
        self.batch_size = 64 if device == "cuda" else 4
        self.dense = lqedu.perplexity(self.model, self.windows, batch_size=self.batch_size)

    def configuration(self) -> dict[str, Any]:
        return {
            "model": "smollm2-135m",
            "weights_sha256": self.digest,
            "calibration": CALIBRATION,
            "evaluation": EVALUATION | {"windows": len(self.windows), "windows_sha256": self.dense.windows_sha256},
        }

    def calibration(self, windows: int) -> torch.Tensor:
        """Token windows of the calibration text."""
        return lqedu.token_windows(
            self.tokenizer, self.text, length=CALIBRATION["length"], count=windows, seed=CALIBRATION["seed"]
        )

    def evaluate(self, method: Method, windows: int, model: nn.Module | None = None) -> tuple[Perplexity, Any, float]:
        began = time.perf_counter()
        quantized = lqedu.quantize(model or self.model, method, self.calibration(windows))
        seconds = time.perf_counter() - began
        return lqedu.perplexity(quantized, self.windows, batch_size=self.batch_size), quantized, seconds

    def named(self, name: str, model: nn.Module) -> dict[str, Any]:
        """A row for a model that no single method makes."""
        result = lqedu.perplexity(model, self.windows, batch_size=self.batch_size)
        print(f"{name}: ppl {result.ppl:.3f}", flush=True)
        return {"name": name, **_quality(result, self.dense)}

    def row(
        self,
        method: Method | None,
        *,
        windows: int = CALIBRATION["windows"],
        model: nn.Module | None = None,
        **labels: str,
    ) -> dict[str, Any]:
        """One row of a quality table; ``None`` is the dense model. ``model`` takes its place as what is quantized."""
        if method is None:
            return {"method": "dense", "bits_per_weight": 32.0, **_quality(self.dense, self.dense)}
        return self._described(method, *self.evaluate(method, windows, model), windows, labels)

    def cache_rows(self, method: Method, prefix: str = "") -> list[dict[str, Any]]:
        """Rows for caches of three widths, and for two remedies of 4-bit keys, behind the weights that ``method`` makes."""
        from lqedu.runtime import quantize_kv

        rows, windows = [], CALIBRATION["windows"]
        _, quantized, seconds = self.evaluate(method, windows)
        text = self.calibration(8)
        caches = {
            "KV16": (16, {}),
            "KV8": (8, {}),
            "KV4": (4, {}),
            "KV4, Hadamard": (4, {"hadamard": True}),
            "KV4, centred, Hadamard": (4, {"hadamard": True, "centre": text}),
        }
        for name, (bits, remedy) in caches.items():
            result = lqedu.perplexity(quantize_kv(quantized, bits, **remedy), self.windows, batch_size=self.batch_size)
            other = replace(method, kv_bits=None if bits == 16 else bits)
            rows.append(self._described(other, result, quantized, seconds, windows, {"name": prefix + name}))
        return rows

    def _described(
        self,
        method: Method,
        result: Perplexity,
        quantized: nn.Module,
        seconds: float,
        windows: int,
        labels: dict[str, str],
    ) -> dict[str, Any]:
        losses = quantized.lqedu_learned.get("losses")
        layers = linears(quantized).values()
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        stored = sum(layer.nbytes if isinstance(layer, QuantLinear) else 2 * layer.weight.numel() for layer in layers)
        row = labels | {
            "method": method.name,
            **method.options(),
            "calibration_windows": windows if method.uses_calibration else 0,
            "bits_per_weight": 8 * stored / weights,  # a layer that a method keeps counts as FP16
            **_quality(result, self.dense),
            "proxy_loss": _total([report.proxy_loss for report in quantized.lqedu_reports.values()]),
            "max_attempts": max(report.attempts for report in quantized.lqedu_reports.values()),
            "quantize_seconds": seconds,
        }
        if losses is not None and len(losses):
            row["losses"] = [round(loss, 5) for loss in losses.tolist()]
        print(f"{labels} {method} windows={windows}: ppl {row['ppl']:.3f} in {seconds:.1f} s", flush=True)
        return row


@contextmanager
def _exchanged(model: nn.Module, other: nn.Module, last_name: str) -> Iterator[None]:
    """``model`` with the layers called ``last_name`` taken from ``other``; afterwards as it was."""
    own = {name: layer for name, layer in model.named_modules() if name.rsplit(".", 1)[-1] == last_name}
    try:
        for name in own:
            model.set_submodule(name, other.get_submodule(name))
        yield
    finally:
        for name, layer in own.items():
            model.set_submodule(name, layer)


def _by_shuffled_columns(model: nn.Module, decoded: Callable[[torch.Tensor], torch.Tensor], seed: int = 0) -> nn.Module:
    """A dense copy with what ``decoded`` makes of each weight when its groups are random columns, not neighbours.

    SmolLM2's weights lie on a lattice of 32 neighbours (chapter 03), which random groups do not see.
    """
    result = copy_sharing_tensors(model)
    generator = torch.Generator().manual_seed(seed)
    for linear in linears(result).values():
        order = torch.randperm(linear.in_features, generator=generator).to(linear.weight.device)
        w_hat = decoded(linear.weight.detach()[:, order])
        linear.weight = nn.Parameter(w_hat[:, order.argsort()], requires_grad=False)
    return result


def _gain(samples: list[float], before: list[float]) -> dict[str, float]:
    """Mean difference of two rows' losses, window by window, and its standard error."""
    moved = torch.tensor(samples, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    return {"gain": float(moved.mean()), "gain_stderr": float(moved.std() / len(moved) ** 0.5)}


def _total(values: list[float | None]) -> float | None:
    return None if None in values else sum(values)


def _quality(result: Perplexity, dense: Perplexity) -> dict[str, Any]:
    """Perplexity and its paired distance from the dense model; the samples are the loss of every window."""
    from lqedu.evaluation import paired

    difference = paired(result, dense)
    return {
        "ppl": result.ppl,
        "nll": result.nll,
        "stderr": result.stderr,
        "delta_nll": difference.delta_nll,
        "delta_stderr": difference.stderr,
        "samples": [round(loss, 6) for loss in result.window_nll],
        "unit": "nats per token, by window",
    }


def _with_recovery(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add ``recovered``: the share of the NLL that plain RTN loses on the same grid that a row wins back."""
    lost = {
        (row["bits"], row["group_size"]): row["delta_nll"]
        for row in rows
        if row["method"] == "rtn" and row["search"] == "none" and not row["symmetric"]
    }
    return [
        row | {"recovered": 1 - row["delta_nll"] / lost[row["bits"], row["group_size"]]} if "bits" in row else row
        for row in rows
    ]


def _timed(call: Callable[[], Any], device: str, *, repeats: int = 7) -> dict[str, Any]:
    """Median seconds of a call and its raw samples; one warm-up call is left out."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    samples = []
    for _ in range(repeats + 1):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        samples.append(time.perf_counter() - began)
    samples = samples[1:]
    return {"seconds": median(samples), "samples": samples, "unit": "s"}


MEASUREMENTS: dict[str, Callable[[str], Measurement]] = {
    "weight-only": weight_only,
    "gptq-study": gptq_study,
    "awq": awq,
    "hqq": hqq,
    "hqq-layer": hqq_layer,
    "hqq-study": hqq_study,
    "quip": quip,
    "quantize-cost": quantize_cost,
    "rotate-cost": rotate_cost,
    "w4a8-cost": w4a8_cost,
    "streaming": streaming,
    "smoothquant": smoothquant,
    "invariance": invariance,
    "quarot": quarot,
    "quarot-search": quarot_search,
    "spinquant": spinquant,
    "spinquant-clip": spinquant_clip,
    "spinquant-study": spinquant_study,
    "progressive": progressive,
    "qqq": qqq,
    "qoq": qoq,
    "kv-cache": kv_cache,
    "kv-length": kv_length,
    "fp8": fp8,
    "fp8-scales": fp8_scales,
    "fp8-training": fp8_training,
    "bench-noise": bench_noise,
    "gptq-layer": gptq_layer,
    "ceilings": ceilings,
}


def main(
    name: Annotated[str, typer.Argument(help=", ".join(MEASUREMENTS))],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Run one measurement and write it with its provenance."""
    if name not in MEASUREMENTS:
        raise typer.BadParameter(f"unknown measurement {name!r}; choose one of {', '.join(MEASUREMENTS)}")
    configuration, rows = MEASUREMENTS[name](device)
    title = " ".join((MEASUREMENTS[name].__doc__ or "").split(": ", 1)[1].split()).rstrip(".")
    title = title[0].upper() + title[1:]
    write_result(out, title=title, kind="measured", configuration=configuration | {"device": device}, values=rows)


if __name__ == "__main__":
    typer.run(main)
