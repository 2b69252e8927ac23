"""Sign conflicts on a fixed sample: the same entries of a module for every adapter, formed a few rows at a time."""

from __future__ import annotations

from math import sqrt

from loratools.core.update import Array, namespace
from loratools.linalg.namespace import up
from loratools.ops.compare_bases import Bases

CHUNK = 1 << 21
"""Entries of all adapters together formed at a time."""

MOST = 1 << 20
"""Largest sample per module."""


def sampled_rows_and_columns(m: int, n: int, sample: int) -> tuple[list[int], list[int]]:
    """Return evenly spaced rows and columns of an m x n matrix whose crossings are at most ``sample`` entries."""
    rows = min(m, max(1, int(sqrt(sample * m / n))))
    return _spaced(m, rows), _spaced(n, min(n, max(1, sample // rows)))


def _spaced(size: int, count: int) -> list[int]:
    return [size * i // count for i in range(count)]


def signs(x: Bases, y: Bases, sample: int) -> tuple[Array, Array]:
    """Return, for all pairs, the sampled entries whose signs differ and those where neither entry is zero, (p, q).

    Cost 2 r (p + q) + 2 p q multiply-adds per sampled entry.
    """
    xp = namespace(x.u)
    rows, columns = sampled_rows_and_columns(int(x.u.shape[1]), int(x.v.shape[1]), sample)
    height = max(1, CHUNK // ((len(x) + len(y)) * len(columns)))
    right = [_wide(b, columns) for b in ((x,) if x is y else (x, y))]
    agree = both = xp.zeros((len(x), len(y)), dtype=xp.float64, device=x.u.device)
    for start in range(0, len(rows), height):
        chunk = rows[start : start + height]
        found = [_signs(b, wide, chunk) for b, wide in zip((x,) if x is y else (x, y), right, strict=True)]
        one, other = found[0], found[-1]
        agree = agree + up(one @ other.mT, "float64")
        both = both + up(xp.abs(one) @ xp.abs(other).mT, "float64")
    return (both - agree) / 2, both


def _wide(b: Bases, columns: list[int]) -> Array:
    """Return core_i v_i^T at the sampled columns, (c, r, k) in fp32."""
    xp = namespace(b.u)
    chosen = xp.take(b.v, xp.asarray(columns, device=b.v.device), axis=1)
    return up(b.core) @ xp.matrix_transpose(chosen)


def _signs(b: Bases, wide: Array, rows: list[int]) -> Array:
    """Return the signs of the sampled rows of every update as -1, 0 and 1, (c, rows * k) in fp32."""
    xp = namespace(b.u)
    tall = xp.take(b.u, xp.asarray(rows, device=b.u.device), axis=1)
    return xp.sign(tall @ wide).reshape(len(b), -1)
