"""Each foreign layout, a layer at a time: bit for bit through the file, and against formulas of its description."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lqedu.checkpoint import awq, compressed_tensors, gptq, qserve
from lqedu.checkpoint.layout import LinearParts
from lqedu.errors import CheckpointError, ExportError, GridError
from lqedu.formats import IntGrid, QTensor
from lqedu.formats.activation import ActivationGrid
from lqedu.formats.fp8 import Float8ActivationGrid, Float8Grid, Float8Tensor
from lqedu.formats.progressive import ProgressiveGrid, ProgressiveTensor
from lqedu.runtime.inputs import InputPath
from lqedu.runtime.permuted import PermutedWeight

TOKEN = InputPath(activation=ActivationGrid(8))


def random_weight(grid: IntGrid, shape: tuple[int, int], seed: int = 0, least_zero: int = 0) -> QTensor:
    """Any codes, scales and zero points of a grid, not only those that rounding a weight gives."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(grid.code_min, grid.code_max + 1, shape, generator=g).to(grid.code_dtype)
    scale = (0.01 + torch.rand(grid.scale_shape(shape), generator=g)).to(grid.scale_dtype)
    if grid.symmetric:
        return QTensor(codes, scale, None, grid)
    zero = torch.randint(least_zero, grid.levels, scale.shape, generator=g).to(torch.uint8)
    return QTensor(codes, scale, zero, grid)


