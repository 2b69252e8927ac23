"""What the file of a fused adapter says: the first input's words, where they still hold for the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratools.core.adapter import Adapter, Meta
from loratools.core.update import Array, Leaf, Update
from loratools.ops.fuse_inputs import WHOLE
from loratools.ops.touched import forgotten

TARGETS = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
SAVED = ("modules_to_save", "bias", "trainable_token_indices", "task_type")


Layout = Mapping[str, Mapping[str, Any]]
"""Parameter name -> how its file wrote it."""


def fused_meta(
    adapters: Sequence[Adapter],
    updates: Mapping[str, Update],
    leftover: Mapping[str, Leaf | Array],
    *,
    take: int | None,
) -> Meta:
    """Return the first input's meta: base id, layout and config completed from the others."""
    first = adapters[0].meta
    layout: dict[str, Mapping[str, Any]] = {}
    for adapter in adapters:
        if adapter.meta.source == first.source:
            layout = {**adapter.meta.layout, **layout}
    unmergeable = {name: why for a in adapters for name, why in a.meta.unmergeable.items()}
    return replace(
        first,
        base_id=next((a.meta.base_id for a in adapters if a.meta.base_id), None),
        layout={name: entry for name, entry in layout.items() if name in updates},
        config=_config(adapters, updates, layout, take) if first.source == "peft" else first.config,
        metadata=forgotten(first.metadata),
        leftover=leftover,
        remarks=(),
        absorbed={},
        unmergeable=unmergeable,
    )


def _config(
    adapters: Sequence[Adapter],
    updates: Mapping[str, Update],
    layout: Layout,
    take: int | None,
) -> dict[str, Any]:
    """Return the config of a PEFT result; ranks and scales are the writer's.

    Where the inputs' targets differ, the modules are named one by one: a union of patterns could mean more modules, and
    PEFT drops in silence what its patterns do not reach.
    """
    first = adapters[0].meta.config
    saved = adapters[take or 0].meta.config
    config = {**first, **{field: saved[field] for field in SAVED if field in saved}}
    config |= {"use_dora": False, "init_lora_weights": True, "lora_bias": any(_said(a, "lora_bias") for a in adapters)}
    if len({_targets(a) for a in adapters}) > 1:
        config = {key: value for key, value in config.items() if key not in TARGETS}
        config["target_modules"] = sorted(_path(name, layout) for name, u in updates.items() if u.kind not in WHOLE)
    return config


def _said(adapter: Adapter, field: str) -> bool:
    return bool(adapter.meta.config.get(field))


def _targets(adapter: Adapter) -> str:
    """Return what the config says about its targets, the order of names aside."""
    config = adapter.meta.config
    said = {field: config.get(field) for field in TARGETS}
    return repr({field: sorted(map(str, v)) if isinstance(v, list | tuple) else v for field, v in said.items()})


def _path(name: str, layout: Layout) -> str:
    return str(layout.get(name, {}).get("path", name.removesuffix(".weight")))
