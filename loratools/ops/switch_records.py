"""What a switch writes: adapters with the model's own values under their entries, and the values that follow.

New values follow from the records alone, whatever was on before and in whatever order, so writing them again does no
harm; and the model's own values are in them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from loratools.core.adapter import Adapter
from loratools.core.pool import parallel_map
from loratools.core.update import Array, Leaf, namespace
from loratools.errors import FormatError, LoratoolsError, MismatchError, UnsupportedError, UsageError
from loratools.files import load
from loratools.io.base import Base
from loratools.kinds.sparse import Sparse, common
from loratools.linalg.namespace import device_of, down, dtype_name, is_float, raw_bytes, up, working_dtype
from loratools.ops.job import content_hash
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


class Given(NamedTuple):
    """An adapter that was named: the hash of its content, what people call it, and itself."""

    id: str
    label: str
    adapter: Adapter


class Record:
    """An adapter that is on: parameter of the model -> sparse update whose ``base`` are the model's own values."""

    def __init__(self, id: str, label: str, updates: Mapping[str, Sparse]) -> None:
        self.id, self.label, self.updates = id, label, updates
        self._flat: dict[str, Array] = {}

    def flat(self, name: str) -> Array:
        """Return the row-major positions in a parameter, computed once."""
        if name not in self._flat:
            self._flat[name] = self.updates[name].flat()
        return self._flat[name]


def given(one: Adapter | str | Path, model: Base) -> Given:
    """Return an adapter, loaded. Raises UnsupportedError for updates that are not sparse, naming the first."""
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
    return Given(content_hash(adapter), label, adapter)


def recorded(one: Given, model: Base, store: Store, present: Sequence[Record]) -> Record:
    """Return the adapter with the model's own values under its entries, checked against what it remembers of them.

    Raises MismatchError for another base, UnsupportedError for a parameter that is not switched, NumericsError for a
    value that is not finite.
    """
    names, path = model.resolve(one.adapter), one.adapter.meta.path
    found = Record(one.id, one.label, {})

    def remembered(name: str) -> Sparse:
        u, target = one.adapter[name], names[name]
        assert isinstance(u, Sparse)  # given()
        try:
            _check_fits(u, model, target)
            flat = found._flat[target] = u.flat()
            own = _pristine(target, flat, store.read(target, flat), present)
            _check_values(u, own)
        except LoratoolsError as error:
            raise error.at(file=path, parameter=name) from error
        return replace(u, base=own)

    made = parallel_map(remembered, list(names), weights=[16 * one.adapter[name].nnz for name in names])  # type: ignore[attr-defined]
    found.updates = {names[name]: u for name, u in zip(names, made, strict=True)}
    said = one.adapter.meta.metadata.get(KEY)
    if said is not None and hash_values((name, found.updates[names[name]].base) for name in one.adapter) != said:
        raise _wrong_base(path)
    return found


def _check_fits(u: Sparse, model: Base, target: str) -> None:
    if model.shapes[target] != u.shape:
        raise MismatchError("the adapter does not fit the model", expected=model.shapes[target], got=u.shape)
    if not is_float(model.dtypes[target]):
        raise UnsupportedError("a parameter of no floating dtype is not switched", got=model.dtypes[target])


def _pristine(name: str, flat: Array, now: Array, present: Sequence[Record]) -> Array:
    """Return the model's own values: what it holds now, but where active adapters remember better."""
    for record in present:
        if name in record.updates:
            mine, theirs = common(flat, record.flat(name))
            now[mine] = _base(record, name)[theirs]
    return now


def _check_values(u: Sparse, own: Array) -> None:
    if u.base is None:
        return
    base = u.base.read() if isinstance(u.base, Leaf) else u.base
    if dtype_name(base) != dtype_name(own) or raw_bytes(base) != raw_bytes(own):
        raise _wrong_base(None)


def _wrong_base(path: Path | None) -> MismatchError:
    return MismatchError(
        "this is not the model that the adapter was made for: its values under the adapter's entries differ",
        file=path,
        expected="the base of the adapter, as it was",
        hint="nothing was written",
    )


def check_fits(model: Base, records: Sequence[Record]) -> None:
    """Raise MismatchError unless the model still has every parameter under the records, in its shape."""
    for name, u in ((name, u) for record in records for name, u in record.updates.items()):
        if model.shapes.get(name) != u.shape:
            raise MismatchError(
                "the model was replaced since adapters were switched on: they do not fit it",
                file=model.path,
                parameter=name,
                expected=u.shape,
                got=model.shapes.get(name, "no such parameter"),
                hint="nothing was written; restore the file, or delete its switch directory to take it as it is",
            )


