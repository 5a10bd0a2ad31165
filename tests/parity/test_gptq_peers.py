"""Our GPTQ against what gptqmodel and llmcompressor answered on the same problem (goldens/, see make_goldens.py).

Conventions: 4 bits; asymmetric grids contain zero (MINMAX_ZERO), symmetric ones are max/7.5 over [-8, 7] (FULL_RANGE),
as both peers have them; scales stay float32, because the peers do not round theirs. Their Hessian counts sequences and
ours counts tokens, which changes no code: damping is relative.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lqedu.formats import IntGrid
from lqedu.linalg import HessianAccumulator
from lqedu.rounding import gptq
from tests import tolerances
from tests.compare import code_mismatch

GOLDENS = Path(__file__).parent / "goldens"
RECORD = json.loads((GOLDENS / "gptq.json").read_text())
STALE = "asym_g32_block128_stale"
CASES = [(peer, name) for peer in ("gptqmodel", "llmcompressor") for name in RECORD[peer]]


def ours(case: dict, tensors: dict[str, torch.Tensor], block: int | None = None):
    accumulator = HessianAccumulator(tensors["weight"].shape[1])
    for sequence in tensors["activations"]:
        accumulator.add(sequence)
    granularity, size = ("channel", None) if case["group"] < 0 else ("group", case["group"])
    grid = IntGrid(RECORD["bits"], case["symmetric"], granularity, size, scale_dtype=torch.float32)
    order = "activation" if case["actorder"] else "natural"
    block = block or case.get("block", 128)
    return gptq(
        tensors["weight"], accumulator.result(), grid, damping=RECORD["damping"], block_size=block, order=order
    )[0]


def codes_of(w_hat: torch.Tensor, mine) -> torch.Tensor:
    """The codes a peer's dequantized weights stand for, read with our scales."""
    return mine.grid.encode(w_hat, mine.scale, mine.zero)


@pytest.mark.parametrize(("peer", "name"), [case for case in CASES if case[1] != STALE])
def test_same_weights_as_the_peer(peer: str, name: str) -> None:
    tensors = load_file(GOLDENS / "gptq.safetensors")
    mine = ours(RECORD[peer][name], tensors)
    theirs = tensors[f"{peer}.{name}"]
    assert code_mismatch(mine.codes, codes_of(theirs, mine)) <= tolerances.FP32_TIES
    same = mine.codes == codes_of(theirs, mine)
    assert torch.allclose(mine.dequantize()[same], theirs[same], atol=tolerances.PEER_WEIGHT)


def test_the_peers_stale_group_scales_are_theirs_alone() -> None:
    """With groups smaller than the block, gptqmodel fits a group on weights from before the block; we do not."""
    tensors = load_file(GOLDENS / "gptq.safetensors")
    case = RECORD["gptqmodel"][STALE]
    theirs = tensors[f"gptqmodel.{STALE}"]
    accumulator = HessianAccumulator(theirs.shape[1])
    accumulator.add(tensors["activations"])
    h = accumulator.result().double()

    def loss(w_hat: torch.Tensor) -> float:
        delta = (w_hat - tensors["weight"]).double()
        return float(((delta @ h) * delta).sum())

    mine = ours(case, tensors)
    small = ours(case, tensors, block=32)
    assert code_mismatch(mine.codes, small.codes) <= tolerances.FP32_TIES
    assert code_mismatch(mine.codes, codes_of(theirs, mine)) > 0.1
    assert loss(mine.dequantize()) < loss(theirs)


def test_goldens_say_where_they_come_from() -> None:
    assert set(RECORD["versions"]) == {"gptqmodel", "llmcompressor", "compressed-tensors", "torch", "transformers"}
