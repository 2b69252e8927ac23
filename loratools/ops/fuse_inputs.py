"""What several adapters have in common: checked before any work, by names, shapes and what the files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path

from loratools.core.adapter import Adapter
from loratools.core.update import Delta, Update
from loratools.errors import MismatchError, MissingScaleError, NeedsBaseError, UnsupportedError, UsageError
from loratools.formats.peft.config import altered_words
from loratools.formats.spaces import worlds
from loratools.io.base import Base
from loratools.ops.altered import advice, initialisation
from loratools.ops.base_names import base_names
from loratools.ops.bottlenecks import refuse_bottlenecks
from loratools.ops.parts import layer_and_projection

NAMELESS = ("adapter_model", "adapters", "lora", "pytorch_lora_weights", "model")
"""File names that every adapter of a program has: its folder tells more."""

WHOLE = ("replace", "replace_rows", "rebased")
"""Kinds that store a parameter (or rows of it) whole: they have no weighted sum."""

Row = tuple[Update | None, ...]
"""The updates of one parameter, one per adapter; None where an adapter lacks it."""


def labels(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Return short names of the adapters, each once: folder or file, made longer where two agree, then numbered."""
    paths = [a.meta.path for a in adapters]
    short = [_short(path, i) for i, path in enumerate(paths)]
    if len(set(short)) < len(short):
        short = [
            name if path is None else f"{_home(path).parent.name}/{name}"
            for path, name in zip(paths, short, strict=True)
        ]
    return tuple(name if short.count(name) == 1 else f"{name}#{i + 1}" for i, name in enumerate(short))


def _home(path: Path) -> Path:
    return path.parent if path.stem in NAMELESS else path


def _short(path: Path | None, i: int) -> str:
    if path is None:
        return f"adapter {i + 1}"
    home = _home(path.absolute())
    return home.name if home != path.absolute() else home.stem


def checked_weights(count: int, weights: Sequence[float] | None) -> tuple[float, ...]:
    """Return one finite weight per adapter, 1 by default. Raises UsageError otherwise."""
    if count == 0:
        raise UsageError("no adapter to fuse", expected="at least one")
    found = (1.0,) * count if weights is None else tuple(float(w) for w in weights)
    if len(found) != count:
        raise UsageError("weights and adapters differ in number", expected=f"{count} weights", got=len(found))
    if not all(map(isfinite, found)):
        raise UsageError("a weight is not finite", got=list(found))
    return found


def check_bases(adapters: Sequence[Adapter], names: Sequence[str], *, same_base: bool) -> None:
    """Raise unless the adapters can be of one base: by declared ids, scales, altered bases, and shapes."""
    for adapter in adapters:
        refuse_bottlenecks(adapter)
    for adapter in adapters:
        if not adapter.meta.scaled:
            raise MissingScaleError(
                f"a {adapter.meta.source} file does not say how strongly its factors act",
                file=adapter.meta.path, hint="loratools convert IN --scale NUMBER says it",
            )  # fmt: skip
        init = initialisation(adapter.meta.config)
        if init is not None:
            raise UnsupportedError(
                f"{altered_words(adapter.meta.config)} changed the base when training began: this adapter acts on "
                "another base",
                file=adapter.meta.path, hint=advice(init),
            )  # fmt: skip
    tokens = [a.meta.config.get("alora_invocation_tokens") for a in adapters]
    if any(said != tokens[0] for said in tokens):
        raise UnsupportedError(
            "activated LoRAs act only after their own invocation: those of different ones cannot be one adapter",
            got="; ".join(f"{name}: {said}" for name, said in zip(names, tokens, strict=True))[:200],
        )
    declared = {name: a.meta.base_id for name, a in zip(names, adapters, strict=True) if a.meta.base_id}
    if len(set(declared.values())) > 1 and not same_base:
        raise _differences(
            "the adapters were trained on different bases",
            _first_unequal(declared),
            hint="pass --same-base if these ids mean one model (shapes are checked still)",
        )
    _check_shapes(adapters, names)


def _first_unequal(declared: Mapping[str, str]) -> list[str]:
    first = next(iter(declared.values()))
    other = [f"{name}: {base}" for name, base in declared.items() if base != first]
    return [f"{next(iter(declared))}: {first}, {text}" for text in other]


