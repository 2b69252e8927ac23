"""Bottlenecks: what is told of them, and that they go nowhere where they would be misread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import loratools as lt
from loratools.errors import ConversionError, LoratoolsError
from loratools.ops.bottlenecks import bottlenecks

DIGITS = Path(__file__).parents[2] / "fixtures" / "digits" / "r4"


def adaptertune() -> lt.Adapter:
    rng = np.random.default_rng(0)
    down, up_ = np.eye(4, 10, dtype=np.float32), np.zeros((10, 4), np.float32)
    up_[0, 0], up_[1, 1], up_[2, 2] = 8.0, 1.0, 0.5  # the last unit does nothing
    tensors = {"blocks.0.adapter.down.weight": down, "blocks.0.adapter.down.bias": rng.standard_normal(4),
               "blocks.0.adapter.up.weight": up_, "blocks.0.adapter.up.bias": rng.standard_normal(10)}  # fmt: skip
    zero = {f"blocks.1.{k[9:]}": 0 * v if "up" in k else v for k, v in tensors.items()}
    return lt.from_state_dict({k: v.astype(np.float32) for k, v in (tensors | zero).items()})


def test_spectrum_elbow_and_dead_units() -> None:
    report = bottlenecks(adaptertune())
    assert report is not None
    trained, untrained = report.to_rows()
    assert trained["singular_values"][:3] == pytest.approx([8.0, 1.0, 0.5])
    assert (trained["rank"], trained["numerical_rank"], trained["dead"], trained["trained"]) == (4, 3, 1, True)
    assert trained["stable_rank"] == pytest.approx((64 + 1 + 0.25) / 64)
    assert trained["elbow"] == 1  # one large value, then a plateau
    assert (untrained["trained"], untrained["dead"], untrained["numerical_rank"]) == (False, 4, 0)


def test_diagnose_tells_of_them() -> None:
    report = lt.diagnose(adaptertune())
    assert len(report.extra["bottlenecks"]) == 2
    assert "2 bottlenecks, 1 of them trained" in report.extra["summary"]
    assert "bottlenecks" not in lt.diagnose(lt.load(DIGITS)).extra


def test_they_are_refused_where_they_would_be_something_else(tmp_path: Path) -> None:
    adapter = adaptertune()
    with pytest.raises(ConversionError, match=r"no update of (any|a) weight"):
        lt.convert(adapter, "peft")
    with pytest.raises(LoratoolsError):
        lt.fuse([adapter, adapter])
    saved = lt.load(lt.save(lt.convert(adapter, "native"), tmp_path / "n.safetensors", format="native"))
    assert bottlenecks(saved) is not None
