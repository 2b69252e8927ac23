"""advise: error against bytes for one adapter, over the ways of spending them: rank or bits?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.pool import parallel_map
from loratools.errors import UsageError
from loratools.kinds.lowrank import low_rank
from loratools.kinds.packed import payload_bytes, runs_of
from loratools.linalg.lowbit import encode
from loratools.ops.bit_budget import MENDED, Module, allocate
from loratools.ops.canonical import Part, canonical_parts
from loratools.ops.quantise_budget import check_group
from loratools.report import Report

SAMPLED = 12
SWEEPS = 4
AVERAGES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
UNIFORM = (1, 2, 3, 4, 8)
SHARES = (1.0, 0.5, 0.25, 0.125)
UNITS = {
    "bits": "bits of codes and scales per stored weight of the input",
    "bytes": "bytes of codes and scales, for the whole adapter",
    "relative_error": "Frobenius norm of (packed - original) / that of the original, on the modules tried",
    "best": "true where no other line has a smaller error at as few bytes",
}


def advise(adapter: Adapter, *, group: int = 0) -> Report:
    """Return measured points of error against bytes: bits of 1 to 8 at several ranks, and budgets shared out by gain.

    Measured on up to 12 modules, evenly spaced, with bytes scaled up to the whole. Raises UsageError where nothing can
    be quantised.
    """
    check_group(group)
    directions = {name: low for name, u in adapter.items() if (low := low_rank(u)) is not None}
    if not directions:
        raise UsageError("the adapter holds no low-rank update to quantise", got=f"{len(adapter)} others")
    weights = {name: low.rank * sum(low.matrix_shape) for name, low in directions.items()}
    chosen = list(directions)[:: -(-len(directions) // SAMPLED)]
    parts = canonical_parts({name: directions[name] for name in chosen})
    parts = {name: p for name, p in parts.items() if p.energies}
    if not parts:
        raise UsageError("every update that was tried is zero", got=f"{len(chosen)} modules")
    inside, whole = sum(weights[name] for name in parts), sum(weights.values())
    plans = _plans(parts, inside, group)
    errors = parallel_map(lambda plan: _error(parts, plan, group), list(plans.values()), weights=[1 << 24] * len(plans))
    rows = [
        _row(name, _bytes(parts, plan, group), error, inside, whole)
        for (name, plan), error in zip(plans.items(), errors, strict=True)
    ]
    rows.sort(key=lambda row: (row["bytes"], row["relative_error"]))
    total = {"modules": len(directions), "tried": len(parts), "bits": 16.0, "bytes": 2 * whole, "relative_error": 0.0}
    told = [] if len(parts) == len(directions) else [f"measured on {len(parts)} of {len(directions)} modules"]
    return Report("loratools.quantize/1", tuple(_marked(rows)), total, UNITS, tuple(told), extra={"target": "advise"})


Plan = Mapping[str, tuple[int, ...]]


def _plans(parts: Mapping[str, Part], weights: int, group: int) -> dict[str, Plan]:
    modules = {name: Module(p.energies, p.shape) for name, p in parts.items()}
    plans: dict[str, Plan] = {}
    for bits in UNIFORM:
        for share in SHARES:
            ranks = {name: max(1, round(share * len(p.energies))) for name, p in parts.items()}
            top = max(ranks.values())
            plans.setdefault(f"{bits} bit, rank {top}", {name: (bits,) * k for name, k in ranks.items()})
    for average in AVERAGES:
        found = allocate(modules, int(average * weights / 8), lost=MENDED, group=group)
        if found is not None:
            plans[f"shared out, {average:g} on average"] = found
    return plans


def _bytes(parts: Mapping[str, Part], plan: Plan, group: int) -> int:
    return sum(payload_bytes(runs_of(bits), parts[name].shape, group) for name, bits in plan.items())


def _error(parts: Mapping[str, Part], plan: Plan, group: int) -> float:
    square = wrong = 0.0
    for name, p in parts.items():
        k, whole = len(plan[name]), sum(p.energies)
        kept = sum(p.energies[:k])
        square, wrong = square + whole, wrong + whole - kept
        if k:
            wrong += encode(p.b[:, :k], p.a[:k, :], plan[name], group=group, sweeps=SWEEPS).error * kept
    return sqrt(wrong / square)


def _row(name: str, spent: int, error: float, inside: int, whole: int) -> dict[str, Any]:
    size = round(spent * whole / inside)
    return {"name": name, "bits": 8 * spent / inside, "bytes": size, "relative_error": error}


def _marked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mark the rows on the frontier; they come by rising bytes."""
    out, least = [], float("inf")
    for row in rows:
        best = row["relative_error"] < least
        least = min(least, row["relative_error"])
        out.append({**row, "best": best})
    return out
