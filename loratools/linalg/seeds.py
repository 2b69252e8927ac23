"""The one source of randomness: Philox-4x32-10, a word for every matrix entry, addressable in any order.

Entry (row, column) of the stream ``key`` is the first word of the block with counter (column, row, 0, 0). It depends on
nothing else: not on the shape asked for, on tiles, threads, library or device.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Any

from loratools.leaf import Array
from loratools.linalg.namespace import cast, namespace, up

Key = tuple[int, int]
"""Two 32-bit words."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF
_TILE = 1 << 15  # entries worked on at once, so that the temporaries stay in the cache


def key_of(seed: int, name: str) -> Key:
    """Return the key of a named stream: the first 8 bytes of blake2b("seed:name"), as two little-endian words."""
    from hashlib import blake2b  # loads OpenSSL: milliseconds and megabytes that most runs do not need

    digest = blake2b(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(counter: tuple[Any, Any, Any, Any], key: Key) -> tuple[Any, Any, Any, Any]:
    """Return the four words of each block: counters are int64 arrays of 32-bit values that broadcast together.

    Products of two words wrap round in int64, in NumPy as in torch; masking the shifted product restores its high word.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = ((p1 >> 32) & _LOW) ^ x1 ^ k0, p1 & _LOW
        x2, x3 = ((p0 >> 32) & _LOW) ^ x3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return x0, x1, x2, x3


def words(key: Key, rows: int | range, cols: int | range, *, like: Array | None = None) -> Array:
    """Return the words of rows x cols (a number means the first so many) as uint32, shape (len(rows), len(cols)).

    ``like``: an array whose library and device to use (NumPy if none). Cost about 30 ns per entry on a CPU.
    """
    return cast(_words(key, rows, cols, like), "uint32")


def signs(key: Key, rows: int | range, cols: int | range, *, like: Array | None = None) -> Array:
    """Return +1 and -1 in fp32, minus where bit 31 of the word is set; arguments as for :func:`words`."""
    return 1 - 2 * up(_words(key, rows, cols, like) >> 31)


def uniform(key: Key, rows: int | range, cols: int | range, *, like: Array | None = None) -> Array:
    """Return word / 2^32 in fp64, exactly: uniform on [0, 1); arguments as for :func:`words`."""
    return up(_words(key, rows, cols, like), "float64") * 2.0**-32


def _words(key: Key, rows: int | range, cols: int | range, like: Array | None) -> Array:
    """Return the words in int64, which both libraries compute in."""
    xp, device = namespace(like), getattr(like, "device", None)
    row, column = (
        xp.arange(r.start, r.stop, r.step, dtype=xp.int64, device=device)
        for r in (range(n) if isinstance(n, int) else n for n in (rows, cols))
    )
    zero = xp.zeros((1, 1), dtype=xp.int64, device=device)
    height = max(1, _TILE // max(column.shape[0], 1))
    tops = range(0, max(row.shape[0], 1), height)
    return xp.concat([philox((column[None, :], row[i : i + height, None], zero, zero), key)[0] for i in tops])
