"""QServe's W4A8 linear with our kernel: the layout is packed here as QServe packs it, the answer is computed in float64."""

import pytest
import torch
from torch import Tensor, nn

from lqedu.errors import CheckpointError, GridError, UsageError
from lqedu.integrations.qserve import QSERVE_CLASS, W4A8Linear, replace

pytest.importorskip("triton", reason="the layouts of kernels are defined in lqedu_kernels, which needs Triton")
ROWS, COLUMNS, TOKENS = 64, 256, 5


def _random(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def _pack(q: Tensor) -> Tensor:
    """As ``from_linear`` of w4a8_linear.py does: two reorderings, then a nibble pair a byte."""
    n, k = q.shape
    tiles = (
        q.reshape(n // 32, 2, 2, 8, k // 32, 2, 4, 4).permute(0, 4, 3, 6, 1, 5, 2, 7).permute(0, 1, 2, 3, 5, 6, 7, 4)
    )
    return ((tiles[..., 1] << 4) + tiles[..., 0]).reshape(n, k // 2).to(torch.uint8).view(torch.int8)


def _interleave(x: Tensor) -> Tensor:
    """``[out, groups]`` to ``[groups, out]``: of 32 outputs first 0, 8, 16, 24, then 1, 9, ..."""
    order = torch.tensor([row + 8 * part for row in range(8) for part in range(4)])
    return x.T.reshape(x.shape[1], -1, 32)[..., order].reshape(x.shape[1], -1).contiguous()


def _problem(group_size: int, bias: bool) -> tuple[dict[str, Tensor], Tensor]:
    """A state dict and the weight it stands for, float64."""
    q = _random((ROWS, COLUMNS), 0, 15, 0)
    assert len(q.unique()) == 16
    s1 = (_random((ROWS,), 1, 900, 1) / 4096).half()
    state = {"qweight": _pack(q), "s1_scales": s1}
    if bias:
        state["bias"] = (_random((ROWS,), -99, 99, 2) / 8).half()
    if group_size == -1:
        z = _random((ROWS,), 0, 15, 3)
        state["s1_szeros"] = z.half() * s1
        return state, s1.double()[:, None] * (q - z[:, None])
    s2 = _random((ROWS, COLUMNS // group_size), 1, 8, 4)  # 15 x 8 = 120: every code and zero point stays inside int8
    z = _random(s2.shape, 0, 15, 5)
    state |= {"s2_scales": _interleave(s2.to(torch.int8)), "s2_zeros": _interleave((-z * s2).to(torch.int8))}
    w8 = (q.view(ROWS, -1, group_size) - z[..., None]) * s2[..., None]
    return state, s1.double()[:, None] * w8.view(ROWS, COLUMNS)


def _run(layer: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    out = torch.full((len(x), ROWS), torch.nan, dtype=torch.float16)
    assert layer(x, scale, torch.full_like(scale, torch.nan), out) is None
    return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_it_computes_what_its_tensors_stand_for(group_size: int, bias: bool) -> None:
    state, weight = _problem(group_size, bias)
    layer = W4A8Linear(COLUMNS, ROWS, bias, group_size)
    assert {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in state.items()
    }
    layer.load_state_dict(state)
    x, scale = _random((TOKENS, COLUMNS), -127, 127, 6).to(torch.int8), (_random((TOKENS,), 1, 99, 7) / 8192).half()
    exact = x.double() @ weight.T * scale.double()[:, None] + (state["bias"].double() if bias else 0)
    assert torch.allclose(_run(layer, x, scale).double(), exact, rtol=2**-10, atol=1e-6)
    assert torch.equal(_run(layer, x, scale), _run(layer, x, scale))
    assert set(layer.state_dict()) == ({"bias"} if bias else set())  # the loaded tensors are freed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("group_size", [-1, 128])
def test_the_kernel_computes_what_its_reference_does(group_size: int) -> None:
    state, _ = _problem(group_size, True)
    layers = [W4A8Linear(COLUMNS, ROWS, True, group_size, device) for device in ("cpu", "cuda")]
    x, scale = _random((TOKENS, COLUMNS), -127, 127, 6).to(torch.int8), (_random((TOKENS,), 1, 99, 7) / 8192).half()
    out = []
    for layer, device in zip(layers, ("cpu", "cuda"), strict=True):
        layer.load_state_dict(state)
        y = torch.full((TOKENS, ROWS), torch.nan, dtype=torch.float16, device=device)
        layer(x.to(device), scale.to(device), None, y)
        out.append(y.cpu().double())
    assert torch.allclose(out[0], out[1], rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("group_size", [-1, 128])
def test_from_linear_packs_as_qserve_does(group_size: int) -> None:
    state, weight = _problem(group_size, True)
    dense = nn.Linear(COLUMNS, ROWS)
    dense.weight.data, dense.bias.data = weight.float(), state["bias"].float()
    before = dense.weight.detach().clone()
    if group_size == -1:
        scales = {"s1_scale": state["s1_scales"], "zeros": _random((ROWS,), 0, 15, 3)}
    else:
        scales = {
            "s1_scale": state["s1_scales"],
            "s2_scale": _random((ROWS, 2), 1, 8, 4),
            "zeros": _random((ROWS, 2), 0, 15, 5),
        }
    made = W4A8Linear.from_linear(dense, 4, group_size, **scales).state_dict()
    assert set(made) == set(state) and all(torch.equal(made[name], state[name]) for name in state)
    assert torch.equal(dense.weight, before)
    assert not W4A8Linear.from_linear(dense, 4, group_size, init_only=True).qweight.any()


def test_layers_of_a_qserve_model_are_replaced() -> None:
    state, _ = _problem(128, True)
    theirs = type(QSERVE_CLASS, (W4A8Linear,), {})(COLUMNS, ROWS, True, 128)
    theirs.load_state_dict(state)
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"proj": theirs}))
    ours = replace(model)
    assert type(ours[1]["proj"]) is W4A8Linear and type(model[1]["proj"]) is type(theirs)
    assert ours[1]["proj"].qweight.data_ptr() == theirs.qweight.data_ptr()
    x, scale = _random((TOKENS, COLUMNS), -127, 127, 6).to(torch.int8), torch.full((TOKENS,), 0.01).half()
    assert torch.equal(_run(ours[1]["proj"], x, scale), _run(theirs, x, scale))
    with pytest.raises(UsageError, match="nothing to replace"):
        replace(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("sizes", [(256, 48, 128), (200, 64, 128), (256, 64, 64), (160, 64, 128)])
def test_sizes_that_the_layout_does_not_hold_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(GridError, match="tiles of 32"):
        W4A8Linear(sizes[0], sizes[1], False, sizes[2])


def test_tensors_that_were_not_loaded_are_refused() -> None:
    layer = W4A8Linear(COLUMNS, ROWS, False, 128)
    with pytest.raises(CheckpointError, match="make no weight"):
        layer(torch.zeros(1, COLUMNS, dtype=torch.int8), torch.ones(1).half(), None, torch.zeros(1, ROWS).half())


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (dict(w_bit=8), UsageError, "w_bit=8"),
        (dict(zeros=None), UsageError, "pass s1_scale and zeros"),
        (dict(s2_scale=None), UsageError, "pass s1_scale and zeros"),
        (dict(s1_scale=torch.full((ROWS,), 0.03).half()), GridError, "do not lie on the 4-bit grid"),
    ],
)
def test_weights_and_scales_that_do_not_belong_together_are_refused(given: dict, error: type, match: str) -> None:
    _, weight = _problem(128, False)
    dense = nn.Linear(COLUMNS, ROWS, bias=False)
    dense.weight.data = weight.float()
    right = dict(
        w_bit=4, group_size=128, s1_scale=(_random((ROWS,), 1, 900, 1) / 4096).half(), s2_scale=_random((ROWS, 2), 1, 8, 4),
        zeros=_random((ROWS, 2), 0, 15, 5),
    )  # fmt: skip
    W4A8Linear.from_linear(dense, **right)
    with pytest.raises(error, match=match):
        W4A8Linear.from_linear(dense, **right | given)
