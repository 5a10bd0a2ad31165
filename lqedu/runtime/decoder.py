"""A Llama-like model taken apart into what an engine runs: four products a layer, norms, a table of rotations.

The modules of transformers are read, not called. What is not known here (another activation, sliding windows, scales of RoPE that
depend on the length) is refused: an engine that guesses computes something else. Chapter ``21-serving``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lqedu.errors import UnsupportedModelError
from lqedu.models.anatomy import block_list, describe, head_dim
from lqedu.runtime.attention import MEAN, AttentionPath
from lqedu.runtime.linear import QuantLinear
from lqedu.runtime.paged import append_options
from lqedu.runtime.projection import Projection, part_of

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # angles are a function of the position alone


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder block.

    Attributes:
        input_norm, post_norm: weights of the norms before attention and MLP, ``[hidden]``.
        qkv, o, gate_up, down: the four products.
        head_norms: weights of the norms of each query and key, ``[head_dim]`` (Qwen3).
        key_mean: what is taken off each key, ``[kv_heads, 1, head_dim]``.
    """

    input_norm: Tensor
    qkv: Projection
    o: Projection
    post_norm: Tensor
    gate_up: Projection
    down: Projection
    head_norms: tuple[Tensor, Tensor] | None = None
    key_mean: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Decoder:
    """A model for :class:`lqedu.runtime.engine.Engine`.

    Attributes:
        layers: in order.
        embedding: ``[vocabulary, hidden]``; head: the same shape, maybe the same tensor.
        norm: weight of the last norm.
        cos, sin: of each position, float32 ``[positions, head_dim]``.
        heads, kv_heads: numbers of query and key heads.
        eps: of the norms.
        scaling: of attention scores.
        path: how keys and values are stored; ``None`` for floats.
        notes: what does not run on kernels, a sentence each.
    """

    layers: tuple[Layer, ...]
    embedding: Tensor
    head: Tensor
    norm: Tensor
    cos: Tensor
    sin: Tensor
    heads: int
    kv_heads: int
    eps: float
    scaling: float
    path: AttentionPath | None = None
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.embedding.device

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.cos.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, scales, norms and tables."""
        ends = [self.embedding, self.norm, self.cos, self.sin]
        ends += [] if self.head is self.embedding else [self.head]
        return sum(t.nbytes for t in ends) + sum(_layer_bytes(layer) for layer in self.layers)


def decoder_of(model: nn.Module, dtype: torch.dtype | None = None) -> Decoder:
    """A model, dense or quantized by any method, as an engine runs it.

    Args:
        model: Llama-like, all of it on one device; not changed. Weights of joined products are copies, so memory holds both as
            long as the model lives.
        dtype: of activations: float16 or bfloat16, and on the CPU float32 too; ``None`` is the model's own, float16 for a
            float32 model on a GPU.

    Raises:
        UnsupportedModelError: another architecture, or a feature that is not known here; the sentence names it.
        GridError: keys and values, or inputs of linears, on grids that an engine does not run.
        MissingDependencyError: Triton is not installed.
    """
    check_decoder(model)
    dtype = _dtype(model, dtype)
    anatomy, config, size = describe(model), model.config, head_dim(model)
    path = getattr(model, "lqedu_attention", None)
    append_options(path, size)  # refuses what no page holds
    layers = tuple(_layer(block, dtype) for block in block_list(model))
    embedding = model.get_submodule(anatomy.embeddings[0]).weight.detach()
    head = model.get_submodule(anatomy.head).weight.detach()
    cast = embedding.to(dtype)
    with torch.no_grad():
        positions = torch.arange(config.max_position_embeddings, device=cast.device)[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1, device=cast.device), positions)
    return Decoder(
        layers=layers,
        embedding=cast,
        head=cast if head.data_ptr() == embedding.data_ptr() else head.to(dtype),
        norm=model.get_submodule(anatomy.final_norm).weight.detach().to(dtype),
        cos=cos[0].float().contiguous(),
        sin=sin[0].float().contiguous(),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        eps=config.rms_norm_eps,
        scaling=block_list(model)[0].self_attn.scaling,
        path=path,
        notes=_notes(layers),
    )


def check_decoder(model: nn.Module) -> None:
    """Refuse (UnsupportedModelError) what :func:`decoder_of` does not know; the sentence names it."""
    anatomy, remedy = describe(model), "use generate of transformers for this model"
    if anatomy.model_type == "opt":
        raise UnsupportedModelError(f"the engine runs Llama-like decoders, not 'opt'; {remedy}")
    config = model.config
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"the engine knows gated MLPs with silu, not {config.hidden_act!r}; {remedy}")
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention"} or (window is not None and not kinds and window < config.max_position_embeddings):
        raise UnsupportedModelError(
            f"the engine attends to all tokens, and this model to windows of {window}; {remedy}"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"the engine knows RoPE of the types {', '.join(_ROPE_TYPES)}, not {rope!r}; {remedy}"
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the engine runs on one device, and this model is on {sorted(map(str, devices))}; {remedy}"
        )


def _dtype(model: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    weight = model.get_input_embeddings().weight
    allowed = (torch.float16, torch.bfloat16) + (() if weight.is_cuda else (torch.float32,))
    if dtype is None:
        return weight.dtype if weight.dtype in allowed else torch.float16
    if dtype not in allowed:
        raise UnsupportedModelError(f"the engine computes in {', '.join(map(str, allowed))} here, got {dtype!r}")
    return dtype


def _layer(block: nn.Module, dtype: torch.dtype) -> Layer:
    attention, mlp = block.self_attn, block.mlp

    def joined(*linears: nn.Module) -> Projection:
        return Projection([part_of(linear, dtype) for linear in linears])

    norms = None
    if hasattr(attention, "q_norm"):
        norms = tuple(norm.weight.detach().to(dtype) for norm in (attention.q_norm, attention.k_norm))
    return Layer(
        input_norm=block.input_layernorm.weight.detach().to(dtype),
        qkv=joined(attention.q_proj, attention.k_proj, attention.v_proj),
        o=joined(attention.o_proj),
        post_norm=block.post_attention_layernorm.weight.detach().to(dtype),
        gate_up=joined(mlp.gate_proj, mlp.up_proj),
        down=joined(mlp.down_proj),
        head_norms=norms,
        key_mean=attention._buffers.get(MEAN),
    )


def _notes(layers: tuple[Layer, ...]) -> tuple[str, ...]:
    parts = [p for layer in layers for q in (layer.qkv, layer.o, layer.gate_up, layer.down) for p in q.parts]
    kept = sum(isinstance(part.weight, QuantLinear) for part in parts)
    return (f"{kept} linears run as their reference: no kernel reads them",) if kept else ()


def _layer_bytes(layer: Layer) -> int:
    tensors = [layer.input_norm, layer.post_norm, *(layer.head_norms or ())]
    tensors += [] if layer.key_mean is None else [layer.key_mean]
    products = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return sum(t.nbytes for t in tensors) + sum(product.nbytes for product in products)
