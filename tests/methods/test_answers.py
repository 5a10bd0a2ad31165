"""What the summary table says of each method agrees with what the method does to a model."""

from dataclasses import fields

import pytest

import lqedu
from lqedu.methods import available
from lqedu.runtime.online import WORK, online_work
from tests.models_tiny import tiny_model, tiny_windows

_SMALL = {"group_size": 32, "steps": 2, "windows_per_step": 2}  # widths of the tiny model, and two steps of training


def _default(cls):
    """The method as it is, less what a tiny model has no room or time for."""
    return cls(**{name: value for name, value in _SMALL.items() if name in {f.name for f in fields(cls)}})


@pytest.mark.parametrize("name", available())
def test_what_runs_online_is_what_a_quantized_model_does(name):
    cls = available()[name]
    quantized = lqedu.quantize(tiny_model(blocks=1), _default(cls), tiny_windows())
    assert online_work(quantized) == cls.answers.online
    assert set(cls.answers.online) <= set(WORK)


def test_a_dense_model_does_nothing_beside_its_products():
    assert online_work(tiny_model(blocks=1)) == ()


def test_an_option_changes_what_runs_online():
    """The claims are of the defaults: what is derived follows the options."""
    model, windows = tiny_model(blocks=1), tiny_windows()
    offline = lqedu.quantize(
        model, lqedu.methods.SpinQuant(steps=0, windows_per_step=4, online=False, kv_bits=None), windows
    )
    assert online_work(offline) == ("quantize inputs",)
    mixed = lqedu.quantize(model, lqedu.methods.RTN(bits=4, group_size=32, activation_bits=8, kv_bits=4))
    assert online_work(mixed) == ("unpack weights to 8 bits", "quantize inputs", "quantize keys and values")


@pytest.mark.parametrize("name", available())
def test_calibration_and_quantized_objects_are_what_the_defaults_ask_for(name):
    cls = available()[name]
    method, says = cls(), cls.answers.calibration
    assert (says == "none") == (not method.uses_calibration) == (not cls.needs_calibration)
    if method.needs_hessian:
        assert "Hessian" in says
    if name in ("rtn", "hqq", "fp8", "smoothquant"):
        assert "Hessian" not in says
    assert ("gradients" in says) == (not cls.learns_from_blocks)
    path = method.attention_path()
    assert ("activations" in cls.quantizes) == (method.activation_grid() is not None)
    assert ("KV cache" in cls.quantizes) == (path is not None and path.key is not None and path.value is not None)
    assert "weights" in cls.quantizes
