"""What an operation tells about its work: rows of figures, as data. No renderer computes anything.

The JSON form is a contract: figure names are the same in ``modules`` and in ``total``, numbers are numbers, and what is
not finite is written as null and named among the warnings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """Figures per module and in total. ``schema`` is e.g. ``loratools.squeeze/1``; ``units`` explains each figure."""

    schema: str
    modules: tuple[Row, ...] = ()
    total: Row = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    inputs: tuple[Row, ...] = ()
    output: Row | None = None
    checks: tuple[Row, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> Report:
        """Return a copy with the named fields replaced."""
        return replace(self, **changes)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one dict per module, ready for a DataFrame."""
        return [dict(row) for row in self.modules]

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON object as Python data (non-finite numbers as None plus a warning)."""
        from loratools import __version__

        lost: list[str] = []
        body = {
            "schema": self.schema,
            "loratools": __version__,
            "inputs": [_plain(row, "inputs", lost) for row in self.inputs],
            "output": None if self.output is None else _plain(self.output, "output", lost),
            "total": _plain(self.total, "total", lost),
            "modules": [_plain(row, str(row.get("name")), lost) for row in self.modules],
            "checks": [_plain(row, "checks", lost) for row in self.checks],
            **{key: _plain(value, key, lost) for key, value in self.extra.items()},
        }
        return {**body, "warnings": [*self.warnings, *(f"{place} is not finite; written as null" for place in lost)]}

    def to_json(self) -> str:
        """Return the documented JSON object as one line of text."""
        return json.dumps(self.to_dict(), allow_nan=False)


def _plain(value: Any, place: str, lost: list[str]) -> Any:
    """Reduce to JSON types, noting the places of non-finite numbers in ``lost``."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{place}.{k}", lost) for k, v in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, list | tuple):
        return [_plain(v, place, lost) for v in value]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return _plain(value.tolist(), place, lost)
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        lost.append(place)
        return None
    return str(value)
