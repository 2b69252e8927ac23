"""Fusion methods: one decorated pure function per file, with what it promises said beside its name.

A method takes the updates of one parameter and their weights and returns the fused update. Its keyword parameters are
its settings (``--set name=value``); ``seed`` and ``statistics`` are handed over by the caller to those that have them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from loratools.core.update import Delta
from loratools.errors import UsageError
from loratools.registry import Registry

F = TypeVar("F", bound=Callable[..., Delta])
HANDED_OVER = ("seed", "statistics")
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Between:
    """Range of a number, both ends included unless ``above``: then ``low`` itself is excluded."""

    low: float
    high: float = float("inf")
    above: bool = False

    def holds(self, value: float) -> bool:
        """Tell whether ``value`` lies inside."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = f"{'>' if self.above else '>='} {self.low:g}"
        return low if self.high == float("inf") else f"{low} and <= {self.high:g}"


Density = Annotated[float, Between(0, 1, above=True)]
"""Share of entries that stay."""


@dataclass(frozen=True)
class Parameter:
    """One setting of a method: its type, default, and the values it may have."""

    name: str
    type: type
    default: Any
    choices: tuple[str, ...] = ()
    between: Between | None = None
    optional: bool = False

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        words = " | ".join(self.choices) or {float: "a number", int: "an integer", bool: "true | false"}[self.type]
        return words + (f" {self.between}" if self.between else "") + (", or none" if self.optional else "")

    def value(self, given: Any) -> Any:
        """Return the checked value of what was given, as text or as a value. Raises UsageError."""
        if self.optional and (given is None or given == "none"):
            return None
        try:
            found = self._converted(given)
        except (KeyError, TypeError, ValueError):
            found = None
        right = found is not None and (not self.choices or found in self.choices)
        if not right or (self.between is not None and not self.between.holds(found)):
            raise UsageError(f"wrong value of {self.name}", expected=self.allowed, got=given)
        return found

    def _converted(self, given: Any) -> Any:
        if self.type is bool:
            return given if isinstance(given, bool) else _FLAGS[str(given).lower()]
        if self.type is str:
            return given if isinstance(given, str) else None
        if isinstance(given, bool):
            return None
        number = self.type(given)
        return number if isfinite(number) and number == float(given) else None


@dataclass(frozen=True)
class Method:
    """A fusion method and its promises.

    ``identity``: the settings with which one adapter at weight 1 gives itself, None where it never does.
    ``linear_limit``: the settings with which it is the plain weighted sum, None where it never is. ``gauge_free``:
    B -> B G, A -> G^-1 A changes nothing. ``ordered``: the order of the adapters matters. ``least`` .. ``most``: how
    many adapters.
    """

    name: str
    run: Callable[..., Delta]
    reference: str
    guarantee: str
    parameters: Mapping[str, Parameter]
    handed_over: frozenset[str]
    identity: Mapping[str, Any] | None = field(default_factory=dict)
    linear_limit: Mapping[str, Any] | None = None
    gauge_free: bool = True
    ordered: bool = False
    least: int = 1
    most: int | None = None

    @property
    def summary(self) -> str:
        """First sentence of the function's docstring."""
        return inspect.getdoc(self.run).partition("\n")[0]  # type: ignore[union-attr]

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return every parameter with its checked value. Raises UsageError for unknown names and wrong values."""
        from difflib import get_close_matches

        for name in given:
            if name not in self.parameters:
                close = get_close_matches(name, self.parameters, n=1)
                raise UsageError(
                    f"method {self.name!r} has no parameter {name!r}",
                    expected=", ".join(self.parameters) or "no parameters",
                    hint=f"did you mean {close[0]!r}?" if close else None,
                )
        return {name: p.value(given[name]) if name in given else p.default for name, p in self.parameters.items()}

    def check_count(self, count: int) -> None:
        """Raise UsageError for a number of adapters that the method cannot fuse."""
        if count < self.least or (self.most is not None and count > self.most):
            most = "" if self.most is None else f" to {self.most}"
            raise UsageError(
                f"method {self.name!r}: wrong number of adapters", expected=f"{self.least}{most}", got=count
            )


FUSIONS: Registry[Method] = Registry("loratools.fusion", "fusion method")


def fusion(name: str, *, reference: str, guarantee: str, **promises: Any) -> Callable[[F], F]:
    """Decorator: register ``f(deltas, weights, *, settings...) -> Delta``; promises as in :class:`Method`."""

    def register(f: F) -> F:
        hints = get_type_hints(f, include_extras=True)
        own = [p for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY]
        parameters = {p.name: _parameter(p.name, hints[p.name], p.default) for p in own if p.name not in HANDED_OVER}
        handed = frozenset(p.name for p in own if p.name in HANDED_OVER)
        FUSIONS.add(name)(Method(name, f, reference, guarantee, parameters, handed, **promises))
        return f

    return register


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    if optional:
        hint = next(part for part in get_args(hint) if part is not NoneType)
    between: Between | None = None
    if get_origin(hint) is Annotated:
        hint, between = get_args(hint)
    if get_origin(hint) is Literal:
        return Parameter(name, str, default, tuple(get_args(hint)), optional=optional)
    return Parameter(name, hint, default, between=between, optional=optional)


def check_statistics(statistics: Sequence[Any], count: int) -> None:
    """Raise UsageError unless there are as many statistics as adapters."""
    if len(statistics) != count:
        raise UsageError("one set of statistics per adapter is needed", expected=count, got=len(statistics))
