"""What the readers of papers' checkpoints share: the tensors, the settings that no file holds, the base, the result."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar, TypeVar

from loratools.core.update import Leaf, Update
from loratools.errors import FormatError, MissingScaleError, NeedsBaseError, UsageError
from loratools.io.base import Base
from loratools.registry import Registry

Parts = dict[str, Leaf]


@dataclass
class Reading:
    """One checkpoint being read: ``settings`` and ``files`` are the manifest's; the rest is what has been found."""

    tensors: Mapping[str, Leaf]
    base: Base | None
    settings: Mapping[str, Any]
    files: Mapping[str, Any]
    updates: dict[str, Update] = field(default_factory=dict)
    used: dict[str, Parts] = field(default_factory=dict)
    layout: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    unmergeable: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, update: Update, parts: Mapping[str, Leaf], *, why: str | None = None, **said: Any) -> None:
        """Add the update of one parameter, made of the tensors ``parts`` (by key); ``why`` it cannot be merged."""
        if name in self.updates:
            raise FormatError("two modules of the file are one parameter", parameter=name)
        self.updates[name], self.used[name] = update, dict(parts)
        self.layout[name] = {"keys": {key: key for key in parts}, **said}
        if why is not None:
            self.unmergeable[name] = why

    def number(self, name: str, *, default: float | None = None, hint: str = "") -> float:
        """Return a number from the manifest's settings; :class:`MissingScaleError` where it is needed and not there."""
        value = self.settings.get(name, default)
        if value is None:
            expected = f"settings = {{{name} = NUMBER}} in a manifest{hint}"
            raise MissingScaleError(f"the checkpoint does not say {name}", expected=expected)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise FormatError(f"the manifest's {name} is no number", got=repr(value)[:80])
        return float(value)

    def word(self, name: str, choices: Iterable[str], default: str | None = None) -> str:
        """Return one of ``choices`` from the manifest's settings."""
        value, known = self.settings.get(name, default), tuple(choices)
        if value not in known:
            raise FormatError(f"the manifest's settings say no {name}", expected=" or ".join(known), got=value)
        return str(value)

    def place(self, names: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Look the parameters up in the base, where there is one; all at once, for prefixes are found together."""
        if self.base is not None:
            self.names |= self.base.resolve([*names, *optional], optional=tuple(optional))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a placed parameter in the base, None where it has none or there is no base."""
        return None if self.base is None or name not in self.names else self.base.shapes[self.names[name]]

    def weight(self, name: str, system: str) -> Leaf:
        """Return the base's parameter; :class:`NeedsBaseError` without a base."""
        if self.base is None or name not in self.names:
            what = f"a {system} checkpoint says the update by its base's values"
            raise NeedsBaseError(what, hint="pass --base").at(parameter=name)
        return self.base.leaf(self.names[name])


class System(ABC):
    """Reader of one system's checkpoints. ``settings`` are the words it asks a manifest for."""

    name: ClassVar[str] = ""
    settings: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Return whether the checkpoint is this system's, from keys and shapes alone."""

    @abstractmethod
    def read(self, r: Reading) -> None:
        """Add every update that the checkpoint says; raise for what it does not explain of its own keys."""

    def carries(self, key: str) -> bool:
        """Return whether a tensor that no update used belongs in such a checkpoint (the frozen model, a head)."""
        return False


_MODEL = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "position_ids", "cls_token",
          "pos_embed", "class_embedding", "positional_embedding", "logit_scale", "temperature")  # fmt: skip


def of_model(key: str) -> bool:
    """Return whether a key looks like a parameter of the frozen model or of its head, by its last segment."""
    return key.rpartition(".")[2] in _MODEL


S = TypeVar("S", bound=type[System])
SYSTEMS: Registry[System] = Registry("loratools.formats.papers", "paper's system")


def system(name: str) -> Any:
    """Class decorator: register a reader under the name that manifests use."""

    def register(cls: S) -> S:
        cls.name = name
        SYSTEMS.add(name)(cls())
        return cls

    return register


def modules(tensors: Mapping[str, Leaf], pattern: str) -> dict[str, dict[str, tuple[str, Leaf]]]:
    """Return module -> leaf -> (key, tensor) for keys that match ``pattern`` with groups ``module`` and ``leaf``."""
    found: dict[str, dict[str, tuple[str, Leaf]]] = {}
    search = re.compile(pattern)
    for key, leaf in tensors.items():
        if m := search.fullmatch(key):
            found.setdefault(m["module"], {})[m["leaf"]] = (key, leaf)
    return found


def need(parts: Mapping[str, tuple[str, Leaf]], module: str, *leaves: str) -> list[Leaf]:
    """Return the tensors of these leaves; :class:`FormatError` names what is missing, and what was found."""
    missing = [leaf for leaf in leaves if leaf not in parts]
    if missing:
        got = ", ".join(key for key, _ in parts.values())
        raise FormatError("a tensor of this module is missing", parameter=module, expected=", ".join(missing), got=got)
    return [parts[leaf][1] for leaf in leaves]


def keyed(parts: Mapping[str, tuple[str, Leaf]]) -> Parts:
    """Return key -> tensor."""
    return dict(parts.values())


def need_axes(leaf: Leaf, axes: int, module: str, what: str) -> Leaf:
    """Return a tensor, or raise :class:`FormatError` where it has another number of axes."""
    if len(leaf.shape) != axes:
        raise FormatError(f"{what} has another form", parameter=module, expected=f"{axes} axes", got=leaf.shape)
    return leaf


def need_shape(leaf: Leaf, shape: tuple[int, ...], module: str, what: str) -> Leaf:
    """Return a tensor, or raise :class:`FormatError` where it has another shape."""
    if leaf.shape != shape:
        raise FormatError(f"{what} has another shape", parameter=module, expected=shape, got=leaf.shape)
    return leaf


def refuse_settings(given: Iterable[str], known: tuple[str, ...], where: str) -> None:
    """Raise :class:`UsageError` for a setting that the reader does not have."""
    unknown = [name for name in given if name not in known]
    if unknown:
        expected = ", ".join(known) or "none"
        raise UsageError(f"the reader {where} has no such setting", expected=expected, got=", ".join(unknown))
