"""Gram-Schmidt among adapters: every later one keeps out of the way of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loratools.core.update import Array, Delta, namespace
from loratools.fusion.base import fusion
from loratools.fusion.canonical import canonical, left_singular, made
from loratools.fusion.combine import zero_of

Side = Literal["input", "output", "both"]


@fusion(
    "orthogonalise",
    reference="Gram-Schmidt on subspaces",
    guarantee="exact in factor space; later adapters vanish on the subspaces of earlier ones",
    ordered=True,
)
def orthogonalise(deltas: Sequence[Delta], weights: Sequence[float], *, side: Side = "input") -> Delta:
    """Remove from every adapter what lies in the subspaces of those given before it, then sum with weights.

    ``side``: input (A (I - Q Q^T): what earlier adapters react to), output ((I - Q Q^T) B: where they write), or both.
    The first adapter is kept whole, so the order is a ranking.
    """
    forms = [canonical(d) for d in deltas]
    xp = namespace(*(f.s for f in forms))
    tall, wide = [f.u * f.s for f in forms], [f.vh.mT for f in forms]
    if side != "input":
        tall = _swept(tall, [f.u for f in forms])
    if side != "output":
        wide = _swept(wide, wide)
    b = xp.concat([w * x for w, x in zip(weights, tall, strict=True)], axis=1)
    return made(deltas, b, xp.concat(wide, axis=1).mT) if b.shape[1] else zero_of(deltas)


def _swept(columns: Sequence[Array], spaces: Sequence[Array]) -> list[Array]:
    """Return every block of columns without its part in the span of the spaces before it."""
    xp = namespace(*columns)
    out = []
    for i, x in enumerate(columns):
        earlier = xp.concat(list(spaces[:i]), axis=1) if i else x[:, :0]
        if earlier.shape[1]:
            q = left_singular(earlier)
            x = x - q @ (q.mT @ x)  # noqa: PLW2901 - twice is enough: the basis is orthonormal to rounding
        out.append(x)
    return out
