"""The order of adapters in the pictures of a comparison."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.render.compare_plots import linkage, plots
from loratools.report import Report


def test_linkage_joins_what_is_alike_first() -> None:
    similarity = np.array([[1, 0.1, 0.9], [0.1, 1, 0.2], [0.9, 0.2, 1]])
    tree = linkage(similarity.tolist())
    assert set(tree[0, :2].astype(int)) == {0, 2}
    assert tree[0, 2] == pytest.approx(0.1)
    assert tree[1, 2] == pytest.approx(0.85)  # average of 0.9 and 0.8


def test_one_adapter_has_no_picture(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert plots(Report("loratools.compare/1", extra={"names": ["a"]}), tmp_path) == []
