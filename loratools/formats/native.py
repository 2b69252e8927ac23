"""The native format, version 1: one safetensors file that holds every kind of update.

``__metadata__["loratools"]`` is a JSON object {"format": 1, "namespace", "base", "history", "updates"}; each update is
{"kind", "fields": {field: tensor key, number, list of numbers, or nested update}}. A kind serialises itself through its
dataclass fields, so a new kind needs no new container.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from loratools.core.adapter import Absorbed, Adapter, Meta
from loratools.core.update import Update, is_tensor
from loratools.errors import FormatError, UsageError
from loratools.formats.base import FORMATS, Format
from loratools.formats.description import Description, parsed
from loratools.formats.metadata import HISTORY, history_of
from loratools.io.base import Base
from loratools.io.bundle import Bundle

KEY = "loratools"
VERSION = 1


class Native(Format):
    """loratools' own files: exact for every kind."""

    name = "native"
    accepts = (Update,)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim files whose metadata carry our description."""
        return None if _description(bundle).get("updates") is not None else "no loratools description in its metadata"

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Rebuild every update from its description; tensors that it does not name are refused (or carried)."""
        why = self.declines(bundle)
        if why is not None:
            raise FormatError("this is no native file", got=why)
        said = Description(_description(bundle), bundle.tensors)
        if said.said.get("format") != VERSION:
            raise FormatError("unknown version of the native format", expected=VERSION, got=said.said.get("format"))
        updates = said.updates()
        absorbed = {name: _absorbed(name, kept, updates, said) for name, kept in said.table("absorbed", dict).items()}
        rest = {key: leaf for key, leaf in bundle.tensors.items() if key not in said.used}
        unknown = rest.keys() - set(said.texts("leftover"))
        if unknown and not allow_unknown:
            raise FormatError("tensors that the description does not name", got=", ".join(sorted(unknown)[:3]))
        meta = Meta(
            format=self.name,
            namespace=said.get("namespace", str, ""),
            base_id=said.get("base", str, None),
            config=said.get("config", dict, {}),
            metadata={k: v for k, v in bundle.metadata.items() if k not in (KEY, HISTORY)},
            layout=said.table("layout", dict),
            leftover=rest,
            history=(*history_of(bundle.metadata), *said.texts("history")),
            path=bundle.path,
            siblings=bundle.siblings,
            readme=bundle.readme,
            origin=said.get("origin", str, ""),
            scaled=said.get("scaled", bool, True),
            unmergeable=said.table("unmergeable", str),
            absorbed=absorbed,
        )
        return Adapter(updates, meta)

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Describe every update by its fields; tensors keep their storage dtypes."""
        if options:
            raise UsageError("the native format has no such option", got=", ".join(options))
        tensors: dict[str, Any] = {}
        updates = {name: _described(name, update, tensors) for name, update in adapter.items()}
        meta = adapter.meta
        absorbed = {name: kept for name, kept in meta.absorbed.items() if adapter.get(name) is kept.update}
        tensors |= {f"absorbed:{key}": t for kept in absorbed.values() for key, t in kept.tensors.items()}
        said = {
            "format": VERSION,
            "namespace": meta.namespace,
            "base": meta.base_id,
            "history": list(meta.history),
            "updates": updates,
            "layout": {name: dict(layout) for name, layout in meta.layout.items() if name in adapter},
            "config": dict(meta.config),
            "leftover": list(meta.leftover),
            "origin": meta.source,
            "scaled": meta.scaled,
            "unmergeable": {name: why for name, why in meta.unmergeable.items() if name in adapter},
            "absorbed": {name: {key: f"absorbed:{key}" for key in kept.tensors} for name, kept in absorbed.items()},
        }
        return Bundle(
            tensors={**tensors, **meta.leftover},
            metadata={**meta.metadata, KEY: json.dumps(said)},
            config=None,
            path=None,
            container="safetensors",
            siblings=(),
            readme=None,
        )


def _description(bundle: Bundle) -> Mapping[str, Any]:
    try:
        said = parsed(bundle.metadata.get(KEY, "{}"))
    except FormatError as error:
        raise error.at(file=bundle.path) from None
    return said if isinstance(said, dict) else {}


def _absorbed(name: str, kept: Mapping[str, Any], updates: Mapping[str, Update], said: Description) -> Absorbed:
    if name not in updates:
        raise FormatError("absorbed tensors of an update that is not described", parameter=name)
    return Absorbed(updates[name], {key: said.tensor(name, at, f"absorbed.{key}") for key, at in kept.items()})


def _described(key: str, update: Update, tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": update.kind,
        "fields": {
            f.name: _field(f"{key}.{f.name}", value, tensors)
            for f in fields(update)  # type: ignore[arg-type]  # every kind is a dataclass
            if (value := getattr(update, f.name)) is not None  # nothing is said by silence
        },
    }


def _field(key: str, value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, Update):
        return _described(key, value, tensors)
    if isinstance(value, tuple):
        return [_field(f"{key}.{i}", part, tensors) for i, part in enumerate(value)]
    if is_tensor(value):
        tensors[key] = value
        return {"tensor": key}
    return value


FORMATS.add("native")(Native())
