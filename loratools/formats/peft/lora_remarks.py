"""What is worth telling of a LORA file as a whole: where its config and its tensors disagree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratools.formats.peft.config import Settings, altered_words, base_name
from loratools.formats.peft.forms.embedding import EMBEDDING_A
from loratools.formats.peft.forms.form import MAGNITUDE, A, Module
from loratools.formats.peft.lora_sort import SAMPLER, Sorted
from loratools.formats.peft.orientation import contradicted
from loratools.formats.peft.patterns import unused


def remarks_of(found: Sorted, config: Mapping[str, Any], said: Settings, modules: Sequence[Module]) -> Iterator[str]:
    """Yield one line per oddity; the modules know the base's shapes, where there is a base."""
    yield from _base(config)
    yield from found.remarks
    for name in found.adapters:
        yield f"the adapter name {name!r} was left in the keys; it is taken out on writing"
    if SAMPLER.rstrip(".") in found.training:
        yield "MonteCLoRA's sampler serves training alone: it is left out where ranks change"
    yield from _magnitudes(config, modules)
    known = modules[0].known
    turned = contradicted(known.turned, said.fan_in_fan_out) if known.shapes else None
    if turned is not None:
        yield turned
    paths = [path for m in modules for path in known.wrapped.get(m.path, (m.path,))]
    for field in ("rank_pattern", "alpha_pattern"):
        idle = unused(getattr(said, field), paths, field)
        if idle:
            yield f"{field} has keys that match no module: {', '.join(idle[:3])}"


def _base(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield which base the adapter is relative to, where that is not the one of its name."""
    altered = altered_words(config)
    if altered is not None:
        yield (
            f"{altered} changed the base when training began: "
            "this adapter is only right on that altered base, not on the original one"
        )
    name = config.get("base_model_name_or_path")
    if name is not None and base_name(config) is None:
        yield f"base_model_name_or_path is no name ({repr(name)[:40]}): the base is taken as not named"


def _magnitudes(config: Mapping[str, Any], modules: Sequence[Module]) -> Iterator[str]:
    """Yield where ``use_dora`` and the magnitudes in the file disagree, and what PEFT would do."""
    factored = [m for m in modules if A in m or EMBEDDING_A in m]
    bare = [m.path for m in factored if MAGNITUDE not in m]
    coated, said = len(factored) - len(bare), bool(config.get("use_dora"))
    if coated and not said:
        yield (
            f"use_dora is not true, but {coated} of {len(factored)} modules have magnitudes: read as DoRA; "
            "PEFT would ignore the magnitudes"
        )
    if bare and said:
        yield (
            f"use_dora is true, but {len(bare)} of {len(factored)} modules have no magnitude, the first {bare[0]}: "
            "read as plain LoRA; PEFT would renormalise them to the norms of the base"
        )
