"""Writing types other than LORA: the tensors that an update was read from, or projected onto, as they are.

An adapter says so through ``Meta.absorbed``; it holds as long as every update is the object that its tensors said.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.lazy import Tensor
from loratools.errors import UsageError
from loratools.formats.metadata import carried
from loratools.formats.peft.common_config import is_lora
from loratools.formats.peft.keys import PREFIX
from loratools.formats.peft.lora_targets import in_line
from loratools.io.bundle import Bundle
from loratools.kinds.replace import Replace


def stays(adapter: Adapter, name: str) -> bool:
    """True if the update is the one that the tensors of another type than LORA said."""
    kept = adapter.meta.absorbed.get(name)
    typed = adapter.meta.source == "peft" and not is_lora(adapter.meta.config)
    return typed and kept is not None and kept.update is adapter[name]


def is_typed(adapter: Adapter) -> bool:
    """True if some update stays so: the file will be of that type."""
    return any(stays(adapter, name) for name in adapter)


def is_verbatim(adapter: Adapter) -> bool:
    """True if all updates stay so, but for parameters stored whole."""
    return is_typed(adapter) and all(stays(adapter, name) or isinstance(u, Replace) for name, u in adapter.items())


def write(adapter: Adapter, **options: Any) -> Bundle:
    """Return the bundle of an adapter that :func:`is_verbatim`."""
    if options:
        raise UsageError("the PEFT format has no such option", got=", ".join(options))
    meta = adapter.meta
    rest = {name: u for name, u in adapter.items() if not stays(adapter, name)}
    tensors: dict[str, Tensor] = {}
    for name, u in adapter.items():
        if name not in rest:
            tensors |= meta.absorbed[name].tensors
        elif isinstance(u, Replace):
            tensors[meta.layout.get(name, {}).get("key") or PREFIX + name] = u.value
    typed = [name for name in adapter if name not in rest]
    paths = {meta.layout.get(name, {}).get("path", name.rpartition(".")[0]): True for name in typed}
    return Bundle(
        tensors={**tensors, **meta.leftover},
        metadata={"format": "pt", **carried(meta, "peft")},
        config=in_line(meta.config, replace(adapter, updates=rest), paths, ()),
        path=None,
        container="safetensors",
        siblings=meta.siblings,
        readme=meta.readme,
    )
