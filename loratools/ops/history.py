"""How the figures of a diagnosis came about over the checkpoints of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratools.core.adapter import Adapter
from loratools.ops.tally_diagnose import is_judged, totals

Row = Mapping[str, Any]

TRACKED = (
    "frobenius_norm", "spectral_norm", "effective_rank", "stable_rank", "update_norm", "relative_norm", "intruders",
    "intruder_index", "certain", "moved", "nonfinite", "singular_values", "max_cosine_upper",
)  # fmt: skip
"""Figures kept per module and checkpoint."""

TOLD = (("frobenius_norm", "norm"), ("effective_rank", "mean effective rank"), ("intruders", "intruders"))


def step(adapter: Adapter, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the history keeps of one checkpoint: its path, its totals, and the tracked figures per module."""
    path = adapter.meta.path
    judged = [{**row, "matrix": is_judged(row)} for row in rows]
    modules = [
        {"name": row["name"], **{figure: row.get(figure) for figure in TRACKED}} for row in judged if row["matrix"]
    ]
    return {"path": None if path is None else str(path), "total": totals(judged), "modules": modules}


def course(history: Sequence[Row]) -> list[str]:
    """Return the course of the totals in words."""
    told = []
    for figure, name in TOLD:
        values = [one["total"].get(figure) for one in history]
        if all(value is not None for value in values):
            told.append(f"{name} {' -> '.join(f'{value:.4g}' for value in values)}")
    return [f"Over {len(history)} checkpoints: {'; '.join(told)}."] if told else []
