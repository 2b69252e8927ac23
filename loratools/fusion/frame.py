"""The core frame: R x R coordinates in which every low-rank update of a module is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loratools.core.update import Array, Delta, namespace
from loratools.fusion.canonical import canonical, left_singular
from loratools.linalg.factored import SVD


class Frame(NamedTuple):
    """D_i = left @ cores[i] @ right: left (m, p), right (q, n) with orthonormal columns and rows, cores (p, q)."""

    left: Array
    right: Array
    cores: list[Array]


def frame(deltas: Sequence[Delta]) -> Frame | None:
    """Return the joint frame of the updates, None where all are zero.

    ``left`` are the left singular vectors of all balanced tall factors U_i sqrt(S_i) side by side, ``right`` likewise:
    of the canonical factors, so the frame, and any rule in it, depends on the updates alone. O((m + n) R^2).
    """
    return framed([canonical(d) for d in deltas])


def framed(forms: Sequence[SVD]) -> Frame | None:
    """Return the joint frame of updates in canonical form."""
    xp = namespace(*(f.s for f in forms))
    tall = xp.concat([f.u * xp.sqrt(f.s) for f in forms], axis=1)
    wide = xp.concat([f.vh.mT * xp.sqrt(f.s) for f in forms], axis=1)
    if tall.shape[1] == 0:
        return None
    left, right = left_singular(tall), left_singular(wide).mT
    return Frame(left, right, [((left.mT @ f.u) * f.s) @ (f.vh @ right.mT) for f in forms])
