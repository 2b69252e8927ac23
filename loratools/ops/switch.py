"""switch: sparse adapters on and off in a checkpoint in place, undone bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.core import pool
from loratools.core.adapter import Adapter
from loratools.errors import MismatchError, UsageError
from loratools.io.base import Base
from loratools.io.inplace import InPlace, locked
from loratools.io.quantised import refuse_quantised
from loratools.ops.switch_records import (
    Given,
    check_fits,
    check_untouched,
    given,
    recorded,
    switch_report,
    touched_parameters,
    write,
)
from loratools.ops.switch_state import LOCK, State
from loratools.report import Report


def switch(
    model: str | Path,
    *,
    on: Sequence[Adapter | str | Path] = (),
    off: Sequence[Adapter | str | Path] = (),
    dry_run: bool = False,
) -> Report:
    """Put sparse adapters on in a model's safetensors files, take others off; return a report.

    Only the elements of the adapters are written, each W + D rounded once, whatever else is on and in whatever order.
    What they were is kept in a hidden directory (``.NAME.switch`` beside a file, ``.loratools-switch`` in a directory
    of several), so ``off`` restores the model bit for bit; with nothing on, the directory goes. A journal makes the
    switch one step: if the process is killed, the next call completes it first.

    Before anything is written: names and shapes are checked, the model's values under active adapters against what was
    put there, and those under new ones against the adapter's own memory of its base (values or hash), where it has one.
    Raises MismatchError for another base or a changed model, UsageError, UnsupportedError (quantised models, updates
    that are not sparse), FileError.
    """
    pool.keep_freed_memory()
    path = Path(model)
    opened = Base.open(path)
    refuse_quantised(opened)
    state = State(path)
    adding = [given(one, opened) for one in on]
    if dry_run and not state.path.exists():
        return _dry(opened, adding, off)
    with locked(state.path / LOCK):
        try:
            return _switched(opened, state, adding, [given(one, opened) for one in off], dry_run)
        finally:
            state.tidy()


def _dry(opened: Base, adding: Sequence[Given], off: Sequence[Any]) -> Report:
    if off:
        raise UsageError("nothing is on in this model", file=opened.path)
    _check_new(adding, set(), opened)
    with InPlace(opened, _resolved(opened, adding), writable=False) as store:
        new = [recorded(one, opened, store, []) for one in adding]
    return switch_report(opened, [], new, [], dry_run=True)


def _switched(
    opened: Base, state: State, adding: Sequence[Given], removing: Sequence[Given], dry_run: bool
) -> Report:  # fmt: skip
    if dry_run and state.pending() is not None:
        raise UsageError(
            "a switch of this model was interrupted and has to be completed first",
            file=opened.path,
            hint="loratools switch MODEL completes it",
        )
    told = _recovered(opened, state)
    listed = state.on()
    present = [state.record(id, label) for id, label in listed.items()]
    check_fits(opened, present)
    gone = [listed_id(one, listed, opened) for one in removing]
    _check_new(adding, set(listed) - set(gone), opened)
    stay = [r for r in present if r.id not in gone]
    names = list(dict.fromkeys([*touched_parameters(present), *_resolved(opened, adding)]))
    if not names:
        return switch_report(opened, [], [], told, dry_run=dry_run)
    with InPlace(opened, names, writable=not dry_run) as store:
        check_untouched(opened, store, present)
        new = [recorded(one, opened, store, present) for one in adding]
        wanted = [*stay, *new]
        affected = touched_parameters([*new, *(r for r in present if r.id in gone)])
        if not dry_run:
            for record in new:
                state.keep(record)
            after = {r.id: r.label for r in wanted}
            state.begin(listed, after)
            write(store, affected, present, wanted)
            store.flush()
            state.finish(after)
    return switch_report(opened, present, wanted, told, dry_run=dry_run)


def _resolved(opened: Base, adding: Sequence[Given]) -> list[str]:
    return [name for one in adding for name in opened.resolve(one.adapter).values()]


def _check_new(adding: Sequence[Given], on: set[str], opened: Base) -> None:
    """Raise UsageError for an adapter that is on, or that is named twice."""
    for one in adding:
        if one.id in on:
            raise UsageError("this adapter is on already", file=opened.path, got=one.label)
        on.add(one.id)


def _recovered(opened: Base, state: State) -> list[str]:
    """Complete a switch that was killed; return what to tell."""
    pending = state.pending()
    if pending is None:
        return []
    before, after = pending
    records = {id: state.record(id, label) for id, label in {**before, **after}.items()}
    names = touched_parameters(list(records.values()))
    check_fits(opened, list(records.values()))
    with InPlace(opened, names, writable=True) as store:
        write(store, names, [records[id] for id in before], [records[id] for id in after])
        store.flush()
    state.finish(after)
    return ["a switch that had been interrupted was completed first"]


def listed_id(one: Given, listed: Mapping[str, str], model: Base) -> str:
    """Return the id of an adapter that is on. Raises MismatchError where it is not."""
    if one.id not in listed:
        raise MismatchError(
            "this adapter is not on in this model",
            file=model.path,
            expected=", ".join(listed.values()) or "nothing is on",
            got=one.label,
        )
    return one.id
