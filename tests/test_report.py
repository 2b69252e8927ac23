from __future__ import annotations

import json
import math

from loratools.report import Report


def test_json_has_the_documented_fields_and_only_numbers() -> None:
    report = Report("loratools.x/1", modules=({"name": "a", "v": math.nan},), total={"v": 1.5}, warnings=("careful",))
    said = json.loads(report.to_json())
    assert list(said) == ["schema", "loratools", "inputs", "output", "total", "modules", "checks", "warnings"]
    assert said["modules"] == [{"name": "a", "v": None}]
    assert said["warnings"] == ["careful", "a.v is not finite; written as null"]


def test_rows_are_plain_dicts() -> None:
    assert Report("x", modules=({"name": "a"},)).to_rows() == [{"name": "a"}]
