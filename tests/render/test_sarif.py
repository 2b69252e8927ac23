"""Failed gates in the forms that code hosts read."""

from __future__ import annotations

from pathlib import Path

from loratools import gates
from loratools.render.github import MOST, commands
from loratools.render.sarif import sarif
from loratools.report import Report

REPORT = Report(
    "loratools.diagnose/1",
    modules=tuple({"name": f"layer.{i}", "intruders": i} for i in range(20)),
    total={"intruders": 190, "effective_rank": 1.5},
    units={"intruders": "how many"},
    inputs=({"path": "out/adapter: a,b.safetensors"},),
)


def test_one_rule_per_gate_and_one_result_per_place() -> None:
    chosen = gates.parse("intruders>17, total.effective_rank<2, intruders>100")
    log = sarif(REPORT, chosen)
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["intruders", "total.effective_rank", "intruders"]
    assert run["tool"]["driver"]["rules"][0]["fullDescription"]["text"] == "how many"
    places = [
        [where["fullyQualifiedName"] for where in r["locations"][0].get("logicalLocations", [])] for r in run["results"]
    ]
    assert places == [["layer.18"], ["layer.19"], []]
    assert run["results"][0]["ruleIndex"] == 0
    assert (
        run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        == "out/adapter%3A%20a%2Cb.safetensors"
    )
    assert "intruders is 18 in layer.18" in run["results"][0]["message"]["text"]


def test_absolute_paths_are_file_uris(tmp_path: Path) -> None:
    report = REPORT.with_(inputs=({"path": str(tmp_path / "a.safetensors")},))
    (first, *_) = sarif(report, gates.parse("intruders>18"))["runs"][0]["results"]
    assert first["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].startswith("file:///")


def test_no_failure_no_result() -> None:
    assert sarif(REPORT, gates.parse("intruders>99"))["runs"][0]["results"] == []
    assert commands(REPORT, gates.parse("intruders>99")) == []


def test_annotations_escape_and_stop_at_ten() -> None:
    (line,) = commands(REPORT, gates.parse("intruders>18"))
    assert (
        line
        == "::error file=out/adapter%3A a%2Cb.safetensors,title=loratools::intruders is 19 in layer.19: intruders>18"
    )
    many = commands(REPORT, gates.parse("intruders>=0"))
    assert len(many) == MOST
    assert many[-1].endswith(f"{20 - MOST + 1} more gates failed")
