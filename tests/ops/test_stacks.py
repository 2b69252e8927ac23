"""Squeezing, resizing and budgets treat a stack of experts as many products that share one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.errors import NumericsError
from loratools.kinds.lowrank import LowRank
from loratools.kinds.stack import Stack
from loratools.linalg.namespace import to_numpy

NAME = "mlp.experts.down_proj"


def decaying(experts: int, out: int, width: int, rank: int) -> Stack:
    """Experts whose spectra decay at different speeds."""
    rng = np.random.default_rng(0)
    fall = np.exp(-np.outer(np.arange(1, experts + 1), np.arange(rank)))[:, None, :]
    b = (rng.standard_normal((experts, out, rank)) * fall).astype(np.float32)
    return Stack(b, rng.standard_normal((experts, rank, width)).astype(np.float32), 0.5)


def adapter() -> lt.Adapter:
    rng = np.random.default_rng(1)
    flat = LowRank(*(rng.standard_normal(s).astype(np.float32) for s in ((16, 6), (6, 12))))
    return lt.Adapter({NAME: decaying(3, 16, 12, 6), "q.weight": flat})


def dense(u: Any) -> np.ndarray[Any, Any]:
    return to_numpy(u.dense()).astype(np.float64)


def test_every_expert_gets_its_own_optimum_and_the_row_tells_the_whole() -> None:
    before = adapter()
    after = lt.squeeze(before, rank=2)
    d, best = dense(before[NAME]), dense(after[NAME])
    s = np.linalg.svd(d, compute_uv=False)
    cut = np.sqrt((s[:, 2:] ** 2).sum())
    row = next(r for r in after.report.modules if r["name"] == NAME)  # type: ignore[union-attr]
    assert abs(np.linalg.norm(d - best) - cut) <= 1e-6 * np.linalg.norm(d)
    assert (row["rank_before"], row["rank_after"]) == (6, 2)
    assert row["relative_error"] == pytest.approx(cut / np.linalg.norm(d), rel=1e-5)
    assert row["energy"] == pytest.approx((s[:, :2] ** 2).sum() / (s**2).sum(), rel=1e-6)


def test_unequal_choices_are_padded_to_the_largest() -> None:
    after = lt.squeeze(adapter(), energy=0.99)
    s = np.linalg.svd(dense(adapter()[NAME]), compute_uv=False)
    needed = [int(np.searchsorted(np.cumsum(x**2) / (x**2).sum(), 0.99)) + 1 for x in s]
    assert len(set(needed)) > 1
    assert after[NAME].rank == max(needed)  # type: ignore[attr-defined]
    kept = np.linalg.svd(dense(after[NAME]), compute_uv=False)
    assert [int((x > 1e-5 * x[0]).sum()) for x in kept] == needed


@pytest.mark.parametrize("rank", [3, 9])
def test_resize_gives_exactly_that_rank_to_every_expert(rank: int) -> None:
    before, after = adapter(), lt.resize(adapter(), rank=rank)
    assert {u.rank for u in after.values()} == {rank}  # type: ignore[attr-defined]
    if rank > 6:
        for name in before:
            assert np.abs(dense(after[name]) - dense(before[name])).max() <= 1e-6 * np.abs(dense(before[name])).max()
        assert np.abs(to_numpy(after[NAME].a)[:, 6:]).min() > 0  # type: ignore[attr-defined]  # can be trained


def test_a_budget_counts_a_rank_of_all_experts(tmp_path: Path) -> None:
    for size in (4000, 5000, 6000):
        after = lt.squeeze(adapter(), size=size, format="peft")
        out = lt.save(after, tmp_path / str(size), format="peft")
        written = (out / "adapter_model.safetensors").stat().st_size
        assert written <= size
        errors = {r["name"]: r["relative_error"] for r in after.report.modules}  # type: ignore[union-attr]
        assert max(errors.values()) < 1


def test_an_expert_that_is_not_finite_carries_the_stack() -> None:
    u = decaying(3, 16, 12, 6)
    b = to_numpy(u.b).copy()
    b[1, 0, 0] = np.nan
    bad = lt.Adapter({NAME: Stack(b, u.a)})
    with pytest.raises(NumericsError):
        lt.squeeze(bad, rank=2)
    kept = lt.squeeze(bad, rank=2, allow_nonfinite=True)
    assert kept[NAME] is bad[NAME]
