"""``--fail-on``: a list of comparisons over a report's figures, parsed without ``eval``.

Grammar: ``comparison ("," comparison)*``; comparison = ``[total.]figure op number``; op is one of > >= < <= == !=.
A bare figure is judged at its worst over the modules (the largest for > and >=, the smallest for < and <=, any for the
rest); ``total.figure`` is the total. A comparison that is true makes the gate fail.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools.errors import UsageError
from loratools.report import Report

if TYPE_CHECKING:
    from loratools.sarif import Item

_OPS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"\s*(?P<name>[a-z][a-z_.0-9]*)\s*(?P<op>>=|<=|==|!=|>|<)\s*(?P<number>[-+.0-9eE]+)\s*")


class Gate(NamedTuple):
    """One comparison: the gate fails where it is true."""

    expr: str
    name: str
    op: str
    number: float


def parse(text: str | None, figures: Collection[str] | None = None) -> tuple[Gate, ...]:
    """Return the comparisons of an expression list (none for None).

    Raises :class:`UsageError` with the position of the fault, and the names allowed where ``figures`` lists them.
    """
    if text is None:
        return ()
    gates: list[Gate] = []
    position = 0
    for piece in text.split(","):
        found = _COMPARISON.fullmatch(piece)
        number = _number(found["number"]) if found else None
        if found is None or number is None:
            raise UsageError(
                f"--fail-on does not parse at character {position + 1}",
                expected="FIGURE OP NUMBER, comma separated, as in 'relative_error>0.05, total.energy<0.9'",
                got=piece.strip() or "nothing",
                hint=None if figures is None else f"figures: {', '.join(figures)}",
            )
        if figures is not None and found["name"].removeprefix("total.") not in figures:
            what = f"--fail-on: no figure named {found['name']!r}, at character {position + 1 + found.start('name')}"
            raise UsageError(what, expected=", ".join(figures))
        gates.append(Gate(piece.strip(), found["name"], found["op"], number))
        position += len(piece) + 1
    return tuple(gates)


def check(gates: tuple[Gate, ...], report: Report) -> Report:
    """Return the report with one row per gate in ``checks``: expr, value, ok, and the module where it is a module's."""
    return report.with_(checks=tuple(_judged(gate, report) for gate in gates))


def failing(gates: Iterable[Gate], report: Report) -> list[tuple[Gate, str | None, float]]:
    """Return every place where a gate does not hold: (gate, module or None for the total, value)."""
    found: list[tuple[Gate, str | None, float]] = []
    for gate in gates:
        places: list[tuple[str | None, float]]
        if gate.name.startswith("total."):
            places = [(None, _figure(report.total, gate.name.removeprefix("total."), gate))]
        else:
            places = [(str(row["name"]), v) for row in report.modules if (v := row.get(gate.name)) is not None]
        found += [(gate, place, v) for place, v in places if not _verdict(gate, v, None)["ok"]]
    return found


def items(gates: Iterable[Gate], report: Report) -> list[Item]:
    """Return every place where a gate does not hold, for SARIF and annotations: the rule is the gate's figure."""
    from loratools.sarif import Item

    path = next((str(row["path"]) for row in reversed(report.inputs) if row.get("path")), "")
    return [
        Item(
            gate.name, "error", f"{gate.name} is {value:g} in {module or 'total'}: {gate.expr}", path, module or "",
            about=report.units.get(gate.name.removeprefix("total."), gate.name),
        )
        for gate, module, value in failing(gates, report)
    ]  # fmt: skip


def _judged(gate: Gate, report: Report) -> dict[str, Any]:
    total, _, figure = gate.name.rpartition(".")
    if total == "total":
        return _verdict(gate, _figure(report.total, figure, gate), None)
    values = [(v, str(row["name"])) for row in report.modules if (v := row.get(gate.name)) is not None]
    if not values or not isinstance(values[0][0], int | float):
        raise UsageError(f"--fail-on: no figure named {gate.name!r}", expected=", ".join(_names(report)))
    failing = [pair for pair in values if math.isnan(pair[0]) or _OPS[gate.op](pair[0], gate.number)]
    worst = (min if gate.op in ("<", "<=") else max)(failing or values, key=lambda pair: pair[0])
    return _verdict(gate, *worst)


def _verdict(gate: Gate, value: float, module: str | None) -> dict[str, Any]:
    ok = not (math.isnan(value) or _OPS[gate.op](value, gate.number))
    return {"expr": gate.expr, "value": value, "ok": ok, **({"module": module} if module else {})}


def _figure(total: Mapping[str, Any], figure: str, gate: Gate) -> float:
    value = total.get(figure)
    if not isinstance(value, int | float):
        names = [f"total.{k}" for k, v in total.items() if isinstance(v, int | float)]
        raise UsageError(f"--fail-on: no figure named {gate.name!r}", expected=", ".join(names))
    return value


def _names(report: Report) -> list[str]:
    row = report.modules[0] if report.modules else {}
    return [k for k, v in row.items() if isinstance(v, int | float)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
