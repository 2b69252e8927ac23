"""The registry behind ``convert --type``: functions that say an adapter's updates in another parametrisation.

A type is ``f(adapter, settings...) -> Adapter``. It converts the weights of layers, carries what is none (biases, whole
parameters, rows of tokens), and refuses by name what it cannot say. Its report has one row per converted update:
``name``, ``relative_error`` (0 where exact) and whatever else is worth telling; ``total`` has ``relative_error`` of all
together. ``base``, ``rank`` and ``seed`` are handed over to those that name them; further parameters are its settings
(``--set name=value``). ``walk`` does what all types have in common.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from loratools.core.adapter import Adapter
from loratools.errors import UsageError
from loratools.files import BaseLike
from loratools.registry import Registry

F = TypeVar("F", bound=Callable[..., Adapter])
TYPES: Registry[Callable[..., Adapter]] = Registry("loratools.ops.types", "adapter type")
HANDED_OVER = ("base", "rank", "seed")


def adapter_type(name: str) -> Callable[[F], F]:
    """Decorator: register a function as the way to the type ``name``."""

    def register(run: F) -> F:
        TYPES.add(name)(run)
        return run

    return register


def settings_of(name: str) -> dict[str, inspect.Parameter]:
    """Return the settings of a type beyond base, rank and seed, from its signature."""
    return {key: p for key, p in _keywords(name).items() if key not in HANDED_OVER}


def summary_of(name: str) -> str:
    """Return the first sentence of a type's docstring."""
    return (inspect.getdoc(TYPES[name]) or "").partition("\n")[0]


def retyped(
    adapter: Adapter, name: str, *, base: BaseLike | None, rank: int | None, seed: int, settings: Mapping[str, Any]
) -> Adapter:
    """Return the adapter as the type ``name``, its report telling the error of every converted update.

    Raises UsageError for an unknown type, or for a rank or settings that the type does not have.
    """
    known = _keywords(name)
    wrong = [key for key in settings if key not in settings_of(name)] + (
        ["rank"] if rank is not None and "rank" not in known else []
    )
    if wrong:
        expected = ", ".join([*settings_of(name), *(["rank"] if "rank" in known else [])]) or "no settings"
        raise UsageError(f"type {name!r} has no such setting", expected=expected, got=", ".join(wrong))
    handed = {key: value for key, value in (("base", base), ("rank", rank), ("seed", seed)) if key in known}
    return TYPES[name](adapter, **handed, **settings)


def _keywords(name: str) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(TYPES[name]).parameters.items())[1:])
