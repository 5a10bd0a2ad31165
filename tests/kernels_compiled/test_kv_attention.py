"""What the compiler makes of attention over quantized caches, on GPUs that are not here."""

import re

import pytest
import torch
import triton

from lqedu_kernels.kv_attention import kv_attention
from lqedu_kernels.kv_pages import empty_pages, kv_append
from tests.kernels_compiled.compiler import SHARED, Compiled, compiling_for

GPUS = [(8, 0), (8, 9), (9, 0)]
#: kinds of keys and values, query heads of 8 key heads, head size, new tokens; and the GPUs it is compiled for
CASES = {
    "Llama-3-8B kv4": ("kv4", "kv4", 32, 128, 1, GPUS),
    "Llama-3-8B fp8, 4 new": ("fp8", "fp8", 32, 128, 4, [(8, 0), (9, 0)]),
    "Llama-2-7B kv8": ("kv8", "kv8", 8, 128, 1, [(9, 0)]),
    "heads of 64, mixed": ("kv8", "kv4", 24, 64, 2, [(9, 0)]),
    "heads of 96": ("kv4", "fp8", 32, 96, 1, [(8, 9)]),
    "heads of 256": ("kv8", "fp8", 32, 256, 1, GPUS),
}


def attention(
    kinds: tuple[str, str], heads: int, size: int, new: int, pages: int, gpu: tuple[int, int], **options
) -> list[Compiled]:
    keys, values = (empty_pages(k, r, 1, 8, size, device="cpu") for k, r in zip(kinds, ("key", "value"), strict=True))
    query = torch.empty(2, heads, new, size, dtype=torch.float16)
    table, lengths = torch.zeros(2, pages, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with compiling_for(gpu) as found:
        kv_attention(query, keys, values, table, lengths, **options)
    return found


@pytest.mark.parametrize(("case", "gpu"), [(name, gpu) for name, case in CASES.items() for gpu in case[-1]])
def test_attention_compiles(case, gpu):
    *kinds, heads, size, new, _ = CASES[case]
    split, total = attention(tuple(kinds), heads, size, new, 128, gpu)
    assert (split.name, total.name) == ("_split_kernel", "_sum_kernel")
    assert split.spills == total.spills == 0 and not split.warnings
    assert split.shared <= SHARED[gpu]
    # Codes are the first operand, read from registers: mma.sync, on Hopper too, since a warp works on its own.
    assert set(split.mma) == {"m16n8k16.row.col.f32.f16.f16.f32"} and not split.wgmma
    assert ("griddepcontrol.wait" in total.ptx) == (gpu >= (9, 0))


def loop(kernel: Compiled) -> list[str]:
    """Instructions of the largest loop, as the disassembler writes them."""
    labels, found, longest = {}, [], []
    for line in kernel.sass().splitlines():
        if label := re.match(r"\s*(\.L\S+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?(\w[\w.]*)\s*(.*)", line):
            found.append(instruction[1])
            target = re.search(r"`\((\.L\S+)\)", instruction[2])
            start = labels.get(target[1], len(found)) if target and instruction[1].startswith("BRA") else len(found)
            longest = max(longest, found[start:], key=len)
    return longest


@pytest.mark.parametrize("warps", [1, 4])
def test_instructions_of_a_page(warps):
    """A page of Llama-3-8B in 4 bits: 16384 codes, 512 a thread; the counts that the notes reason with."""
    config = {"pages_per_split": 8, "num_warps": warps, "num_stages": 3}
    split, _ = attention(("kv4", "kv4"), 32, 128, 1, 128, (9, 0), config=config)
    body = loop(split)
    count = lambda name: sum(i.startswith(name) for i in body)  # noqa: E731
    assert count("HMMA") == 64  # 2 x 16384 x 8 columns / (16 x 8 x 16)
    assert count("BAR") <= 2  # warps do not exchange anything, they only wait for their copies
    assert count("LOP3") + count("SHF") <= 256 + 64 + 100  # 4 + 1 for each of 64 registers of codes
    assert len(body) <= 1050  # two instructions a code: at most 2/5 of what the memory leaves time for
    # All loads but the next page's number (once for each of three layouts) are asynchronous copies; Triton 3.9 reads scales
    # and zero points by plain loads where a block has four warps.
    assert count("LDG.") <= (3 if warps == 1 or triton.__version__ < "3.9" else 9)


def test_whole_sequences_need_no_sum():
    (split,) = attention(
        ("kv4", "kv4"),
        32,
        128,
        1,
        4,
        (9, 0),
        longest=200,
        config={"pages_per_split": 4, "num_warps": 4, "num_stages": 4},
    )
    assert split.spills == 0 and "griddepcontrol" not in split.ptx


@pytest.mark.parametrize(("kinds", "new", "gpu"), [(("kv4", "kv4"), 1, (9, 0)), (("fp8", "kv8"), 100, (8, 0))])
def test_append_compiles(kinds, new, gpu):
    keys, values = (empty_pages(k, r, 1, 8, 128, device="cpu") for k, r in zip(kinds, ("key", "value"), strict=True))
    x = torch.empty(4, 8, new, 128, dtype=torch.bfloat16)
    table, lengths = torch.zeros(4, 128, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with compiling_for(gpu) as (found):
        kv_append(x, x, keys, values, table, lengths)
    assert [k.name for k in found] == ["_append_kernel"] and found[0].spills == 0
    assert "div.rn.f32" in found[0].ptx and "div.full" not in found[0].ptx  # codes are torch's, bit by bit
