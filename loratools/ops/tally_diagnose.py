"""Totals of a diagnosis, and how the update is spread over layers and projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any

from loratools.ops.parts import layer_and_projection

Row = Mapping[str, Any]

UNITS = {
    "rank": "channels of the factors as stored",
    "scale": "factor s that multiplies b @ a",
    "scale_times_rank": "s r: lora_alpha under LoRA's rule s = alpha / r",
    "scale_times_root_rank": "s sqrt(r): lora_alpha under rsLoRA's rule s = alpha / sqrt(r)",
    "factor_size": "s |b|_F |a|_F: an upper bound on the norm of the update",
    "spectral_norm": "largest singular value of the update (total: the largest of all)",
    "frobenius_norm": "root of the sum of squared singular values of the update (total: of all modules together)",
    "stable_rank": "|D|_F^2 / |D|_2^2 (total: mean)",
    "effective_rank": "exp of the entropy of s_i / sum s (Roy, Vetterli; total: mean)",
    "effective_rank_energy": "exp of the entropy of s_i^2 / sum s^2 (total: mean)",
    "numerical_rank": "singular values above 1e-7 of the largest (total: largest)",
    "share": "share of the squared Frobenius norm of the whole update",
    "balance": "|b|_F / |a|_F",
    "condition_b": "condition number of b; null where it is singular (total: largest)",
    "condition_a": "condition number of a; null where it is singular (total: largest)",
    "dead_components": "channels that are zero (total: sum)",
    "duplicate_components": "channels parallel to an earlier one in both factors (total: sum)",
    "nonfinite": "values that are NaN or infinite (total: sum)",
    "aurac": "mean of 1 - error over the ranks, leading channels as they are; with --rank-curve (total: mean)",
    "aurac_log2": "the same over the logarithm of the rank (total: mean)",
    "aurac_optimal": "mean of 1 - error over the ranks, best channels; with --rank-curve (total: mean)",
    "aurac_log2_optimal": "the same over the logarithm of the rank (total: mean)",
    "update_norm": "|D|_F of the whole update, of a coat too; from here on with --base only",
    "relative_norm": "|D|_F / |W0|_F (total: of all modules together)",
    "relative_spectral_norm": "|D|_2 / |W0|_2 (total: largest)",
    "base_frobenius_norm": "|W0|_F (total: of all modules together)",
    "base_spectral_norm": "|W0|_2 (total: largest)",
    "overlap_left": "share of |D|_F^2 in the span of the base's k leading left singular vectors (total: mean)",
    "overlap_right": "the same on the right (total: mean)",
    "overlap_left_random": "what overlap_left is for a random direction, k / out (total: mean)",
    "overlap_right_random": "what overlap_right is for a random direction, k / in (total: mean)",
    "mixing": "|D|_2 over the median distance of the base's k leading singular values (total: largest)",
    "intruders": "leading left singular vectors of W0 + D unlike every one of W0 (total: sum)",
    "certain": "do the bounds prove every decision of the module? (total: of all)",
    "intruder_residual": "largest measured relative residual of the k leading triples (total: largest)",
    "steps": "block steps that the bounds took (total: largest)",
    "intruders_right": "the same for right singular vectors; with both sides (total: sum)",
    "intruders_both": "intruders on both sides at once (total: sum)",
    "certain_right": "as certain, on the right (total: of all)",
    "attention_ratio": "largest ratio, over heads, of the bounds on the attention logits with and without the adapter",
}
"""Every figure with a number per module: the names that gates may use."""

NEEDS_BASE = frozenset(list(UNITS)[list(UNITS).index("update_norm") :])


def _root_of_squares(values: Sequence[float]) -> float:
    return sqrt(sum(v * v for v in values))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


RULES: dict[str, Callable[[Sequence[Any]], Any]] = {
    **dict.fromkeys(("frobenius_norm", "update_norm", "base_frobenius_norm"), _root_of_squares),
    **dict.fromkeys(("dead_components", "duplicate_components", "nonfinite"), sum),
    **dict.fromkeys(("intruders", "intruders_right", "intruders_both"), sum),
    **dict.fromkeys(("certain", "certain_right"), all),
    **dict.fromkeys(
        (
            "stable_rank", "effective_rank", "effective_rank_energy", "aurac", "aurac_log2", "aurac_optimal",
            "aurac_log2_optimal", "overlap_left", "overlap_right", "overlap_left_random", "overlap_right_random",
        ),
        _mean,
    ),
    **dict.fromkeys(
        (
            "rank", "spectral_norm", "numerical_rank", "condition_b", "condition_a", "relative_spectral_norm",
            "base_spectral_norm", "mixing", "intruder_residual", "steps", "attention_ratio",
        ),
        max,
    ),
}  # fmt: skip


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the total of every figure that some module has, by the rule its unit tells."""
    matrices = [row for row in rows if row.get("matrix")]
    found: dict[str, Any] = {"modules": len(matrices)}
    for figure, rule in RULES.items():
        over = rows if figure == "nonfinite" else matrices
        values = [row[figure] for row in over if row.get(figure) is not None]
        if values:
            found[figure] = rule(values)
    measured = [row for row in matrices if row.get("relative_norm") is not None]
    if measured:
        whole = _root_of_squares([row["base_frobenius_norm"] for row in measured])
        found["relative_norm"] = _root_of_squares([row["update_norm"] for row in measured]) / whole
    return found


def with_shares(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return the rows with layer, projection, and share of the whole update (0 where it is zero)."""
    whole = sum(_square(row) for row in rows)
    return tuple(_placed(row, _square(row) / whole if whole else 0.0) for row in rows)


def _placed(row: dict[str, Any], share: float) -> dict[str, Any]:
    layer, projection = layer_and_projection(row["name"])
    return {
        "name": row["name"],
        "layer": layer,
        "projection": projection,
        **row,
        "matrix": is_judged(row),
        "share": share,
    }


def is_judged(row: Row) -> bool:
    """Tell whether a row is that of a matrix with a known update: vectors and what is stored whole are not, alone."""
    known = row.get("frobenius_norm") is not None or row.get("update_norm") is not None
    return bool(row["matrix"] and (known or row["nonfinite"]))


def _square(row: Row) -> float:
    return float(row.get("update_norm") or row.get("frobenius_norm") or 0.0) ** 2


def grouped(rows: Sequence[Row], by: str) -> list[dict[str, Any]]:
    """Return per layer (or projection) the share of the update and the sums that matter, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["matrix"]:
            groups.setdefault(row[by], []).append(row)
    return [
        {
            by: name,
            "modules": len(members),
            "share": sum(row["share"] for row in members),
            "frobenius_norm": sqrt(sum(_square(row) for row in members)),
            "intruders": _sum(members, "intruders"),
        }
        for name, members in groups.items()
    ]


def _sum(rows: Sequence[Row], figure: str) -> int | None:
    values = [row[figure] for row in rows if row.get(figure) is not None]
    return sum(values) if values else None


def even(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return the rows with one set of keys: a figure that a module lacks is None."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return tuple({key: row.get(key) for key in keys} for row in rows)
