"""Checkers of chapter 04-gptq."""

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.formats import IntGrid
from lqedu.linalg import damp, inverse_factor
from lqedu.rounding import gptq


def _problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    x = torch.randn(4 * columns, columns, generator=g, dtype=torch.float64)
    x = x @ (
        torch.eye(columns, dtype=torch.float64) + torch.randn(columns, columns, generator=g).double() / columns**0.5
    )
    return w, damp(x.T @ x / len(x), 0.01)


@exercise("04-gptq.1", "move the free weights when one weight is rounded (Optimal Brain Surgeon)")
def _update(fn):
    for columns, i, seed in ((2, 0, 0), (5, 0, 1), (7, 6, 2)):
        w, h = _problem(1, columns, seed)
        q_i = torch.round(w[0, i] * 2) / 2
        free = [j for j in range(columns) if j != i]
        want = w[0].clone()
        want[i] = q_i
        # the stationary point of the loss itself: h_ff d_f = -h_fi d_i
        want[free] -= torch.linalg.solve(h[free][:, free], h[free, i]) * (q_i - w[0, i])
        expect_close(fn(w[0], torch.linalg.inv(h), i, q_i), want, name=f"w after rounding weight {i}", atol=1e-8)


@exercise("04-gptq.2", "remove a rounded weight from the inverse Hessian")
def _downdate(fn):
    for columns, i, seed in ((2, 0, 3), (6, 0, 4), (6, 4, 5)):
        _, h = _problem(1, columns, seed)
        keep = [j for j in range(columns) if j != i]
        got = fn(torch.linalg.inv(h), i)
        expect_close(got[keep][:, keep], torch.linalg.inv(h[keep][:, keep]), name=f"inverse without {i}", atol=1e-8)


@exercise("04-gptq.3", "find the mistake in a sweep that is worse than rounding to nearest")
def _repair(fn):
    for shape, seed in (((4, 16), 6), ((7, 33), 7)):
        w, h = _problem(*shape, seed)
        grid = IntGrid(3, scale_dtype=torch.float64)
        want, _ = gptq(w, h, grid, damping=0.0)
        expect_equal(fn(w, inverse_factor(h), grid).long(), want.codes.long(), name="codes")


@exercise("04-gptq.4", "the loss of one column when all later columns are free to compensate")
def _column_loss(fn):
    for columns, seed in ((3, 8), (8, 9)):
        _, h = _problem(1, columns, seed)
        for i in range(columns):
            tail = torch.linalg.inv(h[i:][:, i:])
            expect_close(fn(h, i, 0.5), float(0.25 / tail[0, 0]), name=f"loss(i={i}, error=0.5)", atol=1e-8)


@exercise("04-gptq.5", "predict the share of codes that GPTQ changes when the Hessian is diagonal")
def _diagonal(answer):
    assert isinstance(answer, tuple | list) and len(answer) == 2, (
        "answer with a pair: (natural order, activation order)"
    )
    generator = torch.Generator().manual_seed(10)
    w = torch.randn(6, 24, generator=generator, dtype=torch.float64)
    h = torch.diag(torch.rand(24, generator=generator, dtype=torch.float64) * 9 + 0.1)
    for got, order in zip(answer, ("natural", "activation"), strict=True):
        want = gptq(w, h, IntGrid(3), order=order)[1].flips
        assert abs(float(got) - want) < 1e-9, (
            f"the share in {order} order is not {got}: what would have to travel, and along which entry of the inverse?"
        )


@exercise("04-gptq.6", "activation order by permuting the problem")
def _activation_order(fn):
    for rows, columns, seed in ((4, 16, 11), (7, 33, 12)):
        w, h = _problem(rows, columns, seed)
        h = h * torch.outer(*[torch.linspace(0.5, 3, columns, dtype=torch.float64)] * 2)  # largest inputs come last
        want, _ = gptq(w, h, IntGrid(3), order="activation")
        expect_equal(fn(w, h, IntGrid(3)).long(), want.codes.long(), name="codes")
