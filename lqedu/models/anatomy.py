"""Where the linears of a model are, which of them share an input, and what produces that input.

Everything a method needs to know about an architecture is one row of a table; adding an architecture is adding a row.
Chapter ``03-bench`` shows the table for the bench model.
"""

from dataclasses import dataclass

from torch import nn

from lqedu.errors import UnsupportedModelError


@dataclass(frozen=True)
class Stage:
    """Linears of a block that receive the same input, by names relative to the block.

    Attributes:
        linears: in the order in which the block runs them.
        source: the operation whose output channels are the input's channels, so that it can absorb a positive scale per
            channel: a norm, or the linear before. ``None`` where no single operation does.
    """

    linears: tuple[str, ...]
    source: str | None


@dataclass(frozen=True)
class Anatomy:
    """Dotted names of a model's parts.

    Attributes:
        model_type: the ``model_type`` of its config.
        blocks: the list of decoder blocks.
        embeddings: what turns token ids into the first block's input.
        final_norm, head: what follows the last block.
        stages: the linears of one block, in the order in which they run.
    """

    model_type: str
    blocks: str
    embeddings: tuple[str, ...]
    final_norm: str
    head: str
    stages: tuple[Stage, ...]


_LLAMA_STAGES = (
    Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    # Attention mixes tokens, not channels: o_proj's inputs are v_proj's outputs (repeated over query heads under GQA).
    Stage(("self_attn.o_proj",), "self_attn.v_proj"),
    Stage(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Stage(("mlp.down_proj",), "mlp.up_proj"),  # silu(gate) * up is linear in up
)

_OPT_STAGES = (
    Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn_layer_norm"),
    Stage(("self_attn.out_proj",), "self_attn.v_proj"),
    Stage(("fc1",), "final_layer_norm"),
    Stage(("fc2",), "fc1"),  # relu(s x) = s relu(x) for s > 0
)


def _llama_like(model_type: str) -> Anatomy:
    return Anatomy(model_type, "model.layers", ("model.embed_tokens",), "model.norm", "lm_head", _LLAMA_STAGES)


_KNOWN = {name: _llama_like(name) for name in ("llama", "mistral", "qwen2", "qwen3")} | {
    "opt": Anatomy(
        "opt",
        "model.decoder.layers",
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        "model.decoder.final_layer_norm",
        "lm_head",
        _OPT_STAGES,
    )
}


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of a model.

    Raises:
        UnsupportedModelError: its architecture is not in the table; the sentence lists those that are.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _KNOWN:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; supported: {', '.join(sorted(_KNOWN))}"
        )
    return _KNOWN[model_type]


def block_list(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks."""
    return model.get_submodule(describe(model).blocks)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of all blocks by their full names, in the order in which they run."""
    anatomy = describe(model)
    return {
        f"{anatomy.blocks}.{index}.{name}": block.get_submodule(name)
        for index, block in enumerate(block_list(model))
        for stage in anatomy.stages
        for name in stage.linears
    }
