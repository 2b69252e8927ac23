from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loratools.core.adapter import Adapter
from loratools.core.update import KINDS, Update
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace_rows import ReplaceRows
from loratools.ops.job import content_hash

U = LowRank.example(0)
ROWS = ReplaceRows(np.ones((2, 3), np.float32), (0, 1), (4, 3))
CHANGES: dict[str, tuple[Update, Update]] = {
    "a scale": (U, replace(U, scale=3.0)),
    "a tensor": (U, replace(U, b=U.b + 1)),
    "a dtype": (U, replace(U, b=U.b.astype(np.float32))),
    "a number inside": (Dora(U, np.ones(5)), Dora(replace(U, scale=3.0), np.ones(5))),
    "an index": (ROWS, replace(ROWS, index=(1, 0))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_difference_is_another_adapter(change: str) -> None:
    one, other = (content_hash(Adapter({"x": u})) for u in CHANGES[change])
    assert one != other


@pytest.mark.parametrize("kind", list(KINDS))
def test_equal_content_is_one_adapter(kind: str) -> None:
    one, other = (Adapter({"x": KINDS[kind].example(1)}) for _ in range(2))
    assert content_hash(one) == content_hash(other)
    assert content_hash(one) != content_hash(Adapter({"y": KINDS[kind].example(1)}))
