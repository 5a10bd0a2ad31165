"""Hadamard matrices from number theory, and a transform that never writes them down; chapter ``10-quarot``.

A Hadamard matrix has entries ± 1 and orthogonal rows, ``H H^T = n I``: each output of ``x H^T / √n`` takes the same share
of every input, so no single large input stays visible. Orders above 2 are multiples of 4. The constructions here:

- Sylvester (1867): ``H_2n = [[H, H], [H, -H]]``, all powers of two; applied as a butterfly of log2(n) steps.
- Paley (1933): from the squares of a finite field with ``q`` elements, of order ``q + 1`` for ``q ≡ 3 (mod 4)`` and of
  order ``2 (q + 1)`` for ``q ≡ 1 (mod 4)``.
- Williamson (1944): from four symmetric circulant matrices whose squares add up to ``4 n I``, of order ``4 n``.

**The factorization rule**, which kernels follow too: ``n = m · 2^k`` with the smallest ``m`` that has one of the
constructions (1 for a power of two), and ``H_n = H_m ⊗ H_{2^k}``. Of the multiples of 4 up to 256 it lacks 188 and 236. Where
it finds no factor, :func:`hadamard_block` names the largest blocks that can be transformed one by one.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lqedu.errors import UsageError

# Orders 92, 116, 156 and 172, which neither of Paley's constructions reaches; widths of real models need 172 (11008 = 172 · 64).
# First rows of four symmetric circulants. 39 and 43: found by searching the rows whose signs are constant on, or permuted
# among each other by, a group of multipliers. 23 and 29: by searching all symmetric rows, matching pairs whose
# autocorrelations add up to opposite numbers. The tests verify the products.
_WILLIAMSON = {
    23: (
        "+++-+++-+------+-+++-++",
        "+++---++-+-++-+-++---++",
        "++---+---+-++-+---+---+",
        "+-++-++--++++++--++-++-",
    ),
    29: (
        "++-+-++++--+------+--++++-+-+",
        "++-+-++----+--++--+----++-+-+",
        "+-+--+-+++++--++--+++++-+--+-",
        "++-++-+++---++++++---+++-++-+",
    ),
    39: (
        "++--+++-+--++-+----------+-++--+-+++--+",
        "+---+--++++----+-+-++-+-+----++++--+---",
        "+-++------++--+-+-++++-+-+--++------++-",
        "+---+---+-++-++----++----++-++-+---+---",
    ),
    43: (
        "+++++-++----+-++--++-++-++--++-+----++-++++",
        "+++---++--+-+-+-++--------++-+-+-+--++---++",
        "++-+-++++-+--+--+++--++--+++--+--+-++++-+-+",
        "+-++-----++++-+-+++-++++-+++-+-++++-----++-",
    ),
}
_LARGEST = 1024  # factors beyond this would cost more than they are worth
_CACHED = 400_000  # values that a CPU transforms at once


def hadamard_factors(n: int) -> tuple[int, int]:
    """``(m, 2^k)`` with ``n = m · 2^k`` by the factorization rule.

    Raises:
        UsageError: no order that divides ``n`` in this way is known here; the sentence names :func:`hadamard_block`'s.

    >>> hadamard_factors(4096), hadamard_factors(576), hadamard_factors(11008), hadamard_factors(14336)
    ((1, 4096), (36, 16), (172, 64), (28, 512))
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UsageError(f"a Hadamard transform has a positive number of features, got {n!r}")
    factors = _factors(n)
    if factors is None:
        power = n & -n
        raise UsageError(
            f"no Hadamard matrix of order {n} = {n // power} · {power} is constructed here; "
            f"transform blocks of {hadamard_block(n)} instead"
        )
    return factors


