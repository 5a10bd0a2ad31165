"""The steps that stay in 16 bits, and the cache that does, against their references."""

import pytest
import torch
from torch import Tensor

from lqedu_kernels._tensors import Target
from lqedu_kernels.kv16 import (
    bytes_moved,
    default_config,
    kv16_append,
    kv16_append_reference,
    kv16_attention,
    kv16_attention_reference,
)
from lqedu_kernels.steps16 import (
    rmsnorm,
    rmsnorm_reference,
    rope,
    rope_append,
    rope_append_reference,
    rope_reference,
    silu_mul,
    silu_reference,
)
from tests.compare import assert_close_by_column

DTYPES = (torch.float16, torch.bfloat16)
#: One rounding to 16 bits of a result whose float32 value differs in its last places.
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def randn(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [96, 1000])
def test_rmsnorm(k: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual = (randn(5, k, seed=s, dtype=dtype, device=device) for s in (0, 1))
    weight = randn(k, seed=2, dtype=dtype, device=device)
    for other in (None, residual):
        h, hidden = rmsnorm(x, weight, 1e-5, other)
        want, want_hidden = rmsnorm_reference(x, weight, 1e-5, other)
        torch.testing.assert_close(h, want, rtol=2 * ROUNDING[dtype], atol=1e-5)
        assert torch.equal(hidden, want_hidden)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_halves_of_one_output(dtype: torch.dtype, device: torch.device) -> None:
    both = randn(5, 2 * 1100, seed=3, dtype=dtype, device=device) * 4
    gate, up = both[:, :1100], both[:, 1100:]
    torch.testing.assert_close(silu_mul(gate, up), silu_reference(gate, up), rtol=2 * ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("size", [64, 12])
def test_rope(size: int, norms: bool, dtype: torch.dtype, device: torch.device) -> None:
    heads, kv_heads, m = 4, 2, 5
    qkv = randn(m, (heads + 2 * kv_heads) * size, seed=4, dtype=dtype, device=device)
    angles = torch.arange(20)[:, None] * torch.rand(size // 2, generator=torch.Generator().manual_seed(5))
    cos, sin = (torch.cat((t, t), 1).to(device) for t in (angles.cos(), angles.sin()))
    positions = torch.tensor([0, 3, 19, 7, 7], dtype=torch.int32, device=device)
    options: dict = {"heads": heads, "kv_heads": kv_heads}
    if norms:
        pair = tuple(randn(size, seed=s, dtype=dtype, device=device) for s in (6, 7))
        options |= {"norms": pair, "eps": 1e-6}
    got, want = rope(qkv, cos, sin, positions, **options), rope_reference(qkv, cos, sin, positions, **options)
    for a, b in zip(got, want, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=3 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])
    assert torch.equal(got[2], qkv.view(m, -1, size)[:, -kv_heads:])


def test_the_reference_turns_as_transformers_does() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    qkv, size = randn(3, 6 * 16, seed=8, dtype=torch.float32, device=torch.device("cpu")), 16
    angles = torch.arange(9)[:, None] * torch.rand(8, generator=torch.Generator().manual_seed(9))
    cos, sin = (torch.cat((t, t), 1) for t in (angles.cos(), angles.sin()))
    positions = torch.tensor([2, 8, 0], dtype=torch.int32)
    q, k, _ = rope_reference(qkv, cos, sin, positions, heads=4, kv_heads=1)
    heads = qkv.view(1, 3, 6, size).transpose(1, 2)
    want = apply_rotary_pos_emb(heads[:, :4], heads[:, 4:5], cos[positions][None], sin[positions][None])
    torch.testing.assert_close(q, want[0][0].transpose(0, 1))
    torch.testing.assert_close(k, want[1][0].transpose(0, 1))


def cache(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages of two heads, in no order, for sequences of 150, 1 and 64 tokens."""
    keys, values = (randn(9, 2, 64, size, seed=s, dtype=dtype, device=device) for s in (10, 11))
    table = torch.tensor([[7, 0, 4], [2, 8, 8], [5, 8, 8]], dtype=torch.int32, device=device)
    return keys, values, table, torch.tensor([150, 1, 64], dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [1, 3])
def test_append(new: int, dtype: torch.dtype, device: torch.device) -> None:
    size = 48
    keys, values, table, lengths = cache(size, dtype, device)
    key, value = (randn(3, 2, new, size, seed=s, dtype=dtype, device=device) for s in (12, 13))
    want = keys.clone(), values.clone()
    kv16_append_reference(key, value, *want, table, lengths)
    before = keys.clone()
    kv16_append(key, value, keys, values, table, lengths)
    assert torch.equal(keys, want[0]) and torch.equal(values, want[1])
    assert torch.equal(keys[4, :, 149 - 128], key[0, :, -1]) and torch.equal(keys[2, :, 0], key[1, :, -1])
    assert int((keys != before).any(-1).any(1).sum()) == 2 * new + 1  # the second sequence has room for one


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
def test_rope_to_pages(norms: bool, dtype: torch.dtype, device: torch.device) -> None:
    size, heads = 48, 4
    keys, values, table, lengths = cache(size, dtype, device)
    qkv = randn(3, (heads + 4) * size, seed=16, dtype=dtype, device=device)
    angles = torch.arange(160)[:, None] * torch.rand(size // 2, generator=torch.Generator().manual_seed(5))
    cos, sin = (torch.cat((t, t), 1).to(device) for t in (angles.cos(), angles.sin()))
    options: dict = {"heads": heads, "kv_heads": 2}
    if norms:
        options |= {"norms": tuple(randn(size, seed=s, dtype=dtype, device=device) for s in (6, 7)), "eps": 1e-6}
    want = keys.clone(), values.clone()
    query = rope_append_reference(qkv, cos, sin, *want, table, lengths, **options)
    before = keys.clone()
    got = rope_append(qkv, cos, sin, keys, values, table, lengths, **options)
    close = {"rtol": 3 * ROUNDING[dtype], "atol": 2 * ROUNDING[dtype]}
    torch.testing.assert_close(got, query, **close)
    torch.testing.assert_close(keys, want[0], **close)
    assert torch.equal(values, want[1])
    assert int((keys != before).any(-1).any(1).sum()) == 3  # one token of each sequence, and no other
    separate = rope(qkv, cos, sin, lengths - 1, **options)
    assert torch.equal(got, separate[0]) and torch.equal(keys[4, :, 149 - 128], separate[1][0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "heads"), [(64, 2), (48, 8), (128, 40)])
def test_attention(size: int, heads: int, dtype: torch.dtype, device: torch.device) -> None:
    keys, values, table, lengths = cache(size, dtype, device)
    query = randn(3, heads, size, seed=14, dtype=dtype, device=device)
    want = kv16_attention_reference(query.double(), keys.double(), values.double(), table, lengths)
    for pages in (1, 2, 3):
        config = {"pages_per_split": pages, "num_warps": 4, "num_stages": 2}
        got = kv16_attention(query, keys, values, table, lengths, config=config)
        assert_close_by_column(got, want, 2 * ROUNDING[dtype])  # weights and the result are rounded once each
        assert torch.equal(got, kv16_attention(query, keys, values, table, lengths, config=config))
    scaled = kv16_attention(query, keys, values, table, lengths, scaling=0.3)
    assert_close_by_column(
        scaled, kv16_attention_reference(query, keys, values, table, lengths, scaling=0.3), 4 * ROUNDING[dtype]
    )


def test_attention_is_that_of_torch() -> None:
    keys, values, table, lengths = cache(32, torch.float32, torch.device("cpu"))
    query = randn(3, 4, 32, seed=15, dtype=torch.float32, device=torch.device("cpu"))
    got = kv16_attention_reference(query, keys, values, table, lengths)
    k, v = (t[table[0].long()].transpose(0, 1).flatten(1, 2)[None, :, :150] for t in (keys, values))
    want = torch.nn.functional.scaled_dot_product_attention(query[:1, :, None], k, v, enable_gqa=True)
    torch.testing.assert_close(got[0], want[0, :, 0])


def test_no_tokens_give_zeros(device: torch.device) -> None:
    keys, values, table, _ = cache(64, torch.float16, device)
    query = randn(3, 4, 64, seed=14, dtype=torch.float16, device=device)
    y = kv16_attention(query, keys, values, table, torch.tensor([0, 1, 0], dtype=torch.int32, device=device))
    assert not y[0].any() and y[1].any() and not y[2].any()


def test_configuration_and_bytes() -> None:
    h100 = Target("NVIDIA H100 80GB HBM3", (9, 0), 132)
    assert default_config(8, 16, h100)["pages_per_split"] == 1
    assert default_config(64 * 8, 128, h100)["pages_per_split"] == 128
    assert bytes_moved(1, 8, 128) == 2 * 2 * 8 * 128


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rmsnorm(x.float(), x[0], 1e-5), "x must be float16 or bfloat16"),
        (lambda x: rmsnorm(x, x[0, :4], 1e-5), r"weight must have shape \[64\]"),
        (lambda x: rmsnorm(x, x[0], 1e-5, x[:1]), "residual must have shape"),
        (lambda x: silu_mul(x, None), "gate and up must be float16 or bfloat16 tensors"),
        (lambda x: silu_mul(x, x[:, :4]), "on one device with rows of consecutive elements"),
        (lambda x: rope(x, x[:, :16].float().contiguous(), None, None, heads=2, kv_heads=1), "sin must be a tensor"),
        (lambda x: rope(x, x[:, :8].float().contiguous(), None, None, heads=2, kv_heads=1), r"qkv must have shape \[any, 32\]"),
        (lambda x: rope(x, x[:, :8].float().contiguous(), None, None, heads=3, kv_heads=2), "heads must be a multiple of kv_heads"),
        (lambda x: kv16_attention(x[:, None].contiguous(), None, None, None, None), r"keys \(pages\) must be a tensor"),
    ],
)  # fmt: skip
def test_refusals(call, message: str, device: torch.device) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(randn(2, 64, seed=0, dtype=torch.float16, device=device))