def progressive(shape: tuple[int, int], kind: str, seed: int = 0) -> ProgressiveTensor:
    """A two-level weight whose codes all stay inside int8."""
    g, grid = torch.Generator().manual_seed(seed), ProgressiveGrid(128, kind)
    groups = grid.scale_shape(shape)
    group = torch.randint(1, 17, groups, generator=g).to(torch.uint8)
    codes = torch.randint(0, 16, shape, generator=g).to(torch.uint8)
    if kind == "code":
        zero = torch.randint(0, 16, groups, generator=g).to(torch.int8)
        least = (zero.int() - 128 // group).clamp(min=0).repeat_interleave(128, 1)
        most = (zero.int() + 127 // group).clamp(max=15).repeat_interleave(128, 1)
    else:
        zero = torch.randint(0, 121, groups, generator=g).to(torch.int8)
        least = torch.zeros_like(codes).int()
        most = ((127 + zero.int()) // group).clamp(max=15).repeat_interleave(128, 1)
    codes = torch.minimum(torch.maximum(codes.int(), least), most).to(torch.uint8)
    channel = (0.001 + torch.rand(shape[0], 1, generator=g)).to(torch.float16)
    return ProgressiveTensor(codes, channel, group, zero, grid)


def there_and_back(layout, parts: LinearParts, shape: tuple[int, int]) -> LinearParts:
    tensors, scheme = layout.encode(parts)
    config = layout.config({"a.b": scheme}, ["lm_head"])
    names = {f"a.b.{name}" for name in tensors}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    return layout.decode(tensors, layout.schemes(config, {"a.b": shape}, names)["a.b"], shape)


def assert_same(got: LinearParts, want: LinearParts) -> None:
    assert type(got.weight) is type(want.weight)
    assert got.path == want.path
    if isinstance(want.weight, QTensor):  # how scales were found is in no file
        assert got.weight.grid == dataclasses.replace(want.weight.grid, convention=None, search="none")
    elif isinstance(want.weight, Float8Tensor):
        assert got.weight.grid == dataclasses.replace(want.weight.grid, search="none")
    for (name, a), (other, b) in zip(got.weight.packed().items(), want.weight.packed().items(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b), name
    for a, b in zip(got.static or (), want.static or (), strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))
    assert torch.equal(got.weight.dequantize(), want.weight.dequantize())


def integer_grids(bits: st.SearchStrategy, groups: list[int | None]) -> st.SearchStrategy:
    def build(bits, symmetric, group, dtype):
        return IntGrid(bits, symmetric, "channel" if group is None else "group", group, scale_dtype=dtype)

    dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
    return st.builds(build, bits, st.booleans(), st.sampled_from(groups), dtypes)


FAST = settings(max_examples=25, deadline=None)


# --- round trips ------------------------------------------------------------------------------------------------------


@FAST
@given(
    integer_grids(st.integers(2, 8), [None, 16, 32, 96]),
    st.integers(1, 40),
    st.sampled_from(
        [None, ActivationGrid(8), ActivationGrid(8, symmetric=False), ActivationGrid(8, granularity="tensor")]
    ),
    st.integers(0, 99),
)
def test_compressed_tensors_holds_integers(grid, rows, activation, seed):
    parts = LinearParts(random_weight(grid, (rows, 96), seed), InputPath(activation=activation))
    assert_same(there_and_back(compressed_tensors, parts, (rows, 96)), parts)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("activation", [None, ActivationGrid(8)])
def test_compressed_tensors_holds_one_scale_a_tensor(symmetric, activation):
    parts = LinearParts(random_weight(IntGrid(8, symmetric, "tensor"), (6, 10)), InputPath(activation=activation))
    tensors, _ = compressed_tensors.encode(parts)
    assert tuple(tensors["weight_scale"].shape) == (1,)
    assert_same(there_and_back(compressed_tensors, parts, (6, 10)), parts)


@FAST
@given(
    st.sampled_from(["tensor", "channel", "block"]),
    st.sampled_from([None, "token", "tensor", "group"]),
    st.integers(1, 300),
    st.integers(0, 99),
)
def test_compressed_tensors_holds_floats(granularity, activation, rows, seed):
    g = torch.Generator().manual_seed(seed)
    grid, shape = Float8Grid(granularity), (rows, 256)
    codes = torch.randint(0, 256, shape, generator=g).to(torch.uint8)
    codes[codes & 127 == 127] = 0  # NaN is no weight
    weight = Float8Tensor(codes, 0.01 + torch.rand(grid.scale_shape(shape), generator=g), grid)
    path = InputPath(activation=None if activation is None else Float8ActivationGrid(activation))
    assert_same(there_and_back(compressed_tensors, LinearParts(weight, path), shape), LinearParts(weight, path))


@pytest.mark.parametrize(
    ("grid", "zero"),
    [
        (ActivationGrid(8, granularity="tensor", static=True), None),
        (ActivationGrid(8, symmetric=False, granularity="tensor", static=True), torch.tensor([-128.0])),
        (ActivationGrid(8, symmetric=False, granularity="tensor", static=True), torch.tensor([127.0])),
    ],
)
def test_compressed_tensors_holds_static_inputs(grid, zero):
    parts = LinearParts(
        random_weight(IntGrid(8, True), (4, 8)), InputPath(activation=grid), (torch.tensor([0.3]), zero)
    )
    assert_same(there_and_back(compressed_tensors, parts, (4, 8)), parts)


def test_a_clipped_static_range_is_in_its_scale():
    grid = ActivationGrid(8, granularity="tensor", static=True, clip_ratio=0.9)
    parts = LinearParts(
        random_weight(IntGrid(8, True), (4, 8)), InputPath(activation=grid), (torch.tensor([0.3]), None)
    )
    back = there_and_back(compressed_tensors, parts, (4, 8))
    assert torch.equal(back.static[0], parts.static[0])


@FAST
@given(
    integer_grids(st.sampled_from(gptq.BITS), [None, 32, 96]),
    st.sampled_from([32, 64]),
    st.booleans(),
    st.integers(0, 99),
)
def test_gptq(grid, rows, sorted_inputs, seed):
    weight = random_weight(dataclasses.replace(grid, scale_dtype=torch.float16), (rows, 96), seed, least_zero=1)
    if sorted_inputs and grid.group_size == 32:
        groups = torch.randperm(96, generator=torch.Generator().manual_seed(seed)) // 32
        weight = PermutedWeight(weight, groups.argsort(stable=True).to(torch.int32))
    parts = LinearParts(weight)
    assert_same(there_and_back(gptq, parts, (rows, 96)), parts)


@FAST
@given(integer_grids(st.just(4), [None, 8, 32]), st.sampled_from([8, 24]), st.integers(0, 99))
def test_awq(grid, rows, seed):
    parts = LinearParts(random_weight(dataclasses.replace(grid, scale_dtype=torch.float16), (rows, 32), seed))
    assert_same(there_and_back(awq, parts, (rows, 32)), parts)


@FAST
@given(st.booleans(), st.sampled_from([32, 64]), st.sampled_from([32, 96]), st.integers(0, 99))
def test_qserve_per_channel(symmetric, rows, columns, seed):
    parts = LinearParts(random_weight(IntGrid(4, symmetric), (rows, columns), seed), TOKEN)
    assert_same(there_and_back(qserve, parts, (rows, columns)), parts)


@FAST
@given(st.sampled_from(["code", "offset"]), st.sampled_from([32, 64]), st.sampled_from([128, 384]), st.integers(0, 99))
def test_qserve_per_group(kind, rows, columns, seed):
    parts = LinearParts(progressive((rows, columns), kind, seed), TOKEN)
    assert_same(there_and_back(qserve, parts, (rows, columns)), parts)


# --- against formulas written from the descriptions -------------------------------------------------------------------


def word(tensor: Tensor, *index: int) -> int:
    """An int32 as the unsigned number its bits are."""
    return int(tensor[index]) & 0xFFFFFFFF


def bits_at(words: list[int], start: int, bits: int) -> int:
    """Bits ``start`` to ``start + bits`` of words that follow each other, lowest first."""
    return sum(value << (32 * i) for i, value in enumerate(words)) >> start & ((1 << bits) - 1)


@pytest.mark.parametrize("bits", gptq.BITS)
def test_gptq_index_by_index(bits):
    weight = random_weight(IntGrid(bits, granularity="group", group_size=32), (32, 96), least_zero=1)
    t, _ = gptq.encode(LinearParts(weight))
    assert tuple(t["qweight"].shape) == (96 * bits // 32, 32) and tuple(t["qzeros"].shape) == (3, bits)
    for n in range(32):
        column = [word(t["qweight"], r, n) for r in range(96 * bits // 32)]
        assert [bits_at(column, bits * k, bits) for k in range(96)] == weight.codes[n].tolist()
    for g in range(3):
        row = [word(t["qzeros"], g, c) for c in range(bits)]
        assert [bits_at(row, bits * n, bits) for n in range(32)] == (weight.zero[:, g].int() - 1).tolist()
    assert torch.equal(t["scales"], weight.scale.T) and t["g_idx"].tolist() == [k // 32 for k in range(96)]
    assert t["g_idx"].dtype == torch.int32 and t["scales"].dtype == torch.float16


def test_gptq_symmetric_zero_is_the_known_word():
    t, scheme = gptq.encode(LinearParts(random_weight(IntGrid(4, True, "group", 32), (32, 96))))
    assert {word(t["qzeros"], g, c) for g in range(3) for c in range(4)} == {0x77777777}
    assert gptq.config({"a": scheme}, [])["sym"] is True
    t, _ = gptq.encode(LinearParts(random_weight(IntGrid(8, True), (32, 96))))
    assert {word(t["qzeros"], 0, c) for c in range(8)} == {0x7F7F7F7F}


def test_gptq_version_2_stores_zero_points_as_they_are():
    weight = random_weight(IntGrid(4, granularity="group", group_size=32), (32, 96))  # zero points of 0 too
    t, scheme = gptq.encode(LinearParts(dataclasses.replace(weight, zero=weight.zero.clamp(min=1))))
    config = gptq.config({"a": scheme}, []) | {"checkpoint_format": "gptq_v2"}
    t["qzeros"] = torch.tensor(
        [[sum(int(weight.zero[8 * c + i, g]) << 4 * i for i in range(8)) for c in range(4)] for g in range(3)]
    ).to(torch.int32)
    back = gptq.decode(t, gptq.schemes(config, {"a": (32, 96)}, {"a.qweight"})["a"], (32, 96)).weight
    assert torch.equal(back.zero, weight.zero) and int(back.zero.min()) == 0


def test_awq_index_by_index():
    weight = random_weight(IntGrid(4, granularity="group", group_size=16), (24, 32))
    t, _ = awq.encode(LinearParts(weight))
    for c in range(3):
        for i, n in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            assert [word(t["qweight"], k, c) >> 4 * i & 15 for k in range(32)] == weight.codes[8 * c + n].tolist()
            assert [word(t["qzeros"], g, c) >> 4 * i & 15 for g in range(2)] == weight.zero[8 * c + n].tolist()
    assert torch.equal(t["scales"], weight.scale.T)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_pack_quantized_index_by_index(bits):
    weight = random_weight(IntGrid(bits, granularity="group", group_size=20), (13, 60))
    t, _ = compressed_tensors.encode(LinearParts(weight))
    words = -(-60 * bits // 32)
    assert tuple(t["weight_packed"].shape) == (13, words)
    for n in range(13):
        row = [word(t["weight_packed"], n, c) for c in range(words)]
        assert [bits_at(row, bits * k, bits) for k in range(60)] == weight.codes[n].tolist()
    for g in range(3):
        column = [word(t["weight_zero_point"], r, g) for r in range(t["weight_zero_point"].shape[0])]
        assert len(column) == -(-13 * bits // 32)
        assert [bits_at(column, bits * n, bits) for n in range(13)] == weight.zero[:, g].tolist()


def test_pack_quantized_golden_words():
    """-8 to 7 in a row, as compressed-tensors 0.19 packs them."""
    weight = QTensor(torch.arange(-8, 8, dtype=torch.int8)[None], torch.ones(1, 1).half(), None, IntGrid(4, True))
    t, _ = compressed_tensors.encode(LinearParts(weight))
    assert [word(t["weight_packed"], 0, c) for c in range(2)] == [0x76543210, 0xFEDCBA98]
    assert t["weight_shape"].tolist() == [1, 16] and t["weight_shape"].dtype == torch.int64


def test_int_quantized_is_signed():
    weight = random_weight(IntGrid(8, granularity="group", group_size=4), (3, 8))
    t, _ = compressed_tensors.encode(LinearParts(weight, TOKEN))
    w = t["weight"].double().view(3, 2, 4) - t["weight_zero_point"].double()[..., None]
    assert torch.equal((w * t["weight_scale"].double()[..., None]).view(3, 8), weight.dequantize(torch.float64))


def unpacked_qserve(qweight: Tensor) -> Tensor:
    """Codes of QServe from the description in the docstring of the module, one byte at a time."""
    rows, columns = qweight.shape[0], 2 * qweight.shape[1]
    flat, codes = qweight.flatten().tolist(), torch.zeros(rows, columns, dtype=torch.uint8)
    for at, byte in enumerate(flat):
        tile, inside = divmod(at, 512)
        top, left = 32 * (tile // (columns // 32)), 32 * (tile % (columns // 32))
        (a, b), (f, e) = divmod(inside // 16, 4), divmod(inside % 16, 4)
        n, k = top + 8 * (f % 2) + a, left + 16 * (f // 2) + 4 * b + e
        codes[n, k], codes[n + 16, k] = byte & 15, byte >> 4 & 15
    return codes


def test_qserve_per_channel_byte_by_byte():
    weight = random_weight(IntGrid(4), (64, 96))
    t, _ = qserve.encode(LinearParts(weight, TOKEN))
    assert t["qweight"].dtype == torch.int8 and tuple(t["qweight"].shape) == (64, 48)
    assert torch.equal(unpacked_qserve(t["qweight"]), weight.codes)
    assert torch.equal(t["s1_scales"], weight.scale[:, 0])
    assert torch.equal(t["s1_szeros"], (weight.zero[:, 0].double() * weight.scale[:, 0].double()).half())


@pytest.mark.parametrize("kind", ["code", "offset"])
def test_qserve_per_group_decodes_by_the_rule_of_its_kernel(kind):
    weight = progressive((64, 256), kind)
    t, _ = qserve.encode(LinearParts(weight, TOKEN))
    assert all(tuple(t[name].shape) == (2, 64) and t[name].dtype == torch.int8 for name in ("s2_scales", "s2_zeros"))
    order = [32 * tile + 8 * (i % 4) + i // 4 for tile in range(2) for i in range(32)]  # 0, 8, 16, 24, 1, 9, ...
    q = unpacked_qserve(t["qweight"]).int()
    w8 = torch.zeros(64, 256, dtype=torch.int32)
    for i, n in enumerate(order):
        for g in range(2):
            part = slice(128 * g, 128 * (g + 1))
            w8[n, part] = q[n, part] * int(t["s2_scales"][g, i]) + int(t["s2_zeros"][g, i])
    w8 = (w8 + 128) % 256 - 128  # bytes wrap
    assert torch.equal(w8, weight.int8().int())
    assert torch.equal(w8.double() * t["s1_scales"].double()[:, None], weight.dequantize(torch.float64))


# --- refusals ---------------------------------------------------------------------------------------------------------

GROUPS = IntGrid(4, granularity="group", group_size=32)


@pytest.mark.parametrize(
    ("layout", "grid", "shape", "path", "match"),
    [
        (gptq, IntGrid(5), (32, 32), InputPath(), "5 bits"),
        (gptq, IntGrid(4, granularity="tensor"), (32, 32), InputPath(), "one scale serves the whole weight"),
        (gptq, IntGrid(4), (32, 20), InputPath(), "do not fill words"),
        (gptq, IntGrid(4), (20, 32), InputPath(), "do not fill words"),
        (gptq, IntGrid(4), (32, 32), TOKEN, "inputs are quantized"),
        (gptq, IntGrid(4, True, scale_dtype=torch.float32), (32, 32), InputPath(), "float16 would round"),
        (gptq, IntGrid(4, granularity="group", group_size=8, axis=0), (32, 32), InputPath(), "groups run along the outputs"),
        (gptq, IntGrid(4), (32, 32), InputPath(hadamard=32), "Hadamard"),
        (awq, IntGrid(3), (32, 32), InputPath(), "3 bits"),
        (awq, IntGrid(4), (20, 32), InputPath(), "words of 8"),
        (awq, IntGrid(4, granularity="tensor"), (32, 32), InputPath(), "one scale serves the whole weight"),
        (awq, IntGrid(4, True, scale_dtype=torch.float32), (32, 32), InputPath(), "float16 would round"),
        (compressed_tensors, IntGrid(4), (32, 32), InputPath(hadamard=32), "Hadamard"),
        (compressed_tensors, IntGrid(8, True), (32, 32), InputPath(activation=ActivationGrid(4)), "4 bits"),
        (compressed_tensors, IntGrid(8, True), (32, 32), InputPath(activation=ActivationGrid(8, clip_ratio=0.9)), "clipped"),
        (qserve, IntGrid(4), (32, 32), InputPath(), "not int8 with one symmetric scale a token"),
        (qserve, IntGrid(4), (32, 48), TOKEN, "tiles of 32"),
        (qserve, GROUPS, (32, 32), TOKEN, "4 bits per channel or in two levels"),
        (qserve, IntGrid(8), (32, 32), TOKEN, "4 bits per channel or in two levels"),
    ],
)  # fmt: skip
def test_what_a_layout_cannot_hold_is_refused(layout, grid, shape, path, match):
    with pytest.raises(ExportError, match=match):
        layout.encode(LinearParts(random_weight(grid, shape, least_zero=1), path))


def test_zero_points_of_0_and_float_ones_are_refused():
    weight = random_weight(GROUPS, (32, 32))
    weight.zero[0, 0] = 0
    with pytest.raises(ExportError, match="zero points of 0"):
        gptq.encode(LinearParts(weight))
    grid = IntGrid(4, zero_point="float")
    floats = QTensor(weight.codes, torch.ones(32, 1).half(), torch.ones(32, 1).half(), grid)
    for layout in (gptq, awq, compressed_tensors, qserve):
        with pytest.raises(ExportError, match="floats"):
            layout.encode(LinearParts(floats, TOKEN if layout is qserve else InputPath()))


def test_act_order_is_refused_where_groups_are_runs():
    weight = PermutedWeight(random_weight(GROUPS, (32, 64)), torch.arange(64, dtype=torch.int32).flip(0))
    for layout in (awq, compressed_tensors, qserve):
        with pytest.raises(ExportError, match="act-order"):
            layout.encode(LinearParts(weight, TOKEN if layout is qserve else InputPath()))


def test_layers_that_differ_are_refused_where_there_is_one_config():
    schemes = {f"l{bits}": gptq.encode(LinearParts(random_weight(IntGrid(bits, True), (32, 32))))[1] for bits in (4, 8)}
    with pytest.raises(ExportError, match="l4 and l8"):
        gptq.config(schemes, [])
    with pytest.raises(ExportError, match="up_proj is not"):
        gptq.config({"l4": schemes["l4"]}, ["lm_head", "up_proj"])


def test_layers_that_differ_are_groups_of_compressed_tensors():
    schemes, shapes = {}, {}
    for bits in (4, 8, 4):
        name = f"l{len(schemes)}"
        _, schemes[name] = compressed_tensors.encode(LinearParts(random_weight(IntGrid(bits, True), (32, 32))))
        shapes[name] = (32, 32)
    config = compressed_tensors.config(schemes, ["head"])
    assert [group["targets"] for group in config["config_groups"].values()] == [["l0", "l2"], ["l1"]]
    found = compressed_tensors.schemes(config, shapes | {"head": (32, 32)}, set())
    assert {name: scheme["grid"].bits for name, scheme in found.items()} == {"l0": 4, "l1": 8, "l2": 4}


def test_targets_rank_as_compressed_tensors_ranks_them():
    def group(bits: int, *targets: str) -> dict:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
        return {"targets": list(targets), "weights": weights}

    groups = {"a": group(4, "Linear"), "b": group(8, "re:.*up$"), "c": group(2, "x.up"), "d": group(3, "Conv2d")}
    config = {"format": "pack-quantized", "config_groups": groups, "ignore": ["re:.*head"]}
    found = compressed_tensors.schemes(config, dict.fromkeys(("x.up", "y.up", "y.down", "my_head"), (8, 8)), set())
    assert {name: scheme["grid"].bits for name, scheme in found.items()} == {"x.up": 2, "y.up": 8, "y.down": 4}


@pytest.mark.parametrize(
    ("layout", "parts", "shape", "change", "match"),
    [
        (gptq, LinearParts(random_weight(GROUPS, (32, 64), least_zero=1)), (32, 64), {"qweight": None}, "no qweight"),
        (gptq, LinearParts(random_weight(GROUPS, (32, 64), least_zero=1)), (32, 64), {"scales": torch.ones(2, 31)}, "shape"),
        (gptq, LinearParts(random_weight(GROUPS, (32, 64), least_zero=1)), (32, 64), {"scales": torch.full((2, 32), torch.nan)}, "NaN"),
        (gptq, LinearParts(random_weight(GROUPS, (32, 64), least_zero=1)), (32, 64), {"scales": torch.ones(2, 32).int()}, "scales are"),
        (gptq, LinearParts(random_weight(GROUPS, (32, 64), least_zero=1)), (32, 64), {"qzeros": -torch.ones(2, 4).int()}, "zero point as -1"),
        (gptq, LinearParts(random_weight(GROUPS, (32, 64), least_zero=1)), (32, 64), {"g_idx": torch.zeros(64).int()}, "g_idx does not"),
        (gptq, LinearParts(random_weight(GROUPS, (32, 64), least_zero=1)), (32, 64), {"g_idx": torch.full((64,), -1).int()}, "g_idx does not"),
        (gptq, LinearParts(random_weight(GROUPS, (32, 64), least_zero=1)), (32, 64), {"perm": torch.zeros(1)}, "does not: perm"),
        (gptq, LinearParts(random_weight(GROUPS, (32, 64), least_zero=1)), (32, 96), {}, "shape"),
        (gptq, LinearParts(random_weight(IntGrid(4, True), (32, 64))), (32, 64), {"qzeros": torch.zeros(1, 4).int()}, "calls its grid symmetric"),
        (awq, LinearParts(random_weight(GROUPS, (32, 64))), (32, 64), {"qweight": torch.zeros(64, 4)}, "dtype"),
        (awq, LinearParts(random_weight(GROUPS, (32, 64))), (32, 80), {}, "do not divide"),
        (compressed_tensors, LinearParts(random_weight(GROUPS, (32, 64))), (32, 64), {"weight_shape": torch.tensor([32, 65])}, "weight_shape says"),
        (compressed_tensors, LinearParts(random_weight(GROUPS, (32, 64))), (32, 64), {"weight_zero_point": None}, "no weight_zero_point"),
        (compressed_tensors, LinearParts(random_weight(GROUPS, (32, 64))), (32, 64), {"weight_g_idx": torch.arange(64) % 2}, "actorder"),
        (compressed_tensors, LinearParts(random_weight(GROUPS, (32, 64))), (32, 64), {"weight_scale": torch.ones(32, 3).half()}, "weight_scale has shape"),
        (compressed_tensors, LinearParts(random_weight(IntGrid(4, True), (32, 64)), TOKEN), (32, 64), {"weight": torch.full((32, 64), 9).char()}, "4 bits do not have"),
        (compressed_tensors, LinearParts(random_weight(IntGrid(8, True), (32, 64)), TOKEN), (32, 64), {"weight_zero_point": torch.ones(32, 1).char()}, "calls its grid symmetric"),
        (qserve, LinearParts(random_weight(IntGrid(4), (32, 64)), TOKEN), (32, 64), {"s1_szeros": torch.full((32,), 0.3).half()}, "s1_szeros is not"),
        (qserve, LinearParts(random_weight(IntGrid(4), (32, 64)), TOKEN), (32, 64), {"s1_scales": torch.ones(32)}, "float16"),
        (qserve, LinearParts(progressive((32, 128), "code"), TOKEN), (32, 128), {"s2_scales": torch.zeros(1, 32).char()}, "below 1"),
        (qserve, LinearParts(progressive((32, 128), "code"), TOKEN), (32, 128), {"s2_zeros": torch.ones(1, 32).char(), "s2_scales": torch.full((1, 32), 7).char()}, "no zero point"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(layout, parts, shape, change, match):
    tensors, scheme = layout.encode(parts)
    names = {f"a.{name}" for name in tensors}
    known = layout.schemes(layout.config({"a": scheme}, []), {"a": shape}, names)["a"]
    tensors = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    with pytest.raises((CheckpointError, GridError), match=match):
        layout.decode(tensors, known, shape)


@pytest.mark.parametrize(
    ("layout", "config", "match"),
    [
        (gptq, {"bits": 4}, "lacks 'group_size'"),
        (gptq, {"bits": 5, "group_size": 128}, "5 bits"),
        (gptq, {"bits": 4, "group_size": 0}, "'group_size'"),
        (gptq, {"bits": "4", "group_size": 128}, "'bits' of its quantization config is '4'"),
        (gptq, {"bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "marlin"),
        (gptq, {"bits": 4, "group_size": 128, "dynamic": {"-:lm": {}}}, "dynamic"),
        (awq, {"bits": 3}, "3 bits"),
        (awq, {"bits": 4, "version": "gemv"}, "gemv"),
        (awq, {"w_bit": 4, "q_group_size": -2}, "'group_size'"),
        (qserve, {"group_size": 64}, "'group_size'"),
        (qserve, {"zero": "x"}, "'zero'"),
        (compressed_tensors, {"config_groups": {}}, "lacks 'format'"),
        (compressed_tensors, {"format": "pack-quantized", "config_groups": {"W4A16": ["Linear"]}}, "preset"),
        (compressed_tensors, {"format": "nvfp4-pack-quantized", "config_groups": {"a": {"targets": ["Linear"], "weights": {}}}}, "nvfp4"),
        (compressed_tensors, {"format": "pack-quantized", "config_groups": {}, "transform_config": {"config_groups": {}}}, "transform_config"),
        (compressed_tensors, {"format": "marlin-24", "config_groups": {}, "sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
    ],
)  # fmt: skip
def test_configs_that_are_not_understood_are_refused(layout, config, match):
    with pytest.raises(CheckpointError, match=match):
        layout.schemes(config, {"a": (32, 32)}, {"a.qweight"})


@pytest.mark.parametrize(
    ("part", "args", "match"),
    [
        ("weights", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 16}, "no grid for weights of 4 bits"),
        ("weights", {"num_bits": 16}, "no grid for weights of 16 bits"),
        ("weights", {"num_bits": 4, "group_size": 32, "actorder": "group"}, "actorder"),
        ("weights", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [1, 128]}, "strategy 'block'"),
        ("input_activations", {"num_bits": 4, "dynamic": True, "strategy": "token"}, "inputs of 4 bits"),
        ("input_activations", {"num_bits": 8, "dynamic": "local", "strategy": "tensor_group", "group_size": 16}, "tensor_group"),
        ("input_activations", {"num_bits": 8, "dynamic": False, "strategy": "channel"}, "static"),
        ("output_activations", {"num_bits": 8}, "put out"),
    ],
)  # fmt: skip
def test_schemes_without_a_grid_of_ours_are_refused(part, args, match):
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}} | {part: args}
    with pytest.raises(CheckpointError, match=match):
        compressed_tensors.schemes({"format": "int-quantized", "config_groups": {"g": group}}, {"a": (8, 8)}, set())


def test_a_pattern_that_is_none_is_refused():
    group = {"targets": ["re:("], "weights": {"num_bits": 8}}
    with pytest.raises(CheckpointError, match="no pattern"):
        compressed_tensors.schemes({"format": "int-quantized", "config_groups": {"g": group}}, {"a": (8, 8)}, set())


def test_inputs_are_not_changed():
    weight = random_weight(GROUPS, (32, 64), least_zero=1)
    before = {name: tensor.clone() for name, tensor in weight.packed().items()}
    for layout in (gptq, awq, compressed_tensors):
        tensors, scheme = layout.encode(LinearParts(weight))
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        known = layout.schemes(layout.config({"a": scheme}, []), {"a": (32, 64)}, {f"a.{name}" for name in tensors})[
            "a"
        ]
        layout.decode(tensors, known, (32, 64))
        assert all(torch.equal(tensors[name], kept[name]) for name in kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weight.packed().items())
