"""Rows times a Hadamard matrix H = H_K (x) H_2 (x) ... (x) H_2, entries +-1, as QuaRot and QuIP# lay it out.

n = K 2^k with the first K of 172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12 that divides n, else 1. With the Jacobsthal
matrix Q[i, j] = chi(j - i) of a prime q: H_12, H_20 and H_60 are Paley's first kind (q = K - 1), a first row of -1 but
for its +1, a first column of +1, and 1 - Q; H_28 and H_36 his second (q = K / 2 - 1), [[C + 1, C - 1], [C - 1, -C - 1]]
of the conference matrix C with border 1 around Q; H_40 = H_2 (x) H_20. The other tables are no formula known here, and
their sizes are refused. (Horadam, *Hadamard Matrices and Their Applications*, 2007, section 2.1.)
"""

from __future__ import annotations

from functools import cache

from loratools.errors import UnsupportedError
from loratools.leaf import Array
from loratools.linalg.namespace import namespace

ORDER = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12)
_FIRST = {12: 11, 20: 19, 60: 59}
_SECOND = {28: 13, 36: 17}


def head(n: int) -> int:
    """Return K of a size; :class:`UnsupportedError` where its table is not known, or n / K is no power of two."""
    k = next((k for k in ORDER if n % k == 0), 1)
    if k not in (*_FIRST, *_SECOND, 40, 1) or (n // k) & (n // k - 1) or n < 1:
        expected = "a power of two times 1, 12, 20, 28, 36, 40 or 60"
        raise UnsupportedError(
            "a Hadamard matrix of this size is not known here", expected=expected, got=f"{n} (K {k})"
        )
    return k


@cache
def table(k: int) -> tuple[tuple[int, ...], ...]:
    """Return H_K, as rows of +-1."""
    if k == 1:
        return ((1,),)
    if k == 40:
        half = table(20)
        return tuple((*row, *row) for row in half) + tuple((*row, *(-x for x in row)) for row in half)
    if k in _SECOND:
        q = _SECOND[k]
        c = [[0, *(1,) * q], *([1, *row] for row in _jacobsthal(q))]
        pieces = [((1, 1), (1, -1)), ((1, -1), (-1, -1))]  # (sign of C, sign of the identity) of the four blocks
        return tuple(
            tuple(sign * x + one * (i == j) for sign, one in line for j, x in enumerate(row))
            for line in pieces
            for i, row in enumerate(c)
        )
    q = _FIRST[k]
    inner = ([(i == j) - x for j, x in enumerate(row)] for i, row in enumerate(_jacobsthal(q)))
    return ((1, *(-1,) * q), *((1, *row) for row in inner))


def _jacobsthal(q: int) -> list[list[int]]:
    """Return chi(j - i) of a prime: 0 on the diagonal, 1 at squares, else -1."""
    squares = {x * x % q for x in range(1, q)}
    return [[0 if i == j else 1 if (j - i) % q in squares else -1 for j in range(q)] for i in range(q)]


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
