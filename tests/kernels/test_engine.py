"""The engine on the kernels themselves, interpreted or on a GPU: fused steps, joined products, pages, method by method."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lqedu
from lqedu.formats.fp8 import Float8ActivationGrid
from lqedu.models.copying import copy_sharing_tensors
from lqedu.runtime import backend, quantize_kv, quantized_linears
from lqedu.runtime.decoder import decoder_of
from lqedu.runtime.engine import Engine
from lqedu.runtime.packed import _cast, to_kernels
from tests.compare import relative_error
from tests.models.on_kernels import FLIP, METHODS, SIZES
from tests.models.tiny import VOCABULARY, tiny_model, tiny_windows

STEPS = 1
#: Sums in another order move a 16-bit number to its neighbour, 2^-10 away, and that moves what follows; the code of an activation
#: moves by a step then, at most 1/7 of the largest of a token (4 bits). The references are compared with the models of
#: transformers in tests/runtime/test_engine.py.
#: A code of E4M3 is 1/16 to 1/8 of its value from the next, and tensor cores add FP8 products to fewer digits than float32 has, so
#: codes move in most texts: by up to 0.04 of the logits of this small model on an H100, by 0.0009 where none moves.
CLOSE, CLOSE_CODES, CLOSE_FP8 = 2.0**-7, 2.0**-5, 2.0**-4
PICKED = (
    "rtn", "rtn symmetric", "hqq", "smoothquant", "smoothquant static", "quarot", "spinquant", "qqq", "qoq", "qoq channel", "fp8",
    "fp8 block",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run wherever the tensors are: the interpreter takes those of the CPU."""
    monkeypatch.setattr(backend, "runs_kernels", lambda x: x.dtype != torch.float32)


def texts(lengths: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCABULARY, (n + STEPS,), generator=generator) for n in lengths]


@torch.no_grad()
def of_engine(model: nn.Module, rows: list[Tensor], device: torch.device) -> Tensor:
    engine = Engine(decoder_of(copy.deepcopy(model).to(device), torch.float16), [len(row) for row in rows])
    found = [engine.prefill([row[:-STEPS] for row in rows]).float().cpu()]
    for step in range(STEPS):
        engine.tokens.copy_(torch.stack([row[len(row) - STEPS + step] for row in rows]))
        found.append(engine.step().float().cpu().clone())
    return torch.stack(found, 1)


def check(model: nn.Module, device: torch.device, lengths: tuple[int, ...] = (1, 3)) -> None:
    """The same engine on the references, in float16 too: where it rounds, both round; see CLOSE."""
    rows = texts(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "runs_kernels", lambda x: False)
        want = of_engine(model, rows, torch.device("cpu"))
    grids = [layer.path.activation for layer in quantized_linears(model).values() if layer.path.activation is not None]
    allowed = CLOSE_CODES if grids else CLOSE
    if device.type == "cuda" and any(isinstance(grid, Float8ActivationGrid) for grid in grids):
        allowed = CLOSE_FP8  # the interpreter adds in float32
    assert relative_error(of_engine(model, rows, device), want) < allowed


@pytest.mark.parametrize("name", PICKED)
def test_every_method(name: str, device: torch.device) -> None:
    model = tiny_model("qwen2", num_hidden_layers=1, max_position_embeddings=128, **SIZES)
    check(lqedu.quantize(model, METHODS[name][0], tiny_windows(4, 24)), device)


@pytest.mark.parametrize("options", [{"key": 8}, {"key": "fp8"}, {"key": 4, "hadamard": True, "centre": True}], ids=str)
def test_dense_with_quantized_keys_and_values(options: dict, device: torch.device) -> None:
    model = tiny_model("qwen3", num_hidden_layers=1, max_position_embeddings=128, **(SIZES | {"head_dim": 64}))
    model = quantize_kv(model, **(options | ({"centre": tiny_windows(2, 20)} if "centre" in options else {})))
    check(model, device, (2, 64) if options["key"] == 4 else (1, 3))  # the second text begins a page


def test_dense(device: torch.device) -> None:
    check(tiny_model("llama", num_hidden_layers=1, max_position_embeddings=128, **SIZES), device, (2, 64))


@pytest.mark.parametrize("name", ["rtn", "smoothquant static", "quarot", "spinquant", "qoq channel", "fp8 block"])
def test_a_packed_model(name: str, device: torch.device) -> None:
    method, operation = METHODS[name]
    model = lqedu.quantize(tiny_model("llama", num_hidden_layers=1, **SIZES), method, tiny_windows(4, 24))
    ids = tiny_windows(1, 5, seed=5)
    half = copy_sharing_tensors(model)
    _cast(half, torch.float16)
    with torch.no_grad():
        want = model(ids).logits
        got = to_kernels(model).to(device)(ids.to(device)).logits.cpu()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "runs_kernels", lambda x: False)
            own = relative_error(half(ids).logits, want)
    assert relative_error(got, want) < 3 * own + FLIP[operation]
