from __future__ import annotations

import pytest

from loratools import gates
from loratools.errors import UsageError
from loratools.report import Report

REPORT = Report(
    "loratools.squeeze/1",
    modules=({"name": "a", "relative_error": 0.1, "energy": 0.9}, {"name": "b", "relative_error": 0.3, "energy": 0.7}),
    total={"relative_error": 0.2, "energy": 0.8},
)


@pytest.mark.parametrize(
    ("expr", "value", "ok", "module"),
    [
        ("relative_error>0.2", 0.3, False, "b"),
        ("relative_error > 0.4", 0.3, True, "b"),
        ("energy<0.8", 0.7, False, "b"),
        ("energy <= 0.5", 0.7, True, "b"),
        ("total.relative_error>=0.2", 0.2, False, None),
        ("total.energy<0.8", 0.8, True, None),
    ],
)
def test_worst_module_or_total(expr: str, value: float, ok: bool, module: str | None) -> None:
    (row,) = gates.check(gates.parse(expr), REPORT).checks
    assert (row["value"], row["ok"], row.get("module")) == (value, ok, module)


def test_a_list_of_gates() -> None:
    report = gates.check(gates.parse("relative_error>0.2, total.energy<0.8"), REPORT)
    assert [row["ok"] for row in report.checks] == [False, True]


def test_nan_fails_every_gate() -> None:
    report = Report("x", modules=({"name": "a", "energy": float("nan")},))
    assert not gates.check(gates.parse("energy<0"), report).checks[0]["ok"]


@pytest.mark.parametrize("text", ["", "energy", "energy<", "energy<<1", "energy<x", "energy<1,,", "__import__('os')<1"])
def test_nonsense_is_refused_with_its_position(text: str) -> None:
    with pytest.raises(UsageError, match="does not parse at character"):
        gates.parse(text)


@pytest.mark.parametrize("expr", ["enrgy<1", "total.enrgy<1", "name<1"])
def test_unknown_figures_list_the_known_ones(expr: str) -> None:
    with pytest.raises(UsageError) as caught:
        gates.check(gates.parse(expr), REPORT)
    assert "energy" in str(caught.value.expected)


def test_failing_places_as_items() -> None:
    report = Report(
        "loratools.diagnose/1",
        modules=tuple({"name": f"layer.{i}", "intruders": i} for i in range(20)),
        total={"effective_rank": 1.5},
        units={"intruders": "how many"},
        inputs=({"path": "out/adapter.safetensors"},),
    )
    found = gates.items(gates.parse("intruders>17, total.effective_rank<2, intruders>100"), report)
    assert [item.module for item in found] == ["layer.18", "layer.19", ""]
    assert {(item.id, item.about) for item in found[:2]} == {("intruders", "how many")}
    assert found[0].message == "intruders is 18 in layer.18: intruders>17"
    assert {item.file for item in found} == {"out/adapter.safetensors"}
