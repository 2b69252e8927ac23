"""What every format promises: a pair of pure functions between a bag of tensors and an Adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.registry import Registry


class Format(ABC):
    """One grammar of keys. A format never opens a file: it sees names, shapes, metadata and lazy leaves."""

    name: ClassVar[str]
    accepts: ClassVar[tuple[type[Update], ...]]
    one_rank: ClassVar[bool] = False
    """True where a file has one rank, so that smaller modules are padded to it."""

    @abstractmethod
    def declines(self, bundle: Bundle) -> str | None:
        """Return why the bundle is not of this format, or None to claim it; from keys, shapes and metadata only."""

    def holds(self, adapter: Adapter, name: str) -> bool:
        """True if the format can say this update exactly: its kind, and where formats differ, its convention."""
        return isinstance(adapter[name], self.accepts)

    @abstractmethod
    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Return the adapter; every tensor is converted, carried, or refused by name (:class:`FormatError`)."""

    @abstractmethod
    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Return the bundle to write; decode after encode is the identity."""


FORMATS: Registry[Format] = Registry("loratools.formats", "format")
