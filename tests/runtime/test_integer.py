"""Integer products are exact: compared with int64 arithmetic."""

import pytest
import torch

from lqedu.runtime.integer import int_matmul


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (17, 8, 1023), (4, 6, 1025), (2, 3, 5000)])
def test_equal_to_int64(shape):
    tokens, outs, inputs = shape
    g = torch.Generator().manual_seed(inputs)
    x = torch.randint(-128, 128, (tokens, inputs), generator=g).to(torch.int8)
    w = torch.randint(-128, 128, (outs, inputs), generator=g).to(torch.int8)
    got = int_matmul(x, w)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), x.long() @ w.long().T)


def test_the_worst_case_is_exact():
    x = torch.full((2, 131071), -128, dtype=torch.int8)
    assert int(int_matmul(x, x)[0, 0]) == 128 * 128 * 131071
    odd = torch.full((1, 4099), 127, dtype=torch.int8)
    assert int(int_matmul(odd, odd)[0, 0]) == 127 * 127 * 4099


def test_bad_arguments():
    x = torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(TypeError, match="int8"):
        int_matmul(x, x.float())
    with pytest.raises(ValueError, match="got"):
        int_matmul(x, torch.zeros(2, 4, dtype=torch.int8))
