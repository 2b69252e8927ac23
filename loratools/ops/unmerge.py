"""unmerge: an adapter out of a merged model again, as far as rounding allows; it never is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.rows import rowwise, slice_rows
from loratools.core.update import Array, Delta, Leaf
from loratools.errors import MismatchError, NeedsBaseError, NumericsError
from loratools.files import BaseLike
from loratools.io.base import Base
from loratools.io.output import check_output
from loratools.io.quantised import refuse_quantised
from loratools.io.save_like import Shard, shards_like
from loratools.io.staging import Staging
from loratools.io.write import TensorPlan, check_space
from loratools.linalg.namespace import all_finite, up, working_dtype
from loratools.linalg.rounding import rounded
from loratools.ops import model_files, undo
from loratools.ops.altered import refuse_altered
from loratools.ops.fold import fold, square, unfold
from loratools.ops.job import content_hash, fingerprint
from loratools.ops.merge import checked_weights, input_paths, require_model
from loratools.ops.rewrite import Block, Change, Figures, rewrite
from loratools.ops.targets import Target, Targets, targets
from loratools.ops.undo import Undo
from loratools.report import Report

UNITS = {
    "update_norm": "Frobenius norm of what is taken away",
    "relative_norm": "update_norm / Frobenius norm of the merged parameter",
    "roundtrip_error": "Frobenius norm of merge(unmerge(x)) - x: what a repetition of the merge would miss",
    "relative_roundtrip_error": "roundtrip_error / Frobenius norm of x",
}
NOTHING = Undo({}, {})


def unmerge(
    merged: BaseLike,
    adapters: Sequence[Adapter],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    undo_file: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    altered_base: bool = False,
    dry_run: bool = False,
    accept: Callable[[Report], bool] | None = None,
) -> Report:
    """Write the model without what the adapters added to it, and report how far merging again would miss.

    Additive updates are subtracted in fp32 and rounded once; the base's own bits are lost where the merge rounded them.
    A DoRA and anything stored whole need the ``undo_file`` that the merge wrote (its weights then hold); what it keeps
    whole comes back bit for bit. Memory and files as :func:`loratools.ops.merge.merge`.

    Raises NeedsBaseError naming the updates without an inverse, MismatchError for an undo file of another merge.
    """
    opened, target = require_model(merged), Path(output)
    refuse_quantised(opened)
    refuse_altered(adapters, altered_base=altered_base)
    found = NOTHING if undo_file is None else undo.load(undo_file)
    weights = _weights(adapters, weights, found)
    planned = _without_added(targets(opened, adapters, weights), found)
    _check_invertible(planned, found)
    changes = {name: _change(opened, t, found) for name, t in planned.changed.items()}
    shards = _shards(opened, changes, found)
    if dry_run:
        return _report({}, planned, adapters)
    check_output(target, inputs=input_paths(opened, adapters), overwrite=overwrite)
    check_space(target, sum(shard.nbytes for shard in shards))
    job = fingerprint(opened, adapters, weights=list(weights), verb="unmerge", undo=undo_file is not None)
    staging = Staging(target, job, overwrite=overwrite)
    staging.open(resume=resume)
    with staging.kept_if(tuple(shard.name for shard in shards)):
        figures = rewrite(opened, shards, changes, staging)
        report = _report(figures, planned, adapters)
        if accept is not None and not accept(report):
            staging.discard()
            return report
        model_files.finish(opened, shards, staging, found.config or {}, "unmerged again, up to rounding")
    return report


def _weights(adapters: Sequence[Adapter], weights: Sequence[float] | None, found: Undo) -> tuple[float, ...]:
    """Return the weights of the merge: those of the undo file, which must be of these adapters."""
    if found is NOTHING:
        return checked_weights(adapters, weights)
    if sorted(content_hash(adapter) for adapter in adapters) != sorted(found.adapters):
        raise MismatchError(
            "the undo file belongs to a merge of other adapters",
            expected=f"{len(found.adapters)} adapters as they were merged",
            got=f"{len(adapters)} given",
        )
    said = dict(zip(found.adapters, found.weights, strict=True))
    own = tuple(said[content_hash(adapter)] for adapter in adapters)
    if weights is not None and tuple(weights) != own:
        raise MismatchError("the merge had other weights", expected=list(own), got=list(weights))
    return own


def _without_added(planned: Targets, found: Undo) -> Targets:
    """Return the targets that the base had: what the merge added is dropped, not changed."""
    return replace(planned, changed={n: t for n, t in planned.changed.items() if n not in found.added})


def _check_invertible(planned: Targets, found: Undo) -> None:
    known = {*found.gains, *found.originals}
    stuck = [
        f"{name} ({'replace' if t.value is not None else '+'.join(u.update.kind for u in t.terms)})"
        for name, t in planned.changed.items()
        if name not in known and (t.value is not None or not all(isinstance(u.update, Delta) for u in t.terms))
    ]
    if stuck:
        raise NeedsBaseError(
            f"{len(stuck)} of {len(planned.changed)} updates cannot be taken back from the merged model alone",
            got=", ".join(stuck[:3]),
            hint="pass --undo FILE, which `merge --undo FILE` writes, or use the base itself",
        )


def _shards(base: Base, changes: Mapping[str, Change], found: Undo) -> tuple[Shard, ...]:
    plans = {name: change.plan for name, change in changes.items()}
    return shards_like(base, plans, {}, frozenset(found.added))


def _change(merged: Base, target: Target, found: Undo) -> Change:
    original = found.originals.get(target.name)
    if original is not None:
        plan = TensorPlan(target.name, original.dtype, original.shape)
        return Change(plan, original, lambda start, stop: lambda leaf, i, j: (_read(leaf), Figures()))
    whole = any(rowwise(term.update) is None for term in target.terms)
    plan = TensorPlan(target.name, target.dtype, target.shape)
    gain = found.gains.get(target.name)
    return Change(plan, merged.leaf(target.name), lambda start, stop: _block(target, gain, whole=whole), whole)


def _read(leaf: Leaf | None) -> Array:
    assert leaf is not None
    return leaf.read()


def _block(target: Target, gain: Leaf | None, *, whole: bool) -> Block:
    parts = [None if whole else rowwise(t.update) for t in target.terms]

    def block(leaf: Leaf | None, i: int, j: int) -> tuple[Array, Figures]:
        terms = [
            (t.weight, t.update if rows is None else rows(i, j)) for t, rows in zip(target.terms, parts, strict=True)
        ]
        x = up(_read(leaf), working_dtype(_read(leaf)))
        factors = None if gain is None else up(gain if whole else slice_rows(gain, i, j))
        stored = rounded(unfold(x, terms, factors), target.dtype)
        if not all_finite(stored):
            raise NumericsError("the model without the update is not finite here")
        return stored, _figures(x, stored, terms, target.dtype)

    return block


def _figures(x: Array, stored: Array, terms: Sequence[Any], dtype: str) -> Figures:
    """Merge what is about to be written once more and compare."""
    again = fold(up(stored, working_dtype(x)), terms)
    missed = up(rounded(again.value, dtype), working_dtype(x)) - x
    return Figures({"update": square(again.change), "missed": square(missed), "merged": square(x)})


def _report(figures: Mapping[str, Figures], planned: Targets, adapters: Sequence[Adapter]) -> Report:
    rows = tuple(_row(t, figures[name].sums if name in figures else {}) for name, t in planned.changed.items())
    sums = [f.sums for f in figures.values() if "missed" in f.sums]
    update, missed, merged = (sum(s[key] for s in sums) for key in ("update", "missed", "merged"))
    total = {
        "parameters": len(rows),
        "adapters": len(adapters),
        "update_norm": sqrt(update) if sums else None,
        "relative_norm": sqrt(update / merged) if merged else None,
        "roundtrip_error": sqrt(missed) if sums else None,
        "relative_roundtrip_error": sqrt(missed / merged) if merged else None,
    }
    remarks = (remark for adapter in adapters for remark in adapter.meta.remarks)
    told = ("unmerging undoes a merge up to rounding; it is not exact: keep the base", *remarks, *planned.remarks)
    return Report("loratools.unmerge/1", rows, total, UNITS, told)


def _row(target: Target, sums: Mapping[str, float]) -> dict[str, Any]:
    update, missed, merged = (sums.get(key) for key in ("update", "missed", "merged"))
    return {
        "name": target.name,
        "kind": target.kind,
        "update_norm": None if update is None else sqrt(update),
        "relative_norm": None if update is None or not merged else sqrt(update / merged),
        "roundtrip_error": None if missed is None else sqrt(missed),
        "relative_roundtrip_error": None if missed is None or not merged else sqrt(missed / merged),
    }
