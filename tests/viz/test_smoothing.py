"""The explorer of chapter 08 scales and rounds as the package does, and moves."""

import itertools

import pytest
import torch
from torch import Tensor

import lqedu.viz
from lqedu.formats.activation import ActivationGrid
from lqedu.transforms.smoothing import channel_max, smoothing_scales
from tests.viz.js import assert_every_control_matters, compute, explorer_page

LOUDEST = 3


def _data(tokens: int, columns: int, rows: int) -> dict:
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=g)
    x[:, LOUDEST] *= 20
    return {"x": x, "w": 0.1 * torch.randn(rows, columns, generator=g), "loudest": LOUDEST}


def _plain(data: dict) -> dict:
    return {k: v.double().tolist() if isinstance(v, Tensor) else v for k, v in data.items()}


def _rounded(v: Tensor, bits: int, each: bool) -> Tensor:
    top = 2 ** (bits - 1) - 1
    step = (v.abs().amax(1, keepdim=True) if each else v.abs().amax()) / top
    step = torch.where(step == 0, 1.0, step)
    return step * torch.round(v / step)


def _relative(y: Tensor, exact: Tensor) -> float:
    return float((y - exact).square().sum() / exact.square().sum())


def _errors(x: Tensor, w: Tensor, s: Tensor, bits: int, tokens: bool) -> dict[str, float]:
    x_s, w_s, exact = x / s, w * s, x @ w.T
    x_q, w_q = _rounded(x_s, bits, tokens), _rounded(w_s, bits, True)
    return {
        "x": _relative(x_q @ w_s.T, exact),
        "w": _relative(x_s @ w_q.T, exact),
        "both": _relative(x_q @ w_q.T, exact),
    }


def test_numbers_equal_python() -> None:
    choices = list(itertools.product(((6, 8, 5), (12, 17, 3)), (1, 7), (0.0, 0.35, 1.0), (4, 8), (True, False)))
    inputs, wanted = [], []
    for shape, gain, alpha, bits, tokens in choices:
        data = _data(*shape)
        inputs.append(_plain(data) | {"gain": gain, "alpha": alpha, "bits": bits, "tokens": tokens})
        x, w = data["x"].double(), data["w"].double()
        x[:, LOUDEST] *= gain
        wanted.append((x, w))
    for one, got, (x, w) in zip(inputs, compute("smoothing", inputs), wanted, strict=True):
        a, m = x.abs().amax(0), w.abs().amax(0)
        s = a ** one["alpha"] / m ** (1 - one["alpha"])
        assert got["scale"] == pytest.approx(s.tolist(), rel=1e-12)
        assert got["scale"] == pytest.approx(smoothing_scales(a, channel_max([w]), one["alpha"]).tolist(), rel=1e-5)
        assert got["before"]["x"] == a.tolist() and got["before"]["w"] == m.tolist()
        assert got["after"]["x"] == pytest.approx((a / s).tolist()) and got["after"]["w"] == pytest.approx(
            (m * s).tolist()
        )
        curve = []
        for alpha in got["alphas"]:
            curve.append(_errors(x, w, a**alpha / m ** (1 - alpha), one["bits"], one["tokens"]))
        for mine, theirs in zip([*curve, _errors(x, w, torch.ones_like(a), one["bits"], one["tokens"])],
                                [*got["curve"], got["none"]], strict=True):  # fmt: skip
            assert theirs == pytest.approx(mine, rel=1e-9)
        both = [errors["both"] for errors in curve]
        assert got["best"] == both.index(min(both))
        assert got["chosen"] == round(20 * one["alpha"])


@pytest.mark.parametrize("tokens", [True, False])
def test_activations_are_rounded_as_the_package_rounds_them(tokens: bool) -> None:
    data = _data(9, 12, 4)
    grid = ActivationGrid(bits=6, granularity="token" if tokens else "tensor")
    s = smoothing_scales(data["x"].abs().amax(0), channel_max([data["w"]]), 0.5)
    x, w = data["x"] / s, data["w"] * s
    want = _relative(grid.round_trip(x) @ w.T, x @ w.T)
    (got,) = compute("smoothing", [_plain(data) | {"gain": 1, "alpha": 0.5, "bits": 6, "tokens": tokens}])
    assert got["curve"][got["chosen"]]["x"] == pytest.approx(want, rel=1e-3)  # float32 beside double precision


def test_a_silent_channel_and_a_weight_of_zeros() -> None:
    data = _plain(_data(6, 8, 5)) | {"gain": 1, "alpha": 0.5, "bits": 8, "tokens": True}
    data["x"] = [[0.0 if j == 2 else v for j, v in enumerate(row)] for row in data["x"]]
    (got,) = compute("smoothing", [data])
    assert got["scale"][2] == 1
    data["w"] = torch.zeros(5, 8).tolist()
    (got,) = compute("smoothing", [data])
    assert got["none"]["both"] == got["curve"][10]["both"] == 0


@pytest.fixture(scope="module")
def example():
    data = _data(16, 40, 8) | {"gain": 1, "alpha": 0.5, "bits": 8, "tokens": False}
    return lqedu.viz.explorer("smoothing", data, title="Smoothing", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=range(4))


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("smoothing", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert f"The best α is {result['alphas'][result['best']]:.2f}" in words
    assert "one scale for all tokens" in words
