"""The packed cache: the numbers of the same model without it, the bytes of the formula, and all that generate does with one."""

import itertools

import pytest
import torch
import transformers
from transformers import DynamicCache

import lqedu
from lqedu.errors import CalibrationError, GridError, UnsupportedModelError, UsageError
from lqedu.evaluation.roofline import ModelShape, kv_bytes_per_token
from lqedu.formats.kv import Codes, KVFloat8, KVInt
from lqedu.methods import RTN, QuaRot, SpinQuant
from lqedu.models.anatomy import block_list
from lqedu.runtime import PackedCache, quantize_kv
from lqedu.runtime import attention as module
from lqedu.runtime.attention import AttentionPath, attend_codes
from lqedu.runtime.kv_cache import key_means
from tests.compare import relative_error
from tests.models import tiny
from tests.models_tiny import ARCHITECTURES, tiny_model, tiny_windows
from tests.problems import seeded

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CASES = {
    "KV16": {"key": 16},
    "KV16, Hadamard": {"key": 16, "hadamard": True},
    "KV8": {"key": 8},
    "KV4, Hadamard": {"key": KVInt(4, 0.95, "integer"), "hadamard": True},
    "FP8": {"key": "fp8"},
    "K3V16": {"key": 3, "value": 16},
    "K16V4": {"key": 16, "value": 4, "hadamard": True},
    "KV4, centred, Hadamard": {"key": 4, "hadamard": True, "centre": tiny_windows(3, 11)},
    "FP8, static": {"key": "fp8-static", "calibration": tiny_windows(3, 11)},
    "K FP8 static, centred, V4": {
        "key": "fp8-static", "value": 4, "hadamard": True, "centre": tiny_windows(3, 11), "calibration": tiny_windows(3, 11),
    },
}  # fmt: skip


@pytest.fixture(params=CASES, ids=str)
def options(request):
    return CASES[request.param]


