"""Our HQQ against the iterates and answers of the hqq package on the same weight (goldens/hqq.safetensors).

Convention: min/max range without forcing zero into it, float zero points, everything in float32. The package divides by
the inverse scale where we multiply; its default solver never applies kappa, its second one (asked for the iterates) does.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lqedu.formats import IntGrid, ScaleConvention
from lqedu.rounding import hqq
from lqedu.rounding.hqq import iterates

TENSORS = load_file(Path(__file__).parent / "goldens" / "hqq.safetensors")
GROUP = 64


def _grid(bits: int, axis: int) -> IntGrid:
    return IntGrid(
        bits,
        granularity="group",
        group_size=GROUP,
        axis=axis,
        zero_point="float",
        convention=ScaleConvention.MINMAX,
        scale_dtype=torch.float32,
    )


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_iterate_is_the_peers(bits, axis):
    w, name = TENSORS["weight"], f"axis{axis}.w{bits}"
    ours = list(iterates(w, _grid(bits, axis), iterations=20))
    scale, _ = _grid(bits, axis).fit(w)
    assert torch.allclose(1 / scale.flatten(), TENSORS[f"{name}.inverse_scale"], rtol=1e-6)
    for steps in (0, 2, 3, 5, 10, 20):
        got, want = ours[steps].zero.flatten(), TENSORS[f"{name}.zero.{steps}"]
        # A weight halfway between two codes may round differently (w / s is not w * (1 / s)): it moves the mean of its
        # group by 1/64. All other groups agree to float32, relative to codes of up to 2^b.
        tipped = (got - want).abs() > 2e-5 * 2**bits
        assert float(tipped.double().mean()) < 0.02, f"{int(tipped.sum())} groups differ after {steps} steps"


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_our_error_is_never_above_the_peers(bits, axis):
    w = TENSORS["weight"]
    ours = float((hqq(w, _grid(bits, axis))[0].dequantize() - w).abs().mean())
    assert ours <= float(TENSORS[f"axis{axis}.w{bits}.mean_error"]) * (1 + 1e-6)
