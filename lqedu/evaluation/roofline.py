"""How fast could it be? Bytes and operations of a model's matrix products, and the time no machine can beat.

A matrix product moves bytes and does operations; whichever takes longer at the machine's peak is a floor under its time
(the roofline of Williams et al., 2009). Chapter ``01-memory-wall`` derives everything here.
"""

from dataclasses import dataclass
from typing import Any

from lqedu.errors import UsageError


@dataclass(frozen=True)
class ModelShape:
    """The sizes that fix a decoder's bytes and operations.

    Attributes:
        layers, hidden, intermediate: decoder blocks, width of the residual stream, width of the gated MLP.
        heads, kv_heads, head_dim: query heads, key and value heads (fewer under grouped-query attention), their width.
        vocabulary: tokens the model knows.
        tied: whether the output head is the embedding matrix again.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "ModelShape":
        """The shape of a transformers config of a Llama-like model."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads,
            config.num_key_value_heads, head_dim, config.vocab_size, bool(config.tie_word_embeddings),
        )  # fmt: skip

    @property
    def linear_weights(self) -> int:
        """Weights of the blocks' linear layers: what weight quantization shrinks."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the output head, read for every token and usually left in 16 bits."""
        return self.vocabulary * self.hidden

    @property
    def embedding_weights(self) -> int:
        """Weights of the input embedding beyond the head: stored, but a token reads only one row of it."""
        return 0 if self.tied else self.vocabulary * self.hidden


def matmul_ops(m: int, n: int, k: int) -> int:
    """Operations of ``[m, k] x [k, n]``: a multiplication and an addition for each of the ``m * n * k`` terms.

    >>> matmul_ops(1, 4, 8)
    64
    """
    _positive(m=m, n=n, k=k)
    return 2 * m * n * k


def matmul_bytes(
    m: int, n: int, k: int, *, weight_bits: float = 16, activation_bits: float = 16, output_bits: float = 16
) -> float:
    """Fewest bytes a product of ``m`` tokens with a weight ``[n, k]`` moves: each operand once.

    >>> matmul_bytes(1, 4, 8), matmul_bytes(1, 4, 8, weight_bits=4)
    (88.0, 40.0)
    """
    _positive(m=m, n=n, k=k, weight_bits=weight_bits, activation_bits=activation_bits, output_bits=output_bits)
    return (weight_bits * n * k + activation_bits * m * k + output_bits * m * n) / 8


def roofline_time(ops: float, moved: float, *, peak: float, bandwidth: float) -> float:
    """Seconds below which no machine with ``peak`` operations a second and ``bandwidth`` bytes a second can go.

    >>> roofline_time(64, 88, peak=64, bandwidth=44)    # one second of arithmetic, two of waiting for memory
    2.0
    """
    _positive(peak=peak, bandwidth=bandwidth)
    return max(ops / peak, moved / bandwidth)


def kv_bytes_per_token(shape: ModelShape, *, bits: int = 16) -> float:
    """Bytes the cache keeps for one token: a key and a value per layer and KV head.

    Below 16 bits each head's vector carries a float16 scale and zero point.

    >>> llama2_7b = ModelShape(32, 4096, 11008, 32, 32, 128, 32000)
    >>> kv_bytes_per_token(llama2_7b) / 1024       # half a mebibyte a token
    512.0
    """
    _positive(bits=bits)
    vector = shape.head_dim * bits / 8 + (0 if bits >= 16 else 4)
    return 2 * shape.layers * shape.kv_heads * vector


def decode_bytes_per_token(
    shape: ModelShape, *, batch: int, context: int, weight_bits: float = 16, head_bits: float = 16, kv_bits: int = 16
) -> float:
    """Bytes read to decode one token of each of ``batch`` sequences with ``context`` tokens, per token.

    Weights are read once for the batch, the cache once for each sequence; activations are small beside both.
    """
    _positive(batch=batch, weight_bits=weight_bits, head_bits=head_bits)
    if context < 0:
        raise UsageError(f"context is a number of tokens, at least 0, got {context!r}")
    weights = (shape.linear_weights * weight_bits + shape.head_weights * head_bits) / 8
    return weights / batch + context * kv_bytes_per_token(shape, bits=kv_bits)


def decode_ops_per_token(shape: ModelShape, *, context: int) -> int:
    """Operations to decode one token: two for each weight, and for each query head two products with the cache.

    >>> decode_ops_per_token(ModelShape(1, 4, 8, 2, 1, 2, 10), context=0)       # 2 * (144 + 40) weights
    368
    """
    if context < 0:
        raise UsageError(f"context is a number of tokens, at least 0, got {context!r}")
    attention = 4 * shape.layers * shape.heads * shape.head_dim * context
    return 2 * (shape.linear_weights + shape.head_weights) + attention


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"{name} must be positive, got {value!r}")
