"""Scales of low-bit vectors: one fp16 number per vector, or per group of entries along it."""

from __future__ import annotations

from loratools.leaf import Array
from loratools.linalg.namespace import device_of, down, namespace, up

TINY = 2.0**-24  # the smallest fp16 number
LARGEST = 65504.0


def groups(n: int, group: int) -> int:
    """Return how many scales a vector of n entries has."""
    return -(-n // group) if group else 1


def stored(x: Array) -> Array:
    """Return numbers as fp16 holds them, in fp32; the smallest ones do not vanish."""
    xp = namespace(x)
    return up(down(xp.where(x == 0, 0.0, xp.copysign(xp.clip(xp.abs(x), TINY, LARGEST), x)), "float16"))


def spread(scale: Array, n: int, group: int) -> Array:
    """Return scales (k, groups) for every entry: (k, 1) or (k, n)."""
    return namespace(scale).repeat(scale, min(group, n), axis=1)[:, :n] if group else scale


def grouped(x: Array, group: int) -> Array:
    """Return sums of x (k, n) by group: (k, groups)."""
    return namespace(x).sum(_by_group(x, group), axis=2)


def largest(x: Array, group: int) -> Array:
    """Return the largest magnitudes of x (k, n) by group: (k, groups)."""
    xp = namespace(x)
    return xp.max(xp.abs(_by_group(x, group)), axis=2)


def _by_group(x: Array, group: int) -> Array:
    """Return x (k, n) as (k, groups, entries), zeros behind its end."""
    xp, (k, n) = namespace(x), x.shape
    pad = groups(n, group) * min(group, n) - n if group else 0
    x = xp.concat([x, xp.zeros((k, pad), dtype=x.dtype, device=device_of(x))], axis=1) if pad else x
    return x.reshape(k, groups(n, group), -1)
