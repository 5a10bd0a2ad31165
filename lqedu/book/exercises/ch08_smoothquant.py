"""Checkers of chapter 08-smoothquant."""

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.formats import IntGrid, ScaleConvention
from lqedu.formats.activation import ActivationGrid
from lqedu.rounding import nearest
from lqedu.runtime.integer import integer_linear
from lqedu.transforms.smoothing import channel_max, smoothing_scales


def _activations(tokens: int, features: int, seed: int) -> torch.Tensor:
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))
    x[:, 1] *= 30
    return x


@exercise("08-smoothquant.1", "predict how many codes the median channel of a loud token can have")
def _codes(answer):
    x = torch.tensor([[40.0, *torch.linspace(-1, 1, 1001).tolist()]])
    grid = ActivationGrid(8)
    want = len(grid.encode(x, *grid.fit(x))[0, 1:].unique())
    assert int(answer) == answer and int(answer) == want, (
        f"{answer} is not it: the step is 40/127, so ±1 is how many steps from zero, and which integers are in reach?"
    )


@exercise("08-smoothquant.2", "the scale of a stage from the ranges of its activations and of all its weights")
def _scale(fn):
    for features, alpha, seed in ((6, 0.5, 1), (9, 0.85, 2), (9, 0.0, 3), (4, 1.0, 4)):
        g = torch.Generator().manual_seed(seed)
        x, weights = _activations(20, features, seed), [torch.randn(n, features, generator=g) for n in (3, 5, 1)]
        want = smoothing_scales(x.abs().amax(0), channel_max(weights), alpha)
        expect_close(fn(x.abs().amax(0), weights, alpha), want, name=f"s at α = {alpha}", atol=1e-4)


@exercise("08-smoothquant.3", "find the mistake in the epilogue of an integer product with zero points")
def _epilogue(fn):
    for tokens, features, outs, seed in ((3, 5, 4, 5), (2, 40, 3, 6)):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, features, generator=g).relu() + 0.1
        weight = nearest(
            torch.randn(outs, features, generator=g), IntGrid(8, True, convention=ScaleConvention.MAX_CODE)
        )[0]
        grid = ActivationGrid(8, symmetric=False)
        scale, zero = grid.fit(x)
        codes = grid.encode(x, scale, zero)
        got = fn(codes.long(), scale, zero.long(), weight.codes.long(), weight.scale.float())
        expect_close(got, integer_linear(codes, scale, zero, weight), name="y", atol=1e-4)


@exercise("08-smoothquant.4", "the longest sum of products that an accumulator holds")
def _longest(fn):
    for bits_x, bits_w, bits_sum in ((8, 8, 32), (8, 4, 16), (4, 4, 16), (8, 8, 24), (8, 2, 12)):
        top = 2 ** (bits_x - 1) * 2 ** (bits_w - 1)
        n = 0
        while (n + 1) * top <= 2 ** (bits_sum - 1) - 1 and n < 200_000:
            n += 1
        expect_equal(fn(bits_x, bits_w, bits_sum), n, name=f"inputs for {bits_x} by {bits_w} bits in {bits_sum}")


@exercise("08-smoothquant.5", "a static scale that clips: the least squared error among 80 candidates")
def _static(fn):
    for bits, seed in ((8, 7), (4, 8)):
        x = torch.randn(64, 50, generator=torch.Generator().manual_seed(seed)) ** 3
        top = 2 ** (bits - 1) - 1
        steps = [(1 - i / 100) * float(x.abs().max()) / top for i in range(80)]
        errors = [float((x - s * (x / s).round().clamp(-top - 1, top)).square().sum()) for s in steps]
        got = float(fn(x, bits))
        error = float((x - got * (x / got).round().clamp(-top - 1, top)).square().sum())
        assert error <= errors[0], f"at {bits} bits your scale {got:.4g} is worse than that of the largest value"
        expect_close(got, steps[errors.index(min(errors))], name=f"the scale at {bits} bits", atol=1e-4 * steps[0])
