"""Memory of a running model, predicted from its sizes: weights, pages of keys and values, and what a step needs beside them.

    total = weights + layers · 2 · kv_heads · pages · 64 · bytes(token of a head) + step

Pages hold 64 tokens, so a text pays for a begun page whole. Chapter ``21-serving``; the measurement that this is compared
with is ``lqedu.evaluation.throughput``.
"""

from dataclasses import dataclass

from lqedu.errors import UsageError
from lqedu.evaluation.random_models import Format
from lqedu.evaluation.roofline import ModelShape
from lqedu.options import check_count
from lqedu.runtime.paged import PAGE, pages_of

LIBRARY = 64 << 20  # what cuBLAS takes for itself: 32 MiB for each of the streams that multiply


@dataclass(frozen=True)
class Predicted:
    """Bytes of a model while it generates.

    Attributes:
        weights: of linears, embedding, head, norms and the table of rotations.
        pages: of keys and values.
        step: activations and logits of one step, and the libraries' own.
    """

    weights: int
    pages: int
    step: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.pages + self.step


def weight_bytes(shape: ModelShape, form: Format, *, positions: int = 16384) -> int:
    """Bytes of all weights of a model, in 16 bits where the format says nothing of them.

    >>> from lqedu.evaluation.random_models import FORMATS, SHAPES
    >>> [round(weight_bytes(SHAPES["llama-3-8b"], FORMATS[name]) / 1e9, 2) for name in ("fp16", "w8a8", "w4a8")]
    [16.08, 9.1, 5.72]
    """
    heads, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    products = (
        (heads + 2 * kv, shape.hidden), (shape.hidden, heads), (2 * shape.intermediate, shape.hidden),
        (shape.hidden, shape.intermediate),
    )  # fmt: skip
    linears = shape.layers * sum(form.linear_bytes(*size) for size in products)
    ends = 2 * (shape.head_weights + shape.embedding_weights)
    norms, table = 2 * (2 * shape.layers + 1) * shape.hidden, 2 * 4 * positions * shape.head_dim
    return linears + ends + norms + table


def page_bytes(shape: ModelShape, form: Format) -> int:
    """Bytes of 64 tokens of one text in all layers.

    >>> from lqedu.evaluation.random_models import FORMATS, SHAPES
    >>> [page_bytes(SHAPES["llama-2-7b"], FORMATS[name]) // 64 for name in ("fp16", "w4a8kv4")]      # a token
    [524288, 139264]
    """
    return 2 * shape.layers * shape.kv_heads * PAGE * form.kv_bytes(shape.head_dim)


def step_bytes(shape: ModelShape, tokens: int) -> int:
    """What a step over so many tokens holds at its largest: the MLP's activations, or the logits.

    The stream and its residual stay; beside them lie either gate, up and their product, or the logits of one token a text.
    """
    stream = 2 * shape.hidden
    mlp, logits = 6 * shape.intermediate, 2 * shape.vocabulary + stream
    return tokens * (2 * stream + max(mlp, logits)) + LIBRARY


def predict(shape: ModelShape, form: Format, *, batch: int, tokens: int, positions: int = 16384) -> Predicted:
    """Memory of ``batch`` texts that may grow to ``tokens`` tokens each."""
    pages = batch * pages_of(tokens) * page_bytes(shape, form)
    return Predicted(weight_bytes(shape, form, positions=positions), pages, step_bytes(shape, batch))


def largest_batch(shape: ModelShape, form: Format, *, tokens: int, budget: float = 80e9) -> int:
    """How many texts of ``tokens`` tokens fit into ``budget`` bytes; 0 if the weights alone do not leave room for one.

    >>> from lqedu.evaluation.random_models import FORMATS, SHAPES
    >>> [largest_batch(SHAPES["llama-2-7b"], FORMATS[name], tokens=1024) for name in ("fp16", "w4a8kv4")]
    [123, 532]
    """
    check_count("tokens", tokens, least=1)
    if not budget > 0:
        raise UsageError(f"budget is a number of bytes above 0, got {budget!r}")
    one, two = (predict(shape, form, batch=batch, tokens=tokens).total for batch in (1, 2))
    return max(0, int((budget - (2 * one - two)) // (two - one)))
