"""Scaling intruders against dense computation: exact in factored form, with or without growth of the rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.errors import MismatchError, NumericsError, UsageError
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.kinds.replace import Replace
from loratools.kinds.stack import Stack
from loratools.kinds.sum import Sum
from loratools.linalg.namespace import to_numpy
from loratools.ops.tame import tame

NAME = "model.layers.0.mlp.up_proj.weight"


def base_and_update(seed: int = 0, m: int = 90, n: int = 70) -> tuple[np.ndarray, LowRank]:
    """Return fp64 weights and an update with two strong random directions: two intruders."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((m, n)))
    v, _ = np.linalg.qr(rng.standard_normal((n, n)))
    w = (u * np.geomspace(1, 0.05, n)) @ v.T
    b, _ = np.linalg.qr(rng.standard_normal((m, 3)))
    a, _ = np.linalg.qr(rng.standard_normal((n, 3)))
    return w, LowRank(b * [3.0, 1.9, 0.01], a.T, 1.3)


def wanted(w: np.ndarray, after: np.ndarray, lam: float, *, every: bool, eps: float = 0.5, k: int = 10) -> np.ndarray:
    """Return W' from W0 and W0 + D by the definition, with thin SVDs."""
    u, s, vh = np.linalg.svd(after, full_matrices=False)
    cosines = np.abs(u[:, :k].T @ np.linalg.svd(w, full_matrices=False)[0]).max(axis=1)
    hits = [j for j in range(k) if cosines[j] < eps]
    scaled = hits if every else hits[:1]
    return after + sum((lam - 1) * s[j] * np.outer(u[:, j], vh[j]) for j in scaled)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.75])
def test_only_the_singular_values_of_intruders_change(lam: float, every: bool) -> None:
    w, update = base_and_update()
    done = tame(Adapter({NAME: update}), base={NAME: w}, lam=lam, every=every)
    exact = wanted(w, w + update.dense(), lam, every=every)
    # the angle of 1e-3 that singular vectors are found to, times what is taken away
    assert np.linalg.norm(done[NAME].apply(w) - exact) < 2e-3 * np.linalg.norm(update.dense())
    assert done.report is not None
    (row,) = done.report.modules
    assert (row["intruders"], row["tamed"], row["rank_after"]) == (2, 1 + every, 4 + every)
    change = np.linalg.norm(exact - w - update.dense()) / np.linalg.norm(update.dense())
    assert row["relative_change"] == pytest.approx(change, rel=1e-2)


def test_lambda_zero_removes_and_lowers_the_norm() -> None:
    w, update = base_and_update()
    done = tame(Adapter({NAME: update}), base={NAME: w}, lam=0.0, every=True)
    before, after = (np.linalg.norm(x, 2) for x in (w + update.dense(), done[NAME].apply(w)))
    assert after < 0.5 * before
    assert lt.diagnose(done, base={NAME: w}).total["intruders"] == 0


def test_lambda_one_changes_nothing() -> None:
    w, update = base_and_update()
    adapter = Adapter({NAME: update})
    assert tame(adapter, base={NAME: w}, lam=1.0)[NAME] is update


def test_old_channels_keep_their_bits_and_scale() -> None:
    w, update = base_and_update()
    done = tame(Adapter({NAME: update}), base={NAME: w})[NAME]
    assert isinstance(done, LowRank)
    assert done.scale == update.scale
    assert (done.b[:, :3] == update.b).all()
    assert (done.a[:3] == update.a).all()


def test_keep_rank_is_the_best_cut_and_tells_its_loss() -> None:
    w, update = base_and_update()
    done = tame(Adapter({NAME: update}), base={NAME: w}, lam=0.25, keep_rank=True)
    exact = wanted(w, w + update.dense(), 0.25, every=False) - w
    s = np.linalg.svd(exact, compute_uv=False)
    best = np.linalg.norm(s[3:]) / np.linalg.norm(s)
    found = np.linalg.norm(done[NAME].dense() - exact) / np.linalg.norm(exact)
    assert low_rank(done[NAME]).rank == 3
    assert found == pytest.approx(best, abs=2e-3)
    assert done.report.modules[0]["truncation_error"] == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_dora_keeps_its_product_exact(axis: int, eps: float) -> None:
    w, update = base_and_update()
    rng = np.random.default_rng(3)
    dora = Dora(update, rng.uniform(0.5, 1.5, w.shape[axis]), axis, eps)
    done = tame(Adapter({NAME: dora}), base={NAME: w}, lam=0.5, every=True)
    exact = wanted(w, dora.apply(w), 0.5, every=True)
    assert isinstance(done[NAME], Dora)
    assert done.report.total["tamed"] > 0
    assert np.linalg.norm(done[NAME].apply(w) - exact) < 2e-3 * np.linalg.norm(exact)


