"""Paged key-value caches and attention over them: against plain torch, and against attention in float64."""

import pytest
import torch

from lqedu_kernels.kv_attention import kv_attention, kv_attention_reference
from lqedu_kernels.kv_pages import (
    BITS,
    Pages,
    kv_append,
    kv_append_reference,
    pack_pages,
    quantize_reference,
)

KINDS = ("kv4", "kv8", "fp8")


def random_pages(kind: str, role: str, pages: int, heads: int, size: int, device: torch.device, seed: int = 0) -> Pages:
    """Pages of normal values with one loud channel, quantized by the reference; every token written."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(pages, heads, 64, size, generator=g)
    x[..., 3] = 6 + x[..., 3]
    codes, numbers = quantize_reference(x, kind)
    codes = codes if BITS[kind] == 8 else codes[..., ::2] | codes[..., 1::2] << 4
    width = 1 if kind == "fp8" else 2
    records = torch.cat([codes, numbers[..., :width].contiguous().view(torch.uint8)], -1)
    return Pages(kind, *(t.to(device) for t in pack_pages(records, kind, role)[1:]))


def problem(kinds, lengths, heads, kv_heads, size, device, *, new=1, dtype=torch.float16, seed=0):
    """A query, pages in a shuffled order, block table and lengths; entries of the table that must not be read are absurd."""
    g = torch.Generator().manual_seed(seed)
    need = [-(-n // 64) for n in lengths]
    total, width = sum(need) + 2, max([1, *need]) + 1
    table = torch.full((len(lengths), width), 2**30, dtype=torch.int32)
    order = torch.randperm(total, generator=g).to(torch.int32)
    for row, n in zip(table, need, strict=True):
        row[:n], order = order[:n], order[n:]
    keys = random_pages(kinds[0], "key", total, kv_heads, size, device, seed)
    values = random_pages(kinds[1], "value", total, kv_heads, size, device, seed + 1)
    query = torch.randn(len(lengths), heads, new, size, generator=g).to(dtype)
    return query.to(device), keys, values, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


def worst_row(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest relative error of a head's output."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)).max())


#: Outputs are rounded to 2^-11 (float16) or 2^-8 (bfloat16), weights to 2^-11.
BOUND = {torch.float16: 2**-10, torch.bfloat16: 2**-7.5}


@pytest.mark.parametrize("kinds", [("kv4", "kv4"), ("kv8", "kv8"), ("fp8", "fp8"), ("kv8", "kv4"), ("kv4", "fp8")])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "new"), [(8, 2, 128, 1), (3, 3, 64, 2), (8, 1, 96, 3), (4, 2, 32, 1)]
)
def test_attention(kinds, heads, kv_heads, size, new, device):
    dtype = torch.bfloat16 if new == 2 else torch.float16
    arguments = problem(kinds, [200, 64, new, 129], heads, kv_heads, size, device, new=new, dtype=dtype)
    want = kv_attention_reference(arguments[0].double(), *arguments[1:])
    for per_split in (1, 2, 8):
        config = {"pages_per_split": per_split, "num_warps": 1, "num_stages": 4}
        got = kv_attention(*arguments, config=config)
        assert got.dtype == dtype and worst_row(got.double(), want) < BOUND[dtype]
        assert torch.equal(got, kv_attention(*arguments, config=config))


def clone(pages: Pages) -> Pages:
    return Pages(pages.kind, pages.codes.clone(), pages.numbers.clone())


@pytest.mark.parametrize("kinds", [("kv4", "kv4"), ("kv8", "kv4"), ("fp8", "kv8")])
@pytest.mark.parametrize(("new", "lengths"), [(1, [1, 64, 65, 130]), (5, [5, 66, 200, 3]), (70, [70, 64 + 70 + 3])])
@pytest.mark.parametrize("zero_point", ["float", "integer"])
def test_append_writes_the_codes_of_the_reference(kinds, new, lengths, zero_point, device):
    size, heads, dtype = (64, 2, torch.float16) if new > 1 else (96, 2, torch.bfloat16)
    _, keys, values, table, lengths = problem(kinds, lengths, heads, heads, size, device)
    g = torch.Generator().manual_seed(new)
    key, value = (torch.randn(len(lengths), heads, new, size, generator=g) * 3 + 1 for _ in range(2))
    key[0, 0, 0] = 0.0  # nothing to scale
    value[0, 1, 0] = value[0, 1, 0].abs() + 1  # no negative value: zero point 0
    key, value = key.to(dtype).to(device), value.to(dtype).to(device)
    wanted, got = [clone(p) for p in (keys, values)], [clone(p) for p in (keys, values)]
    kv_append_reference(key, value, *wanted, table, lengths, zero_point=zero_point, clip_ratio=0.9)
    kv_append(key, value, *got, table, lengths, zero_point=zero_point, clip_ratio=0.9)
    for before, want, have in zip((keys, values), wanted, got, strict=True):
        assert not torch.equal(before.codes, want.codes)
        assert torch.equal(have.numbers.view(torch.int16), want.numbers.view(torch.int16))
        assert torch.equal(have.codes, want.codes)
