"""Exercises of chapter 02: a right answer passes, the usual wrong ones are told apart."""

import math

import pytest
import torch

from lqedu.book import check
from lqedu.formats import unpack


def _group_size(bits, budget, symmetric, zeros=True):
    extra = 16 if symmetric or not zeros else 16 + bits
    return next(g for g in (16, 32, 64, 128, 256, 512) if bits + extra / g <= budget)


def _signed_extreme(rows, signed=True):
    extreme = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    s = (extreme if signed else -extreme.abs()) / -8
    s = torch.where(s == 0, torch.ones_like(s), s)
    return torch.round(rows / s).clamp(-8, 7) * s


def _quantizer(rows, bits, *, zero_in_range=True, round_first=True, clamp_codes=True):
    lo, hi = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if zero_in_range:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    exact = (hi - lo) / (2**bits - 1)
    s = exact.half().float() if round_first else exact
    z = torch.round(-lo / s).clamp(0, 2**bits - 1)
    q = torch.round(rows / s)
    q = (q + z).clamp(0, 2**bits - 1) if clamp_codes else q.clamp(0, 2**bits - 1) + z
    return q, exact.half(), z


def test_right_answers_pass(capsys):
    assert check("02-grids.1", _group_size)
    assert check("02-grids.2", _signed_extreme)
    assert check("02-grids.3", _quantizer)
    assert check("02-grids.4", lambda bits: 20 * math.log10(2**bits - 1))
    assert check("02-grids.5", unpack)
    assert "not" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("id", "answer", "hint"),
    [
        ("1", lambda *a: _group_size(*a, zeros=False), "group size for bits=4, budget=4.25, symmetric=False"),
        ("2", lambda rows: _signed_extreme(rows, signed=False), "w_hat[0, 0] is 7, expected 8"),
        ("2", lambda rows: torch.floor(_signed_extreme(rows)), "not right yet"),
        ("3", lambda *a: _quantizer(*a, zero_in_range=False), "s[0, 0]"),
        ("3", lambda *a: _quantizer(*a, round_first=False), "q["),
        ("3", lambda *a: _quantizer(*a, clamp_codes=False), "q["),
        ("3", lambda *a: tuple(t.float() for t in _quantizer(*a)), "stored in FP16"),
        ("4", lambda bits: 6.02 * bits, "dB at 2 bits"),
        ("5", lambda packed, bits, n: packed[..., :n].long(), "1-bit codes"),
    ],
)
def test_wrong_answers_are_told_what_differs(capsys, id, answer, hint):
    assert check(f"02-grids.{id}", answer) is False
    out = capsys.readouterr().out
    assert "not right yet" in out
    assert hint in out
