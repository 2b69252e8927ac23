from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter
from loratools.errors import UsageError
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import down, to_numpy, up

RNG = np.random.default_rng(0)


def low_rank(m: int, r: int, n: int, scale: float = 0.3, dtype: str = "float32") -> LowRank:
    b, a = RNG.standard_normal((m, r)).astype(np.float32), RNG.standard_normal((r, n)).astype(np.float32)
    return LowRank(down(b, dtype), down(a, dtype), scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_up_leaves_the_function_unchanged_and_trainable(dtype: str, library: Callable[[Any], Any]) -> None:
    u = low_rank(6, 2, 9, dtype=dtype)
    if dtype == "float32":
        u = LowRank(library(u.b), library(u.a), u.scale)
    v = lt.resize(Adapter({"x.weight": u}), rank=5)["x.weight"]
    assert (v.rank, v.scale) == (5, u.scale)
    assert np.array_equal(to_numpy(up(v.b))[:, :2], to_numpy(up(u.b)))
    assert not to_numpy(up(v.b))[:, 2:].any()
    rows = to_numpy(up(v.a))[2:]
    assert (np.abs(rows).max(axis=1) > 0).all()
    assert np.abs(rows).max() <= 1 / 3  # +-1/sqrt(in)
    assert np.array_equal(to_numpy(up(v.dense())), to_numpy(up(u.dense()))) or dtype == "float32"


def test_down_is_optimal_and_keeps_the_scale() -> None:
    u = low_rank(12, 6, 9, scale=-0.25)
    v = lt.resize(Adapter({"x.weight": u}), rank=2)["x.weight"]
    s = np.linalg.svd(u.dense(), compute_uv=False)
    assert (v.rank, v.scale) == (2, -0.25)
    assert np.linalg.norm(v.dense() - u.dense()) == pytest.approx(np.sqrt((s[2:] ** 2).sum()), rel=1e-5)


def test_exactly_that_rank_everywhere_even_beyond_the_matrix() -> None:
    adapter = Adapter({"a.weight": low_rank(3, 2, 4), "b.weight": low_rank(20, 9, 30)})
    resized = lt.resize(adapter, rank=8)
    assert {name: u.rank for name, u in resized.items()} == {"a.weight": 8, "b.weight": 8}
    assert resized.report is not None
    assert resized.report.schema == "loratools.resize/1"
    assert resized.report.modules[0]["relative_error"] == 0.0
    assert resized.report.modules[0]["rank_after"] == 8


def test_resized_adapters_load_in_peft_with_the_same_logits(digits: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from transformers import CLIPForImageClassification

    def logits(folder: Path) -> Any:
        base = CLIPForImageClassification.from_pretrained(digits / "base", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            return model(pixel_values=torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)).logits

    out = lt.save(lt.resize(lt.load(digits / "r4-rslora"), rank=16), tmp_path / "r16")
    before, after = logits(digits / "r4-rslora"), logits(out)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("rank", [0, -1, True, 1.5])
def test_impossible_ranks(rank: Any) -> None:
    with pytest.raises(UsageError):
        lt.resize(Adapter({"a.weight": low_rank(3, 2, 4)}), rank=rank)
