"""The types of PEFT adapters: ``@peft_type("LORA")`` registers a reader and, where it has one, a writer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from loratools.core.adapter import Adapter
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.registry import Registry


class PeftType(Protocol):
    """A reader and writer of one ``peft_type``."""

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Return the adapter."""

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Return the bundle to write."""


T = TypeVar("T", bound=type[PeftType])
PEFT_TYPES: Registry[PeftType] = Registry("loratools.formats.peft", "peft_type")


def peft_type(name: str) -> Callable[[T], T]:
    """Class decorator: register an instance as the handler of ``peft_type`` ``name``."""

    def register(cls: T) -> T:
        PEFT_TYPES.add(name)(cls())
        return cls

    return register
