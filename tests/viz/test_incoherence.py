"""The explorer of chapter 07 rotates and rounds as the package does, and moves."""

import itertools

import pytest
import torch

import lqedu.viz
from lqedu.linalg import KroneckerRotation
from lqedu.transforms.incoherence import weight_incoherence
from tests.viz.js import assert_every_control_matters, compute, explorer_page


def _rotation(n: int, seed: int) -> KroneckerRotation:
    return KroneckerRotation.random(n, torch.Generator().manual_seed(seed))


def _data(rows: int, columns: int) -> dict:
    w = 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    parts = {"u": _rotation(rows, 1), "v": _rotation(columns, 2)}
    return {"weights": w} | {k: {"left": r.left, "right": r.right, "order": r.order} for k, r in parts.items()}


def _plain(data: dict) -> dict:
    return {
        k: v.tolist() if isinstance(v, torch.Tensor) else _plain(v) if isinstance(v, dict) else v
        for k, v in data.items()
    }


def test_numbers_equal_python() -> None:
    choices = list(
        itertools.product(((24, 24), (6, 20), (5, 7)), (1, 12), (True, False), (True, False), (2, 4), (1.5, 2.4))
    )
    inputs, wanted = [], []
    for shape, outlier, outputs, on_inputs, bits, half in choices:
        data = _data(*shape)
        settings = {"outlier": outlier, "outputs": outputs, "inputs": on_inputs, "bits": bits, "half": half}
        inputs.append(_plain(data) | settings)
        w = data["weights"].double()
        w.view(-1)[w.abs().argmax()] *= outlier
        after = _rotation(shape[1], 2).apply(w) if on_inputs else w
        after = _rotation(shape[0], 1).apply(after.T).T if outputs else after
        wanted.append((w, after))
    for one, got, pair in zip(inputs, compute("incoherence", inputs), wanted, strict=True):
        for name, numbers, matrix in zip(("before", "after"), (got["first"], got["second"]), pair, strict=True):
            assert torch.allclose(torch.tensor(got[name], dtype=torch.float64), matrix, atol=1e-12)
            assert numbers["mu"] == pytest.approx(weight_incoherence(matrix), rel=1e-9)
            rms = float(matrix.square().mean().sqrt())
            levels = 2 ** one["bits"]
            step, zero = 2 * one["half"] * rms / (levels - 1), (levels - 1) / 2
            codes = torch.clamp(torch.round(matrix / step + zero), 0, levels - 1)
            error = (step * (codes - zero) - matrix).square().sum() / matrix.square().sum()
            assert numbers["error"] == pytest.approx(float(error), rel=1e-9)
            assert numbers["clipped"] == pytest.approx(float((matrix.abs() > (zero + 0.5) * step).double().mean()))
            assert numbers["points"] == pytest.approx([step * (i - zero) / rms for i in range(levels)])


def test_a_weight_of_zeros_is_no_error() -> None:
    data = _plain(_data(6, 20)) | {"outlier": 1, "outputs": True, "inputs": True, "bits": 2, "half": 1.5}
    data["weights"] = torch.zeros(6, 20).tolist()
    (got,) = compute("incoherence", [data])
    assert got["second"]["mu"] == got["second"]["error"] == 0


@pytest.fixture(scope="module")
def example():
    data = _data(24, 24) | {"outlier": 6, "outputs": True, "inputs": True, "bits": 2, "half": 1.5}
    return lqedu.viz.explorer("incoherence", data, title="Incoherence", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=range(5))


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("incoherence", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert f"μ is {result['first']['mu']:.2f} before and {result['second']['mu']:.2f} after" in words
