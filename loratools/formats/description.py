"""Reading the description in a native file: every value is checked once, against the fields of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from loratools.core.update import KINDS, Leaf, Update
from loratools.errors import FormatError, LoratoolsError, UsageError
from loratools.io.sidecar import parse_json

DEPTH = 16  # kinds inside kinds: real adapters have three
_JSON = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}


def parsed(text: str) -> Any:
    """Return the JSON value of a description; :class:`FormatError` where it is damaged or nested too deeply."""
    try:
        return parse_json(text.encode("utf-8", "surrogatepass"))
    except FormatError as error:
        what = f"the loratools description cannot be read: {error.what}"
        raise FormatError(what, got=error.got, hint=error.hint) from None


@dataclass
class Description:
    """The parsed description of a file; ``used`` collects the tensors that updates were made of."""

    said: Mapping[str, Any]
    tensors: Mapping[str, Leaf]
    used: set[str] = field(default_factory=set)

    def get(self, name: str, wanted: type, default: Any) -> Any:
        """Return a value of the description, of the type ``wanted``; null and nothing are the default."""
        value = self.said.get(name)
        return default if value is None else _need(value, wanted, name)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of strings."""
        return tuple(_need(text, str, f"{name}[{i}]") for i, text in enumerate(self.get(name, list, ())))

    def table(self, name: str, wanted: type) -> dict[str, Any]:
        """Return an object whose values are of the type ``wanted``."""
        return {key: _need(value, wanted, name, key) for key, value in self.get(name, dict, {}).items()}

    def updates(self) -> dict[str, Update]:
        """Return every update. Raises :class:`FormatError` that names the parameter and the field."""
        return {name: self._update(name, entry, "") for name, entry in self.table("updates", dict).items()}

    def tensor(self, name: str, key: Any, where: str) -> Leaf:
        """Return a tensor by its key, and remember that it is used."""
        found = self.tensors.get(key) if isinstance(key, str) else None
        if found is None:
            raise _broken(where, "the key of a tensor in this file", key, name)
        self.used.add(key)
        return found

    def _update(self, name: str, entry: Any, where: str) -> Update:
        cls = _kind(name, _need(entry, dict, where or "updates", name), where)
        at = f"{where}." if where else ""
        if at.count(".") > DEPTH:
            raise _broken(where[:40], f"at most {DEPTH} kinds inside each other", "more", name)
        said = _need(entry.get("fields"), dict, f"{at}fields", name)
        wanted = _fields(cls)
        for key in said.keys() ^ wanted.keys():
            if key in said or wanted[key][0]:
                expected = f"{at}{key}, a field of {cls.kind}" if key not in said else ", ".join(wanted)
                raise _broken(f"{at}fields", expected, ", ".join(said), name)
        values = {key: self._value(name, value, wanted[key][1], at + key) for key, value in said.items()}
        try:
            return cls(**values)
        except LoratoolsError as error:
            raise error.at(parameter=name) from None
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise _broken(where or cls.kind, "fields that fit each other", str(error), name) from None

    def _value(self, name: str, value: Any, wanted: Any, where: str) -> Any:
        """Return one field: a number, numbers, a tensor, an update or several."""
        if get_origin(wanted) is tuple:
            item = get_args(wanted)[0]
            parts = enumerate(_need(value, list, where, name))
            return tuple(self._value(name, part, item, f"{where}[{i}]") for i, part in parts)
        if wanted in _NUMBERS:
            expected, holds = _NUMBERS[wanted]
            if isinstance(value, bool) or not holds(value) or (value == 0 and where.rpartition(".")[2][:6] == "shape["):
                raise _broken(where, expected, value, name)
            return value
        if isinstance(wanted, type) and issubclass(wanted, Update):
            update = self._update(name, value, where)
            if not isinstance(update, wanted):
                raise _broken(where, f"a kind of {wanted.__name__}", update.kind, name)
            return update
        return self.tensor(name, _need(value, dict, where, name).get("tensor"), where)


_NUMBERS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number from 0 (sizes from 1)", lambda v: isinstance(v, int) and 0 <= v < 1 << 62),
    float: ("a finite number", lambda v: isinstance(v, int | float) and abs(v) < 1e308),  # false for NaN
}


@cache
def _fields(cls: type[Update]) -> dict[str, tuple[bool, Any]]:
    """Return field name -> (must be said, type) of a kind."""
    hints = get_type_hints(cls)
    said: tuple[Field[Any], ...] = fields(cls)  # type: ignore[arg-type]  # every kind is a dataclass
    return {f.name: (f.default is MISSING and f.default_factory is MISSING, hints[f.name]) for f in said}


def _kind(name: str, entry: Mapping[str, Any], where: str) -> type[Update]:
    kind = _need(entry.get("kind"), str, f"{where}.kind" if where else "kind", name)
    try:
        return KINDS[kind]
    except UsageError as error:
        raise FormatError(error.what, parameter=name, expected=error.expected, hint=error.hint) from None


def _need(value: Any, wanted: type, where: str, name: str | None = None) -> Any:
    if not isinstance(value, wanted):
        raise _broken(where, _JSON[wanted], value, name)
    return value


def _broken(where: str, expected: str, got: object, name: str | None = None) -> FormatError:
    what = f"the loratools description is broken at {where}"
    return FormatError(what, parameter=name, expected=expected, got=repr(got)[:80])
