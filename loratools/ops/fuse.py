"""fuse: several adapters into one, module by module, on the updates themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from loratools.core.adapter import Adapter
from loratools.errors import MismatchError, UnsupportedError, UsageError
from loratools.files import BaseLike, open_base
from loratools.fusion.base import FUSIONS, Method
from loratools.io.spool import Spool
from loratools.io.stats import Collected, StatsLike, load_stats
from loratools.ops.fuse_cut import Aim
from loratools.ops.fuse_inputs import (
    Row,
    check_bases,
    check_coats,
    check_common,
    checked_weights,
    is_whole,
    labels,
    rows_of,
    settled,
)
from loratools.ops.fuse_meta import fused_meta
from loratools.ops.fuse_whole import chosen, leftovers, whole_updates
from loratools.ops.fuse_words import fuse_report
from loratools.ops.fuse_work import How, Statistics, Work

STORED = ("float16", "bfloat16", "float32", "float64")


def fuse(
    adapters: Sequence[Adapter],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    rank: int | str | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    base: BaseLike | None = None,
    stats: Sequence[StatsLike] | None = None,
    take: str | None = None,
    same_base: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Adapter:
    """Return one adapter out of several, by a method of :data:`loratools.fusion.base.FUSIONS` with its ``settings``.

    Every method sees true updates: scales folded in, rsLoRA as its scale says, DoRA as the difference it makes on
    ``base``; ranks, dtypes and target modules may differ (a missing module is zero). ``weights`` are 1 unless given and
    never normalised in silence. ``rank`` or ``energy`` recompress the result by ``squeeze``; a result without factors
    (element-wise rules, DoRA) is cut to the sum of the inputs' ranks unless one of them, or ``rank="full"``, is given.
    ``stats``: for regmean, per adapter statistics of its inputs (:mod:`loratools.io.stats`). What is stored whole must
    be equal in all inputs, or ``take`` names the input that decides. ``report`` of the result has the figures.

    Memory: one module per thread; results beyond 32 MB wait in a temporary file. Raises UsageError for an unknown
    method or setting and for weights that do not match, MismatchError for different bases (the first three differences
    and the count) and for whole parameters that differ, NeedsBaseError, all before any work.
    """
    how = _planned(method, settings, checked_weights(len(adapters), weights), Aim(rank, energy), dtype, seed)
    names, opened = labels(adapters), open_base(base)
    taken = chosen(adapters, names, take)
    adapters, in_base = settled(adapters, opened)
    check_bases(adapters, names, same_base=same_base)
    remarks = check_common(adapters, names)
    rows = rows_of(adapters)
    whole, left = whole_updates(rows, names, taken), leftovers(adapters, names, taken)
    additive = {name: row for name, row in rows.items() if name not in whole and not is_whole(row)}
    check_coats(additive, opened)
    modules = Work(how, opened, in_base, _statistics(how.method, stats, additive, adapters), Spool()).done(additive)
    updates = {n: whole[n] if n in whole else modules[n].update for n in rows if n in whole or n in modules}
    meta = fused_meta(adapters, updates, left, take=taken)
    report = fuse_report(how.words, modules, whole, adapters, names, how.weights, remarks)
    line = f"fuse {how.words} of " + ", ".join(f"{n} ({w:g})" for n, w in zip(names, how.weights, strict=True))
    return replace(Adapter(updates, meta).with_history(line), report=report)


def _planned(
    method: str, settings: Mapping[str, Any], weights: tuple[float, ...], aim: Aim, dtype: str | None, seed: int
) -> How:
    """Return the plan, rehearsed. ``rank`` is also the setting of methods that construct it."""
    found = FUSIONS[method]
    constructs = "rank" in found.parameters and "rank" not in settings and aim.exact_rank is not None
    used = found.settings({**settings, **({"rank": aim.exact_rank} if constructs else {})})
    if dtype is not None and dtype not in STORED:
        raise UsageError("no dtype to store factors in", expected=", ".join(STORED), got=dtype)
    how = How(found, used, weights, aim, dtype, seed)
    how.rehearse()
    return how


def _statistics(
    method: Method, stats: Sequence[StatsLike] | None, rows: Mapping[str, Row], adapters: Sequence[Adapter]
) -> Statistics | None:
    """Return the opened statistics, names resolved and shapes checked; UsageError where they are missing or idle."""
    if "statistics" not in method.handed_over:
        if stats:
            raise UsageError(f"method {method.name!r} uses no statistics", hint="regmean does")
        return None
    if stats is None or len(stats) != len(adapters):
        raise UsageError(
            f"method {method.name!r} needs statistics of every adapter's inputs", expected=f"{len(adapters)} of them",
            got=0 if stats is None else len(stats), hint="--stats FILE once per IN, in their order",
        )  # fmt: skip
    turned = [n for n in rows if any(a.meta.layout.get(n, {}).get("stored") == "in_out" for a in adapters)]
    if turned:
        raise UnsupportedError(
            f"method {method.name!r} weighs inputs, which {len(turned)} parameters have as their rows",
            got=", ".join(turned[:3]), hint="another method treats embeddings and GPT-2's Conv1D",
        )  # fmt: skip
    found: Statistics = [(one, one.resolve(rows)) for one in map(load_stats, stats)]
    for one, at in found:
        wrong = [f"{n}: {_seen(one, at, n)}" for n, row in rows.items() if not _fits(one, at, n, row)]
        if wrong:
            raise MismatchError(
                f"{len(wrong)} modules have no statistics of their inputs that fit", file=one.path,
                expected="in_gram (inputs, inputs) or in_diag (inputs,)", got="; ".join(wrong[:3]),
            )  # fmt: skip
    return found


def _fits(stats: Collected, at: Mapping[str, str], name: str, row: Row) -> bool:
    inputs = stats[at[name]].inputs if name in at else None
    u = next(u for u in row if u is not None)
    n = u.shape[-1] if u.kind == "stack" else prod(u.shape[1:])
    return inputs is not None and inputs.shape[0] == n


def _seen(stats: Collected, at: Mapping[str, str], name: str) -> str:
    inputs = stats[at[name]].inputs if name in at else None
    return "none" if inputs is None else str(inputs.shape)
