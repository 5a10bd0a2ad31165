"""Checkers of chapter 15-kv-cache."""

import math

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.formats.kv import KVInt


def _codes(shape, bits: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    c = torch.randint(0, 2**bits, shape, generator=g).double()
    s = torch.rand(*shape[:-1], 1, generator=g).double() + 0.1
    z = torch.rand(*shape[:-1], 1, generator=g).double() * (2**bits - 1)
    return c, s, z


@exercise("15-kv-cache.1", "attend on codes, with scales and zero points of tokens only")
def _attend(fn):
    for queries, tokens, dim, bits, seed in ((1, 5, 8, 4, 0), (3, 9, 16, 3, 1), (2, 1, 4, 8, 2)):
        q = torch.randn(queries, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 4
        key, value = _codes((tokens, dim), bits, seed + 10), _codes((tokens, dim), bits, seed + 20)
        k, v = (s * (c - z) for c, s, z in (key, value))
        want = (q @ k.T / math.sqrt(dim)).softmax(-1) @ v
        got = fn(q.clone(), key, value)
        expect_close(got, want, name=f"attention of {queries} queries to {tokens} tokens", atol=1e-9)


@exercise("15-kv-cache.2", "predict the bytes that 16 texts of 8,192 tokens take in Llama-3-8B")
def _bytes(answer):
    dim, heads, layers, tokens = 128, 8, 32, 16 * 8192
    want, answer = 2 * layers * heads * (dim // 2 + 4) * tokens, float(answer)
    known = {
        2 * layers * heads * (dim // 2) * tokens: "each token of each head also carries a scale and a zero point",
        layers * heads * (dim // 2 + 4) * tokens: "keys and values are both stored",
        2 * layers * 32 * (dim // 2 + 4) * tokens: "the 32 query heads share 8 key heads, and queries are not stored",
        2 * layers * heads * (dim // 2 + 4) * 8192: "there are 16 texts",
        2 * layers * heads * (2 * dim) * tokens: "that is the cache in FP16",
        2 * layers * heads * (dim // 2 + 2) * tokens: "scale and zero point take two bytes each",
    }
    assert answer == want, f"{answer:,.0f} is not it: " + known.get(
        answer, "count layers, key heads, bytes of 128 codes of 4 bits with what decodes them, keys and values, tokens"
    )


@exercise("15-kv-cache.3", "find the mistake in a grid that loses more than it should")
def _scale_first(fn):
    for bits, seed in ((8, 0), (8, 1), (4, 2)):
        x = torch.randn(300, 64, generator=torch.Generator().manual_seed(seed)) * 3 + 1
        c, s, z = (torch.as_tensor(part).float() for part in fn(x.clone(), bits))
        expect_equal(s, s.half().float(), name="the scale, once rounded to FP16,")
        expect_equal(z, z.half().float(), name="the zero point, once rounded to FP16,")
        codes = KVInt(bits).quantize(x)
        expect_close(s, codes.scale, name="s", atol=0.0)
        expect_close(z, codes.zero, name="z", atol=0.0)
        expect_equal(c, codes.codes, name=f"codes of {bits} bits")


@exercise("15-kv-cache.4", "take from the keys what no softmax sees")
def _centre(fn):
    for tokens, dim, seed in ((6, 8, 0), (33, 16, 1), (1, 4, 2)):
        g = torch.Generator().manual_seed(seed)
        offset = torch.randn(dim, generator=g, dtype=torch.float64) * 20
        k = torch.randn(tokens, dim, generator=g, dtype=torch.float64) + offset
        q = torch.randn(5, dim, generator=g, dtype=torch.float64)
        got = torch.as_tensor(fn(k.clone())).double()
        expect_equal(list(got.shape), list(k.shape), name="the shape of the keys")
        expect_close((q @ got.T).softmax(-1), (q @ k.T).softmax(-1), name="the probabilities", atol=1e-9)
        left = (got.amax(0) + got.amin(0)).abs()
        assert bool((left < 1e-9).all()), (
            "the probabilities are right, but a channel could reach less far: "
            f"one of yours runs from {float(got[:, left.argmax()].amin()):.3g} to {float(got[:, left.argmax()].amax()):.3g}"
        )


@exercise("15-kv-cache.5", "bytes of a token whose keys share scales by channel")
def _kivi(fn):
    for dim, bits, group in ((128, 2, 32), (128, 4, 64), (64, 4, 128)):
        want = dim * bits / 8 + 4 * dim / group
        got = float(fn(dim, bits, group))
        assert got != dim * bits / 8 + 4, (
            "that is a scale for each token; by channel, 128 channels have 128 scales, and a group of tokens shares each"
        )
        assert got != dim * bits / 8 + 4 / group, "every channel has its own scale and zero point"
        expect_close(
            torch.tensor(got), torch.tensor(want), name=f"bytes at {dim}, {bits} bits, groups of {group}", atol=1e-9
        )
