"""Orthonormal bases of updates, padded to one rank and stacked: what all pairs of adapters are measured with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratools.core.update import Array, Delta, namespace
from loratools.kinds.lowrank import low_rank
from loratools.linalg import seeds
from loratools.linalg.gram import cross
from loratools.linalg.namespace import up
from loratools.linalg.rsvd import Matrix, rsvd
from loratools.ops.fuse_tally import LEADING, inverse_root

FULL_RANK = LEADING
"""Leading directions that stand for an update without factors (the true update of a DoRA, a dense difference)."""


@dataclass(frozen=True)
class Bases:
    """D_i = u_i core_i v_i^T for c adapters: u (c, m, r), v (c, n, r), core (c, r, r) in fp32, zero beyond the ranks.

    ``left`` and ``right`` are the dimensions of the column and row spaces, (c,) each; ``held`` is the least share of an
    update's energy that its directions hold (1 where it has factors).
    """

    u: Array
    v: Array
    core: Array
    left: Array
    right: Array
    held: float = 1.0

    def __len__(self) -> int:
        return int(self.u.shape[0])

    def part(self, start: int, stop: int) -> Bases:
        """Return the bases of adapters start .. stop."""
        u, v, core, left, right = (x[start:stop, ...] for x in (self.u, self.v, self.core, self.left, self.right))
        return Bases(u, v, core, left, right, self.held)


Part = tuple[Array, Array, Array, float]  # u (m, r), v (n, s), core (r, s), share of energy held


def bases(deltas: Sequence[Delta]) -> Bases:
    """Return the bases of one matrix's updates.

    Column and row spaces by the Gram matrices of the factors in fp64, directions below 1e-6 of the largest left out.
    O((m + n) r^2) per adapter.
    """
    parts = [_part(d) for d in deltas]
    xp = namespace(*(p[0] for p in parts))
    rank = max(1, *(int(k) for p in parts for k in p[2].shape))
    u, v = (xp.stack([up(_wider(p[i], rank)) for p in parts]) for i in (0, 1))
    core = xp.stack([up(_wider(_wider(p[2], rank).mT, rank).mT) for p in parts])
    left, right = (xp.asarray([int(p[2].shape[i]) for p in parts], device=u.device) for i in (0, 1))
    return Bases(u, v, core, left, right, min(p[3] for p in parts))


def _part(d: Delta) -> Part:
    low = low_rank(d)
    if low is None:
        return _leading(d)
    b, a = (up(t, "float64") for t in (low.b, low.a))
    wide = a.mT
    gb, ga = cross(b, b, "float64"), cross(wide, wide, "float64")
    left, right = inverse_root(gb), inverse_root(ga)
    if 0 in (left.shape[1], right.shape[1], low.scale):  # a zero update has neither space
        left, right = left[:, :0], right[:, :0]
    return b @ left, wide @ right, low.scale * (left.mT @ gb @ ga @ right), 1.0


def _leading(d: Delta) -> Part:
    x = up(d.matrix())
    xp = namespace(x)
    found = rsvd(Matrix(x), min(FULL_RANK, *x.shape), key=seeds.key_of(0, "compare"))
    s = up(found.s, "float64")
    total, held = float(xp.sum(up(xp.linalg.vecdot(x, x), "float64"))), float(xp.sum(s**2))
    core = xp.eye(s.shape[0], dtype=s.dtype, device=s.device) * s
    return up(found.u, "float64"), up(found.vh, "float64").mT, core, held / total if total else 1.0


def _wider(x: Array, k: int) -> Array:
    """Return x with zero columns added up to k."""
    missing = k - int(x.shape[1])
    if missing <= 0:
        return x
    xp = namespace(x)
    return xp.concat([x, xp.zeros((x.shape[0], missing), dtype=x.dtype, device=x.device)], axis=1)
