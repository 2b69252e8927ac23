"""merge: adapters into their base, shard by shard, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from pathlib import Path

from loratools.core.adapter import Adapter
from loratools.core.update import Array
from loratools.errors import MissingScaleError, UsageError
from loratools.files import BaseLike, open_base
from loratools.io.base import Base
from loratools.io.output import check_output
from loratools.io.quantised import refuse_quantised
from loratools.io.staging import Staging
from loratools.io.write import check_space
from loratools.linalg.rounding import MODES
from loratools.ops import model_files, tally_merge, undo
from loratools.ops.altered import refuse_altered
from loratools.ops.job import fingerprint
from loratools.ops.merge_blocks import Rounding, plan_changes, planned_shards
from loratools.ops.rewrite import rewrite
from loratools.ops.targets import targets
from loratools.report import Report


def merge(
    base: BaseLike,
    adapters: Sequence[Adapter],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    measure: bool = True,
    undo_file: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    untie: bool = False,
    requantise: bool = False,
    altered_base: bool = False,
    dry_run: bool = False,
    accept: Callable[[Report], bool] | None = None,
) -> Report:
    """Write W' = W + sum_i weight_i (u_i.apply(W) - W), each u_i against the same W, as a model; return a report.

    Computed in fp32 (fp64 for an fp64 base) and rounded once to the base's dtype. The output has the base's files,
    tensor names, order, dtypes and metadata; the index and, where ties or the vocabulary change, config.json are
    rewritten, other small files copied. Names and shapes are checked before the first byte. Memory: a few MB per
    thread, and the factors of one parameter; a parameter whose rows depend on each other is held as a whole. Adapters
    on a GPU are merged there, one parameter at a time.

    ``undo_file`` keeps what :func:`loratools.ops.unmerge.unmerge` needs beyond the adapters. ``resume`` continues a
    killed job at the first unfinished shard. ``measure`` = False leaves the figures of the report out. Nothing is kept
    where ``accept`` says no to the report.

    Raises MismatchError, UsageError, UnsupportedError (quantised base, altered-base adapter), NumericsError naming the
    parameter where a result is not finite, and what writing raises.
    """
    opened, target = require_model(base), Path(output)
    weights, how = checked_weights(adapters, weights), Rounding(checked_mode(rounding), seed, measure)
    method = refuse_quantised(opened, model_id=base_id(adapters), allow_fp8=requantise)
    refuse_altered(adapters, altered_base=altered_base)
    planned = targets(opened, adapters, weights, untie=untie)
    changes = plan_changes(opened, planned, how, with_fp8=method == "fp8")
    shards = planned_shards(opened, changes)
    if dry_run:
        return tally_merge.report({}, planned, adapters, weights)
    for path in (target, *([] if undo_file is None else [Path(undo_file)])):
        check_output(path, inputs=input_paths(opened, adapters), overwrite=overwrite or (resume and path != target))
    check_space(target, sum(shard.nbytes for shard in shards))
    job = fingerprint(
        opened, adapters, weights=list(weights), rounding=rounding, seed=seed, measure=measure, untie=untie,
        requantise=requantise, undo=undo_file is not None,
    )  # fmt: skip
    staging = Staging(target, job, overwrite=overwrite)
    staging.open(resume=resume)
    with staging.kept_if(tuple(shard.name for shard in shards)):
        figures = rewrite(opened, shards, changes, staging)
        report = tally_merge.report(figures, planned, adapters, weights)
        if accept is not None and not accept(report):
            staging.discard()
            return report
        if undo_file is not None:
            undo.save(Path(undo_file), planned, figures, opened, adapters, weights, overwrite=overwrite or resume)
        model_files.finish(opened, shards, staging, planned.config, _history(adapters, weights, rounding))
    return report


def merged(
    base: BaseLike, adapters: Sequence[Adapter], *, weights: Sequence[float] | None = None, untie: bool = False
) -> Iterator[tuple[str, Array]]:
    """Yield (name, W') of a whole model in the base's order, new parameters last, rounded once to the base's dtypes.

    For bases in memory and for callers with their own storage; memory is one parameter.
    """
    opened = require_model(base)
    planned = targets(opened, adapters, checked_weights(adapters, weights), untie=untie)
    changes = plan_changes(opened, planned, Rounding(measure=False))
    for name in dict.fromkeys([*opened, *planned.changed]):
        change = changes.get(name)
        if change is None:
            yield name, opened[name]
            continue
        count = change.plan.shape[0] if change.plan.shape else 1
        yield name, change.rows(0, count)(change.source, 0, count)[0]


def require_model(base: BaseLike) -> Base:
    """Return the opened base."""
    opened = open_base(base)
    assert opened is not None  # only None opens as None
    return opened


def checked_weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> tuple[float, ...]:
    """Return one finite weight per adapter, 1 by default. Raises UsageError otherwise.

    Raises MissingScaleError where a file does not say how strongly its factors act, and no weight is given that could.
    """
    if not adapters:
        raise UsageError("nothing to merge", expected="at least one adapter")
    unknown = next((a for a in adapters if not a.meta.scaled), None)
    if unknown is not None and weights is None:
        raise MissingScaleError(
            f"a {unknown.meta.source} file that does not say how strongly its factors act",
            file=unknown.meta.path,
            hint="give the scale of the training as its weight: --weights SCALE; or write it down: "
            "loratools convert IN --to FORMAT --scale SCALE",
        )
    found = tuple(float(w) for w in weights) if weights is not None else (1.0,) * len(adapters)
    if len(found) != len(adapters) or not all(map(isfinite, found)):
        raise UsageError("one finite weight per adapter is needed", expected=len(adapters), got=list(found))
    return found


def input_paths(base: Base, adapters: Sequence[Adapter]) -> tuple[Path, ...]:
    """Return the files and directories that no output may replace."""
    paths = (base.path, *base.files.values(), *(a.meta.path for a in adapters))
    return tuple(dict.fromkeys(path for path in paths if path is not None))


def checked_mode(rounding: str) -> str:
    """Return a known way of rounding. Raises UsageError otherwise."""
    if rounding not in MODES:
        raise UsageError("unknown rounding", expected=" or ".join(MODES), got=rounding)
    return rounding


def base_id(adapters: Sequence[Adapter]) -> str | None:
    """Return the id of the base that the adapters name, if one does."""
    return next((a.meta.base_id for a in adapters if a.meta.base_id), None)


def _history(adapters: Sequence[Adapter], weights: Sequence[float], rounding: str) -> str:
    named = (f"{_name(a)} (weight {w:g})" for a, w in zip(adapters, weights, strict=True))
    return f"merged {', '.join(named)}; rounding {rounding}"


def _name(adapter: Adapter) -> str:
    path = adapter.meta.path
    return "an adapter in memory" if path is None else path.parent.name if path.stem == "adapter_model" else path.name
