"""The entries of an update, a block of rows at a time: never the whole of it where its kind has rows."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from loratools.core.generic import need_delta
from loratools.core.rows import rowwise
from loratools.core.update import Array, Delta
from loratools.linalg.namespace import up

TILE = 1 << 20
"""Entries formed at a time (at least one row)."""


def tiles(d: Delta) -> Iterator[tuple[int, int, Array]]:
    """Yield (first row, last row + 1, block): rows of the update in fp32, of the shape (rows, product of the rest)."""
    m, n = d.shape[0], prod(d.shape[1:])
    step = max(1, TILE // n)
    rows = rowwise(d)
    whole = None if rows is not None else up(d.dense()).reshape(m, n)
    for start in range(0, m, step):
        stop = min(start + step, m)
        if rows is None:
            assert whole is not None
            yield start, stop, whole[start:stop, :]
        else:
            yield start, stop, up(need_delta(rows(start, stop)).dense()).reshape(stop - start, n)
