"""tame: scale the intruder dimensions of an adapter down, exactly, in factored form.

W' = W0 + D + (lam - 1) sum_i s_i u_i v_i^T over intruders i, with (u_i, s_i, v_i) singular triples of W0 + D: only
their singular values change, to lam s_i. The sum has rank q: the adapter grows by q channels, and nothing else changes.
Source: arXiv:2410.21228; there only the first intruder of each matrix is scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import LoratoolsError, NumericsError, UsageError
from loratools.files import BaseLike, open_base
from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank, low_rank, low_ranks, with_low_ranks
from loratools.linalg.namespace import namespace
from loratools.linalg.seeds import key_of
from loratools.ops.against_base import Asked, delta_norm, leading_cosines, matrix_of
from loratools.ops.base_names import base_names
from loratools.ops.correct import can_be_corrected, corrected, scaling
from loratools.ops.parts import Part, parts
from loratools.ops.placing import base_matrix
from loratools.ops.schedule import each_part
from loratools.report import Report

UNITS = {
    "intruders": "leading left singular vectors of W0 + D unlike every one of W0 (total: sum)",
    "tamed": "intruders scaled down (total: sum)",
    "certain": "do the bounds prove every decision of the module? (total: of all)",
    "rank_before": "channels before (total: largest)",
    "rank_after": "channels after (total: largest)",
    "relative_change": "|D' - D|_F / |D|_F that was asked for",
    "truncation_error": "|written - asked for|_F / |asked for|_F from cutting back to the old rank; 0 without",
}

ANGLE = 1e-4
"""How well intruders are known before they are scaled, in radians."""


@dataclass(frozen=True)
class _Plan:
    """What is asked of every part; ``names`` adapter name -> base name."""

    asked: Asked
    lam: float
    every: bool
    keep_rank: bool
    base: Base
    names: Any


def tame(
    adapter: Adapter,
    *,
    base: BaseLike,
    lam: float = 0.75,
    every: bool = False,
    keep_rank: bool = False,
    k: int = 10,
    eps: float = 0.5,
    skip_missing: bool = False,
    seed: int = 0,
) -> Adapter:
    """Return the adapter with the singular values of its intruders multiplied by ``lam``: 1 changes nothing, 0 removes.

    The first intruder of each matrix, or ``every`` one among the ``k`` leading left singular vectors; what an intruder
    is, see :func:`diagnose`. Ranks grow by one per intruder, exactly; with ``keep_rank`` the result is cut back to the
    old rank, and the report tells the loss. A DoRA's magnitude follows, so that its product is exact, too. What is
    stored whole is left as it is, and named where it has intruders. Raises UsageError for a ``lam`` outside 0 to 1,
    MismatchError, UnsupportedError (quantised base), NumericsError (values that are not finite).
    """
    check_request(lam=lam, k=k, eps=eps)
    opened = open_base(base)
    assert opened is not None  # only None opens as None
    names, missing = base_names(adapter, opened, skip_missing=skip_missing)
    plan = _Plan(Asked(k, eps, key=key_of(seed, "diagnose"), angle=ANGLE), lam, every, keep_rank, opened, names)
    found = parts(adapter)
    done = each_part([(part,) for part in found], lambda steps: _tamed(steps[0], plan), opened)
    updates = {name: _joined(name, adapter[name], found, done) for name in adapter}
    words = f"tame lambda={lam:g}, {'all intruders' if every else 'the first intruder of each matrix'}, eps={eps:g}"
    report = _report([row for _, row in done if row], adapter, missing, words)
    return replace(replace(adapter, updates=updates).with_history(words), report=report)


def check_request(*, lam: float, k: int, eps: float) -> None:
    """Raise :class:`UsageError` before any work where an option is out of range."""
    if not 0 <= lam <= 1 or k < 1 or not 0 < eps < 1:
        expected = "0 <= lambda <= 1, --top of at least 1, 0 < --eps < 1"
        raise UsageError("nothing to tame that way", expected=expected, got=f"{lam:g}, {k}, {eps:g}")


def _joined(name: str, update: Update, found: Sequence[Part], done: Sequence[tuple[Update, Any]]) -> Update:
    """Return a parameter's new update; experts go back into their stack where one changed."""
    new = [after for part, (after, _) in zip(found, done, strict=True) if part.parameter == name]
    if update.kind != "stack":
        return new[0]
    old = low_ranks(update) or ()
    experts = [n for n in new if isinstance(n, LowRank)]
    changed = any(a.rank != b.rank for a, b in zip(old, experts, strict=True))
    return with_low_ranks(update, experts) if changed else update


