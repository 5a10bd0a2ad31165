"""Scales and rounding of tensors that change at every step."""

import math

import pytest
import torch

from lqedu.errors import UsageError
from lqedu.formats.smallfloat import E2M1, E4M3, E4M3FNUZ, E5M2
from lqedu.training import Recipe, fp8_round, out_of_range, scale_of
from lqedu.training.scaling import SCALINGS, CurrentScaling, DelayedScaling, largest

ONE = torch.ones(())
FORMATS = (E4M3, E5M2)


def _delayed(**changes: object) -> DelayedScaling:
    return DelayedScaling(E4M3, Recipe(**changes))


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)])
def test_rounding_is_that_of_the_codec_and_of_torch(fmt, dtype):
    values = fmt.values()
    values = values[torch.isfinite(values)].double().unique()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles * (1 - 1e-6), middles * (1 + 1e-6)]).float()
    got = fp8_round(x, ONE, fmt)
    assert torch.equal(got, fmt.decode(fmt.encode(x)))
    assert torch.equal(got, x.to(dtype).float())
    assert torch.equal(fp8_round(values.float(), ONE, fmt), values.float())


def test_rounding_of_a_format_that_torch_does_not_have_goes_through_the_codec():
    x = torch.tensor([0.0, 3.1, -239.0, 500.0])
    assert torch.equal(fp8_round(x, ONE, E4M3FNUZ), torch.tensor([0.0, 3.0, -240.0, 240.0]))


@pytest.mark.parametrize("fmt", FORMATS)
def test_finite_values_saturate_and_what_is_not_finite_is_never_a_number(fmt):
    x = torch.tensor([1e30, -1e30, math.inf, -math.inf, math.nan, 0.0])
    got = fp8_round(x, ONE, fmt)
    assert got[:2].tolist() == [fmt.max, -fmt.max]
    assert got[2:5].isnan().all() and got[5] == 0


@pytest.mark.parametrize("fmt", [*FORMATS, E4M3FNUZ])
def test_finite_values_saturate_where_the_quotient_overflows(fmt):
    x = torch.tensor([1e10, -1e10, 0.0, math.inf, math.nan])
    got = fp8_round(x, torch.tensor(1e-30 / 448), fmt)
    assert got[:3].tolist() == [fmt.max, -fmt.max, 0] and got[3:].isnan().all()
    big = torch.tensor([1e300, -1e300, math.inf], dtype=torch.float64)  # finite, and beyond float32
    got = fp8_round(big, ONE, fmt)
    assert got[:2].tolist() == [fmt.max, -fmt.max] and got[2].isnan()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_cannot_divide_is_refused(bad):
    for scale in (torch.tensor(bad), torch.tensor([1.0, bad])):
        with pytest.raises(UsageError, match="a scale is positive and finite"):
            fp8_round(torch.ones(2), scale, E4M3)
    with pytest.raises(UsageError, match="a scale is positive and finite"):
        out_of_range(torch.ones(2), bad, E4M3)


def test_what_is_no_tensor_or_no_margin_is_refused():
    calls = (lambda: largest(1.0), lambda: scale_of(1.0, E4M3), lambda: fp8_round([1.0], ONE, E4M3),
             lambda: fp8_round(ONE, 1.0, E4M3), lambda: out_of_range(None, 1.0, E4M3))  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError, match=r"a floating-point tensor .* is needed, got (float|list|NoneType)"):
            call()
    for margin in (2000, -1, 0.5, True):
        with pytest.raises(UsageError, match="margin is a whole number, from 0 to 16"):
            scale_of(ONE, E4M3, margin)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_power_of_two_in_the_scale_changes_no_rounding(fmt):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    y = 1 + x.abs()  # normal numbers of both formats, before and after
    for k in (-3, 2):
        scale = torch.tensor(2.0**k)
        assert torch.equal(fp8_round(y, scale, fmt) * scale, fp8_round(y, ONE, fmt))


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_relative_error_of_log_uniform_values_is_the_closed_form(fmt):
    """E[(δ/x)²] = 2^(-2M) / 12 · 3 / (8 ln 2) for mantissas that are log-uniform in [1, 2)."""
    x = torch.exp2(2 * torch.rand(400_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).float()
    measured = ((fp8_round(x, ONE, fmt) / x - 1) ** 2).mean()
    assert float(measured) == pytest.approx(4.0**-fmt.mantissa_bits / 12 * 3 / (8 * math.log(2)), rel=0.02)
    worst = (fp8_round(x, ONE, fmt) / x - 1).abs().max()
    assert float(worst) <= 2.0 ** -(fmt.mantissa_bits + 1)


def test_shares_out_of_range_are_counted():
    s = torch.tensor(0.5)
    edge = 0.5 * E4M3.smallest_subnormal * s  # a tie, which goes to zero
    x = torch.tensor([0.0, edge, 1.01 * edge, 223.0, 224.0, 225.0, -1e6])
    assert out_of_range(x, s, E4M3) == (pytest.approx(1 / 6), pytest.approx(2 / 7))
    assert out_of_range(x, float(s), E5M2) == (0.0, pytest.approx(1 / 7))
    assert out_of_range(torch.zeros(3), s, E4M3) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [torch.tensor([math.nan]), torch.tensor([1.0, math.inf]), torch.zeros(0)])
