"""What has been read of a PEFT file so far, whatever its type, and the adapter that it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratools.core.adapter import Absorbed, Adapter, Meta
from loratools.core.update import Leaf, Update
from loratools.errors import FormatError
from loratools.formats.metadata import HISTORY, history_of
from loratools.formats.peft.config import base_name
from loratools.formats.peft.extras import explained
from loratools.formats.peft.forms.form import Found, Remark
from loratools.formats.peft.keys import SAVED
from loratools.formats.peft.lora_sort import Parts, Sorted
from loratools.io.bundle import Bundle
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace import Replace


@dataclass
class Reading:
    """The fields of the adapter and its :class:`Meta`, filled module by module."""

    updates: dict[str, Update] = field(default_factory=dict)
    layout: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    absorbed: dict[str, Absorbed] = field(default_factory=dict)
    unmergeable: dict[str, str] = field(default_factory=dict)
    leftover: dict[str, Leaf] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    def add(self, path: str, parts: Parts | Mapping[str, tuple[str, Leaf]], one: Found) -> None:
        """Add one parameter that the module at ``path`` with these tensors changes."""
        if one.name in self.updates:
            raise FormatError("two modules change one parameter", parameter=one.name, got=path)
        self.updates[one.name] = one.update
        self.layout[one.name] = one.layout
        self.remarks.extend(one.remarks)
        self.leftover |= {parts[leaf][0]: parts[leaf][1] for leaf in one.idle}
        if one.absorbed:
            self.absorbed[one.name] = Absorbed(one.update, dict(parts.values()))
        if one.unmergeable is not None:
            self.unmergeable[one.name] = one.unmergeable

    def add_plain(self, found: Sorted, config: Mapping[str, Any], *, allow_unknown: bool) -> None:
        """Add the tensors with ordinary names: biases, saved modules, whole embeddings; others are refused by name."""
        for name, (key, leaf) in found.plain.items():
            if name in self.updates:
                self.updates[name] = Rebased(leaf, self.updates[name])
                self.layout[name] = {**self.layout[name], "base": key}
            elif explained(name, key, config, found.modules):
                self.updates[name] = Replace(leaf)
                self.layout[name] = {} if SAVED in key else {"key": key}
            elif allow_unknown:
                self.leftover[key] = leaf
                self.remarks.append(f"{key}: unknown tensor, carried untouched")
            else:
                raise FormatError(
                    "a tensor that the config does not explain",
                    parameter=key,
                    expected="a tensor of the adapter's type, a bias (bias=...), or a module listed in modules_to_save",
                    hint="--allow-unknown carries it through untouched",
                )

    def adapter(self, bundle: Bundle, remarks: Sequence[str]) -> Adapter:
        """Return the adapter with what the bundle says beyond its tensors."""
        config = bundle.config or {}
        if "others" in bundle.hints:
            remarks = [*remarks, f"there are adapters in {bundle.hints['others']}, too: each is read by its own path"]
        meta = Meta(
            format="peft",
            namespace="hf",
            base_id=base_name(config),
            config=config,
            metadata={k: v for k, v in bundle.metadata.items() if k != HISTORY},
            layout=self.layout,
            leftover=self.leftover,
            remarks=tuple(remarks),
            history=history_of(bundle.metadata),
            path=bundle.path,
            siblings=bundle.siblings,
            readme=bundle.readme,
            absorbed=self.absorbed,
            unmergeable=self.unmergeable,
        )
        return Adapter(self.updates, meta)
