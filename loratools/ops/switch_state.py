"""What a switched model remembers: the adapters that are on, each with the model's own values under its entries.

A hidden directory beside (or in) the model holds one record per adapter, a native file of sparse updates with ``base``,
named by a hash of its content; ``state.json`` lists the records that are on; ``journal.json`` exists while a switch is
under way and lists those that will be on. New values follow from the records alone, so a switch that was killed is
completed by doing it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loratools.core.adapter import Adapter, Meta
from loratools.errors import FormatError, LoratoolsError, UsageError
from loratools.files import load, save
from loratools.io.atomic import sync
from loratools.io.oserrors import os_errors
from loratools.io.shards import model_files, read_index
from loratools.io.sidecar import read_json
from loratools.io.write import write_text
from loratools.kinds.sparse import Sparse
from loratools.ops.switch_records import Record

STATE, JOURNAL, LOCK = "state.json", "journal.json", "lock"
WHOLE = ".loratools-switch"
VERSION = 1


class State:
    """The hidden directory of one model."""

    def __init__(self, model: Path) -> None:
        self.path = _home(model)

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
        """Write the state, then forget the journal and records that are not needed."""
        self._write(STATE, {"on": dict(after)})
        with os_errors("remove the journal", self.path):
            (self.path / JOURNAL).unlink(missing_ok=True)
        sync(self.path)
        for path in self.path.glob("*.safetensors"):
            if path.stem not in after:
                path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the directory if nothing is on and nothing pending, the lock last: until then it is ours alone."""
        if self.on() or self.pending() is not None:
            return
        for path in self.path.iterdir():
            if path.name != LOCK:
                path.unlink(missing_ok=True)
        (self.path / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # the next process is in it already
            self.path.rmdir()

    def _write(self, file: str, said: Mapping[str, Any]) -> None:
        write_text(self.path / file, json.dumps({"version": VERSION, **said}, indent=1) + "\n", overwrite=True)


def _home(model: Path) -> Path:
    """Return where the state of a model lies: one place, whether its directory or its only file is named.

    It lies beside the file, or in the directory of a model of several. Raises UsageError where a part of the model was
    switched by itself, or the whole of which this is a part.
    """
    if model.name.endswith(".index.json"):
        model = model.parent
    folder = model if model.is_dir() else model.parent
    whole, files = folder / WHOLE, _file_names(folder)
    if not model.is_dir():
        if whole.exists() and model.name in files:
            raise UsageError("this file was switched with its directory", file=model, hint=f"give {folder}")
        return _beside(model)
    if whole.exists() or len(files) == 1:
        return whole if whole.exists() else _beside(folder / files[0])
    alone = next((name for name in files if _beside(folder / name).exists()), None)
    if alone is not None:
        raise UsageError("a file of this model was switched by itself", file=folder / alone,
                         hint="switch everything off there first")  # fmt: skip
    return whole


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.switch")


def _file_names(folder: Path) -> list[str]:
    """Return the names of the weights files of a model directory; none where it is no such directory."""
    try:
        found = model_files(folder)
        return [path.name for path in (found if isinstance(found, tuple) else set(read_index(found).values()))]
    except LoratoolsError:
        return []
