"""The figures of a squeeze, module by module and in total."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratools.core.adapter import Adapter
from loratools.core.update import Update, nbytes
from loratools.kinds.lowrank import LowRank, low_ranks
from loratools.linalg.factored import Truncation, frobenius
from loratools.linalg.namespace import dtype_name, namespace, placed_like, up
from loratools.report import Report

if TYPE_CHECKING:
    from loratools.ops.plain import Original
    from loratools.ops.weighing import Weighing

UNITS = {
    "rank_before": "columns of the factors as stored",
    "rank_after": "columns of the factors as written",
    "energy": "share of the squared Frobenius norm that the kept singular values hold",
    "relative_error": "Frobenius norm of (written - original) / Frobenius norm of the original, rounding included",
    "weighted_error": "the same in the norm of the statistics, where there are any",
    "bytes_before": "bytes of the stored tensors",
    "bytes_after": "bytes of the written tensors",
}


NEGLIGIBLE = 1e-3
"""Rounding that can add no more than this share to the squared error is not measured: 0.05% of the figure told."""

UNKNOWN = (math.inf, 0.0)
UNIT = {"float32": (2.0**-24, 2.0**-150), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}
"""Unit roundoff and half the spacing of subnormals."""


class Tally:
    """Collects one row per module from many threads; rows are put in the adapter's order at the end."""

    def __init__(self, originals: Mapping[str, Original] | None = None) -> None:
        self.originals = originals or {}  # what became factors only for being cut
        self.rows: dict[str, dict[str, Any]] = {}
        self.squares: dict[str, tuple[float, float]] = {}  # name -> (|D|^2, |D' - D|^2)
        self.held: dict[str, float] = {}  # name -> |D|^2 in the norm of which the energy is a share
        self.weighted: dict[str, tuple[float, float]] = {}  # as squares, in the norm of statistics
        self.zero: list[str] = []
        self.nonfinite: list[str] = []

    def squeezed(
        self,
        name: str,
        before: Update,
        directions: Sequence[LowRank],
        results: Sequence[Truncation],
        after: Update,
        weighing: Weighing | None = None,
    ) -> None:
        """Note a module that was truncated: one product, or one per expert of a stack, whose ranks are the largest.

        With fewer results than products the module was carried, because it is not finite. Energies are those of the
        norm in which it was cut.
        """
        rank = max(d.rank for d in directions)
        if len(results) < len(directions):
            self.nonfinite.append(name)
            self.rows[name] = _row(name, before, after, rank, rank, math.nan, math.nan)
            return
        new = low_ranks(after)
        assert new is not None  # what had a direction keeps one
        totals = [float((r.singular_values**2).sum()) for r in results]
        held = self.held[name] = sum(totals)
        lost = sum(t * (1.0 - r.energy) for t, r in zip(totals, results, strict=True))
        energy = 1.0 - lost / held if held else 1.0
        more = {}
        if weighing is not None and name in weighing:
            found = weighing.squares(name, directions, new)
            self.squares[name], self.weighted[name] = found[:2], found[2:]
            more["weighted_error"] = _relative(*found[2:])
        else:
            self.squares[name] = held, sum(map(_wrong, directions, results, new, totals))
        if (known := self.originals.get(name)) is not None:
            before, rank = known.update, known.rank
            if known.lost:  # never with statistics
                self.held[name] = known.total
                self.squares[name] = known.total, self.squares[name][1] + known.lost
                energy = min(1.0, (held - lost) / known.total)
        if self.squares[name][0] == 0.0:
            self.zero.append(name)
        error = _relative(*self.squares[name])
        self.rows[name] = {**_row(name, before, after, rank, max(d.rank for d in new), energy, error), **more}

    def carried(self, name: str, update: Update) -> None:
        """Note a module that squeezing leaves as it is."""
        self.rows[name] = _row(name, update, update, None, None, 1.0, 0.0)


def _relative(whole: float, wrong: float) -> float:
    return math.sqrt(wrong / whole) if whole else 0.0


def _wrong(before: LowRank, result: Truncation, written: LowRank, total: float) -> float:
    """Return |D_written - D|_F^2 of one product, of which ``total`` is |D|_F^2."""
    if result.rank == before.rank:
        return restating(before, written)
    cut = (result.error**2) * total
    if rounding_bound(result, written) <= NEGLIGIBLE * cut:
        return cut
    return cut + rounding(result, written)


