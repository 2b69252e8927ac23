"""The fields of an ``adapter_config.json`` that a type asks for, one by one: a wrong one is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.errors import FormatError
from loratools.formats.peft import config as said
from loratools.formats.peft.patterns import resolver


@dataclass(frozen=True)
class Fields:
    """A config. ``default`` stands for a field that is missing or null; without one, a missing field is refused."""

    config: Mapping[str, Any]

    def number(self, field: str, default: float | None = None) -> float:
        """Return a finite number."""
        return said.number(self._value(field, default), field)

    def integer(self, field: str, default: int | None = None, least: int = 0) -> int:
        """Return an integer of at least ``least``."""
        value = self._value(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            expected = f"an integer of at least {least}"
            raise FormatError(
                f"adapter_config.json: {field} is no such number", expected=expected, got=repr(value)[:80]
            )
        return value

    def flag(self, field: str, default: bool = False) -> bool:
        """Return true or false."""
        return default if self.config.get(field) is None else said.flag(self.config, field)

    def text(self, field: str, default: str) -> str:
        """Return a string."""
        value = self._value(field, default)
        if not isinstance(value, str):
            raise FormatError(f"adapter_config.json: {field} is no string", got=repr(value)[:80])
        return value

    def matched(self, pattern: str, path: str, default: float) -> float:
        """Return the value of a pattern field (``alpha_pattern``) for a module path."""
        table = {key: said.number(v, f"{pattern}[{key!r}]") for key, v in said.table(self.config, pattern)}
        return resolver(table, default, pattern)(path)

    def _value(self, field: str, default: Any) -> Any:
        value = self.config.get(field)
        if value is None and default is None:
            raise FormatError(f"adapter_config.json does not say {field}", expected=f"{field}, a number")
        return default if value is None else value
