"""Add a small low-rank term to an update, exactly: as further channels, and for a DoRA with a new magnitude."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from loratools.core.update import Array, Update
from loratools.kinds.dora import Dora, along, axis_norms
from loratools.kinds.lowrank import LowRank, canonical, low_rank, with_low_rank
from loratools.linalg import factored
from loratools.linalg.namespace import down, dtype_name, namespace, up


class Correction(NamedTuple):
    """A term b @ a: b (m, q), a (q, n), fp64, in the orientation of the stored parameter."""

    b: Array
    a: Array


def can_be_corrected(update: Update) -> bool:
    """Tell whether :func:`corrected` is exact for this kind: low rank, sums of it, DoRA."""
    return low_rank(update) is not None and (isinstance(update, Dora) or update.kind in ("lowrank", "sum"))


def scaling(u: Array, s: Array, vh: Array, lam: float, *, turned: bool) -> Correction:
    """Return balanced factors of (lam - 1) U diag(s) Vh, transposed where the parameter is stored ``turned``."""
    xp = namespace(u)
    root = xp.sqrt((1 - lam) * s)
    b, a = -up(u, "float64") * root, root[:, None] * up(vh, "float64")
    return Correction(a.mT, b.mT) if turned else Correction(b, a)


def corrected(update: Update, w: Array, correction: Correction, keep_rank: bool) -> tuple[Update, float]:
    """Return the update plus the correction on base ``w``, and the relative error of cutting it back to its rank.

    Without ``keep_rank`` the rank grows by that of the correction and the error is 0 before rounding to storage dtypes.
    """
    if isinstance(update, Dora):
        return _corrected_dora(update, w, correction, keep_rank)
    direction = low_rank(update)
    assert direction is not None  # checked by the caller
    grown, loss = _grown(direction, correction, keep_rank)
    return with_low_rank(update, grown), loss


def _grown(u: LowRank, correction: Correction, keep_rank: bool) -> tuple[LowRank, float]:
    """Return u with the correction as further channels at its own scale; the old channels keep their bits."""
    xp, root = namespace(correction.b), abs(u.scale) ** 0.5
    sign = -1.0 if u.scale < 0 else 1.0
    (b, a), dtypes = u.factors(), (dtype_name(u.b), dtype_name(u.a))
    tall = xp.concat([up(b, "float64"), correction.b * (sign / root)], axis=1)
    wide = xp.concat([up(a, "float64"), correction.a / root], axis=0)
    if not keep_rank:
        return LowRank(down(tall, dtypes[0]), down(wide, dtypes[1]), u.scale, u.shape), 0.0
    cut = factored.truncate(tall, wide, lambda s: u.rank, scale=u.scale)
    return canonical(u, cut, scale=u.scale), cut.error


def _corrected_dora(u: Dora, w: Array, correction: Correction, keep_rank: bool) -> tuple[Update, float]:
    """Return a DoRA whose product is that of ``u`` plus the correction.

    W' = g (W + D) row by row, so W' + C = g (W + D + C / g): the direction takes C / g, and the magnitude the norms of
    the new rows.
    """
    direction = low_rank(u)
    assert direction is not None  # checked by the caller
    base = up(w)
    gain = up(u.magnitude) / (axis_norms(base + direction.dense(), u.axis) + u.eps)
    lone = up(gain, "float64")
    b, a = correction
    seen = Correction(b / lone[:, None], a) if u.axis == 0 else Correction(b, a / lone)
    grown, loss = _grown(direction, seen, keep_rank)
    moved = base + grown.dense()
    wanted = along(gain, u.axis, len(u.shape)) * moved
    magnitude = axis_norms(wanted, u.axis) * (1 + u.eps / axis_norms(moved, u.axis))
    after = with_low_rank(u, grown)
    assert isinstance(after, Dora)
    return replace(after, magnitude=down(magnitude, dtype_name(u.magnitude))), loss
