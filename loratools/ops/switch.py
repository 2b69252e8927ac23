"""switch: sparse adapters on and off in a checkpoint in place, or in tensors in memory; undone bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from loratools.core.adapter import Adapter
from loratools.core.pool import parallel_map
from loratools.core.update import Array, namespace
from loratools.errors import LoratoolsError, MismatchError, UnsupportedError, UsageError
from loratools.files import load
from loratools.io.base import Base
from loratools.io.inplace import InPlace, locked
from loratools.io.quantised import refuse_quantised
from loratools.kinds.sparse import Sparse, common
from loratools.linalg.namespace import dtype_name, is_float, placed_like, raw_bytes
from loratools.ops.job import content_hash
from loratools.ops.switch_state import LOCK, Record, State, read, targets, touched_parameters
from loratools.ops.touched import KEY, hash_values
from loratools.report import Report

UNITS = {
    "entries": "elements of the model that the switch wrote",
    "share": "entries / elements of the parameter",
    "overlap": "entries that more than one adapter touches",
}


class Store(Protocol):
    """Where parameters lie: elements at row-major positions are read and written."""

    def read(self, name: str, flat: Array) -> Array:
        """Return elements in their storage dtype."""

    def write(self, name: str, flat: Array, values: Array) -> None:
        """Write elements."""


def switch(
    model: str | Path,
    *,
    on: Sequence[Adapter | str | Path] = (),
    off: Sequence[Adapter | str | Path] = (),
    dry_run: bool = False,
) -> Report:
    """Put sparse adapters on in a model's safetensors files, take others off; return a report.

    Only the elements of the adapters are written, each W + D rounded once, whatever else is on and in whatever order.
    What they were is kept in a hidden directory (``.loratools-switch`` in the model, ``.NAME.switch`` beside a file),
    so ``off`` restores the model bit for bit; with nothing on, the directory goes. A journal makes the switch one step:
    if the process is killed, the next call completes it first.

    Before anything is written: names and shapes are checked, the model's values under active adapters against what was
    put there, and those under new ones against the adapter's own memory of its base (values or hash), where it has one.
    Raises MismatchError for another base or a changed model, UsageError, UnsupportedError (quantised models, updates
    that are not sparse), FileError.
    """
    path = Path(model)
    opened = Base.open(path)
    refuse_quantised(opened)
    state = State(path)
    adding = [_loaded(one, opened) for one in on]
    if dry_run and not state.path.exists():
        return _dry(opened, state, adding, off)
    fresh = not state.path.exists()
    state.open()
    try:
        with locked(state.path / LOCK):
            return _switched(opened, state, adding, [_loaded(one, opened) for one in off], dry_run)
    finally:
        if fresh and not state.on() and state.pending() is None:
            state.finish({})


def _dry(opened: Base, state: State, adding: Sequence[tuple[str, Adapter]], off: Sequence[Any]) -> Report:
    if off:
        raise UsageError("nothing is on in this model", file=opened.path)
    names = [name for _, adapter in adding for name in opened.resolve(adapter).values()]
    with InPlace(opened, names, writable=False) as store:
        new = [_record(label, adapter, opened, store, []) for label, adapter in adding]
    return _report(opened, [], new, [], dry_run=True)


def _switched(
    opened: Base, state: State, adding: Sequence[tuple[str, Adapter]], removing: Sequence[tuple[str, Adapter]],
    dry_run: bool,
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
    gone = [_active(label, adapter, listed, opened) for label, adapter in removing]
    hashes = [content_hash(adapter) for _, adapter in adding]
    known = set(listed) - set(gone)
    twice = [label for i, (label, _) in enumerate(adding) if hashes[i] in known or hashes[i] in hashes[:i]]
    if twice:
        raise UsageError("this adapter is on already", file=opened.path, got=twice[0])
    stay = [r for r in present if r.id not in gone]
    names = list(dict.fromkeys([*touched_parameters(present), *_resolved(opened, adding)]))
    if not names:
        return _report(opened, [], [], told, dry_run=dry_run)
    with InPlace(opened, names, writable=not dry_run) as store:
        _check_untouched(opened, store, present)
        new = [_record(label, adapter, opened, store, present) for label, adapter in adding]
        wanted = [*stay, *new]
        affected = touched_parameters([*new, *(r for r in present if r.id in gone)])
        if not dry_run:
            for record in new:
                state.keep(record)
            after = {r.id: r.label for r in wanted}
            state.begin(listed, after)
            _apply(store, affected, present, wanted)
            store.flush()
            state.finish(after)
    return _report(opened, present, wanted, told, dry_run=dry_run)


def _resolved(opened: Base, adding: Sequence[tuple[str, Adapter]]) -> list[str]:
    return [name for _, adapter in adding for name in opened.resolve(adapter).values()]


def _recovered(opened: Base, state: State) -> list[str]:
    """Complete a switch that was killed; return what to tell."""
    pending = state.pending()
    if pending is None:
        return []
    before, after = pending
    records = {id: state.record(id, label) for id, label in {**before, **after}.items()}
    names = touched_parameters(list(records.values()))
    with InPlace(opened, names, writable=True) as store:
        _apply(store, names, [records[id] for id in before], [records[id] for id in after])
        store.flush()
    state.finish(after)
    if after:
        state.open()
    return ["a switch that had been interrupted was completed first"]


def _apply(store: Store, names: Sequence[str], present: Sequence[Record], wanted: Sequence[Record]) -> None:
    """Write what the records give, parameter by parameter."""

    def one(name: str) -> None:
        store.write(name, *targets(name, present, wanted))

    sizes = [sum(16 * r.updates[n].nnz for r in (*present, *wanted) if n in r.updates) for n in names]
    parallel_map(one, list(names), weights=sizes)


def _loaded(one: Adapter | str | Path, model: Base) -> tuple[str, Adapter]:
    """Return (label, adapter). Raises UnsupportedError for updates that are not sparse, naming the first."""
    adapter = one if isinstance(one, Adapter) else load(one, base=model)
    label = str(one) if not isinstance(one, Adapter) else str(adapter.meta.path or "an adapter in memory")
    for name, u in adapter.items():
        if not isinstance(u, Sparse):
            raise UnsupportedError(
                f"only sparse updates are switched in place, not a {u.kind} one",
                file=adapter.meta.path,
                parameter=name,
                hint="loratools shira makes a sparse adapter; loratools merge writes a model with any",
            )
    if not adapter:
        raise UsageError("the adapter holds nothing to switch", file=adapter.meta.path)
    return label, adapter


def _active(label: str, adapter: Adapter, listed: Mapping[str, str], model: Base) -> str:
    """Return the id of an adapter that is on. Raises MismatchError where it is not."""
    id = content_hash(adapter)
    if id not in listed:
        raise MismatchError(
            "this adapter is not on in this model",
            file=model.path,
            expected=", ".join(listed.values()) or "nothing is on",
            got=label,
        )
    return id


def _record(label: str, adapter: Adapter, model: Base, store: Store, present: Sequence[Record]) -> Record:
    """Return the adapter with the model's own values under its entries, checked against what it remembers of them."""
    names = model.resolve(adapter)
    updates: dict[str, Sparse] = {}
    for name, u in adapter.items():
        assert isinstance(u, Sparse)  # _loaded
        target = names[name]
        try:
            _check_fits(u, model, target)
            flat = u.flat()
            own = _pristine(target, flat, store.read(target, flat), present)
            _check_values(u, own)
        except LoratoolsError as error:
            raise error.at(file=adapter.meta.path, parameter=name) from error
        updates[target] = replace(u, base=own)
    said = adapter.meta.metadata.get(KEY)
    if said is not None:
        pairs = ((name, updates[names[name]].base) for name in adapter)
        if hash_values((name, base) for name, base in pairs if base is not None) != said:
            raise _wrong_base(adapter.meta.path)
    return Record(content_hash(adapter), label, updates)


