"""Checkers of chapter 20-hadamard-kv."""

import torch

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.linalg import fast_hadamard, hadamard_matrix


@exercise("20-hadamard-kv.1", "count the bytes of a chain")
def _passes(fn):
    for steps in (1, 2, 5):
        got, want = float(fn(steps)), (4 * (steps - 1) + 3) / 3
        for wrong, hint in (
            (float(steps), "a step in the middle moves 4 bytes, the last one 3"),
            (4 * steps / 3, "the last step writes codes: 2 + 1 bytes"),
            ((4 * (steps - 1) + 3) / 4, "fused, the chain writes int8: 3 bytes an element"),
        ):
            assert abs(got - wrong) > 1e-9 or abs(wrong - want) < 1e-9, f"{steps} steps, {got:g}: {hint}"
        expect_close(torch.tensor(got), torch.tensor(want), name=f"the ratio of {steps} steps", atol=1e-5)


@exercise("20-hadamard-kv.2", "transform by two products")
def _transform(fn):
    for a, b, seed in ((4, 8, 0), (12, 4, 1), (36, 16, 2)):
        x = torch.randn(3, a * b, generator=torch.Generator().manual_seed(seed))
        h_a, h_b = hadamard_matrix(a).float(), hadamard_matrix(b).float()
        got = torch.as_tensor(fn(x.clone(), h_a.clone(), h_b.clone()))
        want = fast_hadamard(x)
        expect_equal(list(got.shape), list(x.shape), name="the shape")
        if torch.allclose(got, want * (a * b) ** 0.5, atol=1e-3):
            raise AssertionError("the transform is orthonormal: divide by the root of a · b")
        if a == 12 and torch.allclose(got, ((h_a @ x.view(3, a, b) @ h_b).flatten(1) / (a * b) ** 0.5), atol=1e-5):
            expect_close(got, want, name="the transform (is the second matrix transposed?)", atol=1e-4)
        expect_close(got, want, name=f"the transform of {a} · {b} features", atol=1e-4)


@exercise("20-hadamard-kv.3", "put the parts of attention together")
def _merge(fn):
    generator = torch.Generator().manual_seed(3)
    for scale in (1.0, 40.0, 400.0):
        s = torch.randn(5, 7, generator=generator, dtype=torch.float64) * scale
        v = torch.randn(5, 7, 4, generator=generator, dtype=torch.float64)
        m = s.amax(1)
        p = (s - m[:, None]).exp()
        got = torch.as_tensor(fn(m.clone(), p.sum(1), (p[..., None] * v).sum(1)))
        expect_equal(list(got.shape), [4], name="the shape")
        want = s.flatten().softmax(0) @ v.flatten(0, 1)
        unscaled = (p[..., None] * v).sum((0, 1)) / p.sum()
        if torch.allclose(got, unscaled) and not torch.allclose(got, want):
            raise AssertionError("parts have different maxima: bring them to the largest one first")
        expect_close(got, want, name=f"attention with scores up to {float(s.max()):.0f}", atol=1e-9)


@exercise("20-hadamard-kv.4", "take four codes out of a word")
def _fields(fn):
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    got = fn(words.clone())
    expect_equal(len(got), 4, name="the number of fields")
    for i, part in enumerate(got):
        want = ((words.to(torch.int32) >> 4 * i) & 15).double()
        part = torch.as_tensor(part).double()
        if torch.equal(part, 16 * want) and not torch.equal(part, want):
            raise AssertionError(f"field {i} is 16 times too large: it stands four bits higher")
        expect_equal(bool(torch.equal(part, want)), True, name=f"field {i} of every word")


@exercise("20-hadamard-kv.5", "the parts that fill a GPU")
def _parts(answer):
    got = int(answer)
    hints = {
        17: "132 programs would fill 132 processors once; each runs 8 at a time",
        1056: "that is the number of places; each part is read by 8 heads' programs",
        1024: "that many pages there are; fewer parts fill the places already",
        8: "8 programs a processor, but there are 132 processors",
        128: "128 parts make 1024 programs, 32 fewer than there are places",
    }
    assert got == 132, f"{got} is not it: " + hints.get(
        got, "programs are heads times parts, places processors times 8"
    )