def _steps(model, windows, cache, sizes):
    """Logits of windows that a model reads in pieces, with a cache."""
    logits = []
    for piece in windows.split(sizes, dim=1):
        logits.append(model(piece, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


# --- attention on codes -----------------------------------------------------------------------------------------------


def _problem(tokens, stored, *, heads=6, kv_heads=2, size=16, seed=0):
    g = seeded(seed)
    query = torch.randn(3, heads, tokens, size, generator=g, dtype=torch.float64)
    key, value = (torch.randn(3, kv_heads, stored, size, generator=g) * 2 + 1 for _ in range(2))
    return query, key, value


def _oracle(query, key, value, mask, scaling):
    """Dequantize, repeat heads, mask, softmax, sum, in float64."""
    groups = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ k.mT * scaling
    scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    "grids", [(KVInt(4), KVInt(4)), (KVInt(8), KVInt(3)), (KVFloat8(), KVInt(4)), (None, KVInt(2))]
)
@pytest.mark.parametrize(("tokens", "stored"), [(1, 9), (3, 9), (7, 7)])
@pytest.mark.parametrize("kind", ["causal", "bool", "additive", "by head"])
def test_attention_on_codes_is_attention_on_what_they_stand_for(grids, tokens, stored, kind):
    query, key, value = _problem(tokens, stored)
    path = AttentionPath(key=grids[0], value=grids[1])
    codes = path.unpack(*path.pack(key, value), like=query.float())
    causal = torch.ones(tokens, stored, dtype=torch.bool).tril(stored - tokens)
    mask = {
        "causal": None,
        "bool": causal & (torch.arange(stored) >= torch.tensor([0, 1, 2])[:, None, None, None])
        | (torch.arange(stored) == stored - 1),
        "additive": torch.randn(3, 1, tokens, stored, generator=seeded(4)),
        "by head": causal | (torch.rand(3, 6, tokens, stored, generator=seeded(5)) < 0.5),
    }[kind]
    got = attend_codes(query, *codes, mask, scaling=0.3)
    values = [Codes(*(part if part is None else part.double() for part in one)).values() for one in codes]
    want = _oracle(query, *values, causal if mask is None else mask, 0.3)
    for one, stored in zip(values, path.store(key, value), strict=True):
        assert relative_error(stored, one) < 1e-7
    assert got.dtype == torch.float64 and relative_error(got, want) < 1e-12
    half = attend_codes(query.half(), *codes, mask, scaling=0.3)
    assert half.dtype == torch.float16 and relative_error(half.double(), want) < 5e-3


def test_the_scaling_is_that_of_the_head_size():
    query, key, value = _problem(1, 5)
    codes = [grid.quantize(x) for grid, x in ((KVInt(4), key), (KVInt(4), value))]
    assert torch.equal(attend_codes(query, *codes), attend_codes(query, *codes, scaling=0.25))


def test_a_query_that_may_read_nothing_is_not_a_number_that_spreads():
    query, key, value = _problem(2, 5)
    codes = [KVInt(4).quantize(x) for x in (key, value)]
    mask = torch.ones(3, 1, 2, 5, dtype=torch.bool)
    mask[0, :, 0] = False
    assert bool(torch.isfinite(attend_codes(query, *codes, mask)).all())


@torch.no_grad()
def test_few_queries_attend_on_codes_and_many_on_what_they_stand_for(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "attend_codes", lambda *a, **k: calls.append(a[0].shape[2]) or attend_codes(*a, **k))
    model = quantize_kv(tiny_model(), 4)  # 2 query heads a key head, 16 features a head
    cache = PackedCache(model)
    _steps(model, tiny_windows(), cache, [8, 5, 1, 18])
    assert calls == [5, 5, 1, 1]  # 10 rows and 2, fewer than 2/3 of 16 features; both blocks
    _steps(quantize_kv(tiny_model(), 16), tiny_windows(), PackedCache(quantize_kv(tiny_model(), 16)), [31, 1])
    assert len(calls) == 4  # floats are nothing to unpack


# --- the same numbers with it, without it, and with another cache -----------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_model_computes_the_same_with_any_cache_or_none(architecture, options):
    # in float64 no code flips because a product was summed in another order
    model, windows = quantize_kv(tiny_model(architecture).double(), **options), tiny_windows()
    want = model(windows, use_cache=False).logits
    assert relative_error(model(windows, past_key_values=PackedCache(model)).logits, want) < 1e-5
    assert relative_error(_steps(model, windows, PackedCache(model), [20, 3, 1, 1, 7]), want) < 1e-5
    assert relative_error(_steps(model, windows, DynamicCache(), [20, 3, 1, 1, 7]), want) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sixteen_bits_are_transformers_token_for_token(architecture):
    model, prompt = tiny_model(architecture), tiny_windows(3, 9)
    ours = quantize_kv(model, 16)
    got = ours.generate(prompt, past_key_values=PackedCache(ours), **GREEDY)
    assert torch.equal(got, model.generate(prompt, **GREEDY))
    with torch.no_grad():
        assert torch.equal(ours(prompt, past_key_values=PackedCache(ours)).logits, model(prompt).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generated_tokens_do_not_depend_on_the_cache(architecture, options):
    model, prompt = quantize_kv(tiny_model(architecture), **options), tiny_windows(2, 5)
    packed = model.generate(prompt, past_key_values=PackedCache(model), **GREEDY)
    assert torch.equal(packed, model.generate(prompt, **GREEDY))
    assert torch.equal(packed, model.generate(prompt, use_cache=False, **GREEDY))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 4},
        {"prompt_lookup_num_tokens": 3},  # proposes tokens and takes back those that were wrong
    ],
    ids=["beams", "returned beams", "sampling", "samples", "assisted"],
)
@pytest.mark.parametrize("bits", [16, 4])
def test_searches(settings, bits):
    model = quantize_kv(tiny_model(), bits)
    prompt = tiny_windows(1, 6).repeat(1, 3)
    options = GREEDY | settings

    def generate(**cache):
        transformers.set_seed(0)
        return model.generate(prompt, **options, **cache)

    assert torch.equal(generate(past_key_values=PackedCache(model)), generate(past_key_values=DynamicCache()))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
@torch.no_grad()
def test_left_padding_changes_nothing(architecture, options):
    model = quantize_kv(tiny_model(architecture), **options)
    texts = [tiny_windows(1, length, seed=length)[0] for length in (3, 7, 12)]
    batch, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, text in enumerate(texts):
        batch[row, 12 - len(text) :], mask[row, 12 - len(text) :] = text, 1
    together = model.generate(batch, attention_mask=mask, past_key_values=PackedCache(model), **GREEDY)
    for row, text in enumerate(texts):
        alone = model.generate(text[None], past_key_values=PackedCache(model), **GREEDY)
        assert torch.equal(together[row, 12:], alone[0, len(text) :])


