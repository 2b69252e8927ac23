"""Rows times a Hadamard matrix H = H_K (x) H_2 (x) ... (x) H_2, entries +-1, as QuaRot and QuIP# lay it out.

n = K 2^k with the first K of 172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12 that divides n, else 1. H_12 and H_20 are
Paley's: a first row of -1 but for its +1, a first column of +1, and 1 - Q with the Jacobsthal matrix Q of 11 and 19;
H_40 = H_2 (x) H_20. The other tables are no formula known here, and their sizes are refused. (Horadam, *Hadamard
Matrices and Their Applications*, 2007, section 2.1.)
"""

from __future__ import annotations

from functools import cache

from loratools.errors import UnsupportedError
from loratools.leaf import Array
from loratools.linalg.namespace import namespace

ORDER = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12)
_PRIMES = {12: 11, 20: 19}


def head(n: int) -> int:
    """Return K of a size; :class:`UnsupportedError` where its table is not known, or n / K is no power of two."""
    k = next((k for k in ORDER if n % k == 0), 1)
    if (k not in (*_PRIMES, 40, 1)) or (n // k) & (n // k - 1) or n < 1:
        expected = "a power of two times 1, 12, 20 or 40"
        raise UnsupportedError(
            "a Hadamard matrix of this size is not known here", expected=expected, got=f"{n} (K {k})"
        )
    return k


@cache
def table(k: int) -> tuple[tuple[int, ...], ...]:
    """Return H_K, K of 1, 12, 20 and 40, as rows of +-1."""
    if k == 1:
        return ((1,),)
    if k == 40:
        half = table(20)
        return tuple((*row, *row) for row in half) + tuple((*row, *(-x for x in row)) for row in half)
    q = _PRIMES[k]
    squares = {x * x % q for x in range(1, q)}
    inner = [[1 if i == j or (j - i) % q not in squares else -1 for j in range(q)] for i in range(q)]
    return ((1, *(-1,) * q), *((1, *row) for row in inner))


def walsh(x: Array) -> Array:
    """Return x H for x (m, n); O(m n (K + log n))."""
    m, n = x.shape
    k = head(n)
    xp = namespace(x)
    width = 1
    while width < n // k:
        pairs = x.reshape(m, -1, 2, width)
        x = xp.stack([pairs[:, :, 0, :] + pairs[:, :, 1, :], pairs[:, :, 0, :] - pairs[:, :, 1, :]], axis=2)
        width *= 2
    blocks = x.reshape(m, k, n // k)
    h = xp.asarray(table(k), dtype=x.dtype)
    return xp.permute_dims(xp.permute_dims(blocks, (0, 2, 1)) @ h, (0, 2, 1)).reshape(m, n)
