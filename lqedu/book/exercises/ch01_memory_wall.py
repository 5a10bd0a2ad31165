"""Checkers of chapter 01-memory-wall."""

from lqedu.book.exercises import exercise, expect_close, expect_equal
from lqedu.evaluation.roofline import ModelShape, kv_bytes_per_token, matmul_bytes, matmul_ops


@exercise("01-memory-wall.1", "operations per byte of a product of m tokens with a weight [n, k]")
def _intensity(fn):
    for m, n, k, bits in ((1, 4, 8, 16), (1, 4096, 4096, 4.25), (64, 577, 1536, 8), (4096, 4096, 4096, 16)):
        want = matmul_ops(m, n, k) / matmul_bytes(m, n, k, weight_bits=bits)
        expect_close(
            fn(m, n, k, bits), want, name=f"intensity(m={m}, n={n}, k={k}, weight_bits={bits})", atol=1e-9 * want
        )


@exercise("01-memory-wall.2", "the smallest batch that is bound by arithmetic, by arithmetic on paper or a loop")
def _ridge_batch(fn):
    for n, k, peak, bandwidth, bits in (
        (4096, 4096, 7e14, 3e12, 16),
        (4096, 4096, 7e14, 3e12, 4),
        (64, 64, 1e9, 1e9, 8),
    ):
        want = next(
            m
            for m in range(1, 100_000)
            if matmul_ops(m, n, k) / peak >= matmul_bytes(m, n, k, weight_bits=bits) / bandwidth
        )
        expect_equal(fn(n, k, peak, bandwidth, bits), want, name=f"ridge_batch(n={n}, k={k}, weight_bits={bits})")


@exercise("01-memory-wall.3", "bytes of the cache per token, with grouped-query attention")
def _kv(fn):
    for shape in (ModelShape(32, 4096, 11008, 32, 32, 128, 32000), ModelShape(30, 576, 1536, 9, 3, 64, 49152, True)):
        for bits in (16, 4):
            expect_equal(fn(shape, bits), kv_bytes_per_token(shape, bits=bits), name=f"kv_bytes({shape}, {bits})")


@exercise("01-memory-wall.4", "how much faster decoding gets when a share of the bytes stays as it was")
def _limit(fn):
    for share, shrink, want in ((0.0, 4.0, 4.0), (1.0, 4.0, 1.0), (0.2, 4.0, 2.5), (0.5, 2.0, 4 / 3)):
        expect_close(fn(share, shrink), want, name=f"speed_up(share={share}, shrink={shrink})", atol=1e-9)
