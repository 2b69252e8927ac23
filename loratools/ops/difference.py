"""The difference of two stored matrices, formed in fp32 by blocks, with what is known about it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod, sqrt
from operator import add
from typing import NamedTuple

from loratools.core.pool import parallel_map
from loratools.core.rows import row_ranges
from loratools.core.update import Array, Leaf, working_dtype
from loratools.errors import NumericsError
from loratools.linalg.namespace import all_finite, namespace, up
from loratools.linalg.noise import profile_edge, rounding_variances
from loratools.ops.fold import square

RANGE_BYTES = 4 << 20
NOISY = ("bfloat16", "float16")


class Difference(NamedTuple):
    """D = tuned - base as a matrix (m, n), |D|^2, |base|^2, and what rounding the tuned weights added.

    ``noise`` is the expected |noise|^2, ``noise_edge`` the largest singular value that noise alone gives (see
    :func:`loratools.linalg.noise.profile_edge`); None for full precision.
    """

    d: Array
    square: float
    base_square: float
    noise: float | None = None
    noise_edge: float | None = None

    @property
    def noise_floor(self) -> float | None:
        """Expected norm of the noise over |D|, at most 1; None where nothing was rounded or nothing changed."""
        return None if self.noise is None or not self.square else min(sqrt(self.noise / self.square), 1.0)


class _Part(NamedTuple):
    """What a range of rows adds: |base|^2, and sums of the noise's variances by row and by column."""

    base_square: float
    rows: Array | None
    columns: Array | None


def difference(base: Leaf, tuned: Leaf) -> Difference:
    """Return tuned - base; both are read by blocks, in all threads. Memory: the fp32 difference.

    Raises NumericsError where it is not finite.
    """
    shape = (tuned.shape[0], prod(tuned.shape[1:]))
    dtype = working_dtype(base, tuned)
    first = up(tuned.rows(0, 1), dtype)
    d = namespace(first).empty(shape, dtype=first.dtype, device=first.device)

    def fill(rows: tuple[int, int]) -> _Part:
        start, stop = rows
        new, old = (up(leaf.rows(start, stop), dtype).reshape(stop - start, -1) for leaf in (tuned, base))
        d[start:stop, :] = new - old
        if tuned.dtype not in NOISY:
            return _Part(square(old), None, None)
        variances = rounding_variances(new, tuned.dtype)
        return _Part(square(old), variances.sum(axis=1), variances.sum(axis=0))

    ranges = row_ranges(tuned, RANGE_BYTES)
    parts = parallel_map(fill, ranges, weights=[tuned.nbytes // len(ranges)] * len(ranges))
    if not all_finite(d):
        raise NumericsError("the difference of the two models is not finite here")
    return Difference(d, square(d), sum(part.base_square for part in parts), *_noise(parts))


def _noise(parts: Sequence[_Part]) -> tuple[float | None, float | None]:
    rows = [part.rows for part in parts if part.rows is not None]
    columns = [part.columns for part in parts if part.columns is not None]
    if not rows:
        return None, None
    tall = namespace(rows[0]).concat(rows)
    return float(tall.sum()), profile_edge(tall, reduce(add, columns))


def is_same(base: Leaf, tuned: Leaf) -> bool:
    """True if two stored tensors hold the same values."""
    if base.shape != tuned.shape:
        return False
    one, other = up(base, working_dtype(base)), up(tuned, working_dtype(tuned))
    xp = namespace(one, other)
    return bool(xp.all((one == other) | (xp.isnan(one) & xp.isnan(other))))
