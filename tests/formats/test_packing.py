"""Packing is exhausted: every code in every lane, every width, ragged rows, golden bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lqedu.errors import GridError
from lqedu.formats import WORD_LAYOUTS, pack, pack_words, packed_width, unpack, unpack_words
from lqedu.formats.packing import pack_int32, unpack_int32


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_in_every_lane_survives(bits: int) -> None:
    lanes = 8
    for lane in range(lanes):
        codes = torch.zeros(1 << bits, lanes, dtype=torch.uint8)
        codes[:, lane] = torch.arange(1 << bits)
        assert torch.equal(unpack(pack(codes, bits), bits, lanes), codes)


@given(bits=st.integers(1, 8), n=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_round_trip_and_width(bits: int, n: int, seed: int) -> None:
    codes = torch.randint(1 << bits, (3, n), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (3, packed_width(n, bits))
    assert torch.equal(unpack(packed, bits, n).long(), codes)


@given(bits=st.integers(1, 8), n=st.integers(1, 24), seed=st.integers(0, 2**31))
def test_is_one_little_endian_stream(bits: int, n: int, seed: int) -> None:
    """The independent definition: the row as one big integer, code i shifted by i * bits."""
    codes = torch.randint(1 << bits, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    assert pack(torch.tensor(codes), bits).numpy().tobytes() == number.to_bytes(packed_width(n, bits), "little")


def test_golden_bytes() -> None:
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [0b11010001, 0b01011000, 0b00011111]
    assert pack(torch.tensor([0, 1, 2, 3]), 2).tolist() == [0b11100100]
    assert pack(torch.tensor([200, 7]), 8).tolist() == [200, 7]


@pytest.mark.parametrize("layout", WORD_LAYOUTS)
def test_word_layouts(layout: str) -> None:
    codes = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(50)])
    words = pack_words(codes, layout)
    assert words.dtype == torch.int32
    assert words.shape == (50, 2)
    assert torch.equal(unpack_words(words, layout).long(), codes)
    for nibble, index in enumerate(WORD_LAYOUTS[layout]):  # the table says which code sits in which nibble
        assert torch.equal((words[:, 0].long() >> (4 * nibble)) & 15, codes[:, index])


def test_refusals() -> None:
    with pytest.raises(GridError, match=r"\[0, 15\]"):
        pack(torch.tensor([16]), 4)
    with pytest.raises(GridError, match="-1"):
        pack(torch.tensor([-1]), 4)
    with pytest.raises(GridError, match="integers"):
        pack(torch.tensor([0.5]), 4)
    with pytest.raises(GridError, match="1 to 8"):
        pack(torch.tensor([0]), 9)
    with pytest.raises(GridError, match="bytes a row"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 8)
    with pytest.raises(GridError, match="uint8"):
        unpack(torch.zeros(4, dtype=torch.int32), 4, 8)
    with pytest.raises(GridError, match="multiple of 8"):
        pack_words(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(GridError, match="layout"):
        pack_words(torch.zeros(8, dtype=torch.uint8), "zigzag")


@given(st.integers(1, 8), st.integers(1, 70), st.booleans(), st.integers(0, 99))
def test_whole_words_are_the_bit_stream(bits: int, n: int, transposed: bool, seed: int) -> None:
    codes = torch.randint(1 << bits, (n, 3) if transposed else (3, n), generator=torch.Generator().manual_seed(seed))
    codes = codes.T if transposed else codes
    words = pack_int32(codes, bits)
    assert words.dtype == torch.int32 and tuple(words.shape) == (3, -(-n * bits // 32))
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(packed))
        assert stream == sum(code << bits * i for i, code in enumerate(row))
    assert torch.equal(unpack_int32(words, bits, n), codes.to(torch.uint8))
    assert torch.equal(unpack_int32(words.T.contiguous().T, bits, n), codes.to(torch.uint8))


@pytest.mark.parametrize(
    "words", [torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int32), torch.tensor(1)]
)
def test_words_that_do_not_fit_are_refused(words: torch.Tensor) -> None:
    with pytest.raises(GridError, match="take 2 words of int32"):
        unpack_int32(words, 4, 16)
