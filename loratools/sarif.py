"""Findings as SARIF 2.1.0 (code-scanning services) and as GitHub annotations (workflow logs). Data in, data out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from loratools.version import VERSION

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS = ("error", "warning", "note")
_COMMAND = {"error": "error", "warning": "warning", "note": "notice"}


@dataclass(frozen=True)
class Item:
    """One finding: a stable rule id, a level of :data:`LEVELS`, what to tell, the file, and the module if it is one."""

    id: str
    level: str
    message: str
    file: str
    module: str = ""
    help: str = ""


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
    """Yield one GitHub workflow command per finding: ``::error file=...,title=...::message``."""
    for item in items:
        message = _escaped(f"{item.message}{f' ({item.help})' if item.help else ''}")
        properties = f"file={_property(item.file)},title={_property(item.id)}"
        yield f"::{_COMMAND[item.level]} {properties}::{message}"


def _rule(item: Item) -> dict[str, Any]:
    rule: dict[str, Any] = {"id": item.id, "shortDescription": {"text": item.id}}
    return {**rule, "help": {"text": item.help}} if item.help else rule


def _result(item: Item, index: int) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(item.file)}}}
    if item.module:
        location["logicalLocations"] = [{"fullyQualifiedName": item.module, "kind": "module"}]
    return {
        "ruleId": item.id,
        "ruleIndex": index,
        "level": item.level,
        "message": {"text": item.message},
        "locations": [location],
    }


def _uri(file: str) -> str:
    from urllib.parse import quote

    return quote(file.replace("\\", "/"))


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
