import math

import pytest
import torch

import lqedu
import lqedu.evaluation
from lqedu.errors import CalibrationError, UsageError
from lqedu.evaluation import PairedDifference, paired, perplexity
from tests.models.tiny import TYPES, VOCABULARY, tiny_model, tiny_windows


def reference_nll(model, windows):
    """-log p of each next token, one window and one position at a time, in float64."""
    result = []
    for window in windows:
        with torch.no_grad():
            probabilities = model(window[None], use_cache=False).logits[0].double().softmax(-1)
        losses = [-math.log(probabilities[t, window[t + 1]]) for t in range(len(window) - 1)]
        result.append(sum(losses) / len(losses))
    return result


@pytest.mark.parametrize("model_type", TYPES)
def test_equals_the_definition(model_type):
    model, windows = tiny_model(model_type), tiny_windows(5, 11)
    result = perplexity(model, windows)
    expected = torch.tensor(reference_nll(model, windows), dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(result.window_nll, dtype=torch.float64), expected, rtol=1e-5, atol=1e-5)
    assert result.nll == pytest.approx(expected.mean().item(), rel=1e-5)
    assert result.ppl == pytest.approx(math.exp(result.nll))
    assert result.stderr == pytest.approx(expected.std(correction=1).item() / math.sqrt(5), rel=1e-4)
    assert result.tokens == 55


def test_equals_the_loss_of_transformers():
    model, windows = tiny_model("llama"), tiny_windows(4, 20)
    with torch.no_grad():
        assert perplexity(model, windows).nll == pytest.approx(model(windows, labels=windows).loss.item(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_batch_size_changes_nothing(batch_size):
    model, windows = tiny_model("llama"), tiny_windows(7)
    one, other = perplexity(model, windows, batch_size=7), perplexity(model, windows, batch_size=batch_size)
    assert other.window_nll == pytest.approx(one.window_nll, rel=1e-5)
    assert other.windows_sha256 == one.windows_sha256


def test_windows_longer_than_a_chunk():
    model, windows = tiny_model("llama", max_position_embeddings=2048), tiny_windows(2, 1200)
    with torch.no_grad():
        assert perplexity(model, windows).nll == pytest.approx(model(windows, labels=windows).loss.item(), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    model = tiny_model("mistral")
    model.lm_head.weight.data.zero_()
    assert perplexity(model, tiny_windows()).ppl == pytest.approx(VOCABULARY, rel=1e-5)


def test_half_precision_and_noncontiguous_windows():
    model, windows = tiny_model("llama"), tiny_windows(4, 20)
    whole = perplexity(model, windows)
    assert perplexity(model, tiny_windows(4, 20).T.contiguous().T) == whole
    assert perplexity(model.to(torch.bfloat16), windows).nll == pytest.approx(whole.nll, rel=0.02)


def test_one_window_has_no_error_bar():
    assert math.isnan(perplexity(tiny_model("llama"), tiny_windows(1)).stderr)


def test_model_is_left_as_it_was():
    model = tiny_model("opt").train()  # it has dropout
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert perplexity(model, tiny_windows()) == perplexity(model.eval(), tiny_windows())
    model.train()
    perplexity(model, tiny_windows())
    assert all(part.training for part in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_progress_goes_to_stderr(capsys):
    perplexity(tiny_model("llama"), tiny_windows(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "perplexity" in err
    perplexity(tiny_model("llama"), tiny_windows())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_number_is_an_error(bad):
    model = tiny_model("mistral")
    model.lm_head.weight.data[5, 3] = bad
    with pytest.raises(CalibrationError, match=r"for \d of 3 windows .*float32"):
        perplexity(model, tiny_windows())


def test_overflowing_perplexity_is_infinite():
    model = tiny_model("mistral")
    model.lm_head.weight.data.mul_(1e5)
    assert perplexity(model, tiny_windows()).ppl == math.inf


@pytest.mark.parametrize(
    "windows",
    [
        [[1, 2, 3]],
        torch.ones(2, 3),
        torch.ones(2, 3, dtype=torch.int32),
        torch.ones(3, dtype=torch.int64),
        torch.ones(0, 3, dtype=torch.int64),
        torch.ones(3, 1, dtype=torch.int64),
        torch.full((2, 3), VOCABULARY),
        torch.full((2, 3), -1),
    ],
    ids=["list", "float", "int32", "flat", "none", "short", "beyond", "negative"],
)
def test_what_are_no_windows(windows):
    with pytest.raises(UsageError, match="windows"):
        perplexity(tiny_model("llama"), windows)


def test_batch_size_below_one():
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        perplexity(tiny_model("llama"), tiny_windows(), batch_size=0)


def test_paired_removes_what_windows_have_in_common():
    windows = tiny_windows(16, 30)
    model = tiny_model("llama")
    a = perplexity(model, windows)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1.05)
    b = perplexity(model, windows)
    difference = paired(a, b)
    assert difference.delta_nll == pytest.approx(a.nll - b.nll, abs=1e-9)
    assert difference.windows == 16
    deltas = torch.tensor(a.window_nll) - torch.tensor(b.window_nll)
    assert difference.stderr == pytest.approx(deltas.double().std().item() / 4, rel=1e-3)
    assert difference.stderr < 0.5 * math.hypot(a.stderr, b.stderr)
    assert paired(b, a).delta_nll == pytest.approx(-difference.delta_nll)
    assert paired(a, a) == PairedDifference(0.0, 0.0, 16)


@pytest.mark.parametrize("other", [tiny_windows(seed=2), tiny_windows(2), tiny_windows(11, 3)])
def test_other_windows_are_no_pair(other):
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="different windows"):
        paired(perplexity(model, tiny_windows()), perplexity(model, other))


def test_the_same_tokens_in_another_shape_are_no_pair():
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="different windows"):
        paired(perplexity(model, tiny_windows(3, 8)), perplexity(model, tiny_windows(3, 8).reshape(4, 6)))


def test_function_and_module_of_one_name():
    for _ in range(2):
        assert callable(lqedu.perplexity)
        assert callable(lqedu.evaluation.perplexity)
        assert lqedu.perplexity is perplexity