def _check_shapes(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    wrong = []
    for who, adapter in zip(names, adapters, strict=True):
        for name, u in adapter.items():
            if u.kind in WHOLE:
                continue
            first, shape = seen.setdefault(name, (who, u.shape))
            if shape != u.shape:
                wrong.append(f"{name}: {first} {shape}, {who} {u.shape}")
    if wrong:
        raise _differences("the adapters act on parameters of different shapes: their bases differ", wrong)


def _differences(what: str, found: Sequence[str], hint: str | None = None) -> MismatchError:
    """Return the error that names the first three differences and the count."""
    count = f"{len(found)} difference{'s' if len(found) > 1 else ''}"
    return MismatchError(f"{what} ({count})", got="; ".join(found[:3]), hint=hint)


def check_common(adapters: Sequence[Adapter], names: Sequence[str]) -> tuple[str, ...]:
    """Return remarks on adapters without a module in common; MismatchError where only their names are in the way."""
    spoken = {worlds(a): name for a, name in zip(adapters, names, strict=True) if len(a)}
    if len(spoken) > 1:
        raise MismatchError(
            "the adapters name their parameters in different ways",
            got="; ".join(f"{name}: {words}" for words, name in spoken.items()),
            hint="pass --base, or `loratools convert` them to one format first",
        )
    apart = [i for i, a in enumerate(adapters) if len(adapters) > 1 and not _meets(a, adapters, i)]
    for i in apart:
        others = {layer_and_projection(n)[1] for j, a in enumerate(adapters) if j != i for n in a}
        if others & {layer_and_projection(n)[1] for n in adapters[i]}:
            raise MismatchError(
                f"{names[i]} has no parameter in common with the others, although the projections are the same",
                got=f"{next(iter(adapters[i]))} and {next(iter(adapters[0 if i else 1]))}",
                hint="pass --base BASE, which settles the names",
            )
    return tuple(f"{names[i]} has no module in common with the others" for i in apart)


def _meets(adapter: Adapter, adapters: Sequence[Adapter], i: int) -> bool:
    return any(name in other for j, other in enumerate(adapters) if j != i for name in adapter)


def settled(adapters: Sequence[Adapter], base: Base | None) -> tuple[tuple[Adapter, ...], Mapping[str, str]]:
    """Return the adapters under common names, and their names in the base.

    Adapters keep their names unless two of them name one parameter of the base differently; then the base's are used.
    """
    if base is None:
        return tuple(adapters), {}
    found = [_in_base(a, base) for a in adapters]
    spelled: dict[str, set[str]] = {}
    for names in found:
        for own, there in names.items():
            spelled.setdefault(there, set()).add(own)
    if all(len(own) == 1 for own in spelled.values()):
        return tuple(adapters), {own: there for names in found for own, there in names.items()}
    renamed = tuple(_renamed(a, names) for a, names in zip(adapters, found, strict=True))
    return renamed, {name: name for names in found for name in names.values()}


def _in_base(adapter: Adapter, base: Base) -> Mapping[str, str]:
    """Return adapter name -> base name; stacks of experts may be missing, for many bases store them one by one."""
    names, missing = base_names(adapter, base, skip_missing=True)
    unknown = [name for name in missing if adapter[name].kind not in ("stack", "replace")]
    if unknown:
        raise MismatchError(
            f"{len(unknown)} of {len(adapter)} parameters are not in the base", file=adapter.meta.path,
            got=", ".join(unknown[:3]), hint="check that this is the base the adapters were trained on",
        )  # fmt: skip
    return names


def _renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    layout = {names.get(n, n): entry for n, entry in adapter.meta.layout.items()}
    updates = {names.get(n, n): u for n, u in adapter.items()}
    return replace(adapter, updates=updates, meta=replace(adapter.meta, layout=layout))


def rows_of(adapters: Sequence[Adapter]) -> dict[str, Row]:
    """Return the updates of every parameter, in the order in which the adapters bring them."""
    return {name: tuple(a.get(name) for a in adapters) for name in dict.fromkeys(n for a in adapters for n in a)}


def is_whole(row: Row) -> bool:
    """Tell whether an adapter stores the parameter, or rows of it, whole."""
    return any(u is not None and u.kind in WHOLE for u in row)


def check_coats(rows: Mapping[str, Row], base: Base | None) -> None:
    """Raise NeedsBaseError for updates that are defined only together with base weights (DoRA), without a base."""
    coats = [name for name, us in rows.items() for u in us if _is_coat(u)]
    if coats and base is None:
        kind = next(u.kind for us in rows.values() for u in us if u is not None and _is_coat(u))
        raise NeedsBaseError(
            f"{len(coats)} updates of kind {kind} are defined only together with the base weights",
            got=", ".join(coats[:3]), hint="pass --base BASE: then their true update is used",
        )  # fmt: skip


def _is_coat(u: Update | None) -> bool:
    return u is not None and not isinstance(u, Delta) and u.kind not in WHOLE


def true_updates(name: str, row: Row, base: Base | None, names: Mapping[str, str]) -> list[Delta | None]:
    """Return what every adapter adds to the parameter: a coat gives its true update on the base."""
    w = base[names.get(name, name)] if base is not None and any(map(_is_coat, row)) else None
    return [None if u is None else u if isinstance(u, Delta) else u.delta(w) for u in row]
