"""Checkers of chapter 14-qoq."""

import torch

from lqedu.book.exercises import exercise, expect_close
from lqedu.formats.progressive import ProgressiveGrid
from lqedu.transforms.smooth_attention import apply_rope, attention_scales


@exercise("14-qoq.1", "the scale of every key channel, the same within a RoPE pair")
def _scales(fn):
    for shape, alpha, seed in (((2, 3, 5, 8), 0.5, 0), ((1, 1, 4, 2), 1.0, 1), ((3, 2, 7, 6), 0.3, 2)):
        key = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
        key[:, 0, :, 0], key[:, 0, :, shape[-1] // 2] = 0, 0  # a pair that is never active
        want = attention_scales(key.abs().amax((0, 2)), alpha)
        got = torch.as_tensor(fn(key.clone(), alpha))
        assert got.shape == want.shape, (
            f"λ has one entry a channel of a key head, {list(want.shape)}, got {list(got.shape)}"
        )
        half = shape[-1] // 2
        assert torch.allclose(got[:, :half], got[:, half:]), "channels i and i + d/2 turn together, so they share one λ"
        expect_close(got, want, name=f"λ at α = {alpha}", atol=1e-5)


def _rotary(tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(tokens)[:, None] * 100.0 ** (-torch.arange(size // 2) / (size // 2))
    both = torch.cat([angle, angle], -1)[None]
    return both.cos(), both.sin()


@exercise("14-qoq.2", "find the mistakes in a fold of λ into the projections of queries and keys")
def _fold(fn):
    for heads, kv_heads, size, seed in ((4, 2, 8, 0), (2, 2, 6, 1), (6, 2, 4, 2)):
        g = torch.Generator().manual_seed(seed)
        w_q, w_k = (torch.randn(n * size, 12, generator=g) for n in (heads, kv_heads))
        b_q, b_k = (torch.randn(n * size, generator=g) for n in (heads, kv_heads))
        half = torch.rand(kv_heads, size // 2, generator=g) * 3 + 0.5
        scale, x = torch.cat([half, half], 1), torch.randn(1, 9, 12, generator=g)
        cos, sin = _rotary(9, size)

        def scores(w_q, b_q, w_k, b_k, x=x, size=size, cos=cos, sin=sin, repeats=heads // kv_heads):
            q, k = ((x @ w.T + b).unflatten(-1, (-1, size)).transpose(1, 2) for w, b in ((w_q, b_q), (w_k, b_k)))
            k = apply_rope(k, cos, sin).repeat_interleave(repeats, 1)
            return apply_rope(q, cos, sin) @ k.transpose(-1, -2)

        old = (w_q, b_q, w_k, b_k)
        new = fn(*(t.clone() for t in old), scale)
        name = f"the products of queries and keys, {heads} query heads on {kv_heads} key heads,"
        expect_close(scores(*new), scores(*old), name=name, atol=2e-3)
        largest = (x @ new[2].T + new[3]) * scale.reshape(-1)
        expect_close(largest, x @ w_k.T + b_k, name="the keys, once multiplied by λ,", atol=1e-3)


@exercise("14-qoq.3", "what the last code of a group means in int8")
def _last_code(answer):
    grid = ProgressiveGrid(2)
    channel, group, zero = grid.fit(torch.tensor([[-119.0, 119.0]]))
    assert float(channel) == 1
    want = (15 - int(zero)) * int(group)
    assert float(answer) == want, (
        f"{float(answer):g} is not it: s = round(238 / 15), z = round(119 / s), and code 15 means (15 - z) s"
    )


@exercise("14-qoq.4", "sort the hidden channels of an MLP by their largest |x|")
def _reorder(fn):
    for hidden, wide, seed in ((6, 10, 0), (4, 4, 1), (5, 13, 2)):
        g = torch.Generator().manual_seed(seed)
        gate, up = (torch.randn(wide, hidden, generator=g) for _ in range(2))
        down, x = torch.randn(hidden, wide, generator=g), torch.randn(40, hidden, generator=g)

        def inner(gate, up, x=x):
            return torch.nn.functional.silu(x @ gate.T) * (x @ up.T)

        new = fn(gate.clone(), up.clone(), down.clone(), x.clone())
        assert len(new) == 3, "return the new gate, up and down"
        name = f"the output of the MLP with {wide} hidden channels"
        expect_close(inner(*new[:2]) @ new[2].T, inner(gate, up) @ down.T, name=name, atol=1e-3)
        largest = inner(*new[:2]).abs().amax(0)
        assert bool((largest.diff() <= 0).all()), (
            "the largest |x| of the inputs of down must fall from channel to channel"
        )


@exercise("14-qoq.5", "the strength that lets the largest channel end at a given multiple of the median one")
def _strength(fn):
    for loud, target in ((16.0, 4.0), (9.0, 2.0), (25.0, 1.0), (8.0, 8.0)):
        got = float(fn(loud, target))
        left = loud ** (1 - got)
        assert abs(left - target) < 1e-4 * target, (
            f"with α = {got:.4g} a channel {loud:g} times the median one ends at {left:.4g} times it, not {target:g}"
        )
