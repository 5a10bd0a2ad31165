"""Every case of the bench can be called: its operands fit its kernel, under its default configuration and a candidate."""

import pytest
import torch

from lqedu_kernels.bench import cases, families, memory, shapes
from tests.kernels_compiled.compiler import compiling_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small weight and one number of rows instead of all; one copy."""
    small = {"Llama-2-7B gate": (256, 512)}
    monkeypatch.setattr(families, "SHAPES", small)
    monkeypatch.setattr(families, "ROWS", (64,))
    monkeypatch.setattr(families, "_tinygemm", lambda *args: [])  # its packing needs a GPU
    for module in (families, memory):
        monkeypatch.setattr(module, "copies_for", lambda nbytes, most=1: 1)
    monkeypatch.setattr(memory, "TOKENS", (64,))
    monkeypatch.setattr(memory, "WIDTHS", (1536,))
    monkeypatch.setattr(memory, "CACHES", ((2, 128),))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_case_compiles(name: str) -> None:
    seen = set()
    with compiling_for((9, 0)) as compiled:
        for case in families.FAMILIES[name](CPU, None):
            before = len(compiled)
            case.kernels[cases.OURS][0]()
            assert len(compiled) > before
            for config in case.candidates[-1:] if not seen else ():  # of one variant: the others have the same keys
                case.configured(config)[0]()
            assert len(case.kernels) > 1 and case.nbytes > 0
            case.reference()
            seen.add(case.operation)
    assert seen and all(operation.split("/")[0] == name for operation in seen)


def test_one_variant_can_be_chosen() -> None:
    with compiling_for((9, 0)):
        assert {case.operation for case in families.FAMILIES["w4a8"](CPU, "w4a8/channel")} == {"w4a8/channel"}


def test_the_shapes_are_those_of_the_models() -> None:
    assert shapes.SHAPES["Llama-3-8B gate"] == (14336, 4096) and shapes.ROWS == (1, 16, 64, 256, 1024, 4096)