def hadamard_block(n: int) -> int:
    """The largest divisor of ``n`` that has a Hadamard matrix: ``n`` itself where there is one.

    The block-diagonal ``I ⊗ H_b`` is as orthogonal as ``H_n``, but an output sees only the ``b`` inputs of its block.

    Raises:
        UsageError: ``n`` is not a positive integer.

    >>> hadamard_block(11008), hadamard_block(13696), hadamard_block(9)
    (11008, 128, 1)
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UsageError(f"a Hadamard transform has a positive number of features, got {n!r}")
    return next(n // d for d in range(1, n + 1) if n % d == 0 and _factors(n // d) is not None)


def hadamard_matrix(n: int) -> Tensor:
    """A Hadamard matrix, int8 ``[n, n]`` with entries ± 1 and ``H H^T = n I``; :func:`fast_hadamard` applies it.

    Raises:
        UsageError: as :func:`hadamard_factors`.

    >>> hadamard_matrix(4)
    tensor([[ 1,  1,  1,  1],
            [ 1, -1,  1, -1],
            [ 1,  1, -1, -1],
            [ 1, -1, -1,  1]], dtype=torch.int8)
    """
    m, power = hadamard_factors(n)
    sylvester = torch.ones(1, 1, dtype=torch.int8)
    while len(sylvester) < power:
        sylvester = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), sylvester)
    return torch.kron(_base(m), sylvester)


def fast_hadamard(x: Tensor, *, inverse: bool = False) -> Tensor:
    """``x H^T / √n`` along the last axis, orthonormal, without building ``H``.

    The factor ``2^k`` is a butterfly of ``k`` steps, the factor ``m`` a small matrix product:
    :func:`hadamard_operations` operations a vector instead of ``n²``.

    Args:
        x: ``[..., n]``, a floating dtype; 16-bit input is computed in float32. Differentiable.
        inverse: ``x H / √n`` instead, which undoes it. The same thing where ``n`` is a power of two.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        UsageError: as :func:`hadamard_factors`, or ``x`` is no tensor of floating-point vectors.
    """
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise UsageError(f"a Hadamard transform takes a tensor [..., n] of one dimension or more, got {x!r}")
    if not x.is_floating_point():
        raise UsageError(f"a Hadamard transform takes floating-point values, got {x.dtype}")
    n = x.shape[-1]
    m, power = hadamard_factors(n)
    if x.device.type == "cpu" and x.numel() > max(
        n, _CACHED
    ):  # each step reads and writes all of it: stay in a core's cache
        parts = x.reshape(-1, n).split(max(1, _CACHED // n))
        return torch.cat([fast_hadamard(part, inverse=inverse) for part in parts]).reshape(x.shape)
    y = x if x.dtype in (torch.float32, torch.float64) else x.float()
    half = 1
    while half < power:  # pairs of features `half` apart become their sum and their difference
        pairs = y.reshape(*x.shape[:-1], -1, 2, half)
        y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), dim=-2)
        half *= 2
    if m > 1:
        base = _base_like(m, y.device, y.dtype)
        y = (base.T if inverse else base) @ y.reshape(*x.shape[:-1], m, power)
    return (y.reshape(x.shape) * n**-0.5).to(x.dtype)


def hadamard_operations(n: int) -> int:
    """Additions of one transform of ``n`` features: ``n (m - 1)`` for the factor ``m``, ``n`` for each butterfly step.

    >>> hadamard_operations(4096), 4096 * 4095        # against a matrix product of signs
    (49152, 16773120)
    """
    m, power = hadamard_factors(n)
    return n * (m - 1) + n * (power.bit_length() - 1)


def randomized_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """``diag(±1) H / √n``, orthogonal float64 ``[n, n]``: random signs make large inputs unlikely to line up with a row.

    ``x @ randomized_hadamard(n, g)`` flips the signs of ``x`` and transforms it.
    """
    signs = torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * hadamard_matrix(n).to(torch.float64) * n**-0.5


@lru_cache
def _factors(n: int) -> tuple[int, int] | None:
    """:func:`hadamard_factors`, or ``None``."""
    m = n // (n & -n)
    while m <= min(n, _LARGEST):
        if m == 1 or _construction(m) is not None:
            return m, n // m
        m *= 2
    return None


@lru_cache
def _base_like(m: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix of the odd part where an online transform needs it: copied to a device once, not for every layer."""
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        return _base(m).to(device, dtype, copy=True)


@lru_cache
def _base(m: int) -> Tensor:
    """The matrix of the odd part, int8 ``[m, m]``."""
    return torch.ones(1, 1, dtype=torch.int8) if m == 1 else _construction(m)


@lru_cache
def _construction(m: int) -> Tensor | None:
    """A Hadamard matrix of order ``m`` by Paley or Williamson, or ``None``."""
    if m % 4:
        return None
    if (m - 1) % 4 == 3 and _prime_power(m - 1):
        s = _bordered(_characters(m - 1), -1)
        return s + torch.eye(m, dtype=torch.int8)
    if (m // 2 - 1) % 4 == 1 and _prime_power(m // 2 - 1):
        c = _bordered(_characters(m // 2 - 1), 1)
        eye = torch.eye(m // 2, dtype=torch.int8)
        plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
        return torch.kron(c, plus.to(torch.int8)) + torch.kron(eye, minus.to(torch.int8))
    if m // 4 in _WILLIAMSON:
        a, b, c, d = (_circulant(row) for row in _WILLIAMSON[m // 4])
        rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
        return torch.cat([torch.cat(row, dim=1) for row in rows])
    return None


def _bordered(q: Tensor, sign: int) -> Tensor:
    """``[[0, 1], [sign · 1, Q]]``, int8."""
    n = len(q) + 1
    s = torch.zeros(n, n, dtype=torch.int8)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, sign, q
    return s


def _circulant(row: str) -> Tensor:
    first = torch.tensor([1 if sign == "+" else -1 for sign in row], dtype=torch.int8)
    return torch.stack([first.roll(shift) for shift in range(len(row))])


def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``q = p^k``, or ``None``."""
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k, rest = 0, q
    while q > 1 and rest % p == 0:
        k, rest = k + 1, rest // p
    return (p, k) if rest == 1 and q > 1 else None


def _characters(q: int) -> Tensor:
    """``χ(a - b)`` for all elements of the field with ``q`` elements: 1 for squares, -1 for the others, 0 for zero.

    An element is a polynomial of degree below ``k`` over the integers mod ``p``, written as its digits. The powers of a
    generator run through all elements but zero, and the even powers are the squares.
    """
    p, k = _prime_power(q)
    weights = p ** torch.arange(k)
    chi = torch.zeros(q, dtype=torch.int8)
    for exponent, element in enumerate(_powers_of_a_generator(p, k)):
        chi[int((element * weights).sum())] = 1 - 2 * (exponent % 2)
    digits = torch.arange(q)[:, None] // weights % p  # [q, k]
    difference = (digits[:, None] - digits[None]) % p
    return chi[(difference * weights).sum(-1)]


def _powers_of_a_generator(p: int, k: int) -> list[Tensor]:
    """All elements but zero, in the order 1, x, x², …, for the first rule ``x^k = c(x)`` that makes ``x`` a generator."""
    for index in range(1, p**k):
        rule = torch.tensor([index // p**i % p for i in range(k)])
        element, powers, seen = torch.tensor([1] + [0] * (k - 1)), [], set()
        while tuple(element.tolist()) not in seen and bool(element.any()):
            seen.add(tuple(element.tolist()))
            powers.append(element)
            shifted = torch.cat([torch.zeros(1, dtype=element.dtype), element])
            element = (shifted[:k] + shifted[k] * rule) % p
        if len(powers) == p**k - 1:
            return powers
    raise AssertionError(f"every finite field has a generator, so has the one with {p}^{k} elements")
