"""What commands on several adapters share: reading them against one base, and lists of settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from loratools.cli import _options, _session
from loratools.core.adapter import Adapter
from loratools.core.update import tensors
from loratools.errors import UsageError
from loratools.files import load
from loratools.io.base import Base
from loratools.linalg.namespace import device_of


def read(paths: Sequence[Path], reading: _options.Reading, device: str = "cpu") -> tuple[list[Adapter], Base | None]:
    """Load all adapters; the base is opened once (``auto``: as the first one names it)."""
    first, opened = _session.read(paths[0], reading, device)
    unknown, order = reading.allow_unknown, _options.expert_order()
    rest = [
        load(path, format=reading.format, base=opened, allow_unknown=unknown, expert_order=order) for path in paths[1:]
    ]
    return [first, *(adapter if device == "cpu" else adapter.to(_place(first)) for adapter in rest)], opened


def _place(adapter: Adapter) -> str:
    """Return the device of an adapter that was moved as a whole."""
    return next(device_of(t) for u in adapter.values() for _, t in tensors(u))


def settings(pairs: Sequence[str]) -> dict[str, str]:
    """Return the names and values of ``--set name=value``. Raises UsageError for one without = and for repetitions."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError("--set does not parse", expected="name=value", got=pair)
        if name in found:
            raise UsageError(f"--set {name} is given twice", got=pair)
        found[name] = value.strip()
    return found


def require(context: click.Context, paths: Sequence[Path]) -> None:
    """Raise click's own error for a missing argument."""
    if not paths:
        raise click.UsageError("Missing argument 'IN...'.", context)
