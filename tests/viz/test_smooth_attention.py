"""The explorer of chapter 14 smooths, rounds and judges keys as the package does, and moves."""

import itertools

import pytest
import torch

import lqedu.viz
from lqedu.formats.kv import KVInt
from lqedu.transforms.smooth_attention import attention_scales
from tests.viz.js import assert_every_control_matters, compute, explorer_page


def _head(seed: int, tokens: int, size: int, queries: int) -> dict:
    """Keys with two loud pairs and one channel that is never active, as plain numbers."""
    g = torch.Generator().manual_seed(seed)
    keys, asked = torch.randn(tokens, size, generator=g), torch.randn(queries, size, generator=g)
    keys[:, 1] *= 9
    keys[:, 2] += 6
    keys[:, size // 2 - 1], keys[:, size - 1] = 0, 0
    return {"name": f"head {seed}", "keys": keys.tolist(), "queries": asked.tolist()}


HEADS = [_head(0, 6, 16, 5), _head(1, 6, 16, 5)]


def _errors(head: dict, alpha: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """λ and the relative error of each token's scores, in float64 with float16 scales."""
    k, q = (torch.tensor(head[name], dtype=torch.float64) for name in ("keys", "queries"))
    top = k.abs().amax(0)
    pair = torch.maximum(top[:8], top[8:]).repeat(2)
    by = torch.where(pair > 0, pair.pow(alpha), torch.ones(16, dtype=torch.float64))
    x, levels = k / by, 2**bits - 1
    lo, hi = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    s = ((hi - lo) / levels).half().double()
    z = (-lo / s).clamp(max=levels).half().double()
    got = s * (torch.round(x / s + z).clamp(0, levels) - z) * by
    return by, ((got - k) @ q.T).norm(dim=1) / (k @ q.T).norm(dim=1)


def test_numbers_equal_python() -> None:
    choices = list(itertools.product((0, 1), (0, 0.35, 0.5, 1), (2, 4, 8), (0, 5)))
    inputs = [{"heads": HEADS, "head": h, "alpha": a, "bits": b, "token": t} for h, a, b, t in choices]
    for one, got in zip(inputs, compute("smooth_attention", inputs), strict=True):
        head = HEADS[one["head"]]
        by, errors = _errors(head, one["alpha"], one["bits"])
        top = torch.tensor(head["keys"], dtype=torch.float64).abs().amax(0)
        assert got["before"] == pytest.approx(top.tolist())
        assert got["after"] == pytest.approx((top / by).tolist(), rel=1e-9)
        assert got["error"] == pytest.approx(float(errors[one["token"]]), rel=1e-9)
        assert got["mean"] == pytest.approx(float(errors.mean()), rel=1e-9)
        plain = _errors(head, 0.0, one["bits"])[1]
        assert got["plain"] == pytest.approx(float(plain[one["token"]]), rel=1e-9)
        want = [float(_errors(head, i / 10, one["bits"])[1].mean()) for i in range(11)]
        assert got["curve"] == pytest.approx(want, rel=1e-9)


def test_it_smooths_and_rounds_as_the_package() -> None:
    data = {"heads": HEADS, "head": 1, "alpha": 0.5, "bits": 4, "token": 3}
    (got,) = compute("smooth_attention", [data])
    keys = torch.tensor(HEADS[1]["keys"])
    scale = attention_scales(keys.abs().amax(0)[None], 0.5)[0]
    assert got["after"] == pytest.approx((keys.abs().amax(0) / scale).tolist(), rel=1e-5)
    stored = KVInt(4).quantize(keys[3] / scale)
    assert got["codes"] == stored.codes.tolist()
    assert got["scale"] == float(stored.scale) and got["zero"] == float(stored.zero)
    assert got["values"] == pytest.approx(stored.values().tolist(), rel=1e-6)


@pytest.fixture(scope="module")
def example():
    data = {"heads": HEADS, "head": 0, "alpha": 0.5, "bits": 4, "token": 2}
    return lqedu.viz.explorer("smooth_attention", data, title="Keys", description="Move the sliders.")


@pytest.mark.parametrize("width", [320, 1280])
def test_every_control_changes_the_picture_and_the_words(example, width: int) -> None:
    assert_every_control_matters(example, width=width, order=range(4))


def test_the_words_say_what_compute_says(example) -> None:
    (result,) = compute("smooth_attention", [example.data])
    with explorer_page(example, theme="dark") as page:
        words = page.inner_text("[aria-live]")
    assert f"off by {100 * result['error']:.1f} %" in words and f"by {100 * result['mean']:.1f} % on average" in words
