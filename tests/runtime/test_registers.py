"""Register arithmetic, byte by byte against int32 arithmetic, over all codes, scales and offsets."""

import pytest
import torch

from lqedu.formats import pack_words
from lqedu.formats.progressive import ProgressiveGrid, progressive_quantize
from lqedu.runtime.registers import add_bytes, decode_words, multiply, to_int8, to_words, unpack_nibbles

CODES = torch.arange(16)


def _wrapped(values: torch.Tensor) -> torch.Tensor:
    """What int8 keeps of an integer."""
    return ((values + 128) % 256 - 128).to(torch.int8)


def test_words_and_bytes_are_inverses():
    everything = torch.arange(256, dtype=torch.uint8).roll(7).view(8, 32)
    assert torch.equal(to_int8(to_words(everything)).view(torch.uint8), everything)
    assert torch.equal(to_int8(to_words(everything.view(torch.int8))), everything.view(torch.int8))
    assert int(to_words(torch.full((4,), 255, dtype=torch.uint8))) == 2**32 - 1


def test_nibbles_of_every_layout_place():
    codes = torch.stack([CODES.roll(i)[:8] for i in range(16)])  # every code in every place
    low, high = unpack_nibbles(pack_words(codes, "halves"))
    assert torch.equal(to_int8(torch.cat((low, high), -1)), codes.to(torch.int8))
    unsigned = pack_words(codes, "halves").to(torch.int64) % 2**32
    assert torch.equal(unpack_nibbles(unsigned)[1], high)  # a set top bit does not smear over the shift


def test_multiplication_is_bytewise_up_to_255_and_not_beyond():
    words = torch.stack([to_words(CODES.roll(i).to(torch.uint8)) for i in range(16)])  # [16, 4], every neighbourhood
    for s in range(256):
        want = torch.stack([CODES.roll(i) * s for i in range(16)])
        got = to_int8(multiply(words, s)).to(torch.int64) % 256
        assert torch.equal(got, want) == (15 * s <= 255), s
    assert 15 * 17 == 255  # so 17 is the last scale that works


def test_addition_is_bytewise_over_all_pairs():
    a, b = (x.flatten() for x in torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij"))
    for neighbour in (0, 127, 128, 255):  # what could send or take a carry
        for other in (0, 1, 128, 255):
            word_a = a * 0x10001 + neighbour * 0x1000100
            word_b = b * 0x10001 + other * 0x1000100
            got = add_bytes(word_a, word_b)
            assert int(got.min()) >= 0 and int(got.max()) < 2**32
            for place, want in enumerate(((a + b), (neighbour + other) * torch.ones_like(a)) * 2):
                assert torch.equal((got >> (8 * place)) & 0xFF, want % 256)


def test_decoding_equals_int32_arithmetic_over_all_codes_scales_and_zero_points():
    s, z = (x.flatten()[:, None] for x in torch.meshgrid(torch.arange(1, 18), torch.arange(16), indexing="ij"))
    for offset in (z * s, z * 16 - 128):  # a zero point before the scale, and any offset after it
        for roll in range(16):
            codes = CODES.roll(roll).expand(len(s), 16)
            got = decode_words(pack_words(codes, "halves"), s, offset)
            assert torch.equal(got, _wrapped(codes * s - offset))
    product = (CODES[None] - z) * s
    fits = (product >= -128) & (product <= 127)
    assert torch.equal(
        decode_words(pack_words(CODES.expand(len(s), 16), "halves"), s, z * s)[fits], product[fits].to(torch.int8)
    )


@pytest.mark.parametrize("zero", ["code", "offset"])
def test_a_progressive_weight_decodes_in_registers(zero):
    w = torch.randn(24, 192, generator=torch.Generator().manual_seed(0)) ** 3
    q = progressive_quantize(w, ProgressiveGrid(64, zero))
    offset = q.zero.to(torch.int64) * (q.group_scale.to(torch.int64) if zero == "code" else 1)
    words = pack_words(q.codes, "halves").view(24, 3, 8)  # [out, groups, words of a group]
    got = decode_words(words, q.group_scale[..., None], offset[..., None])
    assert torch.equal(got.view(24, 192), q.int8())


def test_subtraction_first_breaks_neighbours():
    codes = torch.tensor([3, 9, 0, 15], dtype=torch.int8)
    early = multiply(to_words(codes - 8), 16)  # a byte of -5 is 251, and 251 * 16 runs into its neighbour
    assert not torch.equal(to_int8(early), (codes - 8) * 16)
    late = add_bytes(multiply(to_words(codes), 16), to_words(torch.full((4,), -128, dtype=torch.int8)))
    assert torch.equal(to_int8(late), (codes - 8) * 16)


def test_bad_arguments():
    with pytest.raises(TypeError, match="int8 or uint8"):
        to_words(torch.zeros(4))
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        to_words(torch.zeros(6, dtype=torch.int8))
