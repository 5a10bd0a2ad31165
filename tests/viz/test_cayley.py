"""The explorer of chapter 11 takes the steps that the package takes, and moves."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import lqedu.viz
from lqedu.linalg import random_orthogonal
from lqedu.transforms.cayley import cayley_exact, cayley_iterate, cayley_step, skew_gradient, step_size
from tests.viz.js import assert_every_control_matters, compute, explorer_page

EYE = torch.eye(3, dtype=torch.float64)


def _points(count: int, seed: int) -> Tensor:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0] = torch.tensor([4.0, 0.3, -0.2])
    return x


def _start(seed: int) -> Tensor:
    return random_orthogonal(3, torch.Generator().manual_seed(seed)).double()


def _loss_and_gradient(x: Tensor, r: Tensor) -> tuple[float, Tensor]:
    u, total = x @ r, x.square().sum(1).square().sum()
    return float(u.pow(4).sum() / total), 4 * x.T @ u.pow(3) / total


def _next(r: Tensor, g: Tensor, method: str, lr: float, iterations: int) -> Tensor:
    a = skew_gradient(r, g)
    if method == "cayley":
        return cayley_step(r, g, lr, iterations=iterations)
    if method == "exact":
        return cayley_exact(r, a, lr)
    if method == "unbounded":
        y = cayley_iterate(r, a, lr, iterations)
        for _ in range(2):
            y = (3 * y - y @ (y.T @ y)) / 2
        return y
    if method == "plain":
        return r - lr * g
    q, upper = torch.linalg.qr(r - lr * g)
    return q * upper.diagonal().sign()


CASES = [
    {"points": _points(count, seed), "start": _start(seed), "method": m, "rate": rate, "iterations": k, "steps": n}
    for (count, seed), m, rate, k, n in itertools.product(
        ((1, 0), (9, 1)), ("cayley", "unbounded", "exact", "plain", "gram"), (-1.0, 0.0, 0.6), (0, 2, 5), (0, 1, 12)
    )
]


def test_numbers_equal_python() -> None:
    inputs = [c | {"points": c["points"].tolist(), "start": c["start"].tolist()} for c in CASES]
    stopped = 0
    for case, got in zip(CASES, compute("cayley", inputs), strict=True):
        x, r, lr = case["points"], case["start"], 10 ** case["rate"]
        taken = len(got["losses"]) - 1
        assert got["stopped"] == (-1 if taken == case["steps"] else taken + 1)
        stopped += got["stopped"] > 0
        for k in range(taken + 1):
            loss, g = _loss_and_gradient(x, r)
            close = {"rel": 1e-5, "abs": 1e-7}  # steps without the bound amplify rounding errors
            assert got["losses"][k] == pytest.approx(loss, **close)
            assert got["defects"][k] == pytest.approx(float((r.T @ r - EYE).abs().max()), **close)
            assert got["path"][k] == pytest.approx((x[0] @ r).tolist(), **close)
            if k < taken:
                r = _next(r, g, case["method"], lr, case["iterations"])
        assert torch.allclose(torch.tensor(got["rotation"], dtype=torch.float64), r, rtol=1e-5, atol=1e-6)
        a = skew_gradient(r, g)
        tau = step_size(a, lr) if case["method"] == "cayley" else lr
        assert got["tau"] == pytest.approx(tau, rel=1e-5)
        assert got["contraction"] == pytest.approx(tau / 2 * float(torch.linalg.matrix_norm(a, 2)), rel=1e-5, abs=1e-7)
        exact = cayley_exact(r, a, tau)
        wanted = [float((cayley_iterate(r, a, tau, k) - exact).norm()) for k in range(case["iterations"] + 1)]
        assert got["errors"] == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert stopped  # steps without the bound do diverge in this grid


def test_a_cayley_step_stays_and_a_plain_one_cheats() -> None:
    base = {"points": _points(6, 3).tolist(), "start": _start(3).tolist(), "iterations": 5, "steps": 40}
    cayley, plain = compute("cayley", [base | {"method": m, "rate": -0.4} for m in ("cayley", "plain")])
    assert max(cayley["defects"]) < 1e-4 and 1 / 3 <= cayley["losses"][-1] < cayley["losses"][0]
    assert plain["defects"][-1] > 0.1 and plain["losses"][-1] < 1 / 3


@pytest.fixture(scope="module")
def example():
    data = {"points": _points(9, 1).tolist(), "start": torch.eye(3).tolist(), "method": "cayley"}
    data |= {"rate": 0.5, "iterations": 5, "steps": 12}
    return lqedu.viz.explorer("cayley", data, title="Cayley", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=(1, 2, 3, 0))


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("cayley", [example.data])
    assert math.isfinite(result["losses"][-1])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert f"the loss is {result['losses'][-1]:.4f}" in words