def _check_fits(u: Sparse, model: Base, target: str) -> None:
    if model.shapes[target] != u.shape:
        raise MismatchError("the adapter does not fit the model", expected=model.shapes[target], got=u.shape)
    if not is_float(model.dtypes[target]):
        raise UnsupportedError("a parameter of no floating dtype is not switched", got=model.dtypes[target])


def _check_values(u: Sparse, own: Array) -> None:
    if u.base is None:
        return
    base = read(u.base)
    if dtype_name(base) != dtype_name(own) or raw_bytes(base) != raw_bytes(own):
        raise _wrong_base(None)


def _wrong_base(path: Path | None) -> MismatchError:
    return MismatchError(
        "this is not the model that the adapter was made for: its values under the adapter's entries differ",
        file=path,
        expected="the base of the adapter, as it was",
        hint="nothing was written",
    )


def _pristine(name: str, flat: Array, now: Array, present: Sequence[Record]) -> Array:
    """Return the model's own values: what it holds now, but where active adapters remember better."""
    for record in present:
        if name in record.updates:
            mine, theirs = common(flat, record.flat[name])
            base = record.updates[name].base
            assert base is not None  # records have them
            now[mine] = read(base)[theirs]
    return now


def _check_untouched(model: Base, store: Store, present: Sequence[Record]) -> None:
    """Raise MismatchError unless the model holds what the active adapters put there: nothing else may have written."""
    for name in touched_parameters(present):
        flat, values = targets(name, present, present)
        if raw_bytes(store.read(name, flat)) != raw_bytes(values):
            raise MismatchError(
                "the model was changed since adapters were switched on: undoing them would not restore it",
                file=model.path,
                parameter=name,
                hint="nothing was written; restore the file, or delete its switch directory to take it as it is",
            )


