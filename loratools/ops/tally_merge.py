"""The report of a merge: what every update is against its base, and what rounding left of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import median
from typing import Any

from loratools.core.adapter import Adapter
from loratools.ops.fold import correlation
from loratools.ops.rewrite import Figures
from loratools.ops.targets import Target, Targets
from loratools.report import Report

UNITS = {
    "update_norm": "Frobenius norm of what is added to the parameter, before rounding",
    "relative_norm": "update_norm / Frobenius norm of the base parameter",
    "rounding_loss": "Frobenius norm of (stored - exact) / update_norm: how wrong rounding makes the applied update",
    "magnitude_agreement": "DoRA: correlation of magnitudes with this base's row norms, near 1 on the right base",
}
LOSS = 0.1  # share of the update from which the loss by rounding is worth a warning
WRONG_BASE = 0.15  # independent rows correlate by about 1 / sqrt(rows); real adapters by 0.3 to 1


def report(
    figures: Mapping[str, Figures], planned: Targets, adapters: Sequence[Adapter], weights: Sequence[float]
) -> Report:
    """Return the rows of every changed parameter and the totals."""
    rows = tuple(
        _row(target, figures[name].sums if name in figures else {}) for name, target in planned.changed.items()
    )
    sums = [f.sums for f in figures.values() if "update" in f.sums]
    update, lost, base = (sum(s[key] for s in sums) for key in ("update", "lost", "base"))
    total = {
        "parameters": len(rows),
        "adapters": len(adapters),
        "update_norm": sqrt(update) if sums else None,
        "relative_norm": sqrt(update / base) if base else None,
        "rounding_loss": sqrt(lost / update) if update else None,
        "magnitude_agreement": _agreement(figures),
    }
    return Report(
        "loratools.merge/1", rows, total, UNITS, tuple(_warnings(rows, total, planned, adapters)),
        extra={"weights": list(weights)},
    )  # fmt: skip


def _row(target: Target, sums: Mapping[str, float]) -> dict[str, Any]:
    update, lost, base = (sums.get(key) for key in ("update", "lost", "base"))
    return {
        "name": target.name,
        "kind": target.kind,
        "dtype": target.dtype,
        "update_norm": None if update is None else sqrt(update),
        "relative_norm": sqrt(update / base) if update is not None and base else None,
        "rounding_loss": None if lost is None or update is None else sqrt(lost / update) if update else 0.0,
        "magnitude_agreement": correlation(sums) if "dora_rows" in sums else None,
    }


def _agreement(figures: Mapping[str, Figures]) -> float | None:
    """Return the median agreement over the parameters under a DoRA."""
    found = [c for f in figures.values() if "dora_rows" in f.sums and (c := correlation(f.sums)) is not None]
    return median(found) if found else None


def _warnings(
    rows: Sequence[Mapping[str, Any]], total: Mapping[str, Any], planned: Targets, adapters: Sequence[Adapter]
) -> list[str]:
    lossy = [row["name"] for row in rows if (row["rounding_loss"] or 0.0) > LOSS]
    agreement = total["magnitude_agreement"]
    return [
        *(remark for adapter in adapters for remark in adapter.meta.remarks),
        *planned.remarks,
        *(_loss_warning(lossy, rows)),
        *wrong_base(agreement),
    ]


def wrong_base(agreement: float | None) -> list[str]:
    """Return the warning of a base on which a DoRA's magnitudes mean nothing."""
    if agreement is None or agreement >= WRONG_BASE:
        return []
    return [
        f"the DoRA magnitudes do not follow this base's row norms (median correlation {agreement:.2f}, near 1 on the "
        "right base): is this the base that the adapter was trained on?"
    ]


def _loss_warning(lossy: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not lossy:
        return []
    worst = max(rows, key=lambda row: row["rounding_loss"] or 0.0)
    return [
        f"rounding to {worst['dtype']} makes the update wrong by more than {LOSS:.0%} in {len(lossy)} of {len(rows)} "
        f"parameters (worst {worst['rounding_loss']:.0%} in {worst['name']}): keep the adapter separate, merge into a "
        "float32 copy, or use --rounding stochastic"
    ]
