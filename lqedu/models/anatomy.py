"""Where the linear layers of a model are, and what feeds them; ``03-bench`` and ``09-invariance``.

A decoder block is a chain of *stages*: groups of linear layers that read the same tensor. One Hessian or one
activation scale serves a stage, and a per-channel scale or a rotation that is applied to its input must be undone in
all its layers at once. Where something in the block produces that input linearly, it can absorb the other half: that is
the stage's *source*.
"""

from dataclasses import dataclass

from torch import nn

from lqedu.errors import UnsupportedModelError


@dataclass(frozen=True)
class Stage:
    """Linear layers of a block that read one tensor.

    Attributes:
        linears: their names relative to the block, in the order they run.
        source: name, relative to the block, of the operation that can absorb a positive scale of each channel of that
            tensor (in its weight's rows or elements, and its bias), or ``None``. It is one of

            - a norm, whose output *is* the tensor;
            - ``self_attn.v_proj``: attention mixes positions and leaves channels alone. With grouped-query attention
              the heads of a group read one value head, so a scale of o_proj's inputs must be equal within the group;
            - ``mlp.up_proj``: the tensor is its output times the gate's;
            - ``fc1`` of an OPT with ReLU: relu(s * x) = s * relu(x) for s > 0. Scales pass it, rotations do not.
    """

    linears: tuple[str, ...]
    source: str | None

    @property
    def behind_norm(self) -> bool:
        """Whether the source is a norm: the linears read the residual stream through it.

        >>> Stage(("fc1",), "final_layer_norm").behind_norm, Stage(("fc2",), "fc1").behind_norm
        (True, False)
        """
        return self.source is not None and self.source.endswith("norm")


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model by their dotted names.

    Attributes:
        model_type: as in the configuration.
        blocks: the list of decoder blocks.
        embeddings: what adds up to the first block's input.
        final_norm: between the last block and the head.
        head: the output layer; it may share its weight with the embedding.
        stages: of every block, in the order they run.
    """

    model_type: str
    blocks: str
    embeddings: tuple[str, ...]
    final_norm: str
    head: str
    stages: tuple[Stage, ...]


_LLAMA_STAGES = (
    Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Stage(("self_attn.o_proj",), "self_attn.v_proj"),
    Stage(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Stage(("mlp.down_proj",), "mlp.up_proj"),
)
_OPT_STAGES = (
    Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn_layer_norm"),
    Stage(("self_attn.out_proj",), "self_attn.v_proj"),
    Stage(("fc1",), "final_layer_norm"),
)
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")  # Qwen3's norms of q and k sit behind the linears: same stages
SUPPORTED = (*_LLAMA_LIKE, "opt")


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of a causal language model of transformers.

    Raises:
        UnsupportedModelError: its type is not described here; the sentence lists those that are.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"a model of transformers is needed, got {model!r}; lqedu.load_model gives one")
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type in _LLAMA_LIKE:
        anatomy = Anatomy(model_type, "model.layers", ("model.embed_tokens",), "model.norm", "lm_head", _LLAMA_STAGES)
    elif model_type == "opt":
        anatomy = _describe_opt(config)
    else:
        raise UnsupportedModelError(f"model type {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")
    try:
        for name in (anatomy.blocks, *anatomy.embeddings, anatomy.final_norm, anatomy.head):
            model.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {name!r}, which a {model_type} causal language model has; "
            "load it with lqedu.load_model or AutoModelForCausalLM"
        ) from error
    return anatomy


def block_list(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in order (UnsupportedModelError as in :func:`describe`)."""
    blocks = describe(model).blocks  # refuses what is no model before it is asked for anything
    return model.get_submodule(blocks)


def head_dim(model: nn.Module) -> int:
    """Features of one attention head."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of all decoder blocks by dotted name, in the order they run; not the head.

    In a quantized model these are the layers that took their place (UnsupportedModelError as in :func:`describe`).
    """
    anatomy = describe(model)
    return {
        f"{anatomy.blocks}.{index}.{name}": block.get_submodule(name)
        for index, block in enumerate(block_list(model))
        for stage in anatomy.stages
        for name in stage.linears
    }


def _describe_opt(config: object) -> Anatomy:
    if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
        # Its norms sit on the residual stream and can absorb nothing, and projections surround the blocks.
        raise UnsupportedModelError("OPT with norms behind its layers (opt-350m) is not supported; use another size")
    stages = (*_OPT_STAGES, Stage(("fc2",), "fc1" if config.activation_function == "relu" else None))
    decoder = "model.decoder"
    return Anatomy(
        model_type="opt",
        blocks=f"{decoder}.layers",
        embeddings=(f"{decoder}.embed_tokens", f"{decoder}.embed_positions"),
        final_norm=f"{decoder}.final_layer_norm",
        head="lm_head",
        stages=stages,
    )
