"""One level of an orthonormal wavelet synthesis along the first axis, periodic at the ends.

A column of coefficients is (approximation, detail), each of half its length; with a synthesis filter pair (g, h) of
length L the signal is x[2 k + t mod n] += g[t] approximation[k] + h[t] detail[k]. Haar and Daubechies' four-tap filter
are closed forms (Daubechies, *Ten Lectures on Wavelets*, SIAM 1992, section 6.4).
"""

from __future__ import annotations

from math import sqrt

from loratools.errors import FormatError, UsageError
from loratools.leaf import Array
from loratools.linalg.namespace import namespace

_R3 = sqrt(3.0)
FILTERS: dict[str, tuple[float, ...]] = {
    "haar": (1 / sqrt(2.0), 1 / sqrt(2.0)),
    "db2": tuple(x / (4 * sqrt(2.0)) for x in (1 + _R3, 3 + _R3, 3 - _R3, 1 - _R3)),
}
"""Scaling filters g; the wavelet's is h[t] = (-1)^t g[L - 1 - t]."""


def synthesis(x: Array, family: str) -> Array:
    """Return S x for coefficients x (n, k), n even, S (n, n) orthonormal; O(L n k).

    Raises UsageError for an unknown family, FormatError for an odd length.
    """
    if family not in FILTERS:
        raise UsageError("unknown wavelet", expected=", ".join(FILTERS), got=family)
    n = x.shape[0]
    if n % 2:
        raise FormatError("a wavelet transform halves its axis", expected="an even size", got=n)
    g = FILTERS[family]
    h = tuple((-1) ** t * value for t, value in enumerate(reversed(g)))
    xp = namespace(x)
    low, high = x[: n // 2, :], x[n // 2 :, :]
    sides = [sum(g[2 * j + p] * xp.roll(low, j, axis=0) + h[2 * j + p] * xp.roll(high, j, axis=0)
                 for j in range(len(g) // 2)) for p in (0, 1)]  # fmt: skip
    return xp.stack(sides, axis=1).reshape(n, x.shape[1])
