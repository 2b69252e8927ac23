"""Findings as SARIF 2.1.0 (code-scanning services) and as GitHub annotations (workflow logs). Data in, data out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from loratools.version import VERSION

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS = ("error", "warning", "note")
MOST = 10
"""Lines of annotations: a GitHub runner shows ten per step."""
_COMMAND = {"error": "error", "warning": "warning", "note": "notice"}


class Item(NamedTuple):
    """One finding: a stable rule id, a level of :data:`LEVELS`, what to tell, the file, and the module if it is one.

    ``help`` is what to do about it, ``about`` what the rule is; they may be empty, and so may ``file``.
    """

    id: str
    level: str
    message: str
    file: str
    module: str = ""
    help: str = ""
    about: str = ""


def sarif(items: Iterable[Item]) -> dict[str, Any]:
    """Return a SARIF 2.1.0 log of one run, as JSON data; rules are listed once, in order of first use.

    Source: OASIS, Static Analysis Results Interchange Format (SARIF) Version 2.1.0.
    """
    listed = list(items)
    rules = {item.id: item for item in reversed(listed)}
    order = list(dict.fromkeys(item.id for item in listed))
    driver = {"name": "loratools", "version": VERSION, "rules": [_rule(rules[id]) for id in order]}
    run = {"tool": {"driver": driver}, "results": [_result(item, order.index(item.id)) for item in listed]}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def workflow_commands(items: Iterable[Item]) -> Iterator[str]:
    """Yield one GitHub workflow command per finding, ``::error file=...,title=...::message``; the worst, and a count.

    At most :data:`MOST` lines, errors first; the last one counts what is left out.
    """
    listed = sorted(items, key=lambda item: LEVELS.index(item.level))
    shown = listed if len(listed) <= MOST else listed[: MOST - 1]
    for item in shown:
        message = _escaped(f"{item.message}{f' ({item.help})' if item.help else ''}")
        place = f"file={_property(item.file)}," if item.file else ""
        yield f"::{_COMMAND[item.level]} {place}title={_property(item.id)}::{message}"
    if len(shown) < len(listed):
        left = listed[len(shown) :]
        yield f"::{_COMMAND[left[0].level]} title=loratools::{len(left)} more findings"


def _rule(item: Item) -> dict[str, Any]:
    rule: dict[str, Any] = {"id": item.id, "shortDescription": {"text": item.about or item.id}}
    return {**rule, "help": {"text": item.help}} if item.help else rule


def _result(item: Item, index: int) -> dict[str, Any]:
    location: dict[str, Any] = {}
    if item.file:
        location["physicalLocation"] = {"artifactLocation": {"uri": _uri(item.file)}}
    if item.module:
        location["logicalLocations"] = [{"fullyQualifiedName": item.module, "kind": "module"}]
    return {
        "ruleId": item.id,
        "ruleIndex": index,
        "level": item.level,
        "message": {"text": item.message},
        "locations": [location] if location else [],
    }


def _uri(file: str) -> str:
    """Return a relative path as it is, an absolute one as a file URI."""
    from pathlib import PurePath
    from urllib.parse import quote

    path = PurePath(file)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
