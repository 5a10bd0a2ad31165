"""The explorer of chapter 02 quantizes exactly as IntGrid does, and moves."""

import itertools

import pytest
import torch

import lqedu.viz
from lqedu.formats import IntGrid
from tests.viz.js import assert_every_control_matters, compute, explorer_page

ROW = 64


def _rows():
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, ROW, generator=generator) * 0.05
    half = row.clone()
    half[:, : ROW // 2] = 0  # groups of zeros
    ties = (torch.arange(ROW) - 20).view(1, -1) * 0.5  # many weights half way between two points
    return {"normal": row, "positive": row.abs() + 0.01, "negative": -row.abs(), "zeros": half, "ties": ties}


def _inputs():
    rows = _rows()
    choices = itertools.product(rows, range(2, 9), (False, True), (64, 16, 8), (1, 13.5))
    return [
        {"weights": rows[name].flatten().tolist(), "bits": b, "symmetric": symmetric, "group": g, "outlier": outlier}
        for name, b, symmetric, g, outlier in choices
    ]


def test_numbers_equal_python():
    inputs = _inputs()
    for one, got in zip(inputs, compute("grid", inputs), strict=True):
        w = torch.tensor([one["weights"]])
        w[0, w.abs().argmax()] *= one["outlier"]
        grid = IntGrid(one["bits"], one["symmetric"], "group", one["group"])
        scale, zero = grid.fit(w)
        codes = grid.encode(w, scale, zero)
        w_hat = grid.decode(codes, scale, zero)
        error = (w_hat - w).abs()
        assert got["w"] == w[0].tolist()
        assert got["scales"] == scale[0].tolist()
        assert got["zeros"] == ([0] * scale.shape[1] if zero is None else zero[0].tolist())
        assert got["codes"] == codes[0].tolist()
        assert got["w_hat"] == w_hat[0].tolist()
        assert got["errors"] == (w_hat - w)[0].tolist()
        assert got["max_error"] == float(error.max())
        assert got["mean_error"] == pytest.approx(float(error.double().mean()), rel=1e-12)
        # In a matrix of this many columns the zero points of a row fill whole bytes.
        assert got["bits_per_weight"] == pytest.approx(grid.bits_per_weight((1, 8 * ROW)), rel=1e-12)
        used = [len(set(part.tolist())) for part in codes.view(-1, one["group"])]
        assert got["used"] == pytest.approx(sum(used) / len(used), rel=1e-12)
        points = torch.arange(grid.code_min, grid.code_max + 1)
        first_zero = 0 if zero is None else int(zero[0, 0])
        assert got["points"][0] == (float(scale[0, 0]) * (points - first_zero)).tolist()


@pytest.fixture(scope="module")
def example():
    data = {"weights": _rows()["normal"][0], "bits": 4, "symmetric": False, "group": 64, "outlier": 1}
    return lqedu.viz.explorer("grid", data, title="Grid", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width):
    assert_every_control_matters(example, width=width, order=range(4))


def test_the_words_say_what_compute_says(example):
    (result,) = compute("grid", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert f"{result['bits_per_weight']:.2f} bits per weight" in words
    assert "4 bits, asymmetric, one scale for the row" in words
