"""What a rule looks at: the file as it is, the adapter that it means, and the base where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.pool import parallel_map
from loratools.core.update import Array, Leaf, Update
from loratools.errors import LoratoolsError
from loratools.formats.base import FORMATS
from loratools.formats.detect import detect
from loratools.formats.peft.keys import Key, parse
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.io.read import open_bundle
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg.namespace import is_float, namespace, to_numpy, up

Tensor = Leaf | Array


@dataclass(frozen=True)
class Subject:
    """One file. ``adapter`` is None where ``problem`` says why it cannot be read; ``limit`` is a server's for ranks."""

    path: Path
    bundle: Bundle
    format: str | None
    adapter: Adapter | None
    problem: LoratoolsError | None
    base: Base | None = None
    limit: int | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The sidecar, empty if there is none."""
        return self.bundle.config or {}

    @property
    def tensors(self) -> Mapping[str, Leaf]:
        """Tensors by their keys in the file."""
        return self.bundle.tensors

    @cached_property
    def keys(self) -> Mapping[str, Key]:
        """Every key as PEFT's grammar parses it."""
        return {key: parse(key) for key in self.tensors}

    @cached_property
    def updates(self) -> Mapping[str, Update]:
        """The updates by parameter name, empty where the file cannot be read."""
        return {} if self.adapter is None else self.adapter.updates

    @cached_property
    def factors(self) -> Mapping[str, LowRank]:
        """Module path -> its pair of factors (a magnitude's direction counts)."""
        pairs = {name: low_rank(u) for name, u in self.updates.items() if u.kind in ("lowrank", "dora")}
        return {self.module(name): u for name, u in pairs.items() if u is not None}

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """Module path as the file names it -> parameter name, for everything that adapts a weight."""
        return {self.module(name): name for name, u in self.updates.items() if u.kind not in ("replace", "dense")}

    @cached_property
    def nonfinite(self) -> tuple[str, ...]:
        """Keys of tensors with NaN or infinity; reads every floating tensor once."""
        return _where({k: t for k, t in self.tensors.items() if is_float(t.dtype)}, _is_nonfinite)

    @cached_property
    def idle(self) -> tuple[str, ...]:
        """Module paths whose ``b`` or ``a`` is all zeros; reads every factor once."""
        sides = [_where({path: side(u) for path, u in self.factors.items()}, _is_zero) for side in (_b, _a)]
        return tuple(dict.fromkeys(path for side in sides for path in side))

    def module(self, name: str) -> str:
        """Return the module path of a parameter as the file says it."""
        layout = {} if self.adapter is None else self.adapter.meta.layout.get(name, {})
        return str(layout.get("path") or name.removesuffix(".weight"))


def _where(tensors: Mapping[str, Tensor], test: Callable[[Tensor], bool]) -> tuple[str, ...]:
    flags = parallel_map(test, list(tensors.values()), weights=[int(t.nbytes) for t in tensors.values()])
    return tuple(key for key, flag in zip(tensors, flags, strict=True) if flag)


def _is_nonfinite(t: Tensor) -> bool:
    x = up(to_numpy(t))
    return not bool(namespace(x).all(namespace(x).isfinite(x)))


def _is_zero(t: Tensor) -> bool:
    x = up(to_numpy(t))
    return not bool(namespace(x).any(x != 0))


def _b(u: LowRank) -> Tensor:
    return u.b


def _a(u: LowRank) -> Tensor:
    return u.a


def read(path: Path, *, format: str | None = None, base: Base | None = None, limit: int | None = None) -> Subject:
    """Open a file for judging. A format that cannot be told or read is part of the subject, not an error.

    Raises FileError and FormatError where the bytes are no container of tensors.
    """
    bundle = open_bundle(path)
    name: str | None = format
    adapter: Adapter | None = None
    problem: LoratoolsError | None = None
    try:
        chosen = FORMATS[format] if format else detect(bundle)
        name = chosen.name
        adapter = chosen.decode(bundle, allow_unknown=True)
    except LoratoolsError as error:
        problem = error.at(file=bundle.path)
    return Subject(path, bundle, name, adapter, problem, base, limit)
