"""Checkers of chapter 05-awq."""

import torch

from lqedu.book.exercises import exercise, expect_close
from lqedu.formats import IntGrid, ScaleConvention
from lqedu.rounding import nearest


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@exercise("05-awq.1", "the scale of every channel from its mean magnitude and an exponent")
def _scale(fn):
    uneven = torch.exp(2 * torch.randn(24, generator=_seeded(0)))
    for a, alpha in ((torch.tensor([4.0, 1.0, 0.25]), 0.5), (uneven, 0.35), (uneven, 0.0), (uneven * 1e-9, 0.95)):
        want = (a**alpha).clamp(min=1e-4)
        want = want / (want.max() * want.min()).sqrt()
        expect_close(fn(a, alpha), want, name=f"scale at alpha={alpha}", atol=1e-5 * float(want.max()))


@exercise("05-awq.2", "the best scale where a step grows with the root mean square of its group")
def _best_scale(fn):
    for columns, seed in ((3, 1), (40, 2)):
        g = _seeded(seed)
        power, spread = (torch.exp(2 * torch.randn(columns, generator=g, dtype=torch.float64)) for _ in range(2))
        s = fn(power, spread)
        assert isinstance(s, torch.Tensor) and s.shape == power.shape and bool((s > 0).all()), (
            f"the answer is one positive scale for each of {columns} channels"
        )
        got = float((s.double() * spread).square().sum() * (power / s.double().square()).sum())
        least = float((power.sqrt() * spread).sum() ** 2)
        assert got < least * (1 + 1e-6), (
            f"with these scales the loss is {got / least:.3f} times the least possible: set the derivative with "
            "respect to one s to zero, and mind both sums"
        )


@exercise("05-awq.3", "fold a scale into a norm that has a bias")
def _fold(fn):
    for tokens, out, columns, seed in ((5, 3, 4, 3), (9, 8, 16, 4)):
        g = _seeded(seed)
        gain, bias = 1 + 0.3 * torch.randn(columns, generator=g), torch.randn(columns, generator=g)
        w, s = torch.randn(out, columns, generator=g), torch.exp(torch.randn(columns, generator=g))
        normed = torch.randn(tokens, columns, generator=g)
        new_gain, new_bias, new_w = fn(gain.clone(), bias.clone(), w.clone(), s)
        want = (normed * gain + bias) @ w.T
        expect_close((normed * new_gain + new_bias) @ new_w.T, want, name="the outputs", atol=1e-4)
        expect_close(new_w, w * s, name="the weight that will be rounded", atol=1e-5)


@exercise("05-awq.4", "one statistic for all query heads that read the same value head")
def _tie(fn):
    for heads, value_heads, size, seed in ((4, 2, 3, 5), (9, 3, 4, 6), (2, 2, 5, 7)):
        a = torch.rand(heads * size, generator=_seeded(seed))
        want = a.view(value_heads, heads // value_heads, size).mean(1, keepdim=True)
        want = want.expand(-1, heads // value_heads, -1).reshape(-1)
        expect_close(fn(a, heads, value_heads), want, name=f"{heads} heads, {value_heads} value heads")


@exercise("05-awq.5", "predict the share of codes that change when every channel is scaled by 4")
def _uniform(answer):
    w = torch.randn(8, 64, generator=_seeded(8))
    grid = IntGrid(3, granularity="group", group_size=32, convention=ScaleConvention.MINMAX)
    share = float((nearest(4 * w, grid)[0].codes != nearest(w, grid)[0].codes).double().mean())
    assert abs(float(answer) - share) < 1e-9, (
        f"the share is not {float(answer):g}: what happens to a group's step when all of its weights grow by 4?"
    )
