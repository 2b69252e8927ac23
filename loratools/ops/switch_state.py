"""What a switched model remembers: the adapters that are on, each with the model's own values under its entries.

A hidden directory beside (or in) the model holds one record per adapter, a native file of sparse updates with ``base``,
named by a hash of its content; ``state.json`` lists the records that are on; ``journal.json`` exists while a switch is
under way and lists those that will be on. New values follow from the records alone, so a switch that was killed is
completed by doing it again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from loratools.core.adapter import Adapter, Meta
from loratools.core.update import Array, Leaf, namespace
from loratools.errors import FormatError
from loratools.files import load, save
from loratools.io.atomic import sync
from loratools.io.oserrors import os_errors
from loratools.io.sidecar import read_json
from loratools.io.write import write_text
from loratools.kinds.sparse import Sparse
from loratools.linalg.namespace import device_of, down, dtype_name, up, working_dtype

STATE, JOURNAL, LOCK = "state.json", "journal.json", "lock"
VERSION = 1
Records = Mapping[str, "Record"]


class Record:
    """An adapter that is on: parameter of the model -> sparse update whose ``base`` are the model's own values."""

    def __init__(self, id: str, label: str, updates: Mapping[str, Sparse]) -> None:
        self.id, self.label, self.updates = id, label, updates

    @cached_property
    def flat(self) -> Mapping[str, Array]:
        """Row-major positions by parameter."""
        return {name: u.flat() for name, u in self.updates.items()}


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
        return only.flat[name], _added(own, only.updates[name].numbers(working_dtype(own))) if only.id in on else own
    union, places = united_places([r.flat[name] for r in touching])
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


def united_places(flats: Sequence[Array]) -> tuple[Array, list[Array]]:
    """Return the union of ascending positions, and where each list stands in it."""
    xp = namespace(*flats)
    union = xp.sort(xp.unique_values(xp.concat(list(flats))))
    return union, [xp.searchsorted(union, flat) for flat in flats]


def _base(record: Record, name: str) -> Array:
    base = record.updates[name].base
    if base is None:
        raise FormatError("a record of a switch lacks the model's values", parameter=name, got=record.label)
    return read(base)


def read(t: Leaf | Array) -> Array:
    """Return a tensor in memory, in its storage dtype."""
    return t.read() if isinstance(t, Leaf) else t


def _added(own: Array, change: Array) -> Array:
    return down(up(own, working_dtype(own)) + change, dtype_name(own))


def touched_parameters(records: Sequence[Record]) -> list[str]:
    """Return the parameters that any of the records touches, in order."""
    return list(dict.fromkeys(name for r in records for name in r.updates))


class State:
    """The hidden directory of one model."""

    def __init__(self, model: Path) -> None:
        self.path = model / ".loratools-switch" if model.is_dir() else model.with_name(f".{model.name}.switch")

    def open(self) -> None:
        """Make the directory."""
        with os_errors("create a directory beside the model", self.path):
            self.path.mkdir(exist_ok=True)

    def on(self) -> dict[str, str]:
        """Return id -> label of the records that are on."""
        return self._listed(STATE, "on")

    def pending(self) -> tuple[dict[str, str], dict[str, str]] | None:
        """Return what was on and what will be on of a switch that did not end, or None."""
        if not (self.path / JOURNAL).exists():
            return None
        return self._listed(JOURNAL, "from"), self._listed(JOURNAL, "to")

    def _listed(self, file: str, key: str) -> dict[str, str]:
        path = self.path / file
        if not path.exists():
            return {}
        said = read_json(path)
        listed = said.get(key)
        if said.get("version") != VERSION or not isinstance(listed, dict):
            raise FormatError("the state of a switched model cannot be read", file=path, expected=f"version {VERSION}")
        return {str(id): str(label) for id, label in listed.items()}

    def record(self, id: str, label: str) -> Record:
        """Open a record. Raises FileError and FormatError."""
        adapter = load(self.path / f"{id}.safetensors", format="native")
        updates = {name: u for name, u in adapter.items() if isinstance(u, Sparse)}
        return Record(id, label, updates)

    def keep(self, record: Record) -> None:
        """Store a record, complete or not at all."""
        adapter = Adapter(dict(record.updates), Meta(history=(record.label,)))
        save(adapter, self.path / f"{record.id}.safetensors", format="native", overwrite=True)

    def begin(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        """Write the journal: from here on the switch will be completed."""
        self._write(JOURNAL, {"from": dict(before), "to": dict(after)})

    def finish(self, after: Mapping[str, str]) -> None:
        """Write the state, then forget the journal and records that are not needed; with nothing on, everything."""
        self._write(STATE, {"on": dict(after)})
        with os_errors("remove the journal", self.path):
            (self.path / JOURNAL).unlink(missing_ok=True)
        sync(self.path)
        for path in self.path.glob("*.safetensors"):
            if path.stem not in after:
                path.unlink(missing_ok=True)
        if not after:
            shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, file: str, said: Mapping[str, Any]) -> None:
        write_text(self.path / file, json.dumps({"version": VERSION, **said}, indent=1) + "\n", overwrite=True)
