from __future__ import annotations

import pytest

from loratools import errors
from loratools.errors import LoratoolsError


def test_message_tells_the_whole_story() -> None:
    error = errors.FormatError("bad", expected="a", got="b", hint="do c").at(file="f.safetensors", parameter="q.weight")
    assert str(error) == "bad\n  file: f.safetensors\n  module: q.weight\n  expected: a\n  got: b\n  to do: do c"


def test_the_first_place_known_stays() -> None:
    error = errors.FormatError("bad", parameter="inner").at(parameter="outer", file="f")
    assert (error.parameter, error.file) == ("inner", "f")


def test_name_errors_are_not_printed_as_reprs() -> None:
    assert str(errors.NameUnresolvedError("no such name", got="x")) == "no such name\n  got: x"


@pytest.mark.parametrize("name", [n for n in dir(errors) if isinstance(getattr(errors, n), type)])
def test_every_error_has_the_root(name: str) -> None:
    cls = getattr(errors, name)
    if name.endswith("Error") and cls.__module__ == "loratools.errors":
        assert issubclass(cls, LoratoolsError)