@torch.no_grad()
def test_the_future_is_not_read():
    model, windows = quantize_kv(tiny_model(), 4, hadamard=True), tiny_windows()
    later = windows.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 97
    for sizes in ([32], [5, 5, 5, 17]):
        a, b = (_steps(model, x, PackedCache(model), sizes) for x in (windows, later))
        assert torch.equal(a[:, :7], b[:, :7]) and not torch.equal(a[:, 7:], b[:, 7:])


@torch.no_grad()
def test_a_sliding_window_is_kept():
    model = tiny_model("mistral")
    model.config.sliding_window = 6
    ours = quantize_kv(model, 16)
    assert (
        relative_error(_steps(ours, tiny_windows(), PackedCache(ours), [9, 1, 1, 21]), model(tiny_windows()).logits)
        < 1e-5
    )


@pytest.mark.parametrize(
    "method",
    [
        RTN(bits=8, group_size=32, kv_bits=4),
        QuaRot(rounding="nearest"),
        SpinQuant(steps=0, rounding="nearest", windows_per_step=4),
    ],
    ids=lambda m: m.name,
)
@torch.no_grad()
def test_methods_that_quantize_keys_and_values(method):
    model = lqedu.quantize(tiny_model(), method, tiny_windows())
    assert model.lqedu_attention.key.bits == method.kv_bits == 4
    cache = PackedCache(model)
    got = _steps(model, tiny_windows(), cache, [17, 1, 14])
    assert relative_error(got, model(tiny_windows(), use_cache=False).logits) < 1e-4
    assert cache.nbytes == 2 * 2 * 4 * 2 * 32 * (8 + 4)


# --- a constant that softmax cannot see -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_floats_less_their_mean_give_the_same_logits(architecture):
    model = tiny_model(architecture)
    ours = quantize_kv(model, 16, centre=tiny_windows(3, 11))
    mean = ours.model.layers[0].self_attn.lqedu_key_mean if architecture != "opt" else None
    assert mean is None or (mean.shape[0] == model.config.num_key_value_heads and mean.abs().max() > 0.01)
    assert relative_error(ours(tiny_windows()).logits, model(tiny_windows()).logits) < 1e-5


@torch.no_grad()
def test_means_are_those_of_keys_behind_rope():
    from lqedu.calibration.capture import block_inputs, run_block
    from lqedu.models.anatomy import block_list
    from lqedu.transforms.smooth_attention import attention_heads

    model = tiny_model("qwen3").double()
    hidden, kwargs = block_inputs(model, tiny_windows(3, 11))
    for block, mean in zip(block_list(model), key_means(model, tiny_windows(3, 11)), strict=True):
        want = attention_heads(block, hidden, kwargs).key.mean((0, 2))[:, None]
        assert mean.dtype == torch.float32 and relative_error(mean, want) < 1e-6
        hidden = run_block(block, hidden, kwargs)


@torch.no_grad()
def test_a_constant_in_the_keys_costs_nothing_once_it_is_taken_off():
    """A bias on the pair of channels that turns least: four bits lose it all, four bits of centred keys hardly anything."""
    model = tiny.tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e9})
    windows, size = tiny.tiny_windows(), model.config.head_dim
    clean = model(windows).logits
    spoiled = quantize_kv(model, 4)(windows).logits
    for block in model.model.layers:
        bias = torch.zeros(model.config.num_key_value_heads, size)
        bias[:, -1] = 100.0
        block.self_attn.k_proj.bias = torch.nn.Parameter(bias.flatten())
    biased = model(windows).logits
    assert relative_error(biased, clean) < 0.01
    centred = relative_error(quantize_kv(model, 4, centre=windows)(windows).logits, biased)
    assert centred < 2 * relative_error(spoiled, clean)
    assert relative_error(quantize_kv(model, 4)(windows).logits, biased) > 3 * centred


@torch.no_grad()
def test_another_cache_forgets_the_means():
    ours = quantize_kv(tiny_model(), 4, centre=tiny_windows(3, 11))
    again = quantize_kv(ours, 4)
    assert not any("key_mean" in name for name, _ in again.named_buffers())
    assert torch.equal(again(tiny_windows()).logits, quantize_kv(tiny_model(), 4)(tiny_windows()).logits)


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("key", "value"), [*itertools.product((16, 8, 4, 3, "fp8"), (16, 4))])
@torch.no_grad()
def test_bytes_are_counted(architecture, key, value):
    model = quantize_kv(tiny_model(architecture), key, value)
    cache, config = PackedCache(model), model.config
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    _steps(model, tiny_windows(3, 11), cache, [5, 1, 5])
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    vector = {16: 16 * 4, 8: 16 + 4, 4: 8 + 4, 3: 6 + 4, "fp8": 16 + 2}
    assert cache.nbytes == config.num_hidden_layers * 3 * 11 * kv_heads * (vector[key] + vector[value])
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_bytes_equal_the_formula_of_chapter_1(bits):
    model = quantize_kv(tiny_model(), bits)
    cache = PackedCache(model)
    model(tiny_windows(3, 11), past_key_values=cache)
    assert cache.nbytes == 3 * 11 * kv_bytes_per_token(ModelShape.from_config(model.config), bits=bits)


