"""Two processes with half of the windows each take the decisions of one process with all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor

import lqedu
from lqedu.calibration import data_parallel
from lqedu.calibration.capture import block_inputs, first_windows
from lqedu.calibration.distributed import (
    all_extremes,
    all_max,
    all_sum,
    check_agreement,
    first_of_all,
    from_first,
    my_windows,
    processes,
    tokens_of_all,
)
from lqedu.errors import CalibrationError, LqeduError, UsageError
from lqedu.methods import AWQ, FP8, GPTQ, HQQ, QQQ, RTN, QoQ, QuaRot, QuIP, SmoothQuant, SpinQuant, pipeline
from lqedu.models.shards import Shards
from lqedu.runtime import quantized_linears
from tests.models_tiny import tiny_model, tiny_windows

METHODS = {
    method.name: method
    for method in (
        RTN(group_size=32, activation_bits=8, activation="static"), GPTQ(bits=3, group_size=32),
        AWQ(group_size=32, alphas=4, search_tokens=40), HQQ(group_size=32), QuIP(bits=4),
        SmoothQuant(activation="static", folds="all"), QuaRot(), QQQ(group_size=32, thresholds=4, search_tokens=50),
        QoQ(group_size=32, reorder="all", smooth="outputs", search_tokens=70), FP8(activation="static"),
    )
}  # fmt: skip
WINDOWS = 5  # an odd number: the processes get parts of different size


def _model() -> torch.nn.Module:
    return tiny_model().double()  # so that sums in another order differ by too little to move a code


def _result(model: torch.nn.Module) -> dict[str, Tensor]:
    """What was decided: everything but the tensors that no method touches."""
    return {
        f"{name}.{key}": b for name, layer in quantized_linears(model).items() for key, b in layer.named_buffers()
    } | {name: p for name, p in model.named_parameters() if "norm" in name}


def _refusal(function, *arguments: object) -> str:
    try:
        function(*arguments)
    except LqeduError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _work(rank: int, folder: Path) -> None:
    """One of two processes: everything that needs two, written to files for the test to look at."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = folder / str(rank)
    own.mkdir()
    windows = tiny_windows(WINDOWS)
    assert processes().count == 1 and torch.equal(my_windows(windows), windows)  # not before it is asked for
    with data_parallel():
        x = torch.arange(10.0).view(5, 2)[rank::2]
        assert torch.equal(all_sum(x.sum(0)), torch.tensor([20.0, 25.0]))
        assert torch.equal(all_max(torch.tensor([1.0 - rank, 1.0 + rank])), torch.tensor([1.0, 2.0]))
        assert torch.equal(all_extremes(x), torch.tensor([0.0, 9.0]))
        assert torch.equal(first_of_all(x, 3), torch.arange(6.0).view(3, 2)) and len(first_of_all(x, 1)) == 1
        tokens = torch.arange(30.0).view(5, 3, 2)
        drawn = torch.tensor([14, 0, 7])
        assert torch.equal(tokens_of_all(tokens[rank::2], drawn), tokens.view(15, 2)[drawn])
        assert from_first({"rank": rank}) == {"rank": 0}
        check_agreement(b"the same", "a block")
        hidden, kwargs = block_inputs(_model(), my_windows(windows))
        few, _ = first_windows(hidden, kwargs, 70)
        assert torch.equal(few, block_inputs(_model(), windows[:3])[0])
        refused = {
            "disagreement": _refusal(check_agreement, bytes([rank] * 8), "a block"),
            "spinquant": _refusal(lqedu.quantize, tiny_model(), SpinQuant(), windows),
            "few": _refusal(lqedu.quantize, tiny_model(), GPTQ(group_size=32), windows[:1]),
        }
        (own / "refused.json").write_text(json.dumps(refused))
        hessians: list[Tensor] = []
        accumulate = pipeline._hessian
        pipeline._hessian = lambda z: hessians.append(accumulate(z)) or hessians[-1]
        for name, method in METHODS.items():
            save_file(_result(lqedu.quantize(_model(), method, windows)), own / f"{name}.safetensors")
            if name == "gptq":
                save_file({"hessian": hessians[0]}, own / "hessian.safetensors")
        run = folder / "run"  # a resumed run, and a streamed one: one process writes
        lqedu.quantize(_model(), METHODS["gptq"], windows, resume_dir=run)
        if rank == 0:
            (run / "block-0001.safetensors").unlink()
        torch.distributed.barrier()
        resumed = lqedu.quantize(_model(), METHODS["gptq"], windows, resume_dir=run)
        save_file(_result(resumed), own / "resumed.safetensors")
        lqedu.quantize_folder(folder / "dense", METHODS["gptq"], windows, folder / "streamed", dtype=torch.float64)
        assert (folder / "streamed" / "lqedu.json").is_file() and not (folder / "streamed.unfinished").exists()
    torch.distributed.destroy_process_group()


