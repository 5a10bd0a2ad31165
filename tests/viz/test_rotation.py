"""The explorer of chapter 09 turns and rounds as Python does, ends at a Hadamard transform, and moves."""

import itertools
import math

import pytest
import torch

import lqedu.viz
from lqedu.formats.activation import ActivationGrid
from lqedu.linalg import fast_hadamard
from tests.viz.js import assert_every_control_matters, compute, explorer_page


def _data(length: int) -> dict:
    g = torch.Generator().manual_seed(length)
    flat, spiky = torch.randn(3, length, generator=g), torch.randn(2, length, generator=g) ** 3
    signs = torch.randint(0, 2, (length,), generator=g) * 2 - 1
    return {"sources": {"flat": flat, "spiky": spiky}, "signs": signs}


def _turned(x: torch.Tensor, size: int, angle: float) -> torch.Tensor:
    """The same by a dense matrix: one 2 × 2 turn for each of ``size`` steps, identity blocks around it."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    one = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    turn = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(size):
        turn = torch.kron(one, turn)
    return (x.unflatten(-1, (-1, len(turn))) @ turn.T).flatten(-2)


def _numbers(x: torch.Tensor) -> dict:
    rounded, size = ActivationGrid(4).round_trip(x.float()).double(), x.float().abs()
    single = x.float().double()
    return {
        "ratio": (size.amax(-1) / size.median(-1).values).double().mean(),
        "kurtosis": (x**4).mean(-1).div((x**2).mean(-1) ** 2).mean(),
        "error": (single - rounded).square().sum() / single.square().sum(),
        "zeros": (rounded == 0).double().mean(),
        "step": (size.amax(-1) / 7 / x.square().mean(-1).sqrt()).mean(),
    }


def test_numbers_equal_python() -> None:
    grid = itertools.product((8, 64), ("flat", "spiky"), (1, 12), (True, False), (1, 3), (0, 20, 45))
    inputs, wanted = [], []
    for length, source, outlier, flip, size, angle in grid:
        data = _data(length)
        settings = {"source": source, "outlier": outlier, "flip": flip, "size": size, "angle": angle}
        x = data["sources"][source].double()
        x[torch.arange(len(x)), x.abs().argmax(-1)] *= outlier
        plain = {"sources": {k: v.tolist() for k, v in data["sources"].items()}, "signs": data["signs"].tolist()}
        inputs.append(plain | settings)
        wanted.append((x, _turned(x * data["signs"] if flip else x, size, angle)))
    for got, pair in zip(compute("rotation", inputs), wanted, strict=True):
        assert torch.allclose(torch.tensor(got["rotated"], dtype=torch.float64), pair[1], atol=1e-12)
        for side, x in zip(("before", "after"), pair, strict=True):
            for name, value in _numbers(x).items():
                assert got[side][name] == pytest.approx(float(value), rel=1e-5), (side, name)
            rms = x.square().mean(-1, keepdim=True).sqrt()
            assert torch.allclose(torch.tensor(got[side]["values"], dtype=torch.float64), (x / rms).flatten())


def test_the_last_angle_is_a_hadamard_transform() -> None:
    eye = torch.eye(16, dtype=torch.float64)
    data = {"sources": {"unit": eye.tolist()}, "signs": [1] * 16, "source": "unit", "outlier": 1, "flip": False}
    (got,) = compute("rotation", [data | {"size": 4, "angle": 45}])
    matrix = torch.tensor(got["rotated"], dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, eye, atol=1e-12)
    assert torch.allclose(matrix.abs(), fast_hadamard(eye).abs(), atol=1e-12)


def test_a_token_of_zeros_is_no_error() -> None:
    data = {"sources": {"zeros": [[0.0] * 8]}, "signs": [1] * 8, "source": "zeros", "outlier": 1, "flip": True}
    (got,) = compute("rotation", [data | {"size": 3, "angle": 45}])
    assert got["after"]["error"] == got["after"]["kurtosis"] == got["after"]["ratio"] == 0


@pytest.fixture(scope="module")
def example():
    data = _data(64) | {"source": "spiky", "outlier": 4, "flip": True, "size": 6, "angle": 45}
    return lqedu.viz.explorer("rotation", data, title="Rotation", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=range(5))


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("rotation", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert f"4 bits lose {100 * result['before']['error']:.1f} % of the energy" in words
    assert f"4 bits lose {100 * result['after']['error']:.1f} % of the energy" in words
