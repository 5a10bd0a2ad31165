"""Copies of a model share what is large and nothing else."""

from lqedu.models.copying import copy_sharing_tensors
from tests.models.tiny import tiny_model


def test_tensors_and_tokenizer_are_shared_modules_are_not() -> None:
    model = tiny_model("llama")
    model.lqedu_tokenizer = object()
    copy = copy_sharing_tensors(model)
    assert copy.lqedu_tokenizer is model.lqedu_tokenizer
    assert all(a is b for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), copy.buffers(), strict=True))
    assert not set(map(id, model.modules())) & set(map(id, copy.modules()))
    copy.model.layers[0].mlp.up_proj = None
    copy.config.num_hidden_layers = 1
    assert model.model.layers[0].mlp.up_proj is not None and model.config.num_hidden_layers == 3


def test_a_model_without_a_tokenizer_is_copied_too() -> None:
    assert not hasattr(copy_sharing_tensors(tiny_model("opt")), "lqedu_tokenizer")