@torch.no_grad()
def test_a_record_is_written_once_and_never_changes():
    model = quantize_kv(tiny_model(), 4)
    cache = PackedCache(model)
    model(tiny_windows()[:, :9], past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    _steps(model, tiny_windows()[:, 9:], cache, [1, 22])
    for layer, old in zip(cache.layers, before, strict=True):
        assert layer.keys.dtype == torch.uint8 and layer.keys.shape == (4, 2, 32, 12)
        assert torch.equal(layer.keys[:, :, :9], old)


@pytest.mark.parametrize("bits", [16, 4])
@torch.no_grad()
def test_taking_back_repeating_choosing_and_reordering(bits):
    model, windows = quantize_kv(tiny_model().double(), bits), tiny_windows()
    want = model(windows, use_cache=False).logits
    cache = PackedCache(model)
    _steps(model, windows[:, :12], cache, [12])
    cache.crop(-3)
    assert cache.get_seq_length() == 9
    assert relative_error(_steps(model, windows[:, 9:20], cache, [1, 10]), want[:, 9:20]) < 1e-5
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 7]))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    rows = torch.tensor([3, 0, 1])
    assert relative_error(_steps(model, windows[rows, 20:], cache, [1, 11]), want[rows, 20:]) < 1e-5
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    assert relative_error(_steps(model, windows, cache, [32]), want) < 1e-5


def test_going_on_where_an_earlier_call_ended():
    model, prompt = quantize_kv(tiny_model(), 4), tiny_windows(1, 6)
    cache = PackedCache(model)
    first = model.generate(prompt, past_key_values=cache, **GREEDY)
    more = model.generate(torch.cat([first, tiny_windows(1, 4, seed=3)], 1), past_key_values=cache, **GREEDY)
    assert torch.equal(more, model.generate(more[:, :-8], **GREEDY))


# --- models and refusals ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_model_is_not_changed():
    model = tiny_model()
    want = model(tiny_windows()).logits
    ours = quantize_kv(model, 3)
    assert model.config._attn_implementation != ours.config._attn_implementation
    assert torch.equal(model(tiny_windows()).logits, want) and not hasattr(model, "lqedu_attention")
    assert all(a is b for a, b in zip(model.parameters(), ours.parameters(), strict=True))
    assert relative_error(ours(tiny_windows()).logits, want) > 1e-3
    again = quantize_kv(ours, 16)
    assert torch.equal(again(tiny_windows()).logits, want) and ours.lqedu_attention.key == KVInt(3)


def test_refusals():
    with pytest.raises(UsageError, match="quantize_kv"):
        PackedCache(tiny_model())
    with pytest.raises(GridError, match="keys and values take"):
        quantize_kv(tiny_model(), 5.5)
    with pytest.raises(UnsupportedModelError, match="not supported"):
        quantize_kv(
            transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)), 4
        )
    bad = {"no tokens": torch.zeros(0, 5, dtype=torch.long), "vocabulary": torch.full((1, 5), 10**6)}
    bad |= {"int64 token ids": torch.zeros(2, 5), "shape": [1, 2], r"\[windows": torch.zeros(2, 5, dtype=torch.bool)}
    for match, text in bad.items():
        with pytest.raises(CalibrationError, match=match):
            quantize_kv(tiny_model(), 4, centre=text)
    with pytest.raises(GridError, match="hadamard is True or False"):
        quantize_kv(tiny_model(), 4, hadamard="yes")
    for nothing in (None, 3, "gpt2"):
        with pytest.raises(UnsupportedModelError, match="a model of transformers"):
            quantize_kv(nothing, 4)
    broken = tiny_model()
    broken.model.layers[0].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="mean key is not finite"):
        quantize_kv(broken, 4, centre=tiny_windows())
    four, eight, floats = (quantize_kv(tiny_model(), bits) for bits in (4, 8, 16))
    for model, other in ((four, eight), (eight, floats), (floats, four)):
        with pytest.raises(GridError, match="made for this model"), torch.no_grad():
            model(tiny_windows(), past_key_values=PackedCache(other))


