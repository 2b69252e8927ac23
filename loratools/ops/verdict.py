"""A diagnosis in words: what a person should know first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
MOST_NAMED = 8  # layers named in a sentence


def verdict(rows: Sequence[Row], total: Row, layers: Sequence[Row], *, eps: float | None) -> tuple[str, ...]:
    """Return a few sentences on size, spread, rank, health and intruders; ``eps`` is None without a base."""
    matrices = [row for row in rows if row.get("matrix")]
    if not matrices:
        return ("There is no matrix in this adapter: only vectors and parameters stored whole.",)
    sentences = [
        _size(matrices, total),
        _spread(layers),
        _rank(matrices),
        _health(rows, total),
        _scale(matrices),
        _intruders(matrices, total, eps),
        _attention(total),
    ]
    return tuple(sentence for sentence in sentences if sentence)


def _size(matrices: Sequence[Row], total: Row) -> str:
    ranks = sorted({row["rank"] for row in matrices if row.get("rank") is not None})
    of_rank = f" of rank {ranks[0]}" if len(ranks) == 1 else f" of ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    size = total.get("relative_norm")
    compared = f"; together {_percent(size)} of the base's norm" if size is not None else ""
    return f"{_count(len(matrices), 'updated matrix', 'updated matrices')}{of_rank}{compared}."


def _spread(layers: Sequence[Row]) -> str | None:
    if len(layers) < 4:
        return None
    kept, taken = 0.0, set()
    for row in sorted(layers, key=lambda row: -row["share"]):
        if kept < 0.5:
            kept += row["share"]
            taken.add(row["layer"])
    if not kept:
        return None
    names = [_short(name, [row["layer"] for row in layers]) for row in layers if (name := row["layer"]) in taken]
    listed = f" ({', '.join(names)})" if len(names) <= MOST_NAMED else ""
    return f"Half of the update lies in {_count(len(names), 'layer', 'layers')} of {len(layers)}{listed}."


def _rank(matrices: Sequence[Row]) -> str | None:
    needed = [row["suggested_ranks"]["energy_0.95"] for row in matrices if row.get("suggested_ranks")]
    ranks = [row["rank"] for row in matrices if row.get("rank") is not None]
    if not any(needed) or not ranks:
        return None
    mean, most = sum(needed) / len(needed), max(needed)
    used = f"95% of the energy needs rank {mean:.1f} on average, {most} at most"
    return used + (", of " + str(max(ranks)) + " stored." if max(ranks) > 1 else ".")


def _health(rows: Sequence[Row], total: Row) -> str:
    zero = [row["name"] for row in rows if row.get("matrix") and row.get("frobenius_norm") == 0]
    troubles = [
        _trouble(total.get("nonfinite"), "value that is not finite", "values that are not finite"),
        _trouble(len(zero), "matrix without any update (untrained?)", "matrices without any update (untrained?)"),
        _trouble(total.get("dead_components"), "dead channel", "dead channels"),
        _trouble(total.get("duplicate_components"), "duplicated channel", "duplicated channels"),
    ]
    found = [t for t in troubles if t]
    return f"Health: {', '.join(found)}." if found else "Health: no dead or duplicated channels, every value finite."


def _scale(matrices: Sequence[Row]) -> str | None:
    rule = {row["scaling"] for row in matrices if row.get("scaling")}
    if rule == {"lora"}:
        return "Scale alpha / r (LoRA): the same alpha at twice the rank acts 0.71 times as strongly."
    if rule == {"rslora"}:
        return "Scale alpha / sqrt(r) (rsLoRA): the strength does not depend on the rank."
    return None


def _intruders(matrices: Sequence[Row], total: Row, eps: float | None) -> str | None:
    judged = [row for row in matrices if row.get("intruders") is not None]
    if eps is None or not judged:
        return None
    count = total["intruders"]
    looked = sum(len(row["max_cosine_upper"]) for row in judged)
    unsure = [row["name"] for row in judged if not row["certain"]]
    proof = "every decision proven" if not unsure else f"not proven in {_some(unsure)}"
    if not count:
        return f"No intruder dimensions (eps {eps:g}) among {looked} leading singular vectors; {proof}."
    hit = [row for row in judged if row["intruders"]]
    return (
        f"{_count(count, 'intruder dimension', 'intruder dimensions')} (eps {eps:g}) among {looked} leading singular "
        f"vectors, in {_count(len(hit), 'matrix', 'matrices')} of {len(judged)}; {proof}."
    )


def _attention(total: Row) -> str | None:
    ratio = total.get("attention_ratio")
    return None if ratio is None else f"The bound on attention logits grows at most {ratio:.2f}-fold in any head."


def _short(name: str, names: Sequence[str]) -> str:
    """Return a dotted name without the parts that all names share at the front."""
    split = [other.split(".") for other in names]
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    return ".".join(name.split(".")[shared:]) or "(none)"


def _trouble(count: Any, one: str, many: str) -> str | None:
    return _count(int(count), one, many) if count else None


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
