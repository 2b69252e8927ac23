"""The figures of a thinned adapter, module by module and in total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod, sqrt
from typing import Any, NamedTuple

from loratools.core.adapter import Adapter
from loratools.core.update import nbytes
from loratools.report import Report

LOW = 0.5
"""Below this share of retained energy the result is another adapter, rather than the same one made small."""

UNITS = {
    "nnz": "stored entries",
    "density": "stored entries / all entries",
    "energy": "share of the squared Frobenius norm that the stored parts hold",
    "relative_error": "Frobenius norm of (written - original) / Frobenius norm of the original, rounding included",
    "bytes_before": "bytes of the stored tensors",
    "bytes_after": "bytes of the written tensors, in the native layout",
    "bytes_native": "bytes of the weights file in the native layout",
    "bytes_peft": "bytes of the weights file in PEFT's layout; null where it cannot hold the adapter",
    "r": "PEFT's r, nnz = r (in + out) in every module; null where there is no such number",
    "density_asked": "the density that was asked for",
}


class Figures(NamedTuple):
    """Of one module: |D|^2, the part of it that is stored, |D' - D|^2, entries and density."""

    square: float
    kept: float
    wrong: float
    nnz: int
    density: float


def sparse_report(
    verb: str,
    figures: Mapping[str, Figures],
    words: str,
    *,
    after: Adapter,
    asked: float,
    before: Adapter | None = None,
    told: Sequence[str] = (),
) -> Report:
    """Return the report; a warning where less than half of the energy is kept."""
    rows = [_row(name, figures.get(name), after, before) for name in after]
    square = sum(f.square for f in figures.values())
    entries = sum(prod(after[name].shape) for name in figures)
    total: dict[str, Any] = {
        "modules": len(figures),
        "nnz": sum(f.nnz for f in figures.values()),
        "density": sum(f.nnz for f in figures.values()) / entries if entries else 0.0,
        "density_asked": asked,
        "r": _rank(figures, after),
        "energy": sum(f.kept for f in figures.values()) / square if square else 1.0,
        "relative_error": sqrt(sum(f.wrong for f in figures.values()) / square) if square else 0.0,
        "bytes_before": None if before is None else sum(nbytes(u) for u in before.values()),
        "bytes_after": sum(nbytes(u) for u in after.values()),
    }
    return Report(
        f"loratools.{verb}/1",
        tuple(rows),
        total,
        UNITS,
        (*told, *_warnings(figures, total["energy"])),
        extra={"target": words},
    )


def _row(name: str, f: Figures | None, after: Adapter, before: Adapter | None) -> dict[str, Any]:
    return {
        "name": name,
        "kind": after[name].kind,
        "nnz": None if f is None else f.nnz,
        "density": None if f is None else f.density,
        "energy": 1.0 if f is None or not f.square else min(f.kept / f.square, 1.0),
        "relative_error": 0.0 if f is None or not f.square else sqrt(f.wrong / f.square),
        "bytes_before": None if before is None else nbytes(before[name]),
        "bytes_after": nbytes(after[name]),
    }


def _rank(figures: Mapping[str, Figures], after: Adapter) -> int | None:
    ranks = {
        f.nnz / sum(after[name].shape) if len(after[name].shape) == 2 and after[name].kind == "sparse" else 0.5
        for name, f in figures.items()
    }
    r = ranks.pop() if len(ranks) == 1 else 0.5
    return int(r) if r == int(r) and r else None


def _warnings(figures: Mapping[str, Figures], energy: float) -> list[str]:
    low = [name for name, f in figures.items() if f.square and f.kept < LOW * f.square]
    zero = [name for name, f in figures.items() if not f.square]
    told = []
    if low:
        told.append(
            f"{len(low)} of {len(figures)} modules retain less than {LOW:.0%} of their energy, e.g. {low[0]} "
            f"({figures[low[0]].kept / figures[low[0]].square:.0%}; in total {energy:.0%}): this is another adapter, "
            "a start for training; --plus-lowrank N adds a low-rank part"
        )
    if zero:
        more = f" and {len(zero) - 1} more" if len(zero) > 1 else ""
        told.append(f"{zero[0]}{more}: the update is zero; so are its entries")
    return told
