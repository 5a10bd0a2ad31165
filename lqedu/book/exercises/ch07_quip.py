"""Checkers of chapter 07-quip."""

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.integer import ScaleConvention
from lqedu.linalg.orthogonal import KroneckerRotation
from lqedu.rounding import proxy_loss, refine
from lqedu.runtime.incoherent import IncoherentLayout


def _problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    x = torch.randn(4 * columns, columns, generator=g, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=g, dtype=torch.float64)
    return w, x.T @ x / len(x)


@exercise("07-quip.1", "rotate vectors with two small factors and a permutation")
def _rotation(fn):
    for n, seed in ((6, 0), (35, 1), (13, 2)):
        g = torch.Generator().manual_seed(seed)
        r = KroneckerRotation.random(n, g)
        x = torch.randn(2, 3, n, generator=g)
        want = x[..., r.order.long()] @ torch.kron(r.left, r.right).T
        expect_close(fn(x, r.left, r.right, r.order.long()), want, name=f"rotated vectors of {n} features", atol=1e-5)


@exercise("07-quip.2", "the diagonal that minimises the product of the two traces")
def _scales(fn):
    for columns, seed in ((3, 3), (8, 4)):
        w, h = _problem(5, columns, seed)
        got = fn(w, h)
        want = (h.diagonal() / w.square().sum(0)) ** 0.25
        expect_close(got / got.log().mean().exp(), want / want.log().mean().exp(), name="c, up to a factor", atol=1e-6)


@exercise("07-quip.3", "find the mistake in a greedy pass whose loss rises")
def _greedy(fn):
    for shape, bits, seed in (((4, 12), 2, 5), ((7, 33), 3, 6)):
        w, h = _problem(*shape, seed)
        grid = IntGrid(bits, granularity="tensor", scale_dtype=torch.float64)
        scale, zero = grid.fit(w)
        start = QTensor(grid.encode(w, scale, zero), scale, zero, grid)
        want = refine(w, h, start)
        got = fn(w, h, start.codes.double(), float(scale), float(zero), bits)
        expect_equal(got.long(), want.codes.long(), name="codes")
        before, after = (proxy_loss(w - grid.decode(c, scale, zero, w.dtype), h) for c in (start.codes, got))
        assert after <= before, "the loss rose"


@exercise("07-quip.4", "predict the bits per weight of a rotated 8192 x 8192 layer")
def _bits(answer):
    grid = IntGrid(2, granularity="tensor", zero_point="float", convention=ScaleConvention.RMS)
    layout = IncoherentLayout(grid, out_factors=(64, 128), in_factors=(64, 128), rescaled=False)
    want = layout.bits_per_weight((8192, 8192))
    assert abs(float(answer) - want) < 5e-4, (
        f"{float(answer):.4f} is not it: count both rotations, each with two factors of 4 bytes a number "
        "and a permutation of 2 bytes a feature, and divide by all weights"
    )


@exercise("07-quip.5", "the nearest point of the lattice E8")
def _e8(fn):
    for n, seed in ((50, 7), (400, 8)):
        x = 4 * torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        got = fn(x)
        halves = (got * 2).round()
        assert torch.allclose(got * 2, halves), "every entry is an integer or an integer and a half"
        parity = halves.long() % 2
        assert bool((parity == parity[:, :1]).all()), "either all entries of a point are integers or none is"
        assert bool((halves.sum(1).long() % 4 == 0).all()), "the entries of a point add up to an even number"
        want = torch.stack([_coset(x, shift) for shift in (0.0, 0.5)]).amin(0)
        expect_close((got - x).square().sum(1), want, name="squared distance", atol=1e-9)


def _coset(x: torch.Tensor, shift: float) -> torch.Tensor:
    """Squared distance to D8 + shift, by trying the nearest point and each single change of it."""
    base = (x - shift).round()
    other = base + torch.where(x - shift > base, 1.0, -1.0)
    trials = [base] + [torch.where(torch.arange(8) == i, other, base) for i in range(8)]
    errors = [(t + shift - x).square().sum(1).masked_fill(t.sum(1).long() % 2 != 0, torch.inf) for t in trials]
    return torch.stack(errors).amin(0)
