"""extract --sparse: exact counts of the largest differences, streamed; low-rank parts; what is kept and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import loratools as lt
from loratools.errors import ConversionError, MismatchError, NumericsError, UsageError
from loratools.kinds.sparse import Sparse
from loratools.kinds.sum import Sum
from loratools.ops import entries
from loratools.ops.streamed import Streamed
from loratools.ops.touched import KEY

SHAPES = {"x.a.weight": (40, 30), "x.b.weight": (20, 50)}


def models(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    base = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    base |= {"x.same.weight": np.ones((6, 7), np.float32), "x.norm.weight": np.ones(30, np.float32)}
    tuned = {n: w + 0.1 * rng.standard_normal(w.shape).astype(np.float32) if n != "x.same.weight" else w
             for n, w in base.items()}  # fmt: skip
    return base, tuned


@pytest.mark.parametrize("tile", [64, 1 << 20])
def test_the_largest_differences_with_an_exact_count(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "TILE", tile)
    base, tuned = models()
    done = lt.extract_sparse(base, tuned, density=0.07, to="native", dtype="float32")
    assert list(done) == ["x.a.weight", "x.b.weight", "x.norm.weight"]
    for name, shape in SHAPES.items():
        d = (tuned[name] - base[name]).reshape(-1)
        k = round(0.07 * shape[0] * shape[1])
        best = np.sort(np.argsort(-np.abs(d), kind="stable")[:k])
        u = done[name]
        assert isinstance(u, Sparse)
        assert np.array_equal(u.flat(), best)
        assert np.array_equal(u.values, d[best])
    assert len(done.meta.metadata[KEY]) == 64


def test_density_one_restores_the_tuned_model() -> None:
    base, tuned = models()
    done = lt.extract_sparse(base, tuned, density=1.0, to="native", dtype="float32")
    restored = dict(lt.merged(base, [done]))
    assert all(np.allclose(restored[n], tuned[n], atol=1e-6) for n in tuned)


def test_low_rank_plus_sparse_beats_either() -> None:
    base, tuned = models()
    rng = np.random.default_rng(5)
    tuned["x.a.weight"] = base["x.a.weight"] + rng.standard_normal((40, 3)).astype(np.float32) @ rng.standard_normal(
        (3, 30)
    ).astype(np.float32)
    tuned["x.a.weight"].reshape(-1)[::97] += 20
    both = lt.extract_sparse(base, tuned, density=0.05, plus_lowrank=4, to="native")
    sparse = lt.extract_sparse(base, tuned, density=0.05, to="native")
    assert isinstance(both["x.a.weight"], Sum)
    d = tuned["x.a.weight"] - base["x.a.weight"]
    row = both.report.modules[0]
    error = np.linalg.norm(d - both["x.a.weight"].dense()) / np.linalg.norm(d)
    assert row["relative_error"] == pytest.approx(error, rel=1e-3)
    assert both.report.total["relative_error"] < sparse.report.total["relative_error"]


def test_peft_layout_of_the_trained_fixture(tmp_path: Path) -> None:
    fixtures = Path(__file__).parents[2] / "fixtures" / "digits"
    with pytest.raises(ConversionError, match="bias"):
        lt.save(lt.extract_sparse(fixtures / "base", fixtures / "tuned", density=0.05), tmp_path / "x")
    done = lt.extract_sparse(fixtures / "base", fixtures / "tuned", density=0.05, carry=False)
    back = lt.load(lt.save(done, tmp_path / "y"))
    assert all(np.array_equal(back[n].dense(), done[n].dense()) for n in done)


def test_what_is_refused() -> None:
    base, tuned = models()
    with pytest.raises(MismatchError, match="no matrix"):
        lt.extract_sparse(base, base, density=0.1)
    for density in (0, 1.5, float("nan")):
        with pytest.raises(UsageError):
            lt.extract_sparse(base, tuned, density=density)
    tuned["x.a.weight"][3, 3] = np.nan
    with pytest.raises(NumericsError) as told:
        lt.extract_sparse(base, tuned, density=0.1, to="native")
    assert told.value.parameter == "x.a.weight"


def test_a_streamed_difference_is_an_operator() -> None:
    u, x = Streamed.example(0), np.ones((7, 2), np.float32)
    assert np.allclose(u.matmul(x), u.dense() @ x)
    assert np.allclose(u.rmatmul(np.ones((5, 1), np.float32)), u.dense().T @ np.ones((5, 1)))
