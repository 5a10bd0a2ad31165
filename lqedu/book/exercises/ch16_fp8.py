"""Checkers of chapter 16-fp8."""

import math

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.formats.fp8 import Float8Grid, decode, float8_quantize
from lqedu.formats.smallfloat import FloatFormat


@exercise("16-fp8.1", "round to any small float without special codes")
def _round(fn):
    for exponent, mantissa, bias in ((4, 3, 7), (2, 1, 1), (3, 2, 5), (5, 2, 15)):
        form = FloatFormat("", exponent, mantissa, bias, "none")
        exact = form.decode(torch.arange(2 ** (exponent + mantissa), dtype=torch.uint8), torch.float64)
        x = torch.randn(400, generator=torch.Generator().manual_seed(exponent), dtype=torch.float64) * form.max / 3
        cases = {
            "values of the format": exact,
            "numbers halfway between two values (ties go to the even code)": (exact[1:] + exact[:-1]) / 2,
            "subnormal numbers": torch.linspace(0, 1, 101, dtype=torch.float64) * form.smallest_normal,
            "numbers beyond the largest value (they become it)": torch.tensor([1.01, 1.5, 40.0]).double() * form.max,
            "numbers of both signs": x,
        }
        for name, inputs in cases.items():
            want = form.decode(form.encode(inputs), torch.float64)
            got = torch.as_tensor(fn(inputs.clone(), exponent, mantissa, bias)).double()
            expect_equal(list(got.shape), list(want.shape), name="the shape")
            expect_close(got, want, name=f"E{exponent}M{mantissa}, bias {bias}: {name}", atol=0.0)


@exercise("16-fp8.2", "predict what E4M3 makes of six numbers")
def _predict(answer):
    answer = [float(v) for v in answer]
    assert len(answer) == 6, f"six numbers were asked for, got {len(answer)}"
    cases = [
        (17.0, 16.0, {18.0: "17 is halfway between 16 and 18, and 16 has the even code (8 steps of 2 against 9)"}),
        (19.0, 20.0, {18.0: "19 is halfway between 18 and 20: 9.5 steps of 2, and the even one is 10"}),
        (
            0.003,
            2 / 512,
            {1 / 512: "0.003 is 1.54 steps of 2^-9", 0.003: "below 2^-6 the values are multiples of 2^-9"},
        ),
        (2.0**-10, 0.0, {2.0**-9: "2^-10 is half a step of 2^-9: a tie, and zero is the even one"}),
        (460.0, 448.0, {464.0: "above 256 the spacing is 32, and 448 is the largest value"}),
        (-500.0, -448.0, {-512.0: "the code of 512 is NaN's neighbour that is not there: beyond 448 values saturate"}),
    ]
    for got, (x, want, known) in zip(answer, cases, strict=True):
        assert got == want, f"{got} is not what E4M3 makes of {x:g}: " + known.get(
            got, "find the power of two below it, divide by the spacing, round half to even"
        )


@exercise("16-fp8.3", "read the weights of a file with blocks")
def _blocks(fn):
    for rows, columns, seed in ((256, 128, 0), (200, 576, 1), (128, 300, 2)):
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        w *= torch.linspace(0.1, 4, rows)[:, None]
        stored = float8_quantize(w, Float8Grid("block"))
        got = torch.as_tensor(fn(stored.codes.clone(), stored.scale.clone())).float()
        expect_equal(list(got.shape), [rows, columns], name="the shape")
        want = stored.dequantize()
        wide = stored.scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        if torch.allclose(got, decode(stored.codes) / wide, rtol=1e-4):
            raise AssertionError(
                "weight_scale_inv multiplies, whatever its name says: it is the inverse of 448 / max|w|"
            )
        expect_close(got, want, name=f"a weight [{rows}, {columns}], whose last blocks may be smaller,", atol=1e-6)


@exercise("16-fp8.4", "derive the peak from which a float is better")
def _crossover(fn):
    for bits, mantissa, n in ((8, 3, 576), (8, 3, 128), (8, 2, 1536), (8, 4, 4096), (6, 2, 256)):
        top = 2 ** (bits - 1) - 1
        lost = 2.0 ** (-2 * mantissa) / (32 * math.log(2))
        want = math.sqrt(lost / ((1 - 1 / n) / (12 * top**2) + lost / n))
        got = float(fn(bits, mantissa, n))
        where = f"{bits} bits, {mantissa} bits of mantissa, {n} numbers"
        for wrong, hint in (
            (math.sqrt(12 * lost) * top, "the largest number has no error; it takes r²/n of the energy with it"),
            (want**2, "that is the square of the peak over the rms"),
            (
                math.sqrt(12 * 4.0**-mantissa / 12) * top,
                "a float's error is that of a full spacing only at powers of two",
            ),
        ):
            assert abs(got / want - 1) < 0.02 or abs(got / wrong - 1) > 0.005, f"{where}: {got:.2f} is not it: {hint}"
        assert abs(got / want - 1) < 0.02, f"{where}: {got:.3g}, but the errors are equal at {want:.3g}"


@exercise("16-fp8.5", "find the best split of seven bits")
def _split(answer):
    normal, heavy = (int(v) for v in answer)
    assert min(normal, heavy) >= 2 and max(normal, heavy) <= 5, "the candidates have 2 to 5 exponent bits"
    found = []
    for x in (_rows("normal"), _rows("heavy")):
        errors = {}
        for exponent in range(2, 6):
            form = FloatFormat("", exponent, 7 - exponent, 2 ** (exponent - 1) - 1, "none")
            s = x.abs().amax(-1, keepdim=True) / form.max
            errors[exponent] = float(
                ((form.decode(form.encode(x / s), torch.float64) * s - x) ** 2).sum() / (x**2).sum()
            )
        found.append(min(errors, key=errors.get))
    assert normal == found[0], (
        f"rows of 576 Gaussian numbers: E{normal}M{7 - normal} is not the best. Their energy lies within a few octaves of "
        "the largest number; what do more exponent bits buy?"
    )
    assert heavy == found[1], (
        f"rows of 65,536 heavy-tailed numbers: E{heavy}M{7 - heavy} is not the best. How many octaves lie between their "
        "largest number and their rms, and how many normal octaves has the format?"
    )


def _rows(kind: str) -> torch.Tensor:
    """Gaussian rows of 576; or long rows whose tails fall off as a Student's t with three degrees of freedom."""
    g = torch.Generator().manual_seed(0)
    if kind == "normal":
        return torch.randn(64, 576, generator=g, dtype=torch.float64)
    z = torch.randn(4, 4, 65536, generator=g, dtype=torch.float64)
    return z[0] / (z[1:] ** 2).mean(0).sqrt()