def _report(
    model: Base, before: Sequence[Record], after: Sequence[Record], told: Sequence[str], *, dry_run: bool
) -> Report:
    changed = {r.id for r in before} ^ {r.id for r in after}
    records = {r.id: r for r in (*before, *after) if r.id in changed}
    rows = []
    for name in touched_parameters(list(records.values())):
        mine = [r for r in records.values() if name in r.updates]
        entries = sum(r.updates[name].nnz for r in mine)
        on = [r.flat[name] for r in after if name in r.updates]
        xp = namespace(mine[0].flat[name])
        overlap = sum(int(f.shape[0]) for f in on) - int(xp.unique_values(xp.concat(on)).shape[0]) if len(on) > 1 else 0
        size = 1
        for n in model.shapes[name]:
            size *= n
        rows.append({"name": name, "entries": entries, "share": entries / size, "overlap": overlap})
    total: dict[str, Any] = {
        "modules": len(rows),
        "entries": sum(row["entries"] for row in rows),
        "overlap": sum(row["overlap"] for row in rows),
    }
    extra = {"on": [r.label for r in after], "dry_run": dry_run}
    return Report("loratools.switch/1", tuple(rows), total, UNITS, tuple(told), extra=extra)


class Switchboard:
    """Sparse adapters on tensors in memory: the same rules as :func:`switch`, in place, on NumPy or torch.

    ``tensors``: parameter name -> contiguous array or tensor (a state dict). ``put_on`` and ``take_off`` write only the
    entries of the adapters; with everything off the tensors have their old bits.
    """

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._store = _Memory(tensors)
        self._model = Base.open(dict(tensors))
        self._on: dict[str, Record] = {}

    @property
    def on(self) -> tuple[str, ...]:
        """Labels of the adapters that are on."""
        return tuple(record.label for record in self._on.values())

    def put_on(self, adapter: Adapter) -> None:
        """Put an adapter on. Raises as :func:`switch`, before anything is written."""
        label, adapter = _loaded(adapter, self._model)
        present = list(self._on.values())
        if content_hash(adapter) in self._on:
            raise UsageError("this adapter is on already", got=label)
        record = _record(label, self._placed(adapter), self._model, self._store, present)
        _check_untouched(self._model, self._store, present)
        _apply(self._store, list(record.updates), present, [*present, record])
        self._on[content_hash(adapter)] = record

    def take_off(self, adapter: Adapter) -> None:
        """Take an adapter off. Raises MismatchError where it is not on, or the tensors were changed since."""
        id = _active("an adapter in memory", adapter, {i: r.label for i, r in self._on.items()}, self._model)
        present = list(self._on.values())
        _check_untouched(self._model, self._store, present)
        record = self._on[id]
        _apply(self._store, list(record.updates), present, [r for i, r in self._on.items() if i != id])
        del self._on[id]

    def _placed(self, adapter: Adapter) -> Adapter:
        """Return the adapter in the library and on the device of the tensors it is for."""
        names = self._model.resolve(adapter)
        return replace(adapter, updates={n: self._store.placed(names[n], u) for n, u in adapter.items()})  # type: ignore[arg-type]


class _Memory:
    """Elements of tensors in memory, through flat views."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._tensors = {name: t.detach() if hasattr(t, "detach") else t for name, t in tensors.items()}

    def _view(self, name: str) -> Array:
        whole = self._tensors[name]
        flat = whole.reshape(-1)
        if flat.shape[0] and _address(flat) != _address(whole):
            raise UsageError("a tensor that is not contiguous is not switched in place", got=name)
        return flat

    def read(self, name: str, flat: Array) -> Array:
        return self._view(name)[flat]

    def write(self, name: str, flat: Array, values: Array) -> None:
        self._view(name)[flat] = values

    def placed(self, name: str, u: Sparse) -> Sparse:
        like = self._tensors[name]
        fields = {f: getattr(u, f) for f in ("rows", "columns", "values", "base")}
        return replace(u, **{f: placed_like(t, like) for f, t in fields.items() if t is not None})


def _address(x: Array) -> int:
    """Return where the elements of an array begin in memory."""
    return int(x.data_ptr() if hasattr(x, "data_ptr") else x.ctypes.data)
