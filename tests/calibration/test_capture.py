import pytest
import torch

from lqedu.calibration import block_inputs, run_block
from lqedu.errors import UnsupportedModelError
from lqedu.models import block_list, describe, linears
from tests.models.tiny import TYPES, tiny_model, tiny_windows


@pytest.fixture(params=TYPES)
def model(request):
    return tiny_model(request.param)


def run_all(model, windows):
    """The model as the sequence of its parts."""
    anatomy = describe(model)
    hidden, kwargs = block_inputs(model, windows)
    for block in block_list(model):
        hidden = run_block(block, hidden, kwargs)
    with torch.no_grad():
        return model.get_submodule(anatomy.head)(model.get_submodule(anatomy.final_norm)(hidden))


def test_blocks_in_sequence_are_the_model(model):
    windows = tiny_windows()
    with torch.no_grad():
        expected = model(windows, use_cache=False).logits
    torch.testing.assert_close(run_all(model, windows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_blocks_stay_causal(model, attention):
    model.set_attn_implementation(attention)
    windows = tiny_windows()
    changed = windows.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 97
    a, b = run_all(model, windows), run_all(model, changed)
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a[:, 7:], b[:, 7:])


def test_windows_do_not_mix(model):
    windows = tiny_windows()
    torch.testing.assert_close(run_all(model, windows)[1:2], run_all(model, windows[1:2]), rtol=1e-5, atol=1e-5)


def test_nothing_is_cached_and_no_gradient_is_kept(model):
    hidden, kwargs = block_inputs(model, tiny_windows())
    assert kwargs.get("past_key_values") is None
    assert not kwargs.get("use_cache")
    assert not hidden.requires_grad
    assert not run_block(block_list(model)[0], hidden, kwargs).requires_grad


def test_no_block_runs_while_inputs_are_captured(model):
    ran = []
    for block in block_list(model):
        for part in block.modules():
            part.register_forward_hook(lambda module, *_: ran.append(module))
    hidden, _ = block_inputs(model, tiny_windows(3, 11))
    assert hidden.shape == (3, 11, 32)
    assert not ran


def test_each_submodule_runs_once(model):
    counts = dict.fromkeys(linears(model), 0)

    def counting(name):
        def count(*_):
            counts[name] += 1

        return count

    for name, linear in linears(model).items():
        linear.register_forward_hook(counting(name))
    visits = {name: lambda x: None for stage in describe(model).stages for name in stage.linears}
    hidden, kwargs = block_inputs(model, tiny_windows())
    for block in block_list(model):
        hidden = run_block(block, hidden, kwargs, visit=visits)
    assert set(counts.values()) == {1}


def test_visitors_see_what_each_submodule_sees(model):
    hidden, kwargs = block_inputs(model, tiny_windows())
    block = block_list(model)[0]
    names = [name for name, _ in block.named_modules() if name]
    seen, expected = {}, {}
    for name in names:
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: expected.update({name: (args or tuple(kwargs.values()))[0]}),
            with_kwargs=True,
        )
    run_block(block, hidden, kwargs, visit={name: lambda x, name=name: seen.update({name: x}) for name in names})
    assert set(seen) == set(expected)
    assert len(seen) > len(describe(model).stages)
    assert all(seen[name] is expected[name] for name in seen)


def test_a_weight_replaced_by_a_visitor_is_the_one_that_runs(model):
    hidden, kwargs = block_inputs(model, tiny_windows())
    block = block_list(model)[0]
    names = [name for stage in describe(model).stages for name in stage.linears]
    originals = {name: block.get_submodule(name).weight for name in names}
    inputs = {}

    def halving(name):
        def visit(x):
            inputs[name] = x.clone()
            linear = block.get_submodule(name)
            linear.weight = torch.nn.Parameter(linear.weight.detach() / 2)

        return visit

    output = run_block(block, hidden, kwargs, visit={name: halving(name) for name in names})
    # Afterwards the block holds the halved weights: an ordinary pass must agree in its output and in every input.
    again = {}
    expected = run_block(block, hidden, kwargs, visit={name: lambda x, n=name: again.update({n: x}) for name in names})
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    for name in names:
        torch.testing.assert_close(inputs[name], again[name], rtol=0, atol=0)
        block.get_submodule(name).weight = originals[name]
    assert not torch.allclose(output, run_block(block, hidden, kwargs))


def test_inputs_and_modes_are_left_as_they_were(model):
    """In training mode too: dropout is off during the pass, and back on after it."""
    windows = tiny_windows()
    expected = run_all(model, windows)
    model.train()
    block_list(model)[1].eval()
    modes = [part.training for part in model.modules()]
    hidden, kwargs = block_inputs(model, windows)
    before = hidden.clone()
    run_block(block_list(model)[0], hidden, kwargs)
    assert torch.equal(hidden, before)
    assert torch.equal(windows, tiny_windows())
    torch.testing.assert_close(run_all(model, windows), expected, rtol=1e-5, atol=1e-5)
    model.train()
    block_list(model)[1].eval()
    block_inputs(model, windows)
    assert [part.training for part in model.modules()] == modes


def test_hooks_are_gone_even_after_an_error(model):
    def fail(x):
        raise RuntimeError("a visitor failed")

    hidden, kwargs = block_inputs(model, tiny_windows())
    block = block_list(model)[0]
    name = describe(model).stages[0].linears[0]
    with pytest.raises(RuntimeError, match="a visitor failed"):
        run_block(block, hidden, kwargs, visit={name: fail})
    with torch.no_grad():
        model(tiny_windows(), use_cache=False)
    assert not any(part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_blocks_with_different_masks_are_refused(model_type):
    mixed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    model = tiny_model(model_type, **mixed)
    with pytest.raises(UnsupportedModelError, match="at most 8 tokens"):
        block_inputs(model, tiny_windows(2, 9))
    windows = tiny_windows(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(run_all(model, windows), model(windows).logits, rtol=1e-5, atol=1e-5)


def test_a_sliding_window_in_all_blocks_is_kept():
    model = tiny_model("mistral", sliding_window=4)
    windows = tiny_windows()
    with torch.no_grad():
        torch.testing.assert_close(run_all(model, windows), model(windows).logits, rtol=1e-5, atol=1e-5)
