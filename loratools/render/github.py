"""Failed gates as annotations of a GitHub Actions run: lines that the runner turns into notes on the check."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.gates import Gate, failing
from loratools.render.sarif import sentence
from loratools.report import Report

MOST = 10
"""The runner shows ten errors per step."""


def commands(report: Report, gates: Sequence[Gate]) -> list[str]:
    """Return one workflow command per failure, at most ten and one that counts the rest."""
    path = next((str(row["path"]) for row in reversed(report.inputs) if row.get("path")), None)
    found = failing(gates, report)
    lines = [_line(sentence(*failure), path) for failure in found[: MOST if len(found) <= MOST else MOST - 1]]
    return lines if len(found) <= MOST else [*lines, _line(f"{len(found) - len(lines)} more gates failed", path)]


def _line(message: str, path: str | None) -> str:
    place = f" file={_property(path)},title=loratools" if path else " title=loratools"
    return f"::error{place}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
