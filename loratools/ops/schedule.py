"""The order of work on many matrices: small ones through a pool, large ones one by one with every thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TypeVar

from loratools.core import pool
from loratools.core.update import nbytes
from loratools.io.base import Base
from loratools.ops.parts import Part

LARGE_BYTES = 16 << 20
"""A base matrix beyond this many bytes in fp32 gets every thread for itself."""

R = TypeVar("R")


def each_part(series: Sequence[Sequence[Part]], f: Callable[[Sequence[Part]], R], base: Base | None) -> list[R]:
    """Return ``[f(steps) for steps in series]``; ``steps`` are one part in every checkpoint.

    At most one large base matrix is in memory at a time.
    """
    sizes = [_base_bytes(steps[-1], base) for steps in series]
    weights = [size + sum(nbytes(part.update) for part in steps) for size, steps in zip(sizes, series, strict=True)]
    small = [i for i, size in enumerate(sizes) if size <= LARGE_BYTES]
    whole, done = sum(weights), sum(weights[i] for i in small)
    with pool.part(0, whole):
        rows = pool.parallel_map(lambda i: f(series[i]), small, weights=[weights[i] for i in small])
    found = dict(zip(small, rows, strict=True))
    for i in (i for i in range(len(series)) if i not in found):
        with pool.all_blas_threads():
            found[i] = f(series[i])
        done += weights[i]
        pool.tell(done, whole)
    return [found[i] for i in range(len(series))]


def _base_bytes(part: Part, base: Base | None) -> int:
    """Return the size in fp32 of the base parameter that a part needs; 0 without a base."""
    return 0 if base is None else 4 * prod(part.update.shape)