def test_sums_stacks_and_what_is_stored_whole() -> None:
    w, update = base_and_update()
    half = LowRank(update.b, update.a, 0.65)
    done = tame(Adapter({NAME: Sum((half, half))}), base={NAME: w}, lam=0.5)
    assert np.linalg.norm(done[NAME].apply(w) - wanted(w, w + update.dense(), 0.5, every=False)) < 1e-2
    stack = Stack(np.stack([update.b, 0 * update.b]), np.stack([update.a, update.a]), 1.3)
    both = tame(Adapter({NAME: stack}), base={NAME: np.stack([w, w])}, lam=0.5)
    assert [row["tamed"] for row in both.report.modules] == [1, 0]
    first = both[NAME].dense()[0]
    assert np.linalg.norm(w + first - wanted(w, w + update.dense(), 0.5, every=False)) < 1e-2
    assert (both[NAME].dense()[1] == 0).all()
    whole = tame(Adapter({NAME: Replace(w + update.dense())}), base={NAME: w}, lam=0.5)
    assert whole.report.total["tamed"] == 0
    assert any("stored whole" in warning for warning in whole.report.warnings)


def test_turned_storage() -> None:
    w, update = base_and_update()
    turned = LowRank(update.a.T, update.b.T, update.scale)
    adapter = Adapter({NAME: turned}, Meta(layout={NAME: {"stored": "in_out"}}))
    done = tame(adapter, base={NAME: w.T}, lam=0.5)
    exact = wanted(w, w + update.dense(), 0.5, every=False)
    assert np.linalg.norm(done[NAME].apply(w.T).T - exact) < 1e-2


def test_both_libraries(library: Callable[[Any], Any]) -> None:
    w, update = base_and_update()
    given = LowRank(library(update.b), library(update.a), update.scale)
    done = tame(Adapter({NAME: given}), base={NAME: library(w)}, lam=0.5)
    assert np.allclose(to_numpy(done[NAME].dense()), wanted(w, w + update.dense(), 0.5, every=False) - w, atol=1e-2)


def test_a_trained_adapter_survives_its_file(digits: Path, tmp_path: Path) -> None:
    for name in ("r4", "r4-dora"):
        done = lt.tame(lt.load(digits / name), base=digits / "base", lam=0.0, every=True)
        again = lt.load(lt.save(done, tmp_path / name))
        before = lt.diagnose(lt.load(digits / name), base=digits / "base").total["intruders"]
        after = lt.diagnose(again, base=digits / "base").total["intruders"]
        assert after < before / 4
        assert any("tame lambda=0" in line for line in done.meta.history)


@pytest.mark.parametrize("options", [{"lam": -0.1}, {"lam": 1.1}, {"k": 0}, {"eps": 2.0}])
def test_impossible_requests(options: dict[str, Any]) -> None:
    w, update = base_and_update()
    with pytest.raises(UsageError, match="nothing to tame"):
        tame(Adapter({NAME: update}), base={NAME: w}, **options)


def test_wrong_base_and_values_that_are_not_finite() -> None:
    w, update = base_and_update()
    with pytest.raises(MismatchError):
        tame(Adapter({NAME: update}), base={"other.weight": w})
    left = tame(Adapter({NAME: update}), base={"other.weight": w}, skip_missing=True)
    assert left[NAME] is update
    assert any("not in the base" in warning for warning in left.report.warnings)
    update.b[0, 0] = np.nan
    with pytest.raises(NumericsError, match="not finite"):
        tame(Adapter({NAME: update}), base={NAME: w})