def _save_dense(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, 128)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    _model().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have left."""
    folder = tmp_path_factory.mktemp("two")
    _save_dense(folder / "dense")
    multiprocessing.spawn(_work, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_decide_as_one_does(name: str, two: Path) -> None:
    want = _result(lqedu.quantize(_model(), METHODS[name], tiny_windows(WINDOWS)))
    first, second = (load_file(two / str(rank) / f"{name}.safetensors") for rank in (0, 1))
    assert set(first) == set(second) == set(want)
    for key, tensor in want.items():
        assert torch.equal(first[key], second[key]), key  # to the bit: sums reach all processes alike
        if tensor.dtype == torch.float64:  # norms that a scale was folded into; scales are float32
            assert torch.allclose(first[key], tensor, rtol=1e-5, atol=0), key
        else:
            assert torch.equal(first[key], tensor), key


def test_a_hessian_differs_by_the_order_of_its_sum_only(two: Path) -> None:
    """|fl(Σ) - Σ| <= γ Σ|terms| for any order, γ = T u / (1 - T u); so two orders differ by twice that at most."""
    hidden, _ = block_inputs(model := _model(), tiny_windows(WINDOWS))
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(hidden).reshape(-1, hidden.shape[-1])
    got = load_file(two / "0" / "hessian.safetensors")["hessian"]
    want, tokens, unit = (
        x.T @ x / len(x),
        len(x) + 2,
        2.0**-53,
    )  # two roundings more: the sum of two parts, the division
    assert got.dtype == torch.float64
    bound = 2 * tokens * unit / (1 - tokens * unit) * (x.abs().T @ x.abs()) / len(x)
    assert bool(((got - want).abs() <= bound).all())
    part = x[: len(x) // 2]
    assert not bool(((part.T @ part / len(part) - want).abs() <= bound).all())  # half of the windows is not enough


def test_resumed_and_streamed_runs_of_two_processes(two: Path) -> None:
    whole = load_file(two / "0" / "gptq.safetensors")
    for rank in (0, 1):
        resumed = load_file(two / str(rank) / "resumed.safetensors")
        assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    streamed = Shards(two / "streamed").read_all()
    assert all(torch.equal(streamed[key], tensor) for key, tensor in whole.items())


def test_what_processes_cannot_share_is_refused(two: Path) -> None:
    for rank in (0, 1):
        refused = json.loads((two / str(rank) / "refused.json").read_text())
        assert refused["disagreement"].startswith("CalibrationError: the processes have different results for a block")
        assert refused["spinquant"].startswith("UsageError: SpinQuant trains with gradients through the whole model")
        assert refused["few"].startswith("CalibrationError: 2 processes share 1 calibration windows")
    with pytest.raises(UsageError, match="torchrun"), data_parallel():
        pass
    assert processes().count == 1


def test_one_process_computes_nothing_else() -> None:
    x = torch.randn(4, 3, 2)
    assert all_sum(x) is x and all_max(x) is x and all_extremes(x) is x and from_first(x) is x
    assert torch.equal(first_of_all(x, 3), x[:3])
    assert torch.equal(tokens_of_all(x, torch.tensor([11, 2])), x.view(12, 2)[[11, 2]])
    check_agreement(b"", "nothing")
    with pytest.raises(CalibrationError, match="fewer processes"):
        my_windows(x[:0])


def test_torchrun_of_the_command_line(two: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    ids = torch.randint(1, 128, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text(" ".join(f"w{i}" for i in ids))
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lqedu", "quantize",
        str(two / "dense"), "--method", "gptq", "--group-size", "32", "--calibration", str(text), "--windows", "4",
        "--length", "32", "--out", str(out), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["method"]["name"] == "gptq"  # printed once
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    model, tokenizer = lqedu.load_model(out)
    windows = lqedu.token_windows(tokenizer, text.read_text(), length=32, count=4, seed=0)
    alone = lqedu.quantize(lqedu.load_model(two / "dense")[0], GPTQ(group_size=32), windows)
    scales = [quantized_linears(m)["model.layers.0.self_attn.q_proj"].scale for m in (model, alone)]
    assert torch.equal(*scales)