def check_untouched(model: Base, store: Store, present: Sequence[Record]) -> None:
    """Raise MismatchError unless the model holds what the active adapters put there: nothing else may have written."""

    def one(name: str) -> None:
        flat, values = targets(name, present, present)
        if raw_bytes(store.read(name, flat)) != raw_bytes(values):
            raise MismatchError(
                "the model was changed since adapters were switched on: undoing them would not restore it",
                file=model.path,
                parameter=name,
                hint="nothing was written; restore the file, or delete its switch directory to take it as it is",
            )

    names = touched_parameters(present)
    parallel_map(one, names, weights=_work(names, present))


def write(store: Store, names: Sequence[str], present: Sequence[Record], wanted: Sequence[Record]) -> None:
    """Write what the wanted records give, parameter by parameter, and the model's own values where they leave."""

    def one(name: str) -> None:
        store.write(name, *targets(name, present, wanted))

    parallel_map(one, list(names), weights=_work(names, [*present, *wanted]))


def _work(names: Sequence[str], records: Sequence[Record]) -> list[int]:
    return [sum(16 * r.updates[n].nnz for r in records if n in r.updates) for n in names]


def targets(name: str, present: Sequence[Record], wanted: Sequence[Record]) -> tuple[Array, Array]:
    """Return the positions of a parameter that any of the records touches, and the values that ``wanted`` give them.

    Each is base + the sum of the updates (fp32, in the order of the records' ids), rounded once: the same whatever the
    order of switching, and the model's own value, bit for bit, where nothing is on.
    """
    touching = sorted({r.id: r for r in (*present, *wanted) if name in r.updates}.values(), key=lambda r: r.id)
    on = {r.id for r in wanted}
    if len(touching) == 1:
        only = touching[0]
        own = _base(only, name)
        return only.flat(name), _added(own, only.updates[name].numbers(working_dtype(own))) if only.id in on else own
    union, places = _united([r.flat(name) for r in touching])
    xp = namespace(union)
    own = xp.zeros(union.shape, dtype=_base(touching[0], name).dtype)
    change = xp.zeros(union.shape, dtype=xp.float64 if dtype_name(own) == "float64" else xp.float32)
    touched = xp.zeros(union.shape, dtype=xp.bool, device=device_of(union))
    for record, place in zip(touching, places, strict=True):
        own[place] = _base(record, name)
        if record.id in on:
            change[place] += record.updates[name].numbers(dtype_name(change))
            touched[place] = True
    values = xp.asarray(own, copy=True)
    values[touched] = _added(own[touched], change[touched])
    return union, values


def _united(flats: Sequence[Array]) -> tuple[Array, list[Array]]:
    """Return the union of ascending positions, and where each list stands in it."""
    xp = namespace(*flats)
    union = xp.sort(xp.unique_values(xp.concat(list(flats))))
    return union, [xp.searchsorted(union, flat) for flat in flats]


def _base(record: Record, name: str) -> Array:
    base = record.updates[name].base
    if base is None:
        raise FormatError("a record of a switch lacks the model's values", parameter=name, got=record.label)
    return base.read() if isinstance(base, Leaf) else base


def _added(own: Array, change: Array) -> Array:
    return down(up(own, working_dtype(own)) + change, dtype_name(own))


def touched_parameters(records: Sequence[Record]) -> list[str]:
    """Return the parameters that any of the records touches, in order."""
    return list(dict.fromkeys(name for r in records for name in r.updates))


def switch_report(
    model: Base, before: Sequence[Record], after: Sequence[Record], told: Sequence[str], *, dry_run: bool
) -> Report:
    """Return the figures of every parameter under the adapters that came or went."""
    changed = {r.id for r in before} ^ {r.id for r in after}
    records = {r.id: r for r in (*before, *after) if r.id in changed}
    rows = []
    for name in touched_parameters(list(records.values())):
        entries = sum(r.updates[name].nnz for r in records.values() if name in r.updates)
        overlap = _overlap([r.flat(name) for r in after if name in r.updates])
        rows.append({"name": name, "entries": entries, "share": entries / prod(model.shapes[name]), "overlap": overlap})
    total: dict[str, Any] = {
        "modules": len(rows),
        "entries": sum(row["entries"] for row in rows),
        "overlap": sum(row["overlap"] for row in rows),
    }
    extra = {"on": [r.label for r in after], "dry_run": dry_run}
    return Report("loratools.switch/1", tuple(rows), total, UNITS, tuple(told), extra=extra)


def _overlap(flats: Sequence[Array]) -> int:
    """Return how many positions more than one list holds, counted for every further list."""
    if len(flats) < 2:
        return 0
    xp = namespace(*flats)
    return sum(int(f.shape[0]) for f in flats) - int(xp.unique_values(xp.concat(list(flats))).shape[0])
