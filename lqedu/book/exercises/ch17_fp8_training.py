"""Checkers of chapter 17-fp8-training."""

import math

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.formats.smallfloat import E4M3, E5M2
from lqedu.training import fp8_round, scale_of
from lqedu.training.scaling import largest


@exercise("17-fp8-training.1", "predict how far below the largest value a scaled tensor reaches")
def _powers(answer):
    got = tuple(float(v) for v in answer)
    assert len(got) == 2, "answer with two numbers, E4M3 first"
    for value, fmt in zip(got, (E4M3, E5M2), strict=True):
        top, want = math.log2(fmt.max), math.log2(fmt.max) - math.log2(fmt.smallest_subnormal / 2)
        assert abs(value - (want - 1)) > 0.05, f"{fmt.name}: half of the smallest subnormal still rounds up to it"
        normal = top - math.log2(fmt.smallest_normal)
        assert abs(value - normal) > 0.05, f"{fmt.name}: below the smallest normal number there are subnormals"
        assert abs(value - want) < 0.1, (
            f"{fmt.name}: {value:g} is not log2 of {fmt.max:g} minus log2 of half a subnormal"
        )


@exercise("17-fp8-training.2", "the largest loss scale that saturates nothing")
def _loss_scale(fn):
    for amaxes, fmt in (
        ([3e-4, 0.0, 2e-6], E4M3),
        ([1.0, 0.5], E5M2),
        ([448.0 / 2**13, 1e-9], E4M3),
        ([60000.0, 1.0], E5M2),
        ([7e-5] * 3, E5M2),
    ):
        x = torch.tensor(amaxes)
        got, top = float(fn(x, fmt)), float(x.max())
        want = 2.0 ** math.floor(math.log2(fmt.max / top) + 1e-9)
        assert got > 0 and math.log2(got) == round(math.log2(got)), f"{got:g} is not a power of two"
        assert got * top <= fmt.max, f"{got:g} times the largest amax {top:g} is beyond {fmt.max:g}"
        assert got >= want, f"for amaxes {amaxes} in {fmt.name} a scale of {want:g} fits as well, you return {got:g}"


@exercise("17-fp8-training.3", "find the mistake in a backward pass of rounded products")
def _backward(fn):
    for tokens, columns, outs, seed in ((7, 16, 5, 0), (3, 9, 4, 1)):
        g = torch.Generator().manual_seed(seed)
        tensors = [3 * torch.randn(tokens, columns, generator=g), torch.randn(outs, columns, generator=g) / 9]
        tensors.append(1e-5 * torch.randn(tokens, outs, generator=g))
        operands = []
        for tensor, fmt in zip(tensors, (E4M3, E4M3, E5M2), strict=True):
            s = scale_of(largest(tensor), fmt)
            operands += [fp8_round(tensor, s, fmt), s]
        q_x, s_x, q_w, s_w, q_y, s_y = operands
        dx, dw = fn(*operands)
        want = q_y @ q_w
        expect_close(
            dx / (s_y * s_w) / want.abs().max(), want / want.abs().max(), name="dx over its largest", atol=1e-4
        )
        dw = torch.as_tensor(dw)
        wrong = (q_y.T @ q_x) * (s_y * s_w)
        assert dw.shape == wrong.shape, f"dw has shape {list(dw.shape)}, expected {list(wrong.shape)}"
        assert not torch.allclose(dw, wrong, rtol=1e-4, atol=0), "dw has the right direction and the wrong length"
        want = q_y.T @ q_x
        expect_close(
            dw / (s_y * s_x) / want.abs().max(), want / want.abs().max(), name="dw over its largest", atol=1e-4
        )


@exercise("17-fp8-training.4", "predict for how long a spike is remembered")
def _spike(fn):
    for k in (1, 4, 16, 1024):
        saturated, late = (int(v) for v in fn(k))
        assert saturated != k or k == 1, "the amax of the spike is known to the next scale"
        assert saturated == 1, f"with k = {k}, {saturated} steps saturate?"
        assert late != k - 1, f"with k = {k}: in the step after the spike it is the newest of k amaxes; count again"
        expect_equal(late, k, name=f"steps with a scale too large, k = {k}")


@exercise("17-fp8-training.5", "stochastic rounding to a float grid")
def _stochastic(fn):
    for fmt in (E4M3, E5M2):
        grid = fmt.values()
        grid = grid[torch.isfinite(grid)].double().unique()
        g = torch.Generator().manual_seed(2)
        sizes = torch.exp2(torch.empty(200).uniform_(math.log2(fmt.smallest_subnormal) - 3, 5, generator=g))
        x = torch.cat([sizes, -sizes, torch.zeros(1), grid[3:-3:7].float()])
        above = torch.searchsorted(grid, x.double()).clamp(max=len(grid) - 1)
        exact = grid[above] == x.double()
        low, high = grid[torch.where(exact, above, above - 1)], grid[above]
        draws = 400
        u = (torch.arange(draws) + 0.5) / draws
        got = torch.stack([torch.as_tensor(fn(x, torch.full_like(x, float(v)), fmt)).double() for v in u])
        assert got.shape[1:] == x.shape, f"the result has shape {list(got.shape[1:])}, expected {list(x.shape)}"
        near = (got == low) | (got == high)
        if not bool(near.all()):
            i = int((~near).any(0).nonzero()[0])
            value = float(got[:, i][~near[:, i]][0])
            raise AssertionError(
                f"{float(x[i]):.6g} became {value:.6g} in {fmt.name}; its neighbours are {float(low[i]):.6g} and "
                f"{float(high[i]):.6g}: the step below the smallest normal number does not shrink any more"
            )
        off = (got.mean(0) - x.double()).abs() / (high - low).clamp(min=1e-30)
        assert float(off[~exact].max()) < 0.01, (
            "the mean over uniform u is not x: go up with the probability (x - low) / (high - low)"
        )
