"""What merging does to one tensor: its updates folded into blocks of its rows, rounded, and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loratools.core.rows import rowwise
from loratools.core.update import Array, Leaf, Update
from loratools.errors import NumericsError
from loratools.io.base import Base
from loratools.io.save_like import Shard, shards_like
from loratools.io.write import TensorPlan
from loratools.kinds.dora import Dora, axis_norms
from loratools.kinds.replace import Replace
from loratools.linalg.namespace import all_finite, up, working_dtype
from loratools.linalg.rounding import rounded
from loratools.linalg.seeds import Key, key_of
from loratools.ops import fp8
from loratools.ops.fold import Folded, Weighted, agreement, fold, square
from loratools.ops.placing import beside, is_away
from loratools.ops.rewrite import Block, Change, Figures
from loratools.ops.settle import Pass, can_settle, once, settle
from loratools.ops.targets import Target, Targets


@dataclass(frozen=True)
class Rounding:
    """How results become the base's dtype: ``nearest``, or ``stochastic`` by a seed; and whether that is measured."""

    mode: str = "nearest"
    seed: int = 0
    measure: bool = True


def plan_changes(base: Base, planned: Targets, how: Rounding, *, with_fp8: bool = False) -> dict[str, Change]:
    """Return the change of every target; for fp8 weights also that of their scale tensors."""
    changes: dict[str, Change] = {}
    for name, target in planned.changed.items():
        if with_fp8 and fp8.is_scaled(base, target):
            changes.update(fp8.changes(base, target, measure=how.measure))
        else:
            changes[name] = _change(base, target, how)
    return changes


def planned_shards(base: Base, changes: Mapping[str, Change]) -> tuple[Shard, ...]:
    """Return the files to be written, with changed shapes and new tensors in their places."""
    plans = {name: change.plan for name, change in changes.items()}
    return shards_like(
        base,
        {name: plan for name, plan in plans.items() if name in base},
        {name: plan for name, plan in plans.items() if name not in base},
    )


def _change(base: Base, target: Target, how: Rounding) -> Change:
    plan = TensorPlan(target.name, target.dtype, target.shape)
    source = None if target.source is None else base.leaf(target.source)
    if source is not None and source.shape != target.shape:
        source = None  # resized: nothing of the old values enters
    ground = target.value.value if target.value is not None and target.on_value else source
    passes = [_pass(term.update, ground) for term in target.terms]
    away = any(map(is_away, (*(term.update for term in target.terms), *filter(None, [target.value]))))
    apart = any(made is None and rowwise(term.update) is None for term, made in zip(target.terms, passes, strict=True))
    whole = away or apart
    return Change(plan, source, lambda start, stop: _block(target, how, passes, whole=whole), whole, away)


def _pass(u: Update, base: Leaf | Array | None) -> Callable[[], Pass] | None:
    """Return the pass over the base that an update needs before its rows stand alone; it is made once, when needed."""
    return once(lambda: settle(u, base)) if isinstance(u, Dora) and can_settle(u) and base is not None else None


def _block(target: Target, how: Rounding, passes: Sequence[Callable[[], Pass] | None], *, whole: bool) -> Block:
    """Return the function that folds and rounds blocks of rows; it reads the shared factors once."""
    made = [None if whole or get is None else get() for get in passes]
    updates = [t.update if p is None else p.update for t, p in zip(target.terms, made, strict=True)]
    parts = [None if whole else rowwise(u) for u in updates]
    key = key_of(how.seed, target.name)

    def block(source: Leaf | None, i: int, j: int) -> tuple[Array, Figures]:
        terms = [
            (t.weight, u if rows is None else rows(i, j))
            for t, u, rows in zip(target.terms, updates, parts, strict=True)
        ]
        value = target.value if target.value is None or whole or not target.shape else _rows_of(target.value, i, j)
        array, figures = _merged(target, source, value, terms, how, (key, i))
        for sums in (p.sums for p in made if p is not None and i == 0):  # of the whole tensor: told once
            _add(figures.sums, sums)
        return array, figures

    return block


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for key, value in more.items():
        total[key] = total.get(key, 0.0) + value


def _rows_of(value: Replace, i: int, j: int) -> Replace:
    rows = rowwise(value)
    assert rows is not None  # a replacement is made of rows
    part = rows(i, j)
    assert isinstance(part, Replace)
    return part


def _merged(
    target: Target,
    source: Leaf | None,
    value: Replace | None,
    terms: Sequence[Weighted],
    how: Rounding,
    place: tuple[Key, int],
) -> tuple[Array, Figures]:
    if value is None and not terms:  # the untied copy of a shared tensor
        assert source is not None
        return source.read(), Figures()
    base = None if source is None else up(_beside(source, value, terms), working_dtype(source))
    exact = _exact(base, value, terms, on_value=target.on_value)
    stored = rounded(exact.value, target.dtype, mode=how.mode, key=place[0], row=place[1])
    if not all_finite(stored):
        raise _not_finite(exact.value, base, target.dtype)
    ground = up(value.value, working_dtype(value.value)) if value is not None and target.on_value else base
    return stored, _figures(base, ground, exact, stored, how, lone=len(terms) == 1 and value is None)


def _beside(source: Leaf, value: Replace | None, terms: Sequence[Weighted]) -> Leaf | Array:
    """Return the block of the base where the updates are: on their GPU, or as it is."""
    updates = [u for _, u in terms] if value is None else [value]
    return beside(source, updates[0])


def _exact(base: Array | None, value: Replace | None, terms: Sequence[Weighted], *, on_value: bool) -> Folded:
    """Return what the tensor becomes before rounding."""
    if value is None:
        assert base is not None  # only replacements may be new
        return fold(base, terms)
    new = up(value.value, working_dtype(value.value))
    if on_value:
        found = fold(new, terms)
        return Folded(found.value, found.value if base is None else new - base + found.change, found.gains)
    if base is None:
        return Folded(new, new)
    if not terms:
        return Folded(new, new - base)
    more = fold(base, terms)
    return Folded(new + more.change, new - base + more.change, more.gains)


def _figures(
    base: Array | None, ground: Array | None, exact: Folded, stored: Array, how: Rounding, *, lone: bool
) -> Figures:
    """Return the figures of a block; ``ground`` is what the terms changed."""
    sums: dict[str, float] = {}
    for dora, _ in exact.gains:
        assert ground is not None  # a magnitude has one
        _add(sums, agreement(dora, axis_norms(ground, dora.axis)))
    if how.measure:
        lost = up(stored, working_dtype(exact.value)) - exact.value
        sums.update(update=square(exact.change), lost=square(lost), base=0.0 if base is None else square(base))
    gains = {"gain": exact.gains[0][1]} if lone and exact.gains and exact.gains[0][0].axis == 0 else {}
    return Figures(sums, gains)


def _not_finite(exact: Array, base: Array | None, dtype: str) -> NumericsError:
    if base is not None and not all_finite(base):
        return NumericsError("the base itself is not finite here", hint="the base file is damaged: fetch it again")
    if not all_finite(exact):
        return NumericsError("the update is not finite here", hint="the adapter diverged in training, or is damaged")
    return NumericsError(
        f"a merged value is too large for {dtype}",
        hint="merge into a bfloat16 or float32 copy of the base, or use a smaller --weights",
    )
