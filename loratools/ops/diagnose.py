"""diagnose: what an adapter does to its base, as figures: spectra, health, relative size, intruder dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratools.core.adapter import Adapter
from loratools.errors import MismatchError, UsageError
from loratools.files import BaseLike, open_base
from loratools.io.base import Base
from loratools.linalg.seeds import key_of
from loratools.ops.against_base import Asked
from loratools.ops.attention import attention_row, sites
from loratools.ops.base_names import base_names
from loratools.ops.bottlenecks import bottlenecks
from loratools.ops.examine import Plan, examined
from loratools.ops.history import course, step
from loratools.ops.parts import Part, parts
from loratools.ops.rank_curve import joined_curve
from loratools.ops.schedule import each_part
from loratools.ops.tally_diagnose import NEEDS_BASE, UNITS, even, grouped, totals, with_shares
from loratools.ops.verdict import verdict
from loratools.report import Report

SCHEMA = "loratools.diagnose/1"


def diagnose(
    adapter: Adapter | Sequence[Adapter],
    *,
    base: BaseLike | None = None,
    k: int = 10,
    eps: float = 0.5,
    both_sides: bool = False,
    rank_curve: bool = False,
    cache: str | Path | None = None,
    skip_missing: bool = False,
    seed: int = 0,
) -> Report:
    """Return spectra and health of an adapter, and with ``base`` its relative size, overlaps and intruder dimensions.

    Several adapters are checkpoints of one training, in order: the figures are those of the last, and ``history`` in
    the report tells how they came about. ``k`` leading singular vectors are judged with threshold ``eps``, the right
    ones too if ``both_sides``; ``rank_curve`` adds errors at every smaller rank; ``cache`` is a directory that keeps
    what the base alone contributes. Updates that the base lacks are an error, or listed with ``skip_missing``.

    Never a full SVD; memory with a base: one parameter in fp32 and about 300 MB (a module that only a dense
    eigendecomposition can decide needs 32 bytes times the square of its smaller side). See docs/diagnose.md for the
    figures. Raises MismatchError, UnsupportedError (quantised base), NumericsError (base not finite), UsageError.
    """
    checkpoints = (adapter,) if isinstance(adapter, Adapter) else tuple(adapter)
    if not checkpoints or k < 1 or not 0 < eps < 1:
        raise UsageError("nothing to diagnose that way", expected="an adapter, k >= 1, 0 < eps < 1", got=(k, eps))
    last, opened = checkpoints[-1], open_base(base)
    series = _series(checkpoints)
    names, missing = ({}, []) if opened is None else base_names(last, opened, skip_missing=skip_missing)
    asked = Asked(k, eps, both_sides, key_of(seed, "diagnose"))
    plan = Plan(asked, opened, names, None if cache is None else Path(cache), rank_curve, _rslora(last))
    found = each_part(series, lambda steps: examined(steps, plan), opened)
    rows, attention = _with_attention([steps[-1] for steps in found], last, plan)
    return _report(rows, attention, found, checkpoints, plan, missing)


def check_request(*, k: int, eps: float, figures: Sequence[str], with_base: bool) -> None:
    """Raise :class:`UsageError` before any file is opened where options contradict each other."""
    if k < 1 or not 0 < eps < 1:
        raise UsageError("nothing to diagnose that way", expected="--top of at least 1, --eps in (0, 1)", got=(k, eps))
    blind = [name for name in figures if name.removeprefix("total.") in NEEDS_BASE]
    if blind and not with_base:
        raise UsageError(f"--fail-on: {blind[0]} needs the base", hint="pass --base")


def _series(checkpoints: Sequence[Adapter]) -> list[tuple[Part, ...]]:
    """Return, part by part of the last checkpoint, that part in every checkpoint."""
    each = [{part.name: part for part in parts(adapter)} for adapter in checkpoints]
    for adapter, found in zip(checkpoints, each, strict=True):
        differing = sorted(found.keys() ^ each[-1].keys())
        if differing:
            raise MismatchError(
                f"the checkpoints differ in {len(differing)} parameters",
                file=adapter.meta.path,
                expected="checkpoints of one training",
                got=", ".join(differing[:3]),
            )
    return [tuple(found[name] for found in each) for name in each[-1]]


def _rslora(adapter: Adapter) -> bool | None:
    """Tell what the file says of its scaling rule; None where it says nothing."""
    said = adapter.meta.config.get("use_rslora")
    return said if isinstance(said, bool) else None


def _with_attention(
    rows: Sequence[dict[str, Any]], adapter: Adapter, plan: Plan
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows with the ratio of attention bounds where it can be told, and the bounds per layer."""
    if plan.base is None:
        return list(rows), []
    base, healthy = plan.base, {row["name"] for row in rows if not row["nonfinite"]}
    adapted = {target: name for name, target in plan.names.items() if name in healthy}
    updates = {target: adapter[name] for target, name in adapted.items()}
    told = [attention_row(site, base, updates) for site in sites(base, adapted)]
    ratio = {
        adapted[name]: one["attention_ratio"] for one in told for name in (one["query"], one["key"]) if name in adapted
    }
    return [{**row, "attention_ratio": ratio[row["name"]]} if row["name"] in ratio else row for row in rows], told


def _report(
    rows: Sequence[dict[str, Any]],
    attention: Sequence[dict[str, Any]],
    found: Sequence[Sequence[dict[str, Any]]],
    checkpoints: Sequence[Adapter],
    plan: Plan,
    missing: Sequence[str],
) -> Report:
    placed = with_shares(rows)
    total, layers = totals(placed), grouped(placed, "layer")
    eps = None if plan.base is None else plan.asked.eps
    extra: dict[str, Any] = {
        "summary": list(verdict(placed, total, layers, eps=eps)),
        "request": {
            "k": plan.asked.k,
            "eps": plan.asked.eps,
            "base": _named(plan.base),
            "both_sides": plan.asked.both_sides,
        },
        "layers": layers,
        "projections": grouped(placed, "projection"),
    }
    curve = joined_curve(placed) if plan.curve else None
    if curve is not None:
        extra["rank_curve"] = curve
    if attention:
        extra["attention"] = list(attention)
    if (told := bottlenecks(checkpoints[-1])) is not None:
        extra["bottlenecks"] = told.to_rows()
        extra["summary"] += [f"{told.total['modules']} bottlenecks, {told.total['trained']} of them trained"]
    if len(checkpoints) > 1:
        steps = [[versions[i] for versions in found] for i in range(len(checkpoints))]
        extra["history"] = [step(adapter, rows) for adapter, rows in zip(checkpoints, steps, strict=True)]
        extra["summary"] += course(extra["history"])
    warnings = [*checkpoints[-1].meta.remarks]
    if missing:
        first = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        warnings.append(f"not in the base, so not compared with it: {first}")
    return Report(SCHEMA, even(placed), total, UNITS, tuple(warnings), extra=extra)


def _named(base: Base | None) -> str | None:
    return None if base is None or base.path is None else str(base.path)
