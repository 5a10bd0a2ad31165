"""Launches of products of two 8-bit matrices, shared by ``lqedu_kernels.w8a8`` and ``lqedu_kernels.fp8``.

Configurations are pure functions of the shape and the GPU. The rules come from measurements on an H100 (``bench/notes/w8a8.md``).
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lqedu_kernels._schedule import COUNTERS, counters, overlapped
from lqedu_kernels._tensors import HAS_GLUON, Target, check_kernel, row_major
from lqedu_kernels.tuning import Config, configuration

#: The keys of a configuration, for each kernel it may name.
_KERNELS = {
    "split": "block_m block_n block_k warps stages group_m splits",
    "tiles": "block_m block_n block_k warps stages group_m per_processor flatten",
    "hopper": "block_m block_n stages group_m lead",
}


def default_config(m: int, n: int, k: int, target: Target) -> dict[str, int | str]:
    """What runs where nothing was measured; a pure function of the shape and the GPU.

    Few tokens: as many tiles of 64 outputs as there are, with all of shared memory as stages where a processor has one tile,
    and K in parts only where tiles would leave most processors idle (adding parts up costs 2 µs and more). Many tokens, on
    Hopper: the tile whose tiles fill whole rounds best, at the rate measured for such tiles.

    Keys: ``kernel`` "split" or "tiles" (or "hopper", from a file of measured configurations, with the keys of
    ``lqedu_kernels.hopper_dense``); block_m, block_n, block_k of a tile; warps, stages; group_m rows of tiles are walked
    together; ``splits`` of K (split); ``per_processor`` programs and whether to ``flatten`` the loops over tiles and K into
    one (tiles).
    """
    if m > 64 and has_descriptors(n, k, target):
        rates = {(128, 256): 1.0, (128, 128): 0.8, (64, 128): 0.65}

        def cost(tile: tuple[int, int]) -> float:
            return -(-tiles_of(m, n, *tile) // target.processors) * tile[0] * tile[1] / rates[tile]

        block_m, block_n = min(rates, key=cost)
        warps, stages = (4, 8) if block_m == 64 else (8, 4)
        return tiles_config(block_m, block_n, 128, warps, stages)
    block_m = next(size for size in (16, 32, 64) if m <= size or size == 64)
    if k % 16:  # rows that start anywhere are loaded byte by byte: a small tile, for what is seldom and slow
        return split_config(16, 64, 64, 4, 2, splits_for(m, n, k, 16, 64, target))
    splits = splits_for(m, n, k, block_m, 128 if m > 64 else 64, target)
    if m > 64:
        return split_config(block_m, 128, 128, 8, 4, splits)
    alone = target.capability >= (9, 0) and tiles_of(m, n, block_m, 64) * splits <= target.processors
    return split_config(block_m, 64, 256, 4, (6 if block_m < 64 else 5) if alone else 3, splits)


def search_space(m: int, n: int, k: int, target: Target) -> list[dict[str, int | str]]:
    """Configurations worth timing at a shape, the likely best first; see :func:`default_config` for the keys."""
    space = [default_config(m, n, k, target)]
    block_m = next(size for size in (16, 32, 64) if m <= size or size == 64)
    if m <= 32:
        shapes = ((64, 256, 4, 3), (64, 256, 4, 4), (64, 256, 4, 6), (128, 256, 4, 4), (128, 128, 4, 5), (64, 512, 4, 3),
                  (32, 256, 2, 6), (32, 512, 2, 4))  # fmt: skip
    elif m <= 64:
        shapes = (
            (64, 256, 4, 3),
            (64, 256, 4, 5),
            (64, 256, 4, 6),
            (64, 128, 4, 6),
            (128, 256, 8, 4),
            (128, 128, 4, 5),
        )
    else:
        shapes = () if has_descriptors(n, k, target) else ((64, 128, 4, 4), (128, 128, 8, 4))
    for block_n, block_k, warps, stages in shapes:
        most = splits_for(m, n, k, block_m, block_n, target)
        for splits in sorted({1, most, 2 * most}):
            if splits <= max(most, target.processors // tiles_of(m, n, block_m, block_n)):
                space.append(split_config(block_m, block_n, block_k, warps, stages, splits))
    if m > 64 and has_descriptors(n, k, target):
        tiles = [(128, 256, 128, 8, 4), (128, 256, 128, 8, 3), (128, 128, 128, 8, 4)]
        tiles += [(64, 128, 128, 4, 8), (64, 128, 256, 4, 4)] if m <= 1024 else []
        for shape in tiles:
            space += [tiles_config(*shape, group_m=group_m) for group_m in ((4, 8, 16) if m > 1024 else (8,))]
    return [config for i, config in enumerate(space) if config not in space[:i]]


def split_config(
    block_m: int, block_n: int, block_k: int, warps: int, stages: int, splits: int
) -> dict[str, int | str]:
    return dict(
        kernel="split", block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages, group_m=8, splits=splits
    )  # fmt: skip


def tiles_config(
    block_m: int,
    block_n: int,
    block_k: int,
    warps: int,
    stages: int,
    *,
    group_m: int = 8,
    per_processor: int = 1,
    flatten: bool = True,
) -> dict[str, int | str]:
    return dict(
        kernel="tiles", block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages, group_m=group_m,
        per_processor=per_processor, flatten=flatten,
    )  # fmt: skip


def tiles_of(m: int, n: int, block_m: int, block_n: int) -> int:
    """How many tiles cover the outputs."""
    return -(-m // block_m) * -(-n // block_n)


def splits_for(m: int, n: int, k: int, block_m: int, block_n: int, target: Target) -> int:
    """Parts of K: doubled as long as programs stay below half of the processors and parts above 512 codes."""
    splits = 1
    while 4 * splits * tiles_of(m, n, block_m, block_n) <= target.processors and k >= 1024 * splits:
        splits *= 2
    return splits


def has_descriptors(n: int, k: int, target: Target) -> bool:
    """TMA is there, and walks over matrices of these sizes: their rows are multiples of 16 bytes."""
    return target.capability >= (9, 0) and k % 16 == 0 and n % 8 == 0


def choose(
    config: Config | None, operation: str, m: int, n: int, k: int, target: Target, default: Callable[..., Config]
) -> Config:
    """The configuration asked for, else the one measured on this GPU where it can run at this size, else the default.

    Raises:
        ValueError: a configuration asked for that cannot run.
    """
    check_kernel(config, _KERNELS)

    def runs(c: Config) -> bool:
        return c["kernel"] == "split" or (has_descriptors(n, k, target) and (c["kernel"] == "tiles" or HAS_GLUON))

    if config is not None:
        if not runs(config):
            raise ValueError(
                f"config asks for kernel {config['kernel']!r}, which needs compute capability 9.0, K a multiple of 16 and N of 8 "
                f"(and 'hopper' Triton 3.6), but N is {n} and K {k} on a {target.name}: take another config, or None"
            )
        return config
    measured = configuration(operation, m, n, k, gpu=target.name) if k % 16 == 0 else None
    return measured if measured is not None and runs(measured) else default(m, n, k, target)


def launch(
    kernels: tuple[triton.JITFunction, triton.JITFunction],
    config: Config,
    target: Target,
    x_codes: Tensor,
    w_codes: Tensor,
    y: Tensor,
    scales: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    *,
    sums: torch.dtype,
    **constants: object,
) -> None:
    """Fill ``y`` by the split or the tiles kernel of a family, whichever the configuration names.

    Args:
        kernels: of the family; both take operands, ``scales``, then (split) parts of ``sums`` and counters, then ``sizes``.
        constants: compile-time arguments of this family only.
    """
    split_kernel, tiles_kernel = kernels
    block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
    tiles = tiles_of(*y.shape, block_m, block_n)
    options = dict(
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=config["group_m"], num_warps=config["warps"],
        num_stages=config["stages"], **overlapped(target), **constants,
    )  # fmt: skip
    if config["kernel"] == "split":
        splits = config["splits"] if tiles <= COUNTERS else 1
        parts = count = None
        if splits > 1:
            parts = torch.empty((tiles, splits, block_n, block_m), dtype=sums, device=y.device)
            count = counters(y.device)
        split_kernel[(tiles * splits,)](x_codes, w_codes, y, *scales, parts, count, *sizes, **options, SPLITS=splits)
        return
    d_x = TensorDescriptor.from_tensor(row_major(x_codes), [block_m, block_k])
    d_w = TensorDescriptor.from_tensor(row_major(w_codes), [block_n, block_k])
    d_y = TensorDescriptor.from_tensor(y, [block_m, block_n // 2])
    programs = min(tiles, target.processors * config["per_processor"])
    tiles_kernel[(programs,)](d_x, d_w, d_y, *scales, *sizes, **options, FLATTEN=config["flatten"])
