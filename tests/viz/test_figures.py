"""Figures: sizes, a second cue besides colour, and plots that hold their values."""

import itertools

import matplotlib as mpl
import pytest
import torch

mpl.use("agg")

from matplotlib import pyplot as plt

import lqedu.viz
from lqedu.errors import UsageError
from lqedu.viz.style import colours


@pytest.fixture(autouse=True)
def _clean():
    with mpl.rc_context():
        yield
    plt.close("all")


def _contrast(a, b):
    """The contrast of two colours as the accessibility guidelines define it."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in mpl.colors.to_rgb(colour)]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("width", "inches"), [("page", 6.4), ("half", 3.4)])
def test_figures_have_the_width_they_will_be_shown_at_and_readable_text(width, inches):
    fig, ax = lqedu.viz.figure(width, rows=2, height=2.0)
    assert fig.get_size_inches().tolist() == [inches, 4.0]
    assert fig.get_facecolor() == (1, 1, 1, 1)
    ax[0].set(title="t", xlabel="x")
    sizes = [text.get_size() for text in (ax[0].title, ax[0].xaxis.label, *ax[0].get_xticklabels())]
    assert min(sizes) >= 9


def test_wrong_sizes_are_refused():
    with pytest.raises(UsageError, match="width is 'page' or 'half'"):
        lqedu.viz.figure("full")
    with pytest.raises(UsageError, match="one or two columns"):
        lqedu.viz.figure(cols=3)


def test_lines_differ_in_more_than_colour():
    lines = [lqedu.viz.series(i) for i in range(8)]
    for key in ("color", "marker"):
        assert len({line[key] for line in lines}) == 8
    assert len({str(line["linestyle"]) for line in lines}) == 8
    _, ax = lqedu.viz.figure()
    drawn = [ax.plot([0, 1])[0] for _ in range(3)]
    assert [line.get_marker() for line in drawn] == ["o", "s", "^"]
    assert colours(9)[8] == colours(1)[0]


def test_colours_stand_out_and_differ():
    named = lqedu.viz.PALETTE
    for strong in ("blue", "red", "green", "grey", "black"):
        assert _contrast(named[strong], "white") >= 3
    for a, b in itertools.combinations(named.values(), 2):
        assert a != b


def test_importing_the_package_sets_no_style():
    assert mpl.rcParamsDefault["axes.spines.top"] == mpl.rcParams["axes.spines.top"]


def test_a_small_matrix_shows_its_values_and_a_large_one_does_not():
    _, ax = lqedu.viz.figure()
    lqedu.viz.matrix(ax, torch.tensor([[1.0, -2.0], [0.25, 0.0]]), title="w")
    assert [text.get_text() for text in ax.texts] == ["1.00", "-2.00", "0.25", "0.00"]
    assert ax.images[0].get_clim() == (-2, 2)
    _, ax = lqedu.viz.figure()
    lqedu.viz.matrix(ax, torch.zeros(40, 50))
    assert not ax.texts
    _, axes = lqedu.viz.figure(cols=2)
    lqedu.viz.matrix(axes[0], torch.randn(2, 12))  # twelve columns of such values do not fit half a page
    assert not axes[0].texts


@pytest.mark.parametrize("value", [0, 3, -3])
def test_a_constant_matrix_can_be_drawn(value):
    _, ax = lqedu.viz.figure()
    lqedu.viz.matrix(ax, torch.full((2, 2), value, dtype=torch.int8), symmetric=False, fmt="d")
    low, high = ax.images[0].get_clim()
    assert low < high
    with pytest.raises(UsageError, match="two dimensions"):
        lqedu.viz.matrix(ax, torch.zeros(3))


def test_bars_carry_their_values():
    _, ax = lqedu.viz.figure()
    lqedu.viz.bars(ax, ["FP32", "RTN"], torch.tensor([22.5, 28.1]), errors=[0.5, 0.6], fmt=".1f", highlight=1)
    assert [text.get_text() for text in ax.texts] == ["22.5", "28.1"]
    assert [bar.get_hatch() for bar in ax.patches] == ["//", None]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["FP32", "RTN"]
    with pytest.raises(UsageError, match="1 labels for 2 values"):
        lqedu.viz.bars(ax, ["FP32"], [1, 2])


def test_a_histogram_counts_all_values_and_marks_all_points():
    _, ax = lqedu.viz.figure()
    values = torch.randn(10, 10, requires_grad=True)
    lqedu.viz.histogram_with_grid(ax, values, torch.arange(-2, 3) * 0.5, bins=7)
    assert sum(bar.get_height() for bar in ax.patches) == 100
    assert ax.lines[0].get_xdata().tolist() == [-1, -0.5, 0, 0.5, 1]


def test_in_a_notebook_a_figure_has_a_width_and_no_height(monkeypatch):
    """A height would distort the picture where a phone narrows it."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    monkeypatch.setattr(InteractiveShell, "_instance", shell)
    fig, _ = lqedu.viz.figure()
    data, metadata = shell.display_formatter.format(fig)
    assert "image/png" in data
    assert set(metadata["image/png"]) == {"width"}
    assert 560 < metadata["image/png"]["width"] < 660
