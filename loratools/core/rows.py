"""Which updates act on rows of the stored parameter one by one, so that a large parameter can pass in blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

from loratools.core.update import Update, tensor_bytes
from loratools.leaf import Array, Leaf

Rows = Callable[[int, int], Update]
"""``rows(start, stop)`` is the update of rows start .. stop of the first axis alone, of shape (stop - start, ...)."""


@singledispatch
def rowwise(u: Update) -> Rows | None:
    """Return the function that restricts ``u`` to rows, or None where a row of W' depends on other rows of W.

    ``rowwise(u)(i, j).apply(w[i:j]) == u.apply(w)[i:j]``. This call reads nothing; what all rows share (a factor) is
    read once, with the first rows, the rest with its own rows.
    """
    return None


def slice_rows(t: Leaf | Array, start: int, stop: int) -> Leaf | Array:
    """Return rows start .. stop of a tensor; of a leaf, the handle that reads them alone."""
    return t.rows(start, stop) if isinstance(t, Leaf) else t[start:stop]


def row_ranges(t: Leaf | Array, limit_bytes: int) -> list[tuple[int, int]]:
    """Return the rows of a tensor in ranges of at most ``limit_bytes`` (at least one row each)."""
    count = int(t.shape[0])
    step = max(1, limit_bytes * count // max(tensor_bytes(t), 1))
    return [(start, min(start + step, count)) for start in range(0, count, step)]
