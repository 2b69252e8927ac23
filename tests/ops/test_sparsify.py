"""shira: exact counts, the entries of a sorted prefix, legal sizes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.errors import ConversionError, LoratoolsError, NeedsBaseError, NumericsError, UsageError
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.kinds.sparse import Sparse
from loratools.ops import entries
from loratools.ops.touched import KEY

SHAPES = {"a.weight": (24, 40), "b.weight": (32, 16)}


def adapter(seed: int = 0, **more: object) -> Adapter:
    rng = np.random.default_rng(seed)
    updates = {
        name: LowRank(
            rng.standard_normal((m, 4)).astype(np.float32), rng.standard_normal((4, n)).astype(np.float32), 0.5
        )
        for name, (m, n) in SHAPES.items()
    }
    return Adapter({**updates, **more}, Meta(format="peft", namespace="hf"))  # type: ignore[arg-type]


def base(seed: int = 9) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("tile", [50, 1 << 20])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
def test_the_largest_entries_with_an_exact_count(density: float, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "TILE", tile)
    source = adapter()
    done = lt.shira(source, density=density, to="native", dtype="float32")
    for name, u in done.items():
        d = source[name].dense().reshape(-1)
        k = round(density * d.size)
        assert isinstance(u, Sparse)
        assert u.nnz == k
        best = np.sort(np.argsort(-np.abs(d), kind="stable")[:k])
        assert np.array_equal(u.flat(), best)
        assert np.allclose(u.values, d[best], atol=1e-6)  # rows formed alone may round otherwise
        row = next(r for r in done.report.modules if r["name"] == name)
        assert row["energy"] == pytest.approx(float((d[best] ** 2).sum() / (d**2).sum()), rel=1e-6)


def test_density_one_is_the_whole_update() -> None:
    source = adapter()
    done = lt.shira(source, density=1.0, to="native", dtype="float32")
    assert all(np.allclose(done[n].dense(), source[n].dense(), atol=1e-6) for n in source)
    assert done.report.total["energy"] == pytest.approx(1.0)
    assert not done.report.warnings


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, float("nan"), float("inf"), True, "x"])
def test_density_out_of_range(density: float) -> None:
    with pytest.raises(UsageError, match="density"):
        lt.shira(adapter(), density=density)


def test_global_scope_counts_over_all_modules() -> None:
    source = adapter()
    source = replace(source, updates={**source, "b.weight": replace(source["b.weight"], scale=5.0)})
    done = lt.shira(source, density=0.1, scope="global", to="native", dtype="float32")
    whole = np.concatenate([source[n].dense().reshape(-1) for n in source])
    k = sum(round(0.1 * m * n) for m, n in SHAPES.values())
    best = np.sort(np.argsort(-np.abs(whole), kind="stable")[:k])
    first = source["a.weight"].dense().size
    mine = np.concatenate([done["a.weight"].flat(), done["b.weight"].flat() + first])
    assert np.array_equal(mine, best)
    assert done["b.weight"].density > 0.2


@pytest.mark.parametrize("mask", ["weight", "snip"])
def test_masks_of_the_base(mask: str) -> None:
    source, weights = adapter(), base()
    with pytest.raises(NeedsBaseError):
        lt.shira(source, density=0.1, mask=mask)
    done = lt.shira(source, density=0.1, mask=mask, base=weights, to="native")
    for name, w in weights.items():
        score = np.abs(w.astype(np.float32)) * (np.abs(source[name].dense()) if mask == "snip" else 1)
        k = done[name].nnz
        assert np.array_equal(done[name].flat(), np.sort(np.argsort(-score.reshape(-1), kind="stable")[:k]))


def test_random_masks_follow_the_seed_and_struct_holds_the_diagonal() -> None:
    one, two, three = (lt.shira(adapter(), density=0.1, mask="random", to="native", seed=s) for s in (0, 0, 1))
    assert np.array_equal(one["a.weight"].flat(), two["a.weight"].flat())
    assert not np.array_equal(one["a.weight"].flat(), three["a.weight"].flat())
    struct = lt.shira(adapter(), density=0.2, mask="struct", to="native")["b.weight"]
    assert np.all(np.diagonal(struct.dense()) != 0)
    assert struct.nnz == round(0.2 * 32 * 16)


def test_peft_sizes_are_rounded_down_and_told() -> None:
    done = lt.shira(adapter(), density=0.15)
    total = done.report.total
    r = int(0.15 * (24 * 40 + 32 * 16) / (64 + 48))
    assert total["r"] == r
    assert all(u.nnz == r * sum(u.shape) for u in done.values())
    assert total["density"] <= total["density_asked"] == 0.15


def test_no_legal_size_names_the_native_format() -> None:
    with pytest.raises(ConversionError, match="no legal size") as told:
        lt.shira(adapter(), density=0.01)
    assert "native" in str(told.value)


def test_low_rank_part_and_residual() -> None:
    source = adapter()
    done = lt.shira(source, density=0.1, plus_lowrank=2, to="native", dtype="float32")
    squeezed = lt.squeeze(source, rank=2)
    for name, u in done.items():
        d = source[name].dense()
        assert u.kind == "sum"
        error = np.linalg.norm(d - u.dense()) / np.linalg.norm(d)
        row = next(r for r in done.report.modules if r["name"] == name)
        assert row["relative_error"] == pytest.approx(error, rel=1e-4)
        assert error < np.linalg.norm(d - squeezed[name].dense()) / np.linalg.norm(d)


@pytest.mark.parametrize("options", [{"plus_lowrank": 2}, {"scope": "global"}, {"keep_base": True}])
def test_what_peft_cannot_hold_is_refused_at_once(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        lt.shira(adapter(), density=0.5, base=base(), **options)


def test_low_energy_is_a_warning() -> None:
    told = lt.shira(adapter(), density=0.01, to="native").report.warnings
    assert any("less than 50%" in line for line in told)


def test_nan_names_the_module() -> None:
    source = adapter()
    broken = LowRank(np.full((24, 4), np.nan, np.float32), source["a.weight"].a)
    with pytest.raises(NumericsError) as told:
        lt.shira(replace(source, updates={**source, "a.weight": broken}), density=0.1, to="native")
    assert told.value.parameter == "a.weight"


def test_replacements_are_carried_and_zero_updates_told() -> None:
    zero = LowRank(np.zeros((8, 2), np.float32), np.ones((2, 8), np.float32))
    source = adapter(**{"c.weight": zero, "head.weight": Replace(np.ones((3, 3), np.float32))})
    done = lt.shira(source, density=0.1, to="native")
    assert done["head.weight"] is source["head.weight"]
    assert any("zero" in line for line in done.report.warnings)


def test_the_base_is_remembered() -> None:
    done = lt.shira(adapter(), density=0.1, base=base(), to="native", keep_base=True)
    for name, w in base().items():
        assert np.array_equal(done[name].base, w.reshape(-1)[done[name].flat()])
    other = lt.shira(adapter(), density=0.1, base=base(1), to="native")
    assert len(done.meta.metadata[KEY]) == 64
    assert done.meta.metadata[KEY] != other.meta.metadata[KEY]


def test_the_wrong_base_is_refused() -> None:
    with pytest.raises(LoratoolsError):
        lt.shira(adapter(), density=0.1, base={n: w.T for n, w in base().items()}, mask="weight", to="native")


@pytest.mark.parametrize("to", ["native", "peft"])
def test_round_trip_through_a_file(to: str, tmp_path: Path) -> None:
    done = lt.shira(adapter(), density=0.2, base=base(), keep_base=to == "native", to=to)
    path = lt.save(done, tmp_path / ("x.safetensors" if to == "native" else "x"), format=to)
    back = lt.load(path)
    assert list(back) == list(done)
    assert all(np.array_equal(back[n].dense(), done[n].dense()) for n in done)
    assert back.meta.metadata[KEY] == done.meta.metadata[KEY]
    size = path.stat().st_size if to == "native" else (path / "adapter_model.safetensors").stat().st_size
    assert done.report.total[f"bytes_{to}"] == pytest.approx(size, abs=4096)  # the history is longer by a line
