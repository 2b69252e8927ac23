"""``rank_pattern`` and ``alpha_pattern``: regular expressions over module paths; the first that matches wins.

PEFT matches ``^(.*\\.)?(KEY)$`` against the module path without ``base_model.model.``, in the order of the config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import comb, inf
from typing import Any, NamedTuple

from loratools.errors import FormatError

MAX_LENGTH = 1000
MAX_WORK = 1e9  # bounds the worst match by some 0.1 s: three open repeats on module paths of 120 characters
USUAL = 64  # characters of a module path
Node = tuple[Any, Any]  # operation and arguments, as Python's own parser of patterns returns them


def resolver(pattern: Mapping[str, float], default: float, field: str) -> Callable[[str], float]:
    """Return ``path -> value``. Raises :class:`FormatError` on patterns that do not compile or could run for ever.

    The latter is checked for paths of usual length at once, for longer ones when they are asked for.
    """
    compiled = [(_compiled(key, field), value) for key, value in pattern.items()]

    def value_of(path: str) -> float:
        return next((value for key, value in compiled if key.matches(path)), default)

    return value_of


def unused(pattern: Mapping[str, float], paths: Iterable[str], field: str) -> list[str]:
    """Return the keys that match no path."""
    known = list(paths)
    return [key for key in pattern if not any(map(_compiled(key, field).matches, known))]


def key_for(path: str, paths: Iterable[str]) -> str:
    """Return a pattern key that matches ``path`` alone: the path itself, else with its dots escaped, else anchored.

    A dot matches any character, so that ``a.b`` also names ``aXb``; and a key also names every path that it ends.
    """
    escaped = re.escape(path).replace(r"\-", "-")
    plain = escaped.replace(r"\.", ".")
    last, n = path.rpartition(".")[2], len(path)
    # only these can match: the last segment has no dots, and what goes before ends in one
    alike = [p for p in paths if p != path and p.endswith(last) and (len(p) == n or p[-n - 1 : -n] == ".")]
    keys = (plain, escaped, f"^{plain}", f"^{escaped}")
    return next((key for key in keys if not any(re.match(_anchored(key), p) for p in alike)), keys[-1])


@dataclass(frozen=True)
class _Cost:
    """How often matching may try again: ``opens`` repeats of any length share a path, ``choices`` are the others."""

    opens: float = 0
    choices: float = 1

    def __add__(self, after: _Cost) -> _Cost:
        return _Cost(self.opens + after.opens, self.choices * after.choices)

    def on(self, length: int) -> float:
        """Return in how many ways the pattern can be laid out along a path."""
        return inf if self.opens == inf else comb(length + int(self.opens), int(self.opens)) * self.choices


_FOR_EVER = _Cost(inf, inf)


class _Key(NamedTuple):
    """A compiled key with what it may cost."""

    key: str
    field: str
    regex: re.Pattern[str]
    cost: _Cost

    def matches(self, path: str) -> bool:
        """Match; raises :class:`FormatError` where that could take too long."""
        self.check(len(path))
        return self.regex.match(path) is not None

    def check(self, length: int) -> None:
        """Raise :class:`FormatError` unless paths of this length are matched soon."""
        if self.cost.on(length) * len(self.key) > MAX_WORK:
            raise FormatError(
                f"a key of {self.field} could backtrack for ever",
                expected=f"fewer repeats and options for paths of {length} characters, no open repeat inside another",
                got=self.key[:80],
            )


def _anchored(key: str) -> str:
    return rf"^(.*\.)?({key})$"


@lru_cache(maxsize=4096)
def _compiled(key: str, field: str) -> _Key:
    if len(key) > MAX_LENGTH:
        what = f"a key of {field} could backtrack for ever"
        raise FormatError(what, expected=f"at most {MAX_LENGTH} characters", got=key[:80])
    try:
        parsed = re._parser.parse(_anchored(key))  # type: ignore[attr-defined]  # not public, but the only one
        checked = _Key(key, field, re.compile(_anchored(key)), _cost(parsed))
    except (re.error, RecursionError, OverflowError) as error:
        got = f"{key[:80]!r}: {error}"
        raise FormatError(f"a key of {field} is no regular expression", got=got) from None
    checked.check(USUAL)
    return checked


def _cost(nodes: Iterable[Node]) -> _Cost:
    """Return the cost of a sequence: choices multiply, the one for PEFT's own prefix among them."""
    return sum((_cost_of(*node) for node in nodes), _Cost())


def _cost_of(operation: Any, said: Any) -> _Cost:
    match str(operation):
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            return _repeated(*said)
        case "BRANCH":
            return _branched(said[1])
        case "SUBPATTERN" | "ASSERT" | "ASSERT_NOT":
            return _cost(said[-1])
        case "ATOMIC_GROUP":
            return _cost(said)
        case "GROUPREF_EXISTS":
            return _branched([branch or () for branch in said[1:]])
    return _Cost()  # one character, a place, or a group again


def _repeated(least: Any, most: Any, nodes: Iterable[Node]) -> _Cost:
    inner, least, most = _cost(nodes), int(least), int(most)
    if inner == _Cost():
        return _Cost(1) if most >= USUAL and most > least else _Cost(0, most - least + 1)
    if most > USUAL:
        return _FOR_EVER
    return _Cost(inner.opens * most, inner.choices**most * (most - least + 1))


def _branched(branches: Iterable[Iterable[Node]]) -> _Cost:
    """Return the cost of alternatives: fixed words exclude each other, unless one begins another."""
    read = [list(branch) for branch in branches]
    words = [branch for branch in read if all(str(operation) == "LITERAL" for operation, _ in branch)]
    costs = [_cost(branch) for branch in read if branch not in words]
    nested = max((sum(a[: len(b)] == b for b in words) for a in words), default=0)
    return _Cost(max((c.opens for c in costs), default=0), nested + sum(c.choices for c in costs))