def _tamed(part: Part, plan: _Plan) -> tuple[Update, dict[str, Any] | None]:
    try:
        return _scaled(part, plan) if part.parameter in plan.names else (part.update, None)
    except LoratoolsError as error:
        raise error.at(parameter=part.name) from error


def _scaled(part: Part, plan: _Plan) -> tuple[Update, dict[str, Any] | None]:
    """Return the update with its intruders scaled, and its row; without a row where there is nothing to judge."""
    found = base_matrix(part, plan.base.leaf(plan.names[part.parameter]))
    if found is None:
        return part.update, None
    delta = part.update.delta(found.w)
    op = matrix_of(delta, turned=part.turned)
    size = delta_norm(delta)
    if not size < float("inf"):
        raise NumericsError("the update is not finite")
    if size == 0:
        return part.update, _row(part, [], 0, True, part.update, 0.0, 0.0)
    top, cosines = leading_cosines(found.matrix, op, plan.asked)
    hits = [j for j, flag in enumerate(cosines.intruders(plan.asked.eps)) if bool(flag)]
    certain = bool(cosines.certain(plan.asked.eps).all())
    scaled = hits if plan.every else hits[:1]
    if not scaled or plan.lam == 1 or not can_be_corrected(part.update):
        return part.update, _row(part, hits, 0, certain, part.update, 0.0, 0.0)
    correction = scaling(top.u[:, scaled], top.s[scaled], top.vh[scaled, :], plan.lam, turned=part.turned)
    after, loss = corrected(part.update, found.w, correction, plan.keep_rank)
    change = (1 - plan.lam) * float(namespace(top.s).linalg.vector_norm(top.s[scaled])) / size
    return after, _row(part, hits, len(scaled), certain, after, change, loss)


def _row(
    part: Part, hits: Sequence[int], tamed: int, certain: bool, after: Update, change: float, loss: float
) -> dict[str, Any]:
    before, written = low_rank(part.update), low_rank(after)
    return {
        "name": part.name,
        "kind": part.update.kind,
        "intruders": len(hits),
        "intruder_index": [j + 1 for j in hits],
        "tamed": tamed,
        "certain": certain,
        "rank_before": None if before is None else before.rank,
        "rank_after": None if written is None else written.rank,
        "relative_change": change,
        "truncation_error": loss,
    }


def _report(rows: Sequence[dict[str, Any]], adapter: Adapter, missing: Sequence[str], words: str) -> Report:
    ranks = [row for row in rows if row["rank_before"] is not None]
    total = {
        "modules": len(rows),
        "intruders": sum(row["intruders"] for row in rows),
        "tamed": sum(row["tamed"] for row in rows),
        "certain": all(row["certain"] for row in rows),
        "rank_before": max((row["rank_before"] for row in ranks), default=None),
        "rank_after": max((row["rank_after"] for row in ranks), default=None),
        "relative_change": max((row["relative_change"] for row in rows), default=0.0),
        "truncation_error": max((row["truncation_error"] for row in rows), default=0.0),
    }
    whole = [row["name"] for row in rows if row["rank_before"] is None and row["intruders"]]
    warnings = [
        *adapter.meta.remarks,
        *([f"not in the base, left as it is: {_some(missing)}"] if missing else []),
        *([f"stored whole, left with its intruders: {_some(whole)}"] if whole else []),
        *(
            [f"not proven: {_some([row['name'] for row in rows if not row['certain']])}"]
            if not total["certain"]
            else []
        ),
    ]
    return Report("loratools.tame/1", tuple(rows), total, UNITS, tuple(warnings), extra={"target": words})


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
