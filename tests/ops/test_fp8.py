from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loratools.core.adapter import Adapter
from loratools.errors import MismatchError, UnsupportedError
from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank
from loratools.ops.fp8 import block_of, dequantised, requantised
from loratools.ops.merge import merge

FP8 = ml_dtypes.float8_e4m3fn
SHAPES = {"tensor": (), "rows": (300, 1), "blocks": (3, 2)}


def low(rng: Any, m: int, n: int) -> LowRank:
    return LowRank(rng.standard_normal((m, 2)).astype(np.float32), rng.standard_normal((2, n)).astype(np.float32), 0.1)


@pytest.mark.parametrize("kind", SHAPES)
def test_requantising_comes_within_half_a_step(kind: str, rng: Any) -> None:
    w = rng.standard_normal((300, 200)).astype(np.float32)
    base = Base.open({"w": np.zeros((300, 200), FP8), "s": np.zeros(SHAPES[kind], np.float32)})
    block = block_of(base, base.shapes["w"], base.shapes["s"])
    codes, scale = requantised(w, base.leaf("s"), block, "float8_e4m3fn")
    assert codes.dtype == FP8
    assert scale.shape == SHAPES[kind]
    back = dequantised(codes, scale, block)
    # e4m3 has three digits: half a step is 2^-4 of the value, or of the smallest normal code times the scale
    assert np.all(np.abs(back - w) <= np.maximum(2.0**-4 * np.abs(w), 2.0**-10 * np.max(scale)) * 1.001)


@pytest.mark.parametrize("kind", SHAPES)
def test_merging_tells_the_loss(kind: str, model: Callable[..., Path], rng: Any, tmp_path: Path) -> None:
    w = rng.standard_normal((300, 200)).astype(np.float32)
    empty = Base.open({"w": np.zeros((300, 200), FP8), "s": np.zeros(SHAPES[kind], np.float32)})
    block = block_of(empty, (300, 200), SHAPES[kind])
    codes, scale = requantised(w, empty.leaf("s"), block, "float8_e4m3fn")
    base = model({"q.weight": codes, "q.weight_scale_inv": np.asarray(scale), "k.weight": np.ones((3, 4), np.float16)},
                 quantization_config={"quant_method": "fp8"})  # fmt: skip
    u = low(rng, 300, 200)
    with pytest.raises(UnsupportedError, match="fp8"):
        merge(base, [Adapter({"q.weight": u})], tmp_path / "out")
    report = merge(base, [Adapter({"q.weight": u})], tmp_path / "out", requantise=True)
    out, before = Base.open(tmp_path / "out"), Base.open(base)
    assert (dict(out.dtypes), dict(out.shapes)) == (dict(before.dtypes), dict(before.shapes))
    exact = dequantised(codes, scale, block) + u.dense()
    lost = dequantised(out["q.weight"], out["q.weight_scale_inv"], block) - exact
    row = next(row for row in report.modules if row["name"] == "q.weight")
    assert row["rounding_loss"] == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(u.dense()), rel=1e-3)
    assert row["rounding_loss"] > 0.05


def test_scales_that_do_not_fit() -> None:
    base = Base.open({"w": np.zeros((300, 200), FP8), "s": np.zeros((7, 5), np.float32)})
    with pytest.raises(MismatchError, match="scales"):
        block_of(base, (300, 200), (7, 5))
