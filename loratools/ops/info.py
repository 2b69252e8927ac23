"""info: what a file is, and what is odd about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Update, nbytes, tensors
from loratools.kinds.lowrank import low_ranks
from loratools.linalg.namespace import dtype_name
from loratools.ops.oddities import oddities
from loratools.report import Report

UNITS = {
    "rank": "columns of the factors as stored",
    "scale": "factor that multiplies b @ a, as the format defines it",
    "bytes": "bytes of the stored tensors",
}


def info(adapter: Adapter) -> Report:
    """Return format, kinds, shapes, ranks, scales, dtypes, sizes, base id and, among the warnings, what is odd."""
    rows = tuple(_row(name, update) for name, update in adapter.items())
    total = {
        "format": adapter.meta.format,
        "base": adapter.meta.base_id,
        "updates": len(rows),
        "kinds": _counts(row["kind"] for row in rows),
        "ranks": _counts(str(row["rank"]) for row in rows if row["rank"] is not None),
        "scales": _counts(f"{row['scale']:g}" for row in rows if row["scale"] is not None),
        "dtypes": _counts(dtype_name(t) for u in adapter.values() for _, t in tensors(u)),
        "parameters": sum(prod(t.shape) for u in adapter.values() for _, t in tensors(u)),
        "bytes": adapter.nbytes,
        "carried": len(adapter.meta.leftover),
    }
    history = {"history": list(adapter.meta.history)}
    return Report("loratools.info/1", rows, total, UNITS, warnings=oddities(adapter), extra=history)


def _row(name: str, update: Update) -> dict[str, Any]:
    direction = next(iter(low_ranks(update) or ()), None)  # experts of a stack are alike
    return {
        "name": name,
        "kind": update.kind,
        "shape": list(update.shape),
        "rank": None if direction is None else direction.rank,
        "scale": None if direction is None else direction.scale,
        "dtype": "/".join(dict.fromkeys(dtype_name(t) for _, t in tensors(update))),
        "bytes": nbytes(update),
    }


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())
