"""Principal angles between column spaces."""

from __future__ import annotations

from loratools.leaf import Array
from loratools.linalg.namespace import namespace, up


def principal_angles(q1: Array, q2: Array) -> Array:
    """Return the angles between two column spaces in radians, ascending: q1 (m, k), q2 (m, l) -> (min(k, l),) fp64.

    Both bases must be orthonormal. Large angles come from cosines, small ones from sines, so every angle is accurate to
    eps of the bases. Cost O(m k l). Source: Björck, Golub 1973; Knyazev, Argentati 2002.
    """
    xp = namespace(q1, q2)
    few, many = sorted((up(q1, "float64"), up(q2, "float64")), key=lambda q: int(q.shape[-1]))
    overlap = many.mT @ few
    cosines = xp.clip(xp.linalg.svdvals(overlap), 0.0, 1.0)
    sines = xp.clip(xp.flip(xp.linalg.svdvals(few - many @ overlap)), 0.0, 1.0)
    return xp.where(cosines**2 < 0.5, xp.acos(cosines), xp.asin(sines))
