"""The report of a fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Update, nbytes
from loratools.kinds.lowrank import low_ranks
from loratools.kinds.sparse import Sparse
from loratools.ops.fuse_inputs import Row
from loratools.ops.fuse_tally import UNITS, Figures, pair_rows, said, summed
from loratools.report import Report


@dataclass(frozen=True)
class Module:
    """A fused module: its update as written, the inputs', the figures, and whether a full rank had to be cut."""

    update: Update
    row: Row
    figures: Figures
    full: bool


def fuse_report(
    words: str,
    modules: Mapping[str, Module],
    whole: Mapping[str, Update],
    adapters: Sequence[Adapter],
    names: Sequence[str],
    weights: Sequence[float],
    remarks: Sequence[str],
) -> Report:
    """Return rows per module, totals over all, and pairs of inputs."""
    rows = tuple(_row(name, m, weights) for name, m in modules.items())
    sparse = [row for row in rows if "entries_after" in row]
    together = summed([m.figures for m in modules.values()]) if modules else None
    total: dict[str, Any] = {
        "modules": len(rows),
        "inputs": len(adapters),
        "weights": list(weights),
        "weight_sum": sum(weights),
        "rank_before": max((row["rank_before"] for row in rows), default=None),
        "rank_after": max((row["rank_after"] for row in rows if row["rank_after"]), default=None),
        **({} if together is None else said(together, weights)),
        **{key: sum(row[key] for row in sparse) for key in ("entries_before", "entries_after") if sparse},
        "whole": len(whole),
        "bytes_after": sum(nbytes(m.update) for m in modules.values()) + sum(map(nbytes, whole.values())),
    }
    pairs = [] if together is None else pair_rows(together, names)
    warnings = (*remarks, *_missing(modules, names), *_cut(modules, total), *_remarks(adapters, names))
    extra = {"method": words, "names": list(names), "pairs": pairs, "whole": list(whole)}
    return Report("loratools.fuse/1", rows, total, UNITS, warnings=warnings, extra=extra)


def _row(name: str, m: Module, weights: Sequence[float]) -> dict[str, Any]:
    return {
        "name": name,
        "inputs": sum(u is not None for u in m.row),
        "rank_before": sum(_rank(u) or 0 for u in m.row if u is not None),
        "rank_after": _rank(m.update),
        **_entries(m),
        **said(m.figures, weights),
    }


def _entries(m: Module) -> dict[str, int]:
    """Return the entries of a sparse result and of its inputs; nothing for others."""
    if not isinstance(m.update, Sparse):
        return {}
    return {"entries_before": sum(u.nnz for u in m.row if isinstance(u, Sparse)), "entries_after": m.update.nnz}


def _rank(u: Update) -> int | None:
    """Return the largest rank inside an update; None for one without factors."""
    found = low_ranks(u)
    return None if found is None else max(one.rank for one in found)


def _missing(modules: Mapping[str, Module], names: Sequence[str]) -> list[str]:
    """Return one sentence per input that lacks modules of the others."""
    told = []
    for i, name in enumerate(names):
        lacks = [module for module, m in modules.items() if m.row[i] is None]
        if lacks:
            told.append(f"{name} lacks {len(lacks)} of {len(modules)} modules, which count as zero: {_some(lacks)}")
    return told


def _cut(modules: Mapping[str, Module], total: Mapping[str, Any]) -> list[str]:
    full = [name for name, m in modules.items() if m.full]
    if not full:
        return []
    worst = max(said(modules[name].figures, [0.0] * len(modules[name].row))["relative_error"] for name in full)
    return [
        f"{len(full)} fused updates have no exact low rank and were cut: relative error {total['relative_error']:.3g} "
        f"in all, {worst:.3g} at worst; --rank N decides, --rank full keeps them whole in a native file"
    ]


def _remarks(adapters: Sequence[Adapter], names: Sequence[str]) -> list[str]:
    return [f"{name}: {remark}" for name, a in zip(names, adapters, strict=True) for remark in a.meta.remarks]


def _some(found: Sequence[str]) -> str:
    return ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")