@torch.no_grad()
def test_a_cache_of_another_path_is_refused_even_where_its_records_have_the_same_size():
    model, text = tiny_model(), tiny_windows(3, 11)
    ways = {
        "plain": {},
        "Hadamard": {"hadamard": True},
        "centred": {"centre": text},
        "centred by another text": {"centre": text.flip(1)},
        "integer zero point": {"key": KVInt(4, zero_point="integer")},
    }
    models = {name: quantize_kv(model, **{"key": 4} | options) for name, options in ways.items()}
    for (a, reader), (b, maker) in itertools.product(models.items(), repeat=2):
        cache = PackedCache(maker)
        if a == b:
            reader(tiny_windows(), past_key_values=cache)
            reader(tiny_windows()[:, :3], past_key_values=cache)
            continue
        with pytest.raises(GridError, match="packed for a model that stores them otherwise"):
            reader(tiny_windows(), past_key_values=cache)
    moved = quantize_kv(model, 4, centre=text)
    cache = PackedCache(moved)
    moved.double().float()  # its means are new tensors of the same numbers
    moved(tiny_windows(), past_key_values=cache)


@torch.no_grad()
def test_a_cache_of_another_size_is_refused():
    model = quantize_kv(tiny_model(), 4)
    cache = PackedCache(model)
    model(tiny_windows()[:2], past_key_values=cache)
    with pytest.raises(UsageError, match="holds 2 texts and is given 1"):
        model(tiny_windows()[:1], past_key_values=cache)
    short = tiny.tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(UsageError, match="made for 1 layers"):
        model(tiny_windows(), past_key_values=PackedCache(quantize_kv(short, 4)))


def test_shapes_that_do_not_fit_are_refused():
    query, key, value = _problem(2, 5)
    codes = [KVInt(4).quantize(x) for x in (key, value)]
    for wrong in (query[:, :5], query[..., :8], query[:2]):
        with pytest.raises(UsageError, match="do not fit"):
            attend_codes(wrong, *codes)
    with pytest.raises(UsageError, match="do not fit"):  # causal, and fewer keys than queries
        attend_codes(query, *(KVInt(4).quantize(x[:, :, :1]) for x in (key, value)))


def test_heads_without_a_hadamard_matrix_are_refused_at_once():
    model = tiny.tiny_model("llama", head_dim=6)
    with pytest.raises(UsageError, match="order 6 is known"):
        quantize_kv(model, 4, hadamard=True)
    assert quantize_kv(model, 4)(tiny.tiny_windows()).logits.isfinite().all()


# --- constants of a block -----------------------------------------------------------------------------------------------


def test_constants_take_the_largest_of_a_text_to_448():
    """Against the keys and values of a plain cache; and rounding to FP16 never cuts the largest off."""
    model, windows = tiny_model(), tiny_windows(3, 11)
    stored = quantize_kv(model, "fp8-static", calibration=windows)
    cache = DynamicCache()
    model(windows, past_key_values=cache, use_cache=True)
    for block, layer in zip(block_list(stored), cache.layers, strict=True):
        constants = module.constants_of(block.self_attn)
        for scale, seen in ((constants.key_scale, layer.keys), (constants.value_scale, layer.values)):
            want = float(seen.abs().max()) / 448
            assert want <= float(scale) <= want * (1 + 2**-10) and torch.equal(scale, scale.half().float())


def test_constants_need_a_text_and_an_engine_refuses_them():
    model = tiny_model()
    with pytest.raises(CalibrationError, match="fitted to a text; pass calibration=windows"):
        quantize_kv(model, "fp8-static")
    with pytest.raises(GridError, match=r"constants of their block; use generate of transformers with a PackedCache"):
        lqedu.generate(quantize_kv(model, "fp8-static", calibration=tiny_windows()), torch.tensor([1, 2]))
    one, other = (quantize_kv(model, "fp8-static", calibration=tiny_windows(3, 11, seed=s)) for s in (0, 1))
    cache = PackedCache(one)
    one(tiny_windows(1, 5), past_key_values=cache)
    with pytest.raises(GridError, match="packed for a model that stores them otherwise"):
        other(tiny_windows(1, 1), past_key_values=cache)
