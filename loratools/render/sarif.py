"""Failed gates as SARIF 2.1.0: what code hosts and reviewers' tools show beside a change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratools.gates import Gate, failing
from loratools.report import Report
from loratools.version import VERSION

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(report: Report, gates: Sequence[Gate]) -> dict[str, Any]:
    """Return a SARIF log with one rule per gate and one result per place where it fails."""
    rules = [_rule(gate, report) for gate in gates]
    index = {gate.expr: i for i, gate in enumerate(gates)}
    results = [_result(gate, module, value, report, index[gate.expr]) for gate, module, value in failing(gates, report)]
    driver = {"name": "loratools", "version": VERSION, "rules": rules}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def sentence(gate: Gate, module: str | None, value: float) -> str:
    """Return one failure in words."""
    return f"{gate.name} is {value:g} in {module or 'total'}: {gate.expr}"


def _rule(gate: Gate, report: Report) -> dict[str, Any]:
    meaning = report.units.get(gate.name.removeprefix("total."), gate.name)
    return {
        "id": gate.name,
        "shortDescription": {"text": gate.expr},
        "fullDescription": {"text": meaning},
        "defaultConfiguration": {"level": "error"},
    }


def _result(gate: Gate, module: str | None, value: float, report: Report, rule: int) -> dict[str, Any]:
    path = next((row["path"] for row in reversed(report.inputs) if row.get("path")), None)
    place: dict[str, Any] = {}
    if path is not None:
        place["physicalLocation"] = {"artifactLocation": {"uri": _uri(path)}}
    if module is not None:
        place["logicalLocations"] = [{"fullyQualifiedName": module, "kind": "module"}]
    return {
        "ruleId": gate.name,
        "ruleIndex": rule,
        "level": "error",
        "message": {"text": sentence(gate, module, value)},
        "locations": [place] if place else [],
    }


def _uri(path: str) -> str:
    """Return a relative path as it is, an absolute one as a file URI."""
    from pathlib import PurePath
    from urllib.parse import quote

    pure = PurePath(path)
    return pure.as_uri() if pure.is_absolute() else quote(pure.as_posix())
