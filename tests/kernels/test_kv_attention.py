"""Paged key-value caches and attention over them: against plain torch, and against attention in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lqedu_kernels.kv_attention import bytes_moved, default_config, kv_attention, kv_attention_reference, search_space
from lqedu_kernels.kv_pages import (
    BITS,
    Pages,
    empty_pages,
    kv_append,
    kv_append_reference,
    pack_pages,
    page_codes,
    page_values,
    quantize_reference,
    unpack_pages,
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
HALF, BRAIN = torch.float16, torch.bfloat16


def split(pages: int, warps: int = 1, stages: int = 3) -> dict[str, int]:
    return {"pages_per_split": pages, "num_warps": warps, "num_stages": stages}


@pytest.mark.parametrize(
    ("kinds", "heads", "kv_heads", "size", "new", "dtype"),
    [
        (("kv4", "kv4"), 8, 2, 128, 1, HALF),
        (("kv8", "kv8"), 3, 3, 64, 2, BRAIN),
        (("fp8", "fp8"), 8, 1, 96, 3, HALF),  # 24 queries a head: two blocks of columns
        (("kv8", "kv4"), 8, 2, 32, 1, BRAIN),
        (("kv4", "fp8"), 2, 1, 64, 5, HALF),  # 10 queries a head: 16 columns
        (("kv4", "kv4"), 4, 2, 96, 8, BRAIN),
        (("kv8", "fp8"), 7, 1, 256, 1, HALF),
    ],
)
def test_attention(kinds, heads, kv_heads, size, new, dtype, device):
    arguments = problem(kinds, [200, 64, new, 0], heads, kv_heads, size, device, new=new, dtype=dtype)
    want = kv_attention_reference(arguments[0].double(), *arguments[1:])
    # Four warps hold four pages for each stage but one: of heads of 256, two stages are what shared memory has room for.
    for config in (split(1), split(2, 2), split(8, 4, stages=2 if size == 256 else 3)):
        got = kv_attention(*arguments, config=config)
        assert got.dtype == dtype and worst_row(got.double(), want) < BOUND[dtype]
    assert torch.equal(got, kv_attention(*arguments, config=config))
    assert not got[3].any()  # nothing to read


def test_reference_is_torch_attention_over_the_decoded_cache(device):
    query, keys, values, table, lengths = problem(
        ("kv4", "fp8"), [130, 128], 4, 2, 64, device, new=3, dtype=torch.float32
    )
    got = kv_attention_reference(query, keys, values, table, lengths)
    for i, length in enumerate(lengths.tolist()):
        pages = table[i, : -(-length // 64)].long()
        k, v = (
            page_values(p, r)[pages].transpose(0, 1).flatten(1, 2)[:, :length]
            for p, r in ((keys, "key"), (values, "value"))
        )
        mask = torch.ones(3, length, dtype=torch.bool, device=device).tril(length - 3)
        want = F.scaled_dot_product_attention(query[i : i + 1], k[None], v[None], mask, enable_gqa=True)
        torch.testing.assert_close(got[i : i + 1], want)


def test_a_sequence_does_not_depend_on_its_batch_nor_on_what_lies_behind_its_end(device):
    query, keys, values, table, lengths = problem(("kv4", "kv8"), [70, 200], 4, 2, 64, device)
    together = kv_attention(query, keys, values, table, lengths, config=split(2))
    keys.numbers[table[0, 1], :, 6:] = math.nan  # tokens 70 and on
    values.numbers[table[0, 1], :, 6:] = math.inf
    alone = kv_attention(query[:1], keys, values, table[:1], lengths[:1], config=split(2), longest=70)
    assert torch.equal(alone, together[:1])


@pytest.mark.parametrize(("magnitude", "scale"), [(1e-30, 1e-6), (1e30, 200.0)])
def test_scales_and_queries_of_any_magnitude(magnitude, scale, device):
    """Weights times scales in float16, or queries rounded to it, would lose most of their digits here, or overflow."""
    query, keys, values, table, lengths = problem(("kv8", "kv8"), [150], 2, 1, 64, device, dtype=BRAIN)
    values.numbers[..., 0] = (torch.rand(values.numbers.shape[:-1]) + 0.5).to(device) * scale
    query, scaling = query * magnitude, 0.125 / magnitude
    want = kv_attention_reference(query.double(), keys, values, table, lengths, scaling=scaling)
    got = kv_attention(query, keys, values, table, lengths, scaling=scaling, config=split(1))
    assert worst_row(got.double(), want) < BOUND[BRAIN]


def test_every_code_of_every_field_is_exact(device):
    """One token is read: the output is its value, rounded once."""
    size = 64
    for kind in KINDS:
        keys = random_pages(kind, "key", 1, 1, size, device)
        for shift in range(0, 256 if kind != "kv4" else 16, 64):
            byte = (torch.arange(64)[:, None] + torch.arange(size) + shift) % (16 if kind == "kv4" else 256)
            byte = torch.where((byte & 127) == 127, 0, byte) if kind == "fp8" else byte  # no NaN
            byte = byte[:, ::2] | byte[:, 1::2] << 4 if kind == "kv4" else byte
            number = torch.tensor([1.0] if kind == "fp8" else [1.0, 3.0]).half().view(torch.uint8).expand(64, -1)
            records = torch.cat([byte.to(torch.uint8), number], -1)[None, None]
            values = pack_pages(records, kind, "value")
            assert torch.equal(unpack_pages(values, "value"), records)
            assert torch.equal(unpack_pages(pack_pages(records, kind, "key"), "key"), records)
            values = Pages(kind, values.codes.to(device), values.numbers.to(device))
            loud = torch.zeros_like(keys.numbers)
            loud[0, 0, 37] = torch.tensor([60.0, 0.0])  # the score of one token lies far above all others
            query = torch.ones(1, 1, 1, size, dtype=torch.float16, device=device)
            ones = Pages("kv4", torch.full((1, 1, 64, size // 4), 0x1111, dtype=torch.int16, device=device), loud)
            table, lengths = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([[0]], [64]))
            got = kv_attention(query, ones, values, table, lengths)[0, 0, 0]
            torch.testing.assert_close(got.float(), page_values(values, "value")[0, 0, 37], rtol=2**-11, atol=0)


def clone(pages: Pages) -> Pages:
    return Pages(pages.kind, pages.codes.clone(), pages.numbers.clone())


def equal(a: Pages, b: Pages) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.numbers.view(torch.int16), b.numbers.view(torch.int16))


@pytest.mark.parametrize(
    ("kinds", "new", "lengths", "zero_point", "size", "dtype"),
    [
        (("kv4", "kv4"), 1, [1, 64, 65, 130], "float", 96, BRAIN),
        (("kv8", "kv4"), 5, [5, 66, 200, 3], "integer", 64, HALF),
        (("kv4", "kv8"), 1, [40], "integer", 128, HALF),
        (("fp8", "kv8"), 35, [100], "float", 32, BRAIN),
        (("kv4", "kv4"), 70, [137], "float", 64, HALF),
        (("fp8", "fp8"), 2, [2, 65], "float", 256, HALF),
    ],
)
def test_append_writes_the_bits_of_the_reference(kinds, new, lengths, zero_point, size, dtype, device):
    _, keys, values, table, lengths = problem(kinds, lengths, 2, 2, size, device)
    g = torch.Generator().manual_seed(new)
    key, value = (torch.randn(len(lengths), 2, new, size, generator=g) * 3 + 1 for _ in range(2))
    key[0, 0, 0] = 0.0  # nothing to scale
    value[0, 1, 0] = value[0, 1, 0].abs() + 1  # no negative value: zero point 0
    key, value = key.to(dtype).to(device), value.to(dtype).to(device)
    wanted, got = [clone(p) for p in (keys, values)], [clone(p) for p in (keys, values)]
    options = {"zero_point": zero_point, "clip_ratio": 0.9}
    kv_append_reference(key, value, *wanted, table, lengths, **options)
    kv_append(key, value, *got, table, lengths, **options)
    for before, want, have in zip((keys, values), wanted, got, strict=True):
        assert not equal(before, want) and equal(have, want)


def test_append_with_calibrated_scales(device):
    _, keys, values, table, lengths = problem(("fp8", "fp8"), [3], 2, 2, 64, device)
    x = torch.randn(1, 2, 3, 64, generator=torch.Generator().manual_seed(0)).half().to(device)
    scales = tuple(torch.tensor(s, dtype=torch.float16, device=device) for s in ([0.01, 0.001], [0.02, 1.0]))
    wanted, got = [clone(p) for p in (keys, values)], [clone(p) for p in (keys, values)]
    kv_append_reference(x, -x, *wanted, table, lengths, scales=scales)
    kv_append(x, -x, *got, table, lengths, scales=scales)
    assert equal(got[0], wanted[0]) and equal(got[1], wanted[1])
    assert int((page_codes(got[0], "key") & 127).max()) == 126  # 448 at most: small scales saturate


@pytest.mark.parametrize("zero_point", ["float", "integer"])
def test_pages_hold_the_records_of_lqedu(zero_point, device):
    """The formats and the attention of ``lqedu`` agree bit by bit, and to rounding."""
    formats = pytest.importorskip("lqedu.formats.kv")
    runtime = pytest.importorskip("lqedu.runtime.attention")
    g = torch.Generator().manual_seed(4)
    key, value, query = (torch.randn(1, h, n, 32, generator=g).half() for h, n in ((1, 20), (1, 20), (3, 2)))
    for grid, kind in ((formats.KVInt(4, zero_point=zero_point), "kv4"), (formats.KVFloat8(), "fp8")):
        keys, values = (empty_pages(kind, role, 2, 1, 32, device=device) for role in ("key", "value"))
        table, lengths = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([[1]], [20]))
        kv_append(key.to(device), value.to(device), keys, values, table, lengths, zero_point=zero_point)
        for x, pages, role in ((key, keys, "key"), (value, values, "value")):
            records = unpack_pages(pages, role).cpu()[1, :, :20]
            assert torch.equal(records[None], grid.encode(x))
        got = kv_attention(query.to(device), keys, values, table, lengths)
        want = runtime.attend_codes(query.double(), grid.quantize(key), grid.quantize(value))
        assert worst_row(got.cpu().double(), want) < BOUND[HALF]


def test_configurations():
    def default(*sizes, **options):
        return tuple(default_config(*sizes, processors=132, **options).values())

    assert default(512, 128) == (128, 1, 3)
    assert default(256, 128) == (128, 2, 3)  # 512 warps for 528 schedulers, and no splits
    assert default(64, 128) == (32, 2, 3)
    assert default(8, 128) == (4, 2, 3)
    assert default(8, 16) == (2, 2, 3)
    assert default(8, 1) == (1, 1, 3)
    assert default(8, 128, page_bytes=33280)[1] == default(8, 128, columns=16)[1] == 1
    for size, key, value in itertools.product(
        (64, 128, 256), KINDS, KINDS
    ):  # two steps of any heads fit an L40S's 99 KB
        page_bytes = bytes_moved(64, 1, size, key, value)
        assert 2 * default(1, 512, page_bytes=page_bytes)[1] * page_bytes <= 80_000
    for programs, pages in ((8, 16), (64, 128), (256, 128), (512, 512)):
        space = search_space(programs, pages)
        assert space[0] == default_config(programs, pages, processors=132) and len(space) <= 30
        assert all(c["pages_per_split"] % c["num_warps"] == 0 for c in space)
    assert bytes_moved(10, 8, 128, "kv4", "fp8") == 10 * 8 * (64 + 128 + 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 4, 1, 64)}, "query must be float16 or bfloat16, got float32"),
        ({"query": torch.zeros(1, 4, 64, dtype=HALF)}, r"query must have shape \[any, any, any, any\]"),
        (
            {"query": torch.zeros(1, 3, 1, 64, dtype=HALF)},
            "query has 3 heads, which is not a multiple of the 2 heads of keys",
        ),
        ({"query": torch.zeros(1, 4, 65, 64, dtype=HALF)}, "query has 65 new tokens"),
        ({"query": torch.zeros(1, 4, 1, 32, dtype=HALF)}, r"keys.codes must have shape \[any, 2, 64, 8\]"),
        ({"query": torch.zeros(1, 4, 1, 48, dtype=HALF)}, "head_dim is a multiple of 32 from 32 to 256, got 48"),
        (
            {"query": torch.zeros(2, 4, 1, 64, dtype=HALF)},
            r"table \(page numbers of each sequence\) must have shape \[2, any\]",
        ),
        ({"config": {"pages_per_split": 2, "num_warps": 4, "num_stages": 3}}, "2 pages a split for 4 warps"),
        ({"keys": torch.zeros(3)}, "keys must be Pages, as empty_pages makes them, got Tensor"),
        (
            {"keys": Pages("kv3", torch.zeros(1, 2, 64, 16).short(), torch.zeros(1, 2, 64, 2).half())},
            "kind is one of kv4, kv8, fp8",
        ),
        (
            {"values": empty_pages("kv8", "key", 1, 1, 64, device="cpu")},
            r"values.codes must have shape \[any, 2, 64, 32\]",
        ),
        ({"table": torch.zeros(1, 2)}, r"table \(page numbers of each sequence\) must be int32, got float32"),
        (
            {"lengths": torch.zeros(1, dtype=torch.int64)},
            r"lengths \(tokens of each sequence, new ones included\) must be int32",
        ),
    ],
)
def test_attention_refuses(change, message, device):
    names = ("query", "keys", "values", "table", "lengths")
    arguments = dict(zip(names, problem(("kv4", "kv4"), [64], 4, 2, 64, device), strict=True))
    with pytest.raises((TypeError, ValueError), match=message):
        kv_attention(**(arguments | moved(change, device)))


def every_other(device: torch.device) -> torch.Tensor:
    """Keys of two heads, every other number of a tensor."""
    return torch.zeros(1, 2, 1, 128, dtype=HALF, device=device)[..., ::2]


def moved(change: dict, device: torch.device) -> dict:
    """Arguments with their tensors, those of pages too, on a device."""

    def move(x):
        if isinstance(x, Pages):
            return Pages(x.kind, x.codes.to(device), x.numbers.to(device))
        if callable(x):  # a view, which a copy to a GPU would make dense
            return x(device)
        return x.to(device) if isinstance(x, torch.Tensor) else x

    return {name: move(x) for name, x in change.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(1, 2, 1, 32, dtype=HALF)}, r"value must have shape \[1, 2, 1, 64\]"),
        ({"value": torch.zeros(1, 2, 1, 64, dtype=BRAIN)}, "value must be float16, got bfloat16"),
        ({"key": every_other}, "key is not contiguous"),
        ({"clip_ratio": 0.0}, r"clip_ratio lies in \(0, 1\], got 0.0"),
        ({"zero_point": "none"}, "zero_point is 'float' or 'integer', got 'none'"),
        ({"scales": (torch.ones(2).half(),) * 2}, "scales are for fp8 pages"),
    ],
)
def test_append_refuses(change, message, device):
    _, keys, values, table, lengths = problem(("kv4", "kv4"), [64], 4, 2, 64, device)
    x = torch.zeros(1, 2, 1, 64, dtype=torch.float16, device=device)
    arguments = {"key": x, "value": x, "keys": keys, "values": values, "table": table, "lengths": lengths}
    with pytest.raises((TypeError, ValueError), match=message):
        kv_append(**(arguments | moved(change, device)))
