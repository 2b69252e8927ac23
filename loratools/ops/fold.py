"""The arithmetic of merging: one block of a parameter and the updates on it, in fp32 (fp64 for an fp64 base)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod, sqrt
from typing import NamedTuple

from loratools.core.update import Array, Update
from loratools.kinds.dora import Dora, along
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace_rows import ReplaceRows
from loratools.linalg.namespace import namespace, up

Weighted = tuple[float, Update]


class Folded(NamedTuple):
    """W' = ``value``, what it adds to W, and the gains of the rows by each Dora among the terms."""

    value: Array
    change: Array
    gains: tuple[tuple[Dora, Array], ...] = ()


def fold(w: Array, terms: Sequence[Weighted]) -> Folded:
    """Return W' = W + sum_i weight_i (u_i.apply(W) - W), every update against the same W; nothing is rounded.

    What stores rows is applied as it is where it is alone at weight 1, so that they come out exactly. O(m n r) per
    low-rank term.
    """
    if len(terms) == 1 and terms[0][0] == 1 and isinstance(terms[0][1], ReplaceRows | Rebased):
        value = terms[0][1].apply(w)
        return Folded(value, value - w)
    total: Array | None = None
    gains: list[tuple[Dora, Array]] = []
    for weight, u in terms:
        change, gain = increment(w, u)
        change = change if weight == 1 else weight * change
        total = change if total is None else total + change
        if gain is not None and isinstance(u, Dora):
            gains.append((u, gain))
    assert total is not None  # at least one term
    return Folded(w + total, total, tuple(gains))


def increment(w: Array, u: Update) -> tuple[Array, Array | None]:
    """Return u.apply(W) - W without cancellation, and the gain of the rows of a Dora."""
    if isinstance(u, Dora):
        return u.change(w)
    return u.delta(w).dense(), None


def unfold(x: Array, terms: Sequence[Weighted], gain: Array | None = None) -> Array:
    """Return the W of which :func:`fold` makes ``x``, up to rounding: for additive terms, or one Dora of known gain."""
    if gain is not None:
        ((weight, u),) = terms
        assert isinstance(u, Dora)
        wide = along(gain, u.axis, len(u.shape))
        return (x - weight * wide * u.direction.dense()) / (1.0 + weight * (wide - 1.0))
    return fold(x, [(-weight, u) for weight, u in terms]).value


def square(x: Array) -> float:
    """Return the squared Frobenius norm: rows in the precision of x, their sum in fp64."""
    xp = namespace(x)
    rows = x.reshape(x.shape[0], prod(x.shape[1:])) if x.ndim > 1 else x.reshape(1, -1)
    return float(xp.sum(up(xp.linalg.vecdot(rows, rows), "float64")))


def agreement(dora: Dora, norms: Array) -> dict[str, float]:
    """Return the sums of the correlation between log magnitude and log |row of W|; W without D: a wrong base has none.

    ``norms`` are those of W along the axis of the magnitude. Magnitudes begin as the row norms of the base and move
    little in training. (The rows of W + D share D with the adapter, so that they agree somewhat with magnitudes trained
    on any base.)
    """
    xp = namespace(norms)
    m, n = (xp.log(xp.abs(up(x, "float64")) + 1e-30) for x in (dora.magnitude, norms))
    pairs = {"rows": m * 0 + 1, "m": m, "n": n, "mm": m * m, "nn": n * n, "mn": m * n}
    return {f"dora_{key}": float(xp.sum(value)) for key, value in pairs.items()}


def correlation(sums: Mapping[str, float]) -> float | None:
    """Return the correlation of :func:`agreement`'s sums; None where magnitudes or norms hardly vary."""
    count, m, n, mm, nn, mn = (sums[f"dora_{key}"] for key in ("rows", "m", "n", "mm", "nn", "mn"))
    vm, vn = mm / count - (m / count) ** 2, nn / count - (n / count) ** 2
    if min(vm, vn) < 1e-9:
        return None
    return (mn / count - m * n / count**2) / sqrt(vm * vn)
