"""Findings as SARIF and as annotations."""

from __future__ import annotations

import json
from pathlib import Path

from loratools.sarif import MOST, Item, sarif, workflow_commands

ITEMS = [
    Item("vllm/dora", "error", "would not load: 4 keys", "adapters/a b", "model.layers.0", "loratools merge"),
    Item("vllm/rank-odd", "note", "100%\nodd", "c:d,e"),
    Item("vllm/dora", "error", "would not load", "other"),
]


def test_one_run_with_every_rule_once() -> None:
    log = json.loads(json.dumps(sarif(ITEMS)))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert rules == ["vllm/dora", "vllm/rank-odd"]
    for result, item in zip(run["results"], ITEMS, strict=True):
        assert rules[result["ruleIndex"]] == result["ruleId"] == item.id
        assert result["level"] == item.level
        assert result["message"]["text"] == item.message
    where = run["results"][0]["locations"][0]
    assert where["physicalLocation"]["artifactLocation"]["uri"] == "adapters/a%20b"
    assert where["logicalLocations"][0]["fullyQualifiedName"] == "model.layers.0"


def test_annotations_are_escaped() -> None:
    first, _, second = workflow_commands(ITEMS)
    assert first == "::error file=adapters/a b,title=vllm/dora::would not load: 4 keys (loratools merge)"
    assert second == "::notice file=c%3Ad%2Ce,title=vllm/rank-odd::100%25%0Aodd"


def test_nothing_found_is_an_empty_run() -> None:
    assert sarif([])["runs"][0]["results"] == []
    assert list(workflow_commands([])) == []


def test_a_place_may_be_missing_or_absolute(tmp_path: Path) -> None:
    nowhere, away = (sarif([Item("x", "error", "told", file)])["runs"][0]["results"][0] for file in ("", str(tmp_path)))
    assert nowhere["locations"] == []
    assert away["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].startswith("file:///")
    assert list(workflow_commands([Item("x", "error", "told", "")])) == ["::error title=x::told"]


def test_ten_annotations_the_worst_first() -> None:
    many = [*(Item("n", "note", "n", "f") for _ in range(8)), *(Item("e", "error", "e", "f") for _ in range(5))]
    lines = list(workflow_commands(many))
    assert len(lines) == MOST
    assert all(line.startswith("::error") for line in lines[:5])
    assert lines[-1] == "::notice title=loratools::4 more findings"
    assert len(list(workflow_commands(many[3:]))) == MOST
