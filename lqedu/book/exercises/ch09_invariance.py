"""Checkers of chapter 09-invariance."""

import torch
from torch.nn.functional import layer_norm

from lqedu.book.exercises import exercise, expect_close
from lqedu.linalg import fast_hadamard, hadamard_operations


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _orthogonal(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(_random(n, n, seed=seed))[0]


@exercise("09-invariance.1", "predict the additions of one online transform of 14336 features")
def _additions(answer):
    want = hadamard_operations(14336)
    assert int(answer) == want, (
        f"{int(answer):,} is not it: each of 512 small products of 28 signs takes 28 · 27 additions, "
        "and the butterfly over the factor 512 takes one addition a feature and step"
    )


@exercise("09-invariance.2", "fold a norm's gains into a reader and rotate a reader and a writer")
def _pair(fn):
    for n, rows, seed in ((4, 3, 0), (9, 5, 1), (16, 1, 2)):
        w_read, w_write, gain = (_random(*shape, seed=seed) for shape in ((rows, n), (n, rows), (n,)))
        r, x = _orthogonal(n, seed + 10), _random(6, n, seed=seed + 20)
        got = fn(w_read.clone(), gain.clone(), w_write.clone(), r.clone())
        assert isinstance(got, tuple) and len(got) == 2, "return two weights: the reader's and the writer's"
        unit = x / x.square().mean(-1, keepdim=True).sqrt()
        expect_close((unit @ r) @ got[0].T, (unit * gain) @ w_read.T, name="what the reader computes", atol=1e-8)
        z = _random(6, rows, seed=seed + 30)
        expect_close(z @ got[1].T, z @ w_write.T @ r, name="what the writer adds to the stream", atol=1e-8)


@exercise("09-invariance.3", "find the mistake in a rotation of value heads")
def _values(fn):
    for heads, groups, size, seed in ((1, 1, 4, 3), (3, 1, 8, 4), (2, 2, 5, 5)):
        n, width = heads * groups * size, heads * size
        w_v, w_o, x = _random(width, n, seed=seed), _random(n, n, seed=seed + 10), _random(7, n, seed=seed + 20)
        r2 = _orthogonal(size, seed + 30)
        v, o = fn(w_v.clone(), w_o.clone(), r2.clone())

        def layer(w_v, w_o, x=x, heads=heads, groups=groups, size=size):
            values = (x @ w_v.T).unflatten(-1, (heads, size)).repeat_interleave(groups, dim=-2)
            return values.flatten(-2) @ w_o.T

        rotated = (x @ w_v.T).unflatten(-1, (heads, size)) @ r2
        expect_close(x @ v.T, rotated.flatten(-2), name="values", atol=1e-8)
        expect_close(layer(v, o), layer(w_v, w_o), name=f"output for {heads} value heads of {size}", atol=1e-8)


@exercise("09-invariance.4", "a Hadamard transform in n log n additions")
def _transform(fn):
    for n, seed in ((1, 6), (2, 7), (8, 8), (64, 9)):
        x = _random(2, 3, n, seed=seed)
        expect_close(fn(x.clone()), fast_hadamard(x), name=f"the transform of {n} features", atol=1e-9)


@exercise("09-invariance.5", "turn a LayerNorm into an RMSNorm by changing the layer that writes before it")
def _centred(fn):
    for rows, columns, seed in ((4, 6, 11), (9, 3, 12)):
        w, b, x = _random(rows, columns, seed=seed), _random(rows, seed=seed + 10), _random(5, columns, seed=seed + 20)
        got = fn(w.clone(), b.clone())
        assert isinstance(got, tuple) and len(got) == 2, "return a weight and a bias"
        y = x @ got[0].T + got[1]
        want = layer_norm(x @ w.T + b, (rows,), eps=0.0)
        expect_close(y / y.square().mean(-1, keepdim=True).sqrt(), want, name="what follows the norm", atol=1e-7)


@exercise("09-invariance.6", "an input that a given signed Hadamard transform turns into one spike")
def _spike(fn):
    for n, seed in ((8, 13), (36, 14), (64, 15)):
        signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
        x = torch.as_tensor(fn(signs.clone())).double()
        assert x.shape == (n,), f"x has shape {list(x.shape)}, expected [{n}]"
        assert bool((x.abs() == 1).all()), "every entry of x is 1 or -1: nothing in it sticks out"
        y = fast_hadamard(x * signs)
        share = float(y.square().max() / y.square().sum())
        assert share > 1 - 1e-9, f"the largest output holds {share:.1%} of the energy, expected all of it"
