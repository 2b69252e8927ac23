"""The report of a comparison: figures per pair, communities, and what they advise in plain words, with evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from loratools.linalg.namespace import to_numpy
from loratools.ops.compare_graph import communities, edges
from loratools.ops.compare_pairs import Table, added
from loratools.report import Report

UNITS = {
    "cosine": "of the two updates as vectors: 1 same, 0 unrelated, -1 opposed",
    "angle_output": "mean principal angle of the column spaces (where they write), degrees, mean over modules",
    "angle_input": "mean principal angle of the row spaces (what they react to), degrees, mean over modules",
    "least_output": "the smallest principal angle of column spaces in any module, degrees",
    "least_input": "the smallest principal angle of row spaces in any module, degrees",
    "a_in_b": "share of a's squared norm inside b's column and row spaces",
    "b_in_a": "share of b's squared norm inside a's column and row spaces",
    "sign_conflict": "share of sampled entries whose signs differ (unrelated updates: one half)",
    "interference": "|(U^T U - 1) S (V^T V - 1)|_F / |S|_F of the pair's singular vectors: 0 separate, 1 identical",
    "norm_ratio": "|b| / |a|",
}
ALIKE, OPPOSED, SEPARATE = 0.5, -0.1, 0.2
"""A pair is alike from this cosine on, opposed below that one, separate up to this interference; else crowded."""

MOST_TOLD = 5

CLEAREST_FIRST = {"alike": ("cosine", -1), "opposed": ("cosine", 1), "crowded": ("interference", -1),
               "separate": ("interference", 1)}  # fmt: skip
"""By which figure the pairs of a verdict are told, the clearest case first, and in which direction."""

ADVICE = {
    "alike": "they say much the same: average them (--method linear with weights that sum to 1, or model-stock)",
    "separate": "they work in separate subspaces: the plain sum (--method linear) keeps both",
    "crowded": "they share subspaces without agreeing, so a plain sum distorts both: try --method iso-c or tsv, "
    "and measure",
    "opposed": "they pull against each other: do not sum them; keep them apart, or project one off the other "
    "(--method null-space)",
}

Figures = dict[str, list[list[float]]]


def compare_report(
    groups: Mapping[str, Table], names: Sequence[str], modules: int, remarks: Sequence[str], *, sample: int, seed: int
) -> Report:
    """Return one row per pair with its figures in total and per group, the graph, and the recommendation."""
    plain = {group: _plain(table) for group, table in groups.items()}
    total = _plain(_together(groups))
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    rows = [_row(total, plain, names, i, j) for i, j in pairs] if groups else []
    similarity = {(row["a"], row["b"]): row["cosine"] or 0.0 for row in rows}
    found = communities(names, similarity, seed)
    norms = [sqrt(max(total["inner"][i][i], 0.0)) for i in range(len(names))] if groups else []
    empty = [name for name, norm in zip(names, norms, strict=False) if norm == 0]
    extra = {
        "names": list(names),
        "norms": norms,
        "groups": list(groups),
        "sample": {"entries_per_module": sample, "how": "evenly spaced rows and columns, the same for every adapter"},
        "communities": found,
        "edges": edges(similarity),
        "recommendation": recommendation(rows, found, empty),
    }
    figures = [name for name in UNITS if name != "norm_ratio"]
    means = {name: _mean([row[name] for row in rows]) for name in figures}
    totals = {"adapters": len(names), "pairs": len(rows), "modules": modules, "communities": len(found), **means}
    return Report("loratools.compare/1", tuple(rows), totals, UNITS, warnings=tuple(remarks), extra=extra)


def _together(groups: Mapping[str, Table]) -> Table:
    total: Table = {}
    for table in groups.values():
        total = added(total, table) if total else table
    return total


def _plain(table: Table) -> Figures:
    return {name: to_numpy(values).tolist() for name, values in table.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _row(total: Figures, groups: Mapping[str, Figures], names: Sequence[str], i: int, j: int) -> dict[str, Any]:
    found = _figures(total, i, j)
    return {
        "name": f"{names[i]} | {names[j]}",
        "a": names[i],
        "b": names[j],
        **found,
        "verdict": verdict(found),
        "groups": {group: _figures(figures, i, j) for group, figures in groups.items()},
    }


def _figures(f: Figures, i: int, j: int) -> dict[str, float | None]:
    """Return the figures of one pair; None where one of the two is zero or lacks every module."""
    own, other = max(f["inner"][i][i], 0.0), max(f["inner"][j][j], 0.0)
    ij, ji, both = f["inside"][i][j], f["inside"][j][i], f["counted"][i][j]
    return {
        "cosine": f["inner"][i][j] / sqrt(own * other) if own * other > 0 else None,
        "angle_output": f["angle_output"][i][j] / both if both else None,
        "angle_input": f["angle_input"][i][j] / both if both else None,
        "least_output": f["least_output"][i][j] if both else None,
        "least_input": f["least_input"][i][j] if both else None,
        "a_in_b": ij / own if own else None,
        "b_in_a": ji / other if other else None,
        "sign_conflict": f["conflict"][i][j] / f["sampled"][i][j] if f["sampled"][i][j] else None,
        "interference": sqrt(max(ij + ji, 0.0) / (own + other)) if own + other else None,
        "norm_ratio": sqrt(other / own) if own else None,
    }


def verdict(figures: Mapping[str, float | None]) -> str:
    """Return what a pair is: alike, opposed, separate or crowded; empty where one of the two is zero."""
    if figures["cosine"] is None:
        return "empty"
    cosine, interference = figures["cosine"] or 0.0, figures["interference"] or 0.0
    if cosine >= ALIKE:
        return "alike"
    if cosine <= OPPOSED:
        return "opposed"
    return "separate" if interference <= SEPARATE else "crowded"


def recommendation(
    rows: Sequence[Mapping[str, Any]], found: Sequence[Sequence[str]], empty: Sequence[str] = ()
) -> list[str]:
    """Return sentences: what belongs together, then the pairs of every verdict with their evidence, worst first."""
    told = [f"Empty: {_some(empty)}: the update is zero (untrained?)."] if empty else []
    for i, members in enumerate((c for c in found if len(c) > 1), start=1):
        inside = [row["cosine"] for row in rows if row["a"] in members and row["b"] in members]
        told.append(
            f"Community {i}: {_some(members)}; mean cosine {_mean(inside) or 0:z.2f}. "
            "If anything is to be fused, fuse within it; its pairs below say how."
        )
    alone = [members[0] for members in found if len(members) == 1 and members[0] not in empty]
    if alone and rows:
        nearest = max(row["cosine"] or 0.0 for row in rows if row["a"] in alone or row["b"] in alone)
        told.append(f"Like no other: {_some(alone)}; the largest cosine is {nearest:z.2f}.")
    if not rows:
        told.append("Nothing to compare: it takes two adapters with additive updates.")
    for kind, (figure, sign) in CLEAREST_FIRST.items():
        chosen = sorted((r for r in rows if r["verdict"] == kind), key=lambda r: sign * (r[figure] or 0.0))
        if chosen:
            told.append(_sentence(kind, chosen))
    return told


def _sentence(kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    evidence = "; ".join(_evidence(row) for row in rows[:MOST_TOLD])
    more = f"; and {len(rows) - MOST_TOLD} more" if len(rows) > MOST_TOLD else ""
    count = "1 pair" if len(rows) == 1 else f"{len(rows)} pairs"
    return f"{kind.capitalize()} ({count}): {ADVICE[kind]}. {evidence}{more}."


def _evidence(row: Mapping[str, Any]) -> str:
    known = {group: f["interference"] for group, f in row["groups"].items() if f["interference"] is not None}
    worst = max(known, key=lambda group: known[group], default=None)
    where = f", most in {worst} ({known[worst]:.2f})" if worst is not None and len(known) > 1 else ""
    figures = f"cosine {row['cosine'] or 0:z.2f}, interference {row['interference'] or 0:.2f}"
    return f"{row['a']} and {row['b']}: {figures}{where}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
