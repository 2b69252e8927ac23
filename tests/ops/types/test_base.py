"""The registry of types: what is handed over, and what every type promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loratools.core.adapter import Adapter, Meta
from loratools.errors import UsageError
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.ops.types.base import TYPES, retyped, settings_of, summary_of

W = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)


def adapter() -> Adapter:
    updates = {"x.weight": LowRank.example(0), "x.bias": Dense(W[:, 0]), "head.weight": Replace(W)}
    return Adapter(updates, Meta(config={"init_lora_weights": "mica"}))


@pytest.mark.parametrize("name", list(TYPES))
def test_every_type_carries_what_is_no_weight_and_tells_its_errors(name: str) -> None:
    before = adapter()
    done = retyped(before, name, base={"x.weight": W}, rank=None, seed=0, settings={})
    assert list(done) == list(before)
    assert done["x.bias"] is before["x.bias"]
    assert done["head.weight"] is before["head.weight"]
    assert done.report is not None
    assert "relative_error" in done.report.total
    assert all({"name", "relative_error"} <= row.keys() for row in done.report.modules)
    assert summary_of(name).endswith(".")
    assert done.meta.config.get("init_lora_weights", True) is True


@pytest.mark.parametrize("name", list(TYPES))
def test_unknown_settings_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no such setting"):
        retyped(adapter(), name, base={"x.weight": W}, rank=None, seed=0, settings={"nonsense": 1})


def test_rank_only_where_there_is_one() -> None:
    assert list(settings_of("lora")) == ["exact"]
    with pytest.raises(UsageError, match="rank"):
        retyped(adapter(), "dora", base={"x.weight": W}, rank=3, seed=0, settings={})


def test_unknown_type() -> None:
    call: dict[str, Any] = {"base": None, "rank": None, "seed": 0, "settings": {}}
    with pytest.raises(UsageError, match="unknown adapter type"):
        retyped(adapter(), "doro", **call)
