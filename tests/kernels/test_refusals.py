"""Calls as a user gets them wrong: each is refused by a sentence that names the argument, whatever the family."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from lqedu_kernels import _tensors
from lqedu_kernels.fp8 import fp8_matmul
from lqedu_kernels.hadamard import hadamard_transform
from lqedu_kernels.kv_attention import kv_attention
from lqedu_kernels.kv_pages import check_places, empty_pages, kv_append, pack_pages, page_values
from lqedu_kernels.quantize import TokenGrid, quantize_tokens, rmsnorm_quantize, silu_quantize
from lqedu_kernels.steps16 import rope
from lqedu_kernels.w4a8 import pack_w4a8, w4a8_matmul
from lqedu_kernels.w4a16 import pack_w4a16, w4a16_matmul
from lqedu_kernels.w8a8 import w8a8_matmul

F8 = torch.float8_e4m3fn


class Arguments:
    """Good arguments of every family, small, on a device."""

    def __init__(self, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.x, self.row = zeros(2, 128, dtype=torch.float16), zeros(1, 8, dtype=torch.float16)
        self.words, self.nibbles = zeros(8, 32, dtype=torch.int16), zeros(8, 64, dtype=torch.uint8)
        self.x8, self.w8 = zeros(2, 128, dtype=torch.int8), zeros(8, 128, dtype=torch.int8)
        self.one, self.two, self.eight = zeros(1, 1), zeros(2), zeros(8)
        self.pages = [empty_pages("kv4", role, 2, 2, 64, device=device) for role in ("key", "value")]
        self.table, self.lengths = zeros(1, 2, dtype=torch.int32), zeros(1, dtype=torch.int32)
        self.key, self.query = zeros(1, 2, 1, 64, dtype=torch.float16), zeros(1, 4, 1, 64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: w4a16_matmul(a.x, None, a.row), "words .* must be a tensor, got NoneType"),
        (
            lambda a: w4a16_matmul(a.x, a.words, a.row, config={}),
            "config must name its kernel, one of few, many, hopper",
        ),
        (lambda a: pack_w4a16(a.x), r"codes must be uint8 or int8 \[n, k\], got torch.float16 of shape \[2, 128\]"),
        (lambda a: pack_w4a16(a.nibbles + 16), "codes must be within 0 to 15 or -8 to 7, got 16 to 16"),
        (lambda a: pack_w4a16(a.w8 - 1), "codes must be within 0 to 15, and some are negative"),
        (lambda a: pack_w4a8(a.w8 - 9), "codes must be within 0 to 15 or -8 to 7, got -9 to -9"),
        (lambda a: pack_w4a8(a.two), "codes must be uint8 or int8"),
        (lambda a: pack_pages(a.x8, "kv4", "key"), "records must be uint8"),
        (lambda a: pack_pages(a.nibbles[None, None, :, :36], "kv5", "key"), "kind is one of kv4, kv8, fp8, got 'kv5'"),
        (lambda a: page_values(a.pages[0], "keys"), "role is 'key' or 'value', got 'keys'"),
        (lambda a: w8a8_matmul(a.x8, a.two, a.w8, a.one), r"x_scale .* must have shape \[2, 1\], got \[2\]"),
        (
            lambda a: w8a8_matmul(a.x8, a.one, a.w8, a.one, config={"kernel": "few"}),
            "config .* one of split, tiles, hopper",
        ),
        (lambda a: w4a8_matmul(None, a.two, a.nibbles, a.eight), r"x \(tokens\) must be a tensor, got NoneType"),
        (lambda a: w4a8_matmul(a.x8, a.two, None, a.eight), r"codes \(pack_w4a8\) must be a tensor, got NoneType"),
        (
            lambda a: w4a8_matmul(a.x8, a.two, a.nibbles, a.eight, config={}),
            "config must name its kernel, one of .*few, tile",
        ),
        (lambda a: fp8_matmul(a.x8.to(F8), 1.0, a.w8.to(F8), a.one), "x_scale must be a tensor, got float"),
        (lambda a: rmsnorm_quantize(a.x, None, eps=1e-6), "weight must be a tensor"),
        (lambda a: rmsnorm_quantize(a.x, a.x[0], eps="1e-6"), "eps must be a number, got '1e-6'"),
        (lambda a: silu_quantize(a.x, None), "up must be a tensor"),  # not the codes of the gate alone
        (lambda a: empty_pages("kv4", "keys", 1, 1, 64, device="cpu"), "role is 'key' or 'value', got 'keys'"),
        (lambda a: kv_append(None, a.key, *a.pages, a.table, a.lengths), "key must be a tensor, got NoneType"),
        (
            lambda a: kv_append(
                a.key,
                a.key,
                *[empty_pages("fp8", role, 2, 2, 64, device=a.key.device) for role in ("key", "value")],
                a.table,
                a.lengths,
                scales=(a.two.half(),),
            ),
            "scales must be a tuple of two tensors",
        ),
        (
            lambda a: kv_append(a.key, a.key, *a.pages, a.table[:, :0].contiguous(), a.lengths),
            "table has no page for 1 sequences",
        ),
        (
            lambda a: kv_append(a.key, a.key, a.pages[0]._replace(kind="int3"), a.pages[1], a.table, a.lengths),
            "keys.kind is one of kv4, kv8, fp8, got 'int3'",
        ),
        (lambda a: kv_attention(a.query, *a.pages, a.table, a.lengths, scaling="x"), "scaling must be a number"),
        (lambda a: kv_attention(a.query, *a.pages, a.table, a.lengths, longest=-1), "longest must be .* got -1"),
        (lambda a: rmsnorm_quantize(a.x, a.x[0], eps=-1.0), "eps must be at least 0, got -1.0"),
        (lambda a: quantize_tokens(a.x, TokenGrid(clip_ratio="1")), "grid must have a clip_ratio above 0"),
        (lambda a: hadamard_transform(a.x, stride=None), "stride must be a whole number of at least 1, got None"),
        (lambda a: w4a16_matmul(a.x, a.words, a.row, group_size=128.0), "group_size must be 32, 64, 128 or None"),
        (
            lambda a: rope(None, a.one, a.one, a.lengths, heads=1, kv_heads=1),
            "qkv must be a tensor, got NoneType",
        ),
        (
            lambda a: rope(a.x, a.w8[:, :32].float(), a.w8[:, :32].float(), a.table[0], heads=2, kv_heads=1, norms=[]),
            "norms must be a tuple of two tensors",
        ),
        (lambda a: check_places("key", 8192, 8), "key has 8192 sequences of 8 heads, but one launch serves 65535"),
        (
            lambda a: kv_attention(a.query, *a.pages, a.table, a.lengths, config={"num_warps": 1}),
            "config lacks pages_per_split, num_stages",
        ),
        (lambda a: quantize_tokens(a.x, config={"piece": 128}), "config lacks warps, stages, resident"),
        (lambda a: w4a16_matmul(a.x, a.words, a.row, config="few"), "config must be a dict, got str"),
        (lambda a: w4a16_matmul(a.x, a.words, a.row, config={"kernel": "many", "block_m": 16}), "config lacks block_n"),
        (
            lambda a: w8a8_matmul(a.x8, a.one, a.w8, a.one, config={"kernel": "split", "splits": 1}),
            "config lacks block_m, block_n, block_k, warps, stages, group_m",
        ),
        (
            lambda a: w4a8_matmul(a.x8, a.two, a.nibbles, a.eight, config={"kernel": "one", "BN": 4, "B": 1}),
            "config lacks num_warps, AHEAD",
        ),
    ],
)
def test_one_sentence(call: Callable[[Arguments], object], message: str, device: torch.device) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(Arguments(device))


def test_no_sequences(device: torch.device) -> None:
    a = Arguments(device)
    assert kv_attention(a.query[:0], *a.pages, a.table[:0], a.lengths[:0]).shape == (0, 4, 1, 64)


def test_another_device_than_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, wherever the tensors are."""
    monkeypatch.setattr(_tensors, "assumed", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    elsewhere = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    with pytest.raises(
        ValueError, match=r"x is on cuda:1, .* device, cuda:0: call this inside `with torch.cuda.device"
    ):
        _tensors.target_of(elsewhere, "x")


@pytest.mark.skipif(_tensors.HAS_GLUON, reason="here the Gluon kernels may run")
def test_a_configuration_that_cannot_run_is_not_replaced(device: torch.device) -> None:
    a = Arguments(device)
    four = {"kernel": "hopper", "block_m": 64, "block_n": 128, "warps": 8, "stages": 8, "group_m": 8, "share": False}
    eight = {"kernel": "hopper", "block_m": 128, "block_n": 64, "stages": 7, "group_m": 8, "lead": 2}
    for call in (
        lambda: w4a16_matmul(a.x, a.words, a.row, config=four),
        lambda: w4a8_matmul(a.x8, a.two, a.nibbles, a.eight, config=four),
        lambda: w8a8_matmul(a.x8, a.one, a.w8, a.one, config=eight),
    ):
        with pytest.raises(ValueError, match=r"config asks for .* Triton 3\.6.*take another config, or None"):
            call()