def test_shares_of_a_tensor_that_is_not_finite_are_refused(bad):
    with pytest.raises(UsageError, match="need a tensor of finite values"):
        out_of_range(bad, 1.0, E4M3)


# --- scales -----------------------------------------------------------------------------------------------------------


def test_the_scale_puts_the_largest_value_at_the_top_and_the_margin_below_it():
    amax = torch.tensor([0.0, 1.0, 448.0, 7.0])
    assert scale_of(amax, E4M3).tolist() == pytest.approx([1.0, 1 / 448, 1.0, 7 / 448])
    assert scale_of(amax, E4M3, margin=3)[1:].tolist() == pytest.approx([8 / 448, 8.0, 56 / 448])
    reciprocal = E5M2.max / amax[1:] / 2**2  # what Transformer Engine stores
    assert torch.allclose(1 / scale_of(amax[1:], E5M2, margin=2), reciprocal, rtol=1e-6)


@pytest.mark.parametrize("amax", [1e-45, 1e-38, 3e38])
def test_a_tiny_or_huge_amax_gives_a_scale_that_can_divide(amax):
    s = scale_of(torch.tensor(amax), E4M3, margin=16)
    assert 0 < float(s) < math.inf
    assert torch.isfinite(fp8_round(torch.tensor(amax), s, E4M3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_scale_of_no_finite_amax_is_refused(bad):
    with pytest.raises(UsageError, match="needs a finite amax"):
        scale_of(torch.tensor(bad), E4M3)


def test_the_largest_magnitude_of_nothing_is_zero_and_that_of_bad_values_is_bad():
    assert largest(torch.zeros(0, 3)) == 0
    assert largest(torch.tensor([1.0, -3.0], dtype=torch.float16)).dtype == torch.float32
    assert largest(torch.tensor([1.0, math.nan])).isnan()
    assert largest(torch.tensor([1.0, -math.inf])).isinf()
    with pytest.raises(UsageError, match="a floating-point tensor of 16 bits"):
        largest(torch.arange(3))
    with pytest.raises(UsageError, match="a floating-point tensor of 16 bits"):
        fp8_round(torch.arange(3), ONE, E4M3)


def test_current_scaling_follows_the_tensor_and_refuses_what_has_no_scale():
    scaling = CurrentScaling(E5M2, Recipe(scaling="current", margin=1))
    assert float(scaling(torch.tensor([3.0, -7.0]))) == pytest.approx(2 * 7 / 57344)
    assert scaling(torch.zeros(4)) == 1
    with pytest.raises(UsageError, match="holds NaN or infinities"):
        scaling(torch.tensor([1.0, math.nan]))


# --- delayed scaling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("history", "margin"), [(1, 0), (4, 2), (1024, 0)])
def test_a_delayed_scale_is_that_of_the_largest_amax_of_the_steps_before(history, margin):
    amaxes = torch.rand(50, generator=torch.Generator().manual_seed(2)).mul(8).exp()
    scaling = _delayed(history=history, margin=margin)
    used = [float(scaling(torch.stack([-a, a / 3]))) for a in amaxes]
    want = [1.0] + [float(amaxes[max(0, t - history) : t].max()) * 2**margin / 448 for t in range(1, 50)]
    assert used == pytest.approx(want, rel=1e-6)


def test_the_history_rolls_as_transformer_engine_s_does():
    """It writes the amax of a step to entry 0, takes the maximum, rolls by -1 and clears entry 0: an order of its own."""
    length = 5
    theirs, scale = torch.zeros(length), torch.ones(())
    ours = _delayed(history=length, margin=1)
    for amax in torch.rand(23, generator=torch.Generator().manual_seed(3)) + 0.01:
        theirs[0] = amax
        scale = (448.0 / theirs.max()) / 2
        theirs = torch.roll(theirs, -1)
        theirs[0] = 0
        ours.record(amax)
        assert float(ours.scale * scale) == pytest.approx(1.0, rel=1e-6)


def test_amax_of_zero_leaves_the_scale_and_ages_the_history():
    scaling = _delayed(history=3)
    scaling.record(torch.tensor(4.0))
    for _ in range(2):
        scaling.record(torch.zeros(()))
        assert float(scaling.scale) == pytest.approx(4 / 448)
    scaling.record(torch.zeros(()))  # the 4 has left, all entries are zero
    assert float(scaling.scale) == pytest.approx(4 / 448) and not scaling.amax.any()
    scaling.record(torch.tensor(2.0))
    assert float(scaling.scale) == pytest.approx(2 / 448)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_amax_that_is_not_finite_leaves_scale_and_history_and_is_counted(bad):
    scaling = _delayed(history=2)
    scaling.record(torch.tensor(4.0))
    scaling.record(torch.tensor(bad))
    assert scaling.amax.tolist() == [4.0, 0.0] and float(scaling.scale) == pytest.approx(4 / 448)
    assert int(scaling.skipped) == 1 and int(scaling.steps) == 2
    scaling.record(torch.tensor(1.0))
    assert scaling.amax.tolist() == [1.0, 4.0]


def test_an_interval_keeps_the_scale_between_updates():
    scaling = _delayed(history=8, interval=3)
    scales = []
    for amax in (1.0, 2.0, 3.0, 4.0, 5.0):
        scaling.record(torch.tensor(amax))
        scales.append(float(scaling.scale) * 448)
    assert scales == pytest.approx([1.0, 1.0, 1.0, 4.0, 4.0])


def test_evaluation_uses_the_scale_and_records_nothing():
    scaling = _delayed()
    scaling(torch.tensor([5.0]))
    before = {name: buffer.clone() for name, buffer in scaling.eval().state_dict().items()}
    assert float(scaling(torch.tensor([500.0]))) == pytest.approx(5 / 448)
    assert all(torch.equal(before[name], buffer) for name, buffer in scaling.state_dict().items())


def test_a_step_is_a_forward_call_in_training_and_the_first_is_unscaled():
    scaling = _delayed()
    assert float(scaling.eval()(torch.tensor([900.0]))) == 1 and int(scaling.steps) == 0
    assert float(scaling.train()(torch.tensor([900.0]))) == 1
    with torch.no_grad():
        assert float(scaling(torch.tensor([1.0]))) == pytest.approx(900 / 448)
    assert int(scaling.steps) == 2


def test_the_state_is_a_tensor_that_a_checkpoint_brings_back():
    one, two = _delayed(history=4), _delayed(history=4)
    for amax in (1.0, 3.0):
        one.record(torch.tensor(amax))
    two.load_state_dict(one.state_dict())
    one.record(torch.tensor(2.0))
    two.record(torch.tensor(2.0))
    assert torch.equal(one.scale, two.scale) and torch.equal(one.amax, two.amax)


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_the_default_is_the_hybrid_recipe_of_transformer_engine():
    recipe = Recipe()
    assert (recipe.forward, recipe.gradient, recipe.scaling) == (E4M3, E5M2, "delayed")
    assert (recipe.history, recipe.margin, recipe.interval) == (1024, 0, 1)
    assert set(SCALINGS) == {"current", "delayed", "none"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scaling": ["current"]}, "scaling must be one of current, delayed, none"),
        ({"scaling": "static"}, "scaling must be one of current, delayed, none"),
        ({"history": 0}, "history is a whole number, at least 1"),
        ({"interval": 1.5}, "interval is a whole number"),
        ({"margin": -1}, "margin is a whole number, from 0 to 16"),
        ({"margin": 17}, "margin is a whole number, from 0 to 16"),
        ({"gradient": E2M1}, "gradient must be a float format that has a NaN"),
        ({"forward": "E4M3"}, "forward must be a float format"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes, problem):
    with pytest.raises(UsageError, match=problem):
        Recipe(**changes)
