"""The format of papers' checkpoints: the system is told by its keys, or named by a manifest with what no file says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import FormatError
from loratools.formats.base import FORMATS, Format
from loratools.formats.kept import absorbed, is_untouched, written_back
from loratools.formats.manifest import files_in, said_in
from loratools.formats.modules import Found, refuse_options
from loratools.formats.papers.system import SYSTEMS, Reading, System, refuse_settings
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.io.manifest import FILES, KEY
from loratools.io.pickle import LEFT_OUT


class Papers(Format):
    """Checkpoints that papers' own code saved."""

    name = "papers"
    accepts: ClassVar[tuple[type[Update], ...]] = (Update,)

    def holds(self, adapter: Adapter, name: str) -> bool:
        """Only what was read from such a file and not changed."""
        return adapter.meta.source == self.name and is_untouched(adapter, name)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim what a manifest hands to a reader, and what one reader claims by its keys."""
        if KEY in bundle.metadata:
            return None if "reader" in (said_in(bundle) or {}) else "a manifest without a reader"
        return None if any(s.claims(bundle.tensors) for s in SYSTEMS.values()) else "no paper's keys"

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Hand over to the reader; what its rules do not explain is refused, or carried."""
        said = said_in(bundle) or {}
        chosen = _chosen(bundle, said)
        settings, files = said.get("settings", {}), files_in(bundle)
        refuse_settings(settings, chosen.settings, chosen.name)
        refuse_settings(files, chosen.files, chosen.name)
        r = Reading(bundle.tensors, base, settings, files)
        chosen.read(r)
        if not r.updates:
            raise FormatError(f"no update in this {chosen.name} checkpoint", got=f"{len(bundle.tensors)} tensors")
        if LEFT_OUT in bundle.metadata:
            r.remarks.append(f"the state of the training is left out: {bundle.metadata[LEFT_OUT]}")
        found = Found(r.updates, r.layout, remarks=[f"read as a checkpoint of {chosen.name}", *r.remarks])
        every = {key for parts in r.used.values() for key in parts}
        rest = {key: leaf for key, leaf in bundle.tensors.items() if key not in every}
        found.rest(rest, allow_unknown=allow_unknown, known=chosen.carries)
        metadata = {key: text for key, text in bundle.metadata.items() if key not in (KEY, FILES, LEFT_OUT)}
        config: dict[str, Any] = {"reader": chosen.name}
        config |= {"manifest": bundle.metadata[KEY], "files": bundle.metadata.get(FILES, "")} if said else {}
        adapter = found.adapter(
            replace(bundle, metadata=metadata), self.name, base, config=config, base_id=said.get("base"),
            unmergeable=r.unmergeable,
        )  # fmt: skip
        return replace(adapter, meta=replace(adapter.meta, absorbed=absorbed(dict(adapter), r.used)))

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Write back what was read; changed adapters become native files."""
        refuse_options(self.name, options)
        config = adapter.meta.config
        said = {KEY: config["manifest"]} if config.get("manifest") else {}
        return written_back(adapter, self.name, said | ({FILES: config["files"]} if config.get("files") else {}))


def _chosen(bundle: Bundle, said: dict[str, Any]) -> System:
    if "reader" in said:
        name = str(said["reader"])
        if name not in SYSTEMS:
            raise FormatError("the manifest names no known reader", expected=", ".join(SYSTEMS), got=name)
        return SYSTEMS[name]
    claims = [s for s in SYSTEMS.values() if s.claims(bundle.tensors)]
    if len(claims) != 1:
        got = (
            ", ".join(s.name for s in claims) or f"{len(bundle.tensors)} tensors: {', '.join(list(bundle.tensors)[:3])}"
        )
        hint = 'say which in a manifest: reader = "NAME"'
        raise FormatError("not the checkpoint of one known system", expected=", ".join(SYSTEMS), got=got, hint=hint)
    return claims[0]


FORMATS.add("papers")(Papers())
