"""Findings as SARIF and as annotations."""

from __future__ import annotations

import json

from loratools.sarif import Item, sarif, workflow_commands

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
    first, second, _ = workflow_commands(ITEMS)
    assert first == "::error file=adapters/a b,title=vllm/dora::would not load: 4 keys (loratools merge)"
    assert second == "::notice file=c%3Ad%2Ce,title=vllm/rank-odd::100%25%0Aodd"


def test_nothing_found_is_an_empty_run() -> None:
    assert sarif([])["runs"][0]["results"] == []
    assert list(workflow_commands([])) == []
