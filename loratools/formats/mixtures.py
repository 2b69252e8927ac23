"""Routed mixtures of adapters: what a router chooses among, read apart from it. docs/collapse.md

| layout | keys | becomes |
|---|---|---|
| MixLoRA | ``mixlora.layers.0.experts.3.up_proj.lora_A.weight``, ``gate.weight`` | ``model.layers.0.mlp.up_proj`` |
| numbered factors | ``<path>.lora_A.3.weight``, or ``lora_A.weight`` where it is shared | ``<path>`` |
| numbered experts | ``<path>.experts.3.<layer>.lora_A.weight`` | ``<path>.<layer>`` |
| a manifest | ``[[update]]`` with ``experts = "e"`` | its ``name`` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from loratools.core.update import Delta, Leaf, Update
from loratools.errors import FormatError, MissingScaleError
from loratools.formats.expressions import names_in
from loratools.formats.manifest import bindings, entries, one, said_in
from loratools.formats.peft.config import base_name, flag, number
from loratools.io.bundle import Bundle
from loratools.kinds.lowrank import LowRank

_MIXLORA = re.compile(r"mixlora\.layers\.(\d+)\.(?:experts\.(\d+)|self_attn)\.(\w+)\.lora_([AB])\.weight")
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.(?:(?:expert|experts)\.)?(\d+)\.weight")
_SHARED = re.compile(r"(.+)\.lora_([AB])\.weight")
_EXPERT = re.compile(r"(.+)\.(?:lora_)?experts\.(\d+)\.(.+)\.lora_([AB])\.weight")
_ROUTER = re.compile(r".+\.(?:gate|router|moe_gate|lora_route|lora_router)\.weight")
OUTPUTS = "experts that end in a nonlinear layer are mixed by their outputs: one expert is exact, several are not"
UNTOLD = "the file does not say where expert outputs meet: several experts are exact where that is behind one layer"
Pairs = dict[str, dict[int | None, dict[str, tuple[str, Leaf]]]]  # parameter -> expert -> A or B -> (key, tensor)


@dataclass(frozen=True)
class Mixture:
    """``experts`` are the updates of every parameter, in the order of ``numbers``; ``plain`` what no router touches.

    ``linear``: several experts at once are the sum of their updates, as far as the file tells; ``remarks`` say why not.
    """

    experts: Mapping[str, tuple[Delta, ...]]
    numbers: tuple[int, ...]
    plain: Mapping[str, Update] = field(default_factory=dict)
    routers: tuple[str, ...] = ()
    linear: bool = True
    remarks: tuple[str, ...] = ()
    base_id: str | None = None
    path: Path | None = None


def read_mixture(bundle: Bundle, *, scale: float | None = None) -> Mixture:
    """Return the experts of a bundle; ``scale`` multiplies b @ a where no config says alpha and r.

    Raises :class:`FormatError` for a bundle without experts, for experts that a parameter lacks, and for tensors that
    no rule explains; :class:`MissingScaleError` where nobody says the scale.
    """
    said = said_in(bundle)
    if said is not None:
        return _described(bundle, said)
    pairs, routers = _sorted(bundle.tensors)
    if not any(e is not None for experts in pairs.values() for e in experts):
        expected = "numbered experts, as MixLoRA saves them, or a manifest with experts"
        raise FormatError("no routed mixture", expected=expected, got=f"{len(bundle.tensors)} tensors")
    experts: dict[str, tuple[Delta, ...]] = {}
    plain: dict[str, Update] = {}
    numbers = sorted({e for by in pairs.values() for e in by if e is not None})
    for name, by in pairs.items():
        shared = by.get(None, {})
        own = {e: parts for e, parts in by.items() if e is not None}
        if not own:
            plain[name] = _pair(name, shared, bundle, scale)
            continue
        if sorted(own) != numbers:
            raise FormatError("experts are missing", parameter=name, expected=numbers, got=sorted(own))
        experts[name] = tuple(_pair(name, {**shared, **own[e]}, bundle, scale) for e in numbers)
    mixlora = any(key.startswith("mixlora.") for key in bundle.tensors)
    nested = mixlora or any(_EXPERT.fullmatch(key) for key in bundle.tensors)
    remarks = (OUTPUTS,) if mixlora else (UNTOLD,) if nested else ()
    base = base_name(bundle.config or {})
    return Mixture(experts, tuple(numbers), plain, tuple(routers), not nested, remarks, base, bundle.path)


def _sorted(tensors: Mapping[str, Leaf]) -> tuple[Pairs, list[str]]:
    pairs: Pairs = {}
    routers = [key for key in tensors if _ROUTER.fullmatch(key)]
    unknown: list[str] = []
    for key, leaf in tensors.items():
        place = _place(key)
        if place is None:
            unknown += [] if key in routers else [key]
            continue
        name, expert, side = place
        pairs.setdefault(name, {}).setdefault(expert, {})[side] = (key, leaf)
    if unknown:
        raise FormatError(f"{len(unknown)} tensors that no rule of mixtures explains", got=", ".join(unknown[:3]),
                          hint="describe them in a manifest")  # fmt: skip
    return pairs, routers


def _place(key: str) -> tuple[str, int | None, str] | None:
    """Return (parameter, expert or None, A or B) of a key."""
    bare = key.removeprefix("base_model.model.")
    if m := _MIXLORA.fullmatch(bare):
        room = "self_attn" if m[2] is None else "mlp"
        return f"model.layers.{m[1]}.{room}.{m[3]}.weight", None if m[2] is None else int(m[2]), m[4]
    if m := _EXPERT.fullmatch(bare):
        return f"{m[1]}.{m[3]}.weight", int(m[2]), m[4]
    if m := _FACTOR.fullmatch(bare):
        return f"{m[1]}.weight", int(m[3]), m[2]
    if m := _SHARED.fullmatch(bare):
        return f"{m[1]}.weight", None, m[2]
    return None


def _pair(name: str, parts: Mapping[str, tuple[str, Leaf]], bundle: Bundle, scale: float | None) -> LowRank:
    if parts.keys() != {"A", "B"}:
        got = ", ".join(key for key, _ in parts.values())
        raise FormatError("half of a factor pair is missing", parameter=name, expected="lora_A and lora_B", got=got)
    a, b = parts["A"][1], parts["B"][1]
    return LowRank(b, a, _scale(bundle.config or {}, a.shape[0]) if scale is None else scale)


def _scale(config: Mapping[str, Any], rank: int) -> float:
    if "lora_alpha" not in config:
        raise MissingScaleError(
            "no config says lora_alpha", expected="alpha / r of the training", hint="--scale NUMBER"
        )
    alpha = number(config["lora_alpha"], "lora_alpha")
    return alpha / (sqrt(rank) if flag(config, "use_rslora") else rank)


def _described(bundle: Bundle, said: Mapping[str, Any]) -> Mixture:
    """Return the mixture that a manifest describes: every value of the experts' placeholder is one expert."""
    experts: dict[str, tuple[Delta, ...]] = {}
    plain: dict[str, Update] = {}
    used: set[str] = set()
    every: set[tuple[int, ...]] = set()
    for entry in entries(said):
        free = entry.get("experts", "")
        for bound in bindings(entry, bundle.tensors, free):
            if not free:
                name, update, made_of = one(entry, bundle.tensors, bound)
                plain[name] = update
                used |= made_of.keys()
                continue
            numbers = _numbers(entry, bundle.tensors, bound, free)
            every.add(numbers)
            made: list[Delta] = []
            for e in numbers:
                name, update, made_of = one(entry, bundle.tensors, {**bound, free: str(e)})
                used |= made_of.keys()
                if not isinstance(update, Delta):
                    raise FormatError("an expert is no difference", parameter=name, got=update.kind)
                made.append(update)
            experts[name] = tuple(made)
    if len(every) != 1:
        raise FormatError("every parameter has experts of its own", expected="the same ones", got=sorted(every))
    unknown = [key for key in bundle.tensors if key not in used and not _ROUTER.fullmatch(key)]
    if unknown and not said.get("carry"):
        raise FormatError(f"{len(unknown)} tensors that the manifest does not name", got=", ".join(unknown[:3]))
    routers = tuple(key for key in bundle.tensors if _ROUTER.fullmatch(key))
    return Mixture(experts, every.pop(), plain, routers, base_id=said.get("base"), path=bundle.path)


def _numbers(
    entry: Mapping[str, Any], tensors: Mapping[str, Leaf], bound: Mapping[str, str], free: str
) -> tuple[int, ...]:
    """Return which experts the weights know, for the first name of the expression that numbers them."""
    named = [name for name in names_in(entry.get("delta")) if f"{{{free}}}" in name]
    if not named or f"{{{free}}}" in entry["name"]:
        expected = f"{{{free}}} in the expression, not in the name"
        raise FormatError("experts are numbered in the tensors", parameter=entry["name"], expected=expected)
    text = re.escape(named[0]).replace(re.escape(f"{{{free}}}"), r"(\d+)")
    for place, value in bound.items():
        text = text.replace(re.escape(f"{{{place}}}"), re.escape(value))
    found = sorted({int(m[1]) for key in tensors if (m := re.fullmatch(text, key))})
    if not found:
        raise FormatError("no expert among the weights", parameter=entry["name"], expected=named[0])
    return tuple(found)
