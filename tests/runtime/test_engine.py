"""The engine computes what the model of transformers computes: prompts, steps, texts of different lengths, every method."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import lqedu
from lqedu.errors import GridError, UnsupportedModelError, UsageError
from lqedu.methods import RTN, QuIP, SmoothQuant
from lqedu.models.copying import copy_sharing_tensors
from lqedu.runtime import quantize_kv
from lqedu.runtime.decoder import Decoder, decoder_of
from lqedu.runtime.engine import Engine, _rectangles
from lqedu.runtime.packed import _cast
from tests.compare import relative_error
from tests.models.on_kernels import FLIP, METHODS, SIZES
from tests.models.tiny import VOCABULARY, tiny_model, tiny_windows

pytest.importorskip("triton", reason="the engine runs lqedu_kernels, or their references, which need Triton")

LENGTHS = (7, 62, 1, 62)  # two texts are read together, and they cross a page of 64 tokens while they grow
STEPS = 4
ROOM = {"max_position_embeddings": 128}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENGINE_METHODS = [name for name in METHODS if name != "smoothquant tensor"]  # its scales belong to no text


def texts(seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n + STEPS,), generator=generator) for n in LENGTHS]


@torch.no_grad()
def logits_of_model(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """Logits behind each prompt and behind each of the next tokens, ``[texts, steps + 1, vocabulary]``; text by text."""
    device = model.get_input_embeddings().weight.device
    return torch.stack(
        [model(row[None].to(device), use_cache=False).logits[0, -STEPS - 1 :].float().cpu() for row in rows]
    )


def logits_of_engine(decoder: Decoder, rows: Sequence[Tensor], **options: bool) -> Tensor:
    engine = Engine(decoder, [len(row) for row in rows], **options)
    found = [engine.prefill([row[:-STEPS] for row in rows]).float().cpu()]
    for step in range(STEPS):
        engine.tokens.copy_(torch.stack([row[len(row) - STEPS + step] for row in rows]))
        found.append(engine.step().float().cpu().clone())
    return torch.stack(found, 1)


@pytest.fixture(scope="module", params=ENGINE_METHODS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, str]:
    method, operation = METHODS[request.param]
    model = tiny_model("llama", num_hidden_layers=2, **SIZES, **ROOM)
    return lqedu.quantize(model, method, tiny_windows(4, 24)), operation


def test_every_method(pair: tuple[nn.Module, str]) -> None:
    """In float32 on the CPU only the order of sums differs, and the codes that this moves: see FLIP; keys and values have some too."""
    model, operation = pair
    rows, flip = texts(), FLIP[operation]
    flip += FLIP["w4a8"] if hasattr(model, "lqedu_attention") else 0
    decoder = decoder_of(model, torch.float32)
    assert not decoder.notes
    joined = [len(q.parts) for q in (decoder.layers[0].qkv, decoder.layers[0].gate_up)]
    assert joined == [1, 1] or (
        joined == [1, 2] and model.lqedu_method["options"].get("granularity") == "block"
    )  # 192 rows
    assert relative_error(logits_of_engine(decoder, rows), logits_of_model(model, rows)) < flip


def test_every_method_in_float16(pair: tuple[nn.Module, str]) -> None:
    """On a GPU these are the kernels. Bound: three times the distance of the model in float16 from itself in float32."""
    model, operation = pair
    rows, want = texts(), logits_of_model(model, texts())
    half = copy_sharing_tensors(model)
    _cast(half, torch.float16)
    own = relative_error(logits_of_model(half, rows), want)
    moved = copy_sharing_tensors(model).to(DEVICE) if DEVICE.type == "cpu" else _moved(model)
    got = logits_of_engine(decoder_of(moved, torch.float16), rows)
    assert relative_error(got, want) < 3 * own + FLIP[operation]


def _moved(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).to(DEVICE)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "w4a16"])
def test_every_architecture(model_type: str, quantized: bool) -> None:
    model = tiny_model(model_type, **(SIZES | {"head_dim": 48} if model_type == "qwen3" else SIZES), **ROOM)
    model = lqedu.quantize(model, RTN(group_size=32)) if quantized else model
    rows = texts()
    got = logits_of_engine(decoder_of(model), rows)
    assert relative_error(got, logits_of_model(model, rows)) < 1e-5


@pytest.mark.parametrize("options", [
    {"key": 4}, {"key": 8}, {"key": "fp8"}, {"key": 8, "value": 4}, {"key": "fp8", "value": 4}, {"key": 4, "hadamard": True},
    {"key": 4, "centre": True}, {"key": 4, "centre": True, "hadamard": True}, {"key": 16, "hadamard": True},
], ids=str)  # fmt: skip
def test_every_grid_of_keys_and_values(options: dict) -> None:
    model = tiny_model("llama", **SIZES, **ROOM)
    model = quantize_kv(model, **(options | ({"centre": tiny_windows(2, 20)} if "centre" in options else {})))
    rows = texts()
    assert relative_error(logits_of_engine(decoder_of(model), rows), logits_of_model(model, rows)) < FLIP["w4a8"]


def test_rotations_that_depend_on_the_position_alone() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    model = tiny_model("llama", **SIZES, **ROOM, rope_parameters=rope)
    rows = texts()
    assert relative_error(logits_of_engine(decoder_of(model), rows), logits_of_model(model, rows)) < 1e-5


def test_other_linears_of_a_stage_than_the_first() -> None:
    """A layer that stays dense, and one that no kernel reads, among others that one does: products that cannot be joined."""
    four, three = (lqedu.quantize(tiny_model("qwen2", **SIZES, **ROOM), RTN(bits=b, group_size=32)) for b in (4, 3))
    dense = tiny_model("qwen2", **SIZES, **ROOM)
    block = four.model.layers[1]
    block.self_attn.k_proj = dense.model.layers[1].self_attn.k_proj
    block.mlp.up_proj = three.model.layers[1].mlp.up_proj
    decoder = decoder_of(four)
    assert [len(q.parts) for q in (decoder.layers[1].qkv, decoder.layers[1].gate_up)] == [3, 2]
    assert decoder.notes == ("1 linears run as their reference: no kernel reads them",)
    rows = texts()
    assert relative_error(logits_of_engine(decoder, rows), logits_of_model(four, rows)) < 1e-5


def test_rotated_weights_run_as_their_reference() -> None:
    model = lqedu.quantize(tiny_model("llama", **SIZES, **ROOM), QuIP(bits=4), tiny_windows(3, 24))
    decoder, rows = decoder_of(model), texts()
    assert decoder.notes == ("21 linears run as their reference: no kernel reads them",)
    assert relative_error(logits_of_engine(decoder, rows), logits_of_model(model, rows)) < 1e-5


def test_a_text_does_not_see_its_neighbours() -> None:
    model = quantize_kv(tiny_model("llama", **SIZES, **ROOM), 4)
    rows, decoder = texts(), decoder_of(model)
    alone = torch.cat([logits_of_engine(decoder, [row]) for row in rows])
    assert relative_error(logits_of_engine(decoder, rows), alone) < FLIP["w4a8"]


def test_an_engine_can_be_used_again() -> None:
    decoder, rows = decoder_of(tiny_model("llama", **SIZES, **ROOM)), texts()
    engine = Engine(decoder, [len(row) for row in rows])
    first = engine.prefill([row[:-STEPS] for row in rows])
    engine.step()
    with pytest.raises(UsageError, match="call reset"):
        engine.prefill([row[:-STEPS] for row in rows])
    engine.reset()
    assert torch.equal(engine.prefill([row[:-STEPS] for row in rows]), first)


def test_the_model_stays_as_it_is() -> None:
    model = lqedu.quantize(tiny_model("llama", **SIZES, **ROOM), RTN(group_size=32))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits_of_engine(decoder_of(model, torch.float16), texts())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bytes_are_those_of_the_tensors() -> None:
    model = tiny_model("llama", **SIZES, **ROOM)
    decoder = decoder_of(model, torch.float16)
    assert decoder.head is decoder.embedding  # tied
    weights = sum(p.numel() for p in model.parameters())
    assert decoder.nbytes == 2 * weights + 2 * 4 * 128 * 32  # and two float32 tables of 128 positions
    engine = Engine(decoder, [65, 3])
    assert engine.cache.nbytes == 3 * (2 * 2 * 64 * 32 * 2) * 3  # layers, a page of keys and values, pages
    four = Engine(decoder_of(quantize_kv(model, 4), torch.float16), [65, 3])
    assert four.cache.nbytes == 3 * (2 * 2 * 64 * (16 + 4)) * 3


def test_rectangles_hold_every_text_once() -> None:
    lengths = [5, 9000, 5, 1, 4096, 4096, 4096]
    found = list(_rectangles(lengths))
    assert sorted(row for rows in found for row in rows) == list(range(7))
    assert all(len({lengths[row] for row in rows}) == 1 for rows in found)
    assert [4, 5] in found and [6] in found and [1] in found


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_step_is_the_step(pair: tuple[nn.Module, str]) -> None:
    decoder, rows = decoder_of(_moved(pair[0]), torch.float16), texts()
    eager = logits_of_engine(decoder, rows, graph=False)
    assert (
        relative_error(logits_of_engine(decoder, rows, graph=True), eager) < 2.0**-10
    )  # cuBLAS may choose otherwise inside


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "gated MLPs with silu, not 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "not 'dynamic'"),
    ],
)
def test_what_is_not_known_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        decoder_of(tiny_model("llama", **SIZES, **change))


def test_other_architectures_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Llama-like decoders, not 'opt'"):
        decoder_of(tiny_model("opt"))
    with pytest.raises(UnsupportedModelError, match="this model to windows of 8"):
        decoder_of(tiny_model("mistral", **SIZES, sliding_window=8))
    with pytest.raises(UnsupportedModelError, match="float64"):
        decoder_of(tiny_model("llama", **SIZES), torch.float64)


def test_grids_that_no_page_holds_are_refused() -> None:
    model = tiny_model("llama", **SIZES)
    for options, message in (
        ({"key": 3}, "4 or 8 bits or E4M3"), ({"key": 4, "value": 16}, "or both in floating point"),
        ({"key": lqedu.formats.kv.KVInt(4, 0.9), "value": 4}, "by one rule"),
    ):  # fmt: skip
        with pytest.raises(GridError, match=message):
            decoder_of(quantize_kv(model, **options))
    with pytest.raises(GridError, match="a multiple of 32, got 8"):
        decoder_of(quantize_kv(tiny_model("llama"), 4))
    shared = lqedu.quantize(model, SmoothQuant(granularity="tensor", activation="tensor"), tiny_windows(4, 24))
    with pytest.raises(GridError, match="depend on the texts beside it"):
        decoder_of(shared)


def test_prompts_and_steps_that_make_no_sense_are_refused() -> None:
    decoder = decoder_of(tiny_model("llama", **SIZES))
    with pytest.raises(UsageError, match="1 to 64 tokens"):
        Engine(decoder, [65])
    with pytest.raises(UsageError, match="1 to 64 tokens"):
        Engine(decoder, [])
    engine = Engine(decoder, [4, 4])
    row = torch.tensor([3, 4, 5])
    with pytest.raises(UsageError, match="begin them with prefill"):
        engine.step()
    for prompts, message in (
        ([row], "made for 2 texts"), ([row, row.repeat(2)], "prompt 1 has 6 tokens"), ([row, row[:0]], "prompt 1 has 0 tokens"),
        ([row, row.float()], "prompt 1 is not a row of token ids"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            engine.prefill(prompts)
    engine.prefill([row, row[:2]])
    engine.step()
    with pytest.raises(UsageError, match=r"texts of \[4, 3\] tokens that may reach \[4, 4\]"):
        engine.step()