def rounding_bound(result: Truncation, written: LowRank) -> float:
    """Return an upper bound of what :func:`rounding` would return, from the spectrum alone.

    With |db_j|^2 <= u^2 |b_j|^2 + m t^2 (u the unit roundoff, t half the spacing of subnormals) and balanced factors it
    is 4 u^2 sum s_j^2 + 2 (m + n) t^2 sum s_j; infinite for dtypes without an entry here.
    """
    u, t = max(UNIT.get(dtype_name(factor), UNKNOWN) for factor in (written.b, written.a))
    s = result.singular_values[: result.rank]
    t *= abs(written.scale) ** 0.5
    squares, values = float((s**2).sum()), float(s.sum())
    return float(4 * u**2 * squares + 2 * sum(written.matrix_shape) * t**2 * values)


def rounding(result: Truncation, written: LowRank) -> float:
    """Return |D_written - D_k|_F^2 caused by storing the factors, to second order in the rounding.

    With balanced factors b^T b = a a^T = diag(s): |db a + b da|^2 = sum_j s_j (|db_j|^2 + |da_j|^2) + 2 <db a, b da>.
    It is orthogonal to the truncated part to first order, so the squares of both errors add.
    """
    root = abs(written.scale) ** 0.5
    sign = -1.0 if written.scale < 0 else 1.0
    k = result.rank  # what was padded beyond it is zero
    db = up(written.b)[:, :k] * (sign * root) - result.b
    da = up(written.a)[:k, :] * root - result.a
    columns = up((db * db).sum(axis=0), "float64") + up((da * da).sum(axis=1), "float64")
    s = placed_like(result.singular_values[:k], columns)
    cross = up(db.T @ result.b, "float64") * up(da @ result.a.T, "float64").T
    return max(float((s * columns).sum() + 2.0 * cross.sum()), 0.0)


def restating(before: LowRank, written: LowRank) -> float:
    """Return |D_written - D|_F^2 where factors were only rescaled or stored in another dtype.

    D_w - D = (b_w s_w - b s) a + b_w s_w (a_w - a): the differences are formed before any product, so nothing cancels.
    """
    k = before.rank
    b, a = up(before.b, "float64") * before.scale, up(before.a, "float64")
    bw, aw = up(written.b, "float64")[:, :k] * written.scale, up(written.a, "float64")[:k, :]
    xp = namespace(b)
    return frobenius(xp.concat([bw - b, bw], axis=1), xp.concat([a, aw - a], axis=0)) ** 2


def squeeze_report(tally: Tally, adapter: Adapter, words: str, said: tuple[str, ...] = ()) -> Report:
    """Return the report of a squeeze to ``words`` of ``adapter``; ``said`` are further warnings."""
    rows = tuple(tally.rows[name] for name in adapter)
    before = sum(d for d, _ in tally.squares.values())
    wrong = sum(e for _, e in tally.squares.values())
    carried = sum(int(t.nbytes) for t in adapter.meta.leftover.values())
    ranks = [row for row in rows if row["rank_before"] is not None]
    total = {
        "modules": len(ranks),
        "rank_before": max((row["rank_before"] for row in ranks), default=None),
        "rank_after": max((row["rank_after"] for row in ranks), default=None),
        "energy": math.nan if tally.nonfinite else _mean_energy(tally, rows),
        "relative_error": math.nan if tally.nonfinite else math.sqrt(wrong / before) if before else 0.0,
        "bytes_before": sum(row["bytes_before"] for row in rows) + carried,
        "bytes_after": sum(row["bytes_after"] for row in rows) + carried,
    }
    if tally.weighted:
        rows = tuple({**row, "weighted_error": row.get("weighted_error")} for row in rows)
        total["weighted_error"] = _relative(*(sum(column) for column in zip(*tally.weighted.values(), strict=True)))
    return Report(
        "loratools.squeeze/1", rows, total, UNITS, (*_warnings(tally, adapter), *said), extra={"target": words}
    )


def _mean_energy(tally: Tally, rows: tuple[Mapping[str, Any], ...]) -> float:
    kept = {row["name"]: row["energy"] for row in rows}
    total = sum(tally.held.values())
    return sum(d * kept[name] for name, d in tally.held.items()) / total if total else 1.0


def _warnings(tally: Tally, adapter: Adapter) -> tuple[str, ...]:
    zero = [name for name in adapter if name in tally.zero]
    bad = [name for name in adapter if name in tally.nonfinite]
    return (
        *adapter.meta.remarks,
        *(
            [f"{_some(zero)}: the update is zero (untrained, or scale 0); it stays zero at the new rank"]
            if zero
            else []
        ),
        *([f"{_some(bad)}: not finite; carried through untouched"] if bad else []),
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _row(
    name: str, before: Update, after: Update, r0: int | None, r1: int | None, energy: float, error: float
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": before.kind,
        "rank_before": r0,
        "rank_after": r1,
        "energy": energy,
        "relative_error": error,
        "bytes_before": nbytes(before),
        "bytes_after": nbytes(after),
    }
