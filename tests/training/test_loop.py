"""The small model and its loop: seeded, repeatable, and able to learn."""

import math

import pytest
import torch

from lqedu.errors import CalibrationError, UsageError
from lqedu.formats.smallfloat import E4M3
from lqedu.training import Recipe, byte_batches, convert, evaluate, small_llama, train

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


def _small(seed: int = 0) -> torch.nn.Module:
    return small_llama(seed, hidden_size=32, layers=1)


def test_the_model_follows_from_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = _small(), _small(), _small(1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    deviation = torch.cat([p.flatten() for p in one.parameters() if p.dim() > 1]).detach().std()
    assert float(deviation) == pytest.approx(0.02, rel=0.05)
    assert 0.8e6 < sum(p.numel() for p in small_llama().parameters()) < 1e6


def test_windows_are_runs_of_the_text_s_bytes():
    windows = byte_batches(TEXT, steps=3, batch=2, length=10, seed=1)
    assert windows.shape == (3, 2, 11) and windows.dtype == torch.int64
    for window in windows.flatten(0, 1).tolist():
        assert bytes(window).decode() in TEXT
    assert torch.equal(windows, byte_batches(TEXT, steps=3, batch=2, length=10, seed=1))
    assert not torch.equal(windows, byte_batches(TEXT, steps=3, batch=2, length=10, seed=2))


@pytest.mark.parametrize("recipe", [None, Recipe(), Recipe(scaling="current")], ids=["FP32", "delayed", "current"])
def test_it_learns_repeats_and_leaves_its_model_alone(recipe):
    model = _small() if recipe is None else convert(_small(), recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = byte_batches(TEXT, steps=30, batch=4, length=32)
    seen = []
    first = train(model, batches, warmup=5, learning_rate=1e-2, after_step=lambda step, _: seen.append(step))
    again = train(model, batches, warmup=5, learning_rate=1e-2)
    assert first.losses == again.losses and seen == list(range(30))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert first.losses[0] == pytest.approx(math.log(256), abs=0.1) and first.losses[-1] < 3
    assert evaluate(first.model, batches[0]) < first.losses[0] - 2


def test_a_loss_scale_of_a_power_of_two_changes_nothing_without_rounding():
    batches = byte_batches(TEXT, steps=5, batch=2, length=16)
    plain, scaled = (train(_small(), batches, loss_scale=scale).losses for scale in (1.0, 2.0**12))
    assert plain == scaled


def test_gradients_that_underflow_in_e4m3_move_nothing_and_a_loss_scale_brings_them_back():
    """Scaling the loss down by 2^16 makes every gradient underflow; scaling it up again is all that is needed."""
    model = convert(_small(), Recipe(gradient=E4M3, scaling="none"))
    batches = byte_batches(TEXT, steps=1, batch=4, length=64)

    def moved(loss_scale: float) -> float:
        trained = train(model, batches, loss_scale=loss_scale).model
        one, two = (m.model.layers[0].mlp.down_proj.weight.detach() for m in (model, trained))
        decay = 1 - 2e-3 / 20 * 0.1  # AdamW shrinks weights also where there is no gradient
        return float((two - decay * one).abs().max())

    assert moved(2.0**-16) < 1e-9 < 1e-5 < moved(1.0)


def test_evaluation_does_not_depend_on_the_batch():
    windows = byte_batches(TEXT, steps=1, batch=7, length=16)[0]
    model = _small()
    assert evaluate(model, windows, batch=3) == pytest.approx(evaluate(model, windows), abs=1e-6)


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="multiple of 32"):
        small_llama(hidden_size=40)
    with pytest.raises(UsageError, match="at least 1"):
        byte_batches(TEXT, steps=0)
    with pytest.raises(CalibrationError, match="a window needs 101"):
        byte_batches("short", steps=1, length=100)
    model = _small()
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(UsageError, match="the loss is nan at step 0"):
        train(model, byte_batches(TEXT, steps=1, batch=1, length=8))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: small_llama(hidden_size=64.0), "hidden_size is a whole number, at least 32, got 64.0"),
        (lambda: small_llama(layers=0), "layers is a whole number, at least 1"),
        (lambda: small_llama(0.5), "seed is a whole number"),
        (lambda: byte_batches(TEXT, steps=1.5), "steps is a whole number, at least 1, got 1.5"),
        (lambda: byte_batches(TEXT, steps=1, batch=0), "batch is a whole number, at least 1"),
        (lambda: byte_batches(b"bytes", steps=1), "text is a str, got bytes"),
        (lambda: train(None, torch.zeros(0, 2, 9, dtype=torch.int64)), "that is not empty"),
        (lambda: train(None, torch.zeros(1, 2, 1, dtype=torch.int64)), "as byte_batches makes"),
        (lambda: train(None, torch.zeros(1, 2, 9)), r"got torch.float32 \[1, 2, 9\]"),
        (lambda: train(None, []), "batches is an int64 tensor .* got list"),
        (lambda: evaluate(None, torch.zeros(0, 9, dtype=torch.int64)), "windows is an int64 tensor"),
        (lambda: evaluate(None, byte_batches(TEXT, steps=1)), "windows is an int64 tensor"),
        (lambda: evaluate(None, byte_batches(TEXT, steps=1)[0], batch=0), "batch is a whole number, at least 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_any_work(call, problem):
    with pytest.raises(UsageError, match=problem):
        call()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"learning_rate": math.nan}, "learning_rate is a finite number, at least 0"),
        ({"learning_rate": -1e-3}, "learning_rate is a finite number, at least 0"),
        ({"warmup": -1}, "warmup is a whole number"),
        ({"loss_scale": 0.0}, "loss_scale is a finite number, above 0"),
    ],
)
def test_options_of_training_are_checked(options, problem):
    with pytest.raises(UsageError, match=problem):
        train(_small(), byte_batches(TEXT, steps=1, batch=1, length=8), **options)


def test_a_text_without_bytes_is_too_short():
    with pytest.raises(CalibrationError, match="the text has 0 bytes"):
        byte_batches("", steps=1)
