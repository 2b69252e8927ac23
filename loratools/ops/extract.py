"""extract: a LoRA out of a full fine-tune, matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod, sqrt
from pathlib import Path
from typing import Any

from loratools.core import pool
from loratools.core.adapter import Adapter, Meta
from loratools.core.update import Update
from loratools.errors import LoratoolsError, UsageError
from loratools.files import BaseLike, open_base
from loratools.io.base import Base
from loratools.io.quantised import refuse_quantised
from loratools.kinds.replace import Replace
from loratools.linalg.namespace import is_float
from loratools.ops.decompose import Plan, decomposed
from loratools.ops.difference import NOISY, is_same
from loratools.ops.extract_config import config_and_layout
from loratools.ops.pairing import Pairing, paired
from loratools.ops.ranks import Target
from loratools.ops.tied import tie_of
from loratools.report import Report, Row

LARGE = 1 << 23  # elements: from here on a matrix is worth all threads
UNITS = {
    "rank": "columns of the extracted factors",
    "energy": "share of |tuned - base|^2 (Frobenius) in the kept singular values",
    "relative_error": "Frobenius norm of (extracted - difference) / that of the difference; factors as stored",
    "noise_floor": "expected norm of the rounding of the tuned weights / norm of the difference; null for fp32",
    "noise_edge": "largest singular value that this rounding alone would give; null for fp32",
    "update_norm": "Frobenius norm of tuned - base",
    "relative_norm": "update_norm / Frobenius norm of the base parameter",
}


def extract(
    base: BaseLike,
    tuned: BaseLike,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    max_rank: int | None = None,
    exact: bool = False,
    carry: bool = True,
    dtype: str | None = None,
    seed: int = 0,
) -> Adapter:
    """Return the adapter that leads from ``base`` to ``tuned``: the best low-rank update of every changed matrix.

    Exactly one target: ``rank`` per module, or ``"noise"``: what stands above the edge of the rounding noise of the
    tuned weights (half precision only); ``energy``; ``error``. Randomised SVD with 4 power iterations, within 0.5% of
    the optimum; ``exact`` for the dense one. What is no matrix (biases, norms, embeddings, new heads, a resized
    vocabulary) is kept whole where it changed, or with ``carry`` = False only named. Stacks of experts are decomposed
    expert by expert.

    Memory: one difference in fp32. Cost 10 products of D with rank + 10 columns per matrix. Everything is matched and
    checked by headers first. Raises MismatchError, UsageError, UnsupportedError (quantised), NumericsError.
    """
    plan = Plan(Target.of(rank=rank, energy=energy, error=error, max_rank=max_rank), exact, seed, dtype)
    if dtype is not None and not is_float(dtype):
        raise UsageError("no floating dtype to store factors in", expected="float16, bfloat16, float32, ...", got=dtype)
    old, new = _model(base), _model(tuned)
    pairing = paired(old, new)
    _check_noise(plan.target, pairing, new)
    updates, rows, left = _decomposed(old, new, pairing, plan)
    kept, named = _whole(old, new, pairing)
    if carry:
        updates |= {name: Replace(new.leaf(name)) for name in kept}
        rows += [_whole_row(name, new) for name in kept]
    tie = tie_of(new)
    tied = tie is not None and tie.embedding in updates and tie.head not in updates
    config, layout = config_and_layout(updates, old, _base_id(old), tied=tied)
    meta = Meta(format="peft", namespace="hf", base_id=_base_id(old), config=config, layout=layout)
    told = [*pairing.remarks, *named, *(left), *([] if carry or not kept else [_left_out(kept)])]
    done = Adapter({name: updates[name] for name in new if name in updates}, meta)
    report = _report(rows, pairing, told, plan.target.words)
    return Adapter(done.updates, done.with_history(f"extract {plan.target.words}").meta, report)


def _model(source: BaseLike) -> Base:
    opened = open_base(source)
    assert opened is not None  # only None opens as None
    refuse_quantised(opened)
    return opened


def _base_id(base: Base) -> str | None:
    said = base.config.get("_name_or_path")
    return str(said) if said else None if base.path is None else str(Path(base.path).resolve())


def _check_noise(target: Target, pairing: Pairing, tuned: Base) -> None:
    full = [name for name in pairing.low_rank if tuned.dtypes[name] not in NOISY]
    if target.noise and full:
        raise UsageError(
            "the tuned model is stored in full precision: there is no rounding noise to stand above",
            expected=" or ".join(NOISY),
            got=f"{tuned.dtypes[full[0]]} in {full[0]}",
            hint="pass --rank N, --energy or --error",
        )


def _decomposed(
    base: Base, tuned: Base, pairing: Pairing, plan: Plan
) -> tuple[dict[str, Update], list[dict[str, Any]], list[str]]:
    """Decompose every changed matrix; return updates, rows and remarks.

    Small matrices go through a pool of threads, large ones one at a time with all BLAS threads.
    """

    def one(name: str) -> tuple[Update | None, dict[str, Any] | None]:
        try:
            return decomposed(name, base.leaf(pairing.low_rank[name]), tuned.leaf(name), plan)
        except LoratoolsError as error:
            raise error.at(parameter=name) from error

    weights = {name: tuned.leaf(name).nbytes for name in pairing.low_rank}
    small = [name for name in weights if prod(tuned.shapes[name]) < LARGE]
    whole, done = sum(weights.values()), sum(weights[name] for name in small)
    with pool.part(0, whole):
        found = dict(zip(small, pool.parallel_map(one, small, weights=[weights[n] for n in small]), strict=True))
    for name, weight in weights.items():
        if name not in found:
            with pool.part(done, whole):
                found[name] = one(name)
            done += weight
    updates = {name: update for name in weights if (update := found[name][0]) is not None}
    rows = [row for name in weights if (row := found[name][1]) is not None]
    quiet = [row["name"] for row in rows if row["name"] not in updates]
    remark = f"{len(quiet)} changed matrices have nothing above the rounding noise, e.g. {quiet[0]}" if quiet else None
    return updates, rows, [] if remark is None else [remark]


def _whole(base: Base, tuned: Base, pairing: Pairing) -> tuple[list[str], list[str]]:
    """Return the changed tensors that are no matrices, and remarks about those of no floating type."""
    changed = [
        name for name, source in pairing.whole.items()
        if source is None or not is_same(base.leaf(source), tuned.leaf(name))
    ]  # fmt: skip
    floats = [name for name in changed if is_float(tuned.dtypes[name])]
    others = [name for name in changed if name not in floats]
    return floats, [f"integer tensors that changed are left out: {', '.join(others[:3])}"] if others else []


def _left_out(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"changed and left out: {', '.join(names[:3])}{more}; the adapter alone does not restore them"


def _whole_row(name: str, tuned: Base) -> dict[str, Any]:
    figures: dict[str, Any] = dict.fromkeys(("rank", "noise_floor", "noise_edge", "update_norm", "relative_norm"))
    return {"name": name, "kind": "replace", **figures, "energy": 1.0, "relative_error": 0.0}


def _report(rows: list[dict[str, Any]], pairing: Pairing, told: list[str], words: str) -> Report:
    measured: list[Mapping[str, Any]] = [row for row in rows if row["update_norm"] is not None]
    square = sum(row["update_norm"] ** 2 for row in measured)
    lost = sum((row["relative_error"] * row["update_norm"]) ** 2 for row in measured)
    total: Row = {
        "modules": len(measured),
        "unchanged": len(pairing.low_rank) - len(measured),
        "whole": len(rows) - len(measured),
        "rank": max((row["rank"] for row in measured), default=0),
        "energy": sum(row["energy"] * row["update_norm"] ** 2 for row in measured) / square if square else 1.0,
        "relative_error": sqrt(lost / square) if square else 0.0,
        "update_norm": sqrt(square),
    }
    return Report("loratools.extract/1", tuple(rows), total, UNITS, tuple(told), extra={"target": words})
