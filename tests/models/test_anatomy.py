import pytest
import torch
from torch import nn

from lqedu.errors import UnsupportedModelError
from lqedu.models import Stage, block_list, describe, linears
from tests.models.tiny import TYPES, tiny_model, tiny_windows


@pytest.fixture(params=TYPES)
def model(request):
    return tiny_model(request.param)


def record_inputs_and_outputs(model, windows):
    """What each submodule of the second block receives and returns, by name relative to the block."""
    block = block_list(model)[1]
    inputs, outputs = {}, {}

    def hook(name):
        def keep(module, args, output):
            inputs[name] = args[0] if args else None
            outputs[name] = output

        return keep

    hooks = [part.register_forward_hook(hook(name)) for name, part in block.named_modules() if name]
    with torch.no_grad():
        model(windows, use_cache=False)
    for handle in hooks:
        handle.remove()
    return inputs, outputs


def test_stages_cover_every_linear_of_a_block_once(model):
    for block in block_list(model):
        found = [name for name, part in block.named_modules() if isinstance(part, nn.Linear)]
        staged = [name for stage in describe(model).stages for name in stage.linears]
        assert sorted(staged) == sorted(found)
        assert len(set(staged)) == len(staged)


def test_linears_are_all_but_the_head_in_the_order_they_run(model):
    named = linears(model)
    everything = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    del everything[describe(model).head]
    assert named == everything
    order = []
    hooks = [part.register_forward_hook(lambda *_, name=name: order.append(name)) for name, part in named.items()]
    with torch.no_grad():
        model(tiny_windows(), use_cache=False)
    for handle in hooks:
        handle.remove()
    assert order == list(named)


def test_linears_of_a_stage_read_the_same_tensor(model):
    inputs, _ = record_inputs_and_outputs(model, tiny_windows())
    for stage in describe(model).stages:
        first, *others = (inputs[name] for name in stage.linears)
        assert all(other is first for other in others)
    heads = [inputs[stage.linears[0]] for stage in describe(model).stages]
    assert len({id(head) for head in heads}) == len(heads)  # and different stages read different ones


def test_a_norm_named_as_source_is_the_input(model):
    inputs, outputs = record_inputs_and_outputs(model, tiny_windows())
    for stage in describe(model).stages:
        if stage.behind_norm:
            assert torch.equal(inputs[stage.linears[0]], outputs[stage.source])


def test_stages_behind_a_norm_are_those_whose_source_is_one(model):
    block = block_list(model)[0]
    stages = [*describe(model).stages, Stage(("fc2",), None)]
    norms = [
        stage.source is not None and "Norm" in type(block.get_submodule(stage.source)).__name__ for stage in stages
    ]
    assert [stage.behind_norm for stage in stages] == norms == [True, False, True, False, False]


def test_every_source_absorbs_a_scale_of_its_stage_input(model):
    """Divide the source's channels by s, multiply the stage's columns by s: the logits stay."""
    windows = tiny_windows()
    with torch.no_grad():
        expected = model(windows, use_cache=False).logits
        for block in block_list(model):
            for stage in describe(model).stages:
                source = block.get_submodule(stage.source)
                generator = torch.Generator().manual_seed(7)
                per_source = torch.rand(source.weight.shape[0], generator=generator) + 0.5
                per_input = per_source
                width = block.get_submodule(stage.linears[0]).in_features
                if width != len(per_source):  # grouped-query attention: query heads of a group read one value head
                    head = block.self_attn.head_dim
                    per_input = per_source.view(-1, head).repeat_interleave(width // len(per_source), dim=0).flatten()
                source.weight.div_(per_source.view(-1, *[1] * (source.weight.dim() - 1)))
                if getattr(source, "bias", None) is not None:
                    source.bias.div_(per_source)
                for name in stage.linears:
                    block.get_submodule(name).weight.mul_(per_input)
        torch.testing.assert_close(model(windows, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_parts_are_where_the_anatomy_says(model):
    anatomy = describe(model)
    assert anatomy.model_type == model.config.model_type
    assert model.get_submodule(anatomy.head) is model.get_output_embeddings()
    assert model.get_submodule(anatomy.embeddings[0]) is model.get_input_embeddings()
    assert len(block_list(model)) == model.config.num_hidden_layers


def test_opt_absorbs_no_scale_across_an_activation_that_is_not_homogeneous():
    assert describe(tiny_model("opt", activation_function="gelu")).stages[-1] == Stage(("fc2",), None)
    assert describe(tiny_model("opt")).stages[-1] == Stage(("fc2",), "fc1")


def test_opt_with_norms_behind_its_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="opt-350m"):
        describe(tiny_model("opt", do_layer_norm_before=False))


def test_unknown_type_lists_the_known_ones():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2))
    for call in (describe, block_list, linears):
        with pytest.raises(UnsupportedModelError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3, opt"):
            call(model)
    with pytest.raises(UnsupportedModelError, match="'Linear'"):
        describe(nn.Linear(2, 2))


def test_a_known_type_without_its_head_is_refused(model):
    with pytest.raises(UnsupportedModelError, match="causal language model"):
        describe(model.model)
