"""The figures of a quantisation: error, true bits, and what the same bytes would do spent otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

from loratools.core.adapter import Adapter
from loratools.core.pool import parallel_map
from loratools.core.update import Array, nbytes, tensor_bytes
from loratools.files import written_size
from loratools.kinds.packed import payload_bytes
from loratools.linalg.lowbit import encode
from loratools.report import Report

SAMPLED = 4
"""Modules, evenly spaced, on which neighbours are tried."""
TRIED = (1, 2, 3, 4, 8)
SWEEPS = 3

UNITS = {
    "rank_before": "columns of the factors as stored",
    "components": "packed components",
    "bits": "bits of codes and scales per stored weight of the input",
    "relative_error": "Frobenius norm of (packed - original) / that of the original, scales as stored",
    "weighted_error": "the same in the norm of the statistics, where there are any",
    "bytes_before": "bytes of the stored tensors",
    "bytes_after": "bytes of the packed tensors",
    "bytes_file": "bytes of the whole file in the native format",
    "neighbours": "other ways to spend these bytes, measured on some modules: bits, components and relative error",
}
LOST = 0.9  # share of the squared norm that is wrong


class Figures(NamedTuple):
    """Of one module: |D|^2, |D' - D|^2, rank before, runs of (bits, count) after, weights before.

    ``weighted`` are both squares in the norm of statistics, where there are any.
    """

    square: float
    wrong: float
    rank: int
    runs: tuple[int, ...]
    weights: int
    weighted: tuple[float, ...] | None = None


def quantise_report(
    figures: Mapping[str, Figures],
    words: str,
    before: Adapter,
    after: Adapter,
    near: Sequence[Mapping[str, Any]],
    said: Sequence[str] = (),
) -> Report:
    """Return the report of a quantisation; ``said`` are further warnings."""
    rows = tuple(_row(name, figures.get(name), before, after) for name in after)
    square = sum(f.square for f in figures.values())
    packed = sum(nbytes(after[name]) for name in figures)
    weights = sum(f.weights for f in figures.values())
    total = {
        "modules": len(figures),
        "rank_before": max(f.rank for f in figures.values()),
        "components": max(sum(f.runs[1::2]) for f in figures.values()),
        "bits": 8 * packed / weights,
        "relative_error": sqrt(sum(f.wrong for f in figures.values()) / square) if square else 0.0,
        "bytes_before": before.nbytes,
        "bytes_after": after.nbytes,
        "bytes_file": written_size(after, format="native"),
    }
    weighted = [f.weighted for f in figures.values() if f.weighted is not None]
    if weighted:
        rows = tuple({**row, "weighted_error": _weighted(figures.get(row["name"]))} for row in rows)
        whole, wrong = (sum(column) for column in zip(*weighted, strict=True))
        total["weighted_error"] = sqrt(wrong / whole) if whole else 0.0
    extra = {"target": words, "neighbours": list(near)}
    return Report("loratools.quantize/1", rows, total, UNITS, (*_warnings(figures, before, after), *said), extra=extra)


def _weighted(f: Figures | None) -> float | None:
    if f is None or f.weighted is None:
        return None
    whole, wrong = f.weighted
    return sqrt(wrong / whole) if whole else 0.0


def _row(name: str, f: Figures | None, before: Adapter, after: Adapter) -> dict[str, Any]:
    return {
        "name": name,
        "kind": after[name].kind,
        "rank_before": None if f is None else f.rank,
        "components": None if f is None else sum(f.runs[1::2]),
        "runs": None if f is None else list(f.runs),
        "bits": None if f is None else 8 * nbytes(after[name]) / f.weights,
        "relative_error": 0.0 if f is None or not f.square else sqrt(f.wrong / f.square),
        "bytes_before": nbytes(before[name]),
        "bytes_after": nbytes(after[name]),
    }


def _warnings(figures: Mapping[str, Figures], before: Adapter, after: Adapter) -> tuple[str, ...]:
    cases = (
        (
            [n for n in after if n not in figures and after[n].kind not in ("replace", "replace_rows")],
            "no product of two factors, carried as it is",
        ),
        ([n for n, f in figures.items() if not f.square], "the update is zero, and takes no codes"),
        ([n for n, f in figures.items() if f.square and not f.runs], "the budget left nothing for this module"),
        (
            [n for n, f in figures.items() if f.runs and not f.wrong < LOST * f.square],  # NaN too
            "nearly nothing of the update is left: too few bits, or factors beyond the range of fp16 scales",
        ),
    )
    return (*before.meta.remarks, *(f"{_some(names)}: {what}" for names, what in cases if names))


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def neighbours(parts: Mapping[str, tuple[Array, Array]], spent: Mapping[str, int], group: int) -> list[dict[str, Any]]:
    """Return, for each number of bits, the error of as many leading components as the bytes of each module hold."""
    names = [n for n in parts if spent[n]]
    names = names[:: -(-len(names) // SAMPLED)] if names else []
    tasks = [(bits, name) for bits in TRIED for name in names]
    work = [sum(64 * tensor_bytes(side) for side in parts[name]) for _, name in tasks]
    tried = parallel_map(lambda one: _tried(*parts[one[1]], one[0], spent[one[1]], group), tasks, weights=work)
    rows = []
    for bits in TRIED:
        found = [result for (one, _), result in zip(tasks, tried, strict=True) if one == bits]
        square, wrong = sum(f[0] for f in found), sum(f[1] for f in found)
        if found and all(f[2] for f in found):
            rows.append(
                {
                    "bits": bits,
                    "components": sum(f[2] for f in found) / len(found),
                    "relative_error": sqrt(wrong / square) if square else 0.0,
                    "bytes": sum(f[3] for f in found),
                    "of_bytes": sum(spent[name] for name in names),
                }
            )
    return rows


def _tried(b: Array, a: Array, bits: int, budget: int, group: int) -> tuple[float, float, int, int]:
    """Return |D|^2, |D' - D|^2, components and bytes of one module at the given bits."""
    shape = (int(b.shape[0]), int(a.shape[1]))
    price = payload_bytes((bits, 1), shape, group)
    energies = [float(e) for e in (a * a).sum(axis=1) * (b * b).sum(axis=0)]
    k = min(budget // price, len(energies))
    square = sum(energies)
    if not k:
        return square, square, 0, 0
    found = encode(b[:, :k], a[:k, :], [bits] * k, group=group, sweeps=SWEEPS, rotate=False)
    kept = sum(energies[:k])
    return square, found.error * kept + square - kept, k, payload_bytes((bits, k), shape, group)
