"""The figures of a diagnosis against dense computation; what is refused, and what is only told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.core.update import KINDS
from loratools.errors import MismatchError, NumericsError, UnsupportedError, UsageError
from loratools.io.base import Base
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.kinds.stack import Stack
from loratools.ops import base_side
from loratools.ops.diagnose import SCHEMA, diagnose
from loratools.ops.whole_model import whole_model
from loratools.report import Report

NAME = "model.layers.0.mlp.up_proj.weight"


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def one(update: Any, w: np.ndarray | None = None, name: str = NAME, **options: Any) -> Mapping[str, Any]:
    """Diagnose a single update and return its row."""
    base = None if w is None else {name: w}
    (row,) = diagnose(Adapter({name: update}), base=base, **options).modules
    return row


def dense_figures(w: np.ndarray, tuned: np.ndarray, k: int, eps: float) -> dict[str, Any]:
    """Return intruders, overlaps and sizes by thin SVDs in fp64: the judge."""
    w, tuned = w.astype(float), tuned.astype(float)
    u0, s0, vh0 = np.linalg.svd(w, full_matrices=False)
    u, s, vh = np.linalg.svd(tuned, full_matrices=False)
    d = tuned - w
    left, right = np.abs(u[:, :k].T @ u0).max(axis=1), np.abs(vh[:k] @ vh0.T).max(axis=1)
    size = np.linalg.norm(d)
    return {
        "intruder_index": [j + 1 for j in range(k) if left[j] < eps],
        "intruder_index_right": [j + 1 for j in range(k) if right[j] < eps],
        "intruders_both": int(((left < eps) & (right < eps)).sum()),
        "relative_norm": size / np.linalg.norm(w),
        "relative_spectral_norm": np.linalg.norm(d, 2) / s0[0],
        "overlap_left": (np.linalg.norm(u0[:, :k].T @ d) / size) ** 2,
        "overlap_right": (np.linalg.norm(d @ vh0[:k].T) / size) ** 2,
        "tuned_singular_values": s[:k],
    }


def agree(row: Mapping[str, Any], exact: Mapping[str, Any]) -> None:
    for figure, value in exact.items():
        if isinstance(value, list | int):
            assert row[figure] == value, figure
        else:
            # sizes: fp32 sums; overlaps: the leading subspace is known to 0.02 rad where its edge is blurred
            assert np.allclose(row[figure], value, rtol=1e-4, atol=0.03 if "overlap" in figure else 0), figure


@pytest.mark.parametrize("shape", [(300, 300), (420, 280), (280, 420)])
def test_against_a_dense_judge(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    w = noise(rng, *shape) + 6 * noise(rng, shape[0], 3) @ noise(rng, 3, shape[1]) / 5
    update = LowRank(noise(rng, shape[0], 4), noise(rng, 4, shape[1]), 0.15)
    row = one(update, w, both_sides=True)
    agree(row, dense_figures(w, update.apply(w), 10, 0.5))
    assert row["certain"]
    assert row["certain_right"]
    assert row["intruders"] == len(row["intruder_index"])


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind(name: str, library: Callable[[Any], Any]) -> None:
    """Every kind that has a delta is judged on it, whatever it is made of."""
    update = KINDS[name].example(0)
    w = np.random.default_rng(1).standard_normal(update.shape)
    report = diagnose(Adapter({NAME: update}), base={NAME: library(w)}, k=3)
    assert report.to_json()
    for row in report.modules:
        if len(update.shape) < 2 or min(row["shape"][0], row["shape"][-1]) < 2:
            continue
        e = int(row["name"].rpartition("[")[2][:-1]) if row["name"].endswith("]") else ...
        before, after = (x[e] for x in (w, update.apply(w)))
        exact = dense_figures(before.reshape(len(before), -1), after.reshape(len(before), -1), 3, 0.5)
        assert row["intruder_index"] == exact["intruder_index"]
        assert row["relative_norm"] == pytest.approx(exact["relative_norm"], rel=1e-4)


def test_trained_adapters_and_dora(digits: Path) -> None:
    weights = load_file(digits / "base" / "model.safetensors")
    for name in ("r4", "r32-dora"):
        adapter = lt.load(digits / name)
        report = lt.diagnose(adapter, base=digits / "base")
        assert report.schema == SCHEMA
        rows = {row["name"]: row for row in report.modules}
        for parameter in list(adapter)[::5]:
            w = weights[parameter].astype(np.float32)
            exact = dense_figures(w, adapter[parameter].apply(w), 10, 0.5)
            agree(rows[parameter], {f: exact[f] for f in ("intruder_index", "relative_norm", "tuned_singular_values")})
        assert report.total["intruders"] == sum(row["intruders"] for row in report.modules)


def test_experts_are_matrices_of_their_own() -> None:
    rng = np.random.default_rng(2)
    b, a, w = noise(rng, 3, 40, 2), noise(rng, 3, 2, 30), noise(rng, 3, 40, 30)
    report = diagnose(Adapter({NAME: Stack(b, a, 1.0)}), base={NAME: w})
    assert [row["name"] for row in report.modules] == [f"{NAME}[{e}]" for e in range(3)]
    for e, row in enumerate(report.modules):
        agree(row, {"intruder_index": dense_figures(w[e], w[e] + b[e] @ a[e], 10, 0.5)["intruder_index"]})
        assert row["frobenius_norm"] == pytest.approx(np.linalg.norm(b[e] @ a[e]), rel=1e-5)


def test_left_is_out_for_conv1d_too() -> None:
    """A base that stores (in, out) is turned: left singular vectors are those of the outputs."""
    rng = np.random.default_rng(3)
    w, update = noise(rng, 60, 90), LowRank(noise(rng, 60, 2), noise(rng, 2, 90), 1.0)
    turned = Adapter({NAME: update}, Meta(layout={NAME: {"stored": "in_out"}}))
    (row,) = diagnose(turned, base={NAME: w}, both_sides=True).modules
    agree(row, dense_figures(w.T, update.apply(w).T, 10, 0.5))


def test_health() -> None:
    rng = np.random.default_rng(4)
    b, a = noise(rng, 30, 5), noise(rng, 5, 20)
    b[:, 1], b[:, 4], a[4] = 0, b[:, 0], 2 * a[0]
    row = one(LowRank(b, a, 2.0))
    assert (row["dead_components"], row["duplicate_components"], row["nonfinite"]) == (1, 1, 0)
    assert row["numerical_rank"] == 3
    assert row["condition_b"] is None
    assert row["balance"] == pytest.approx(np.linalg.norm(b) / np.linalg.norm(a), rel=1e-5)
    assert row["scale_times_rank"] == 10
    assert row["scale_times_root_rank"] == pytest.approx(2 * 5**0.5)
    assert row["factor_size"] == pytest.approx(2 * np.linalg.norm(b) * np.linalg.norm(a), rel=1e-5)


def test_what_is_not_finite_is_counted_and_the_rest_goes_on() -> None:
    rng = np.random.default_rng(5)
    bad, good = LowRank(noise(rng, 20, 2), noise(rng, 2, 20)), LowRank(noise(rng, 20, 2), noise(rng, 2, 20))
    bad.b[3, 1], bad.a[0, :2] = np.nan, np.inf
    other = NAME.replace("up", "down")
    report = diagnose(Adapter({NAME: bad, other: good}), base={NAME: noise(rng, 20, 20), other: noise(rng, 20, 20)})
    first, second = report.modules
    assert first["nonfinite"] == report.total["nonfinite"] == 3
    assert first["frobenius_norm"] is None
    assert second["intruders"] is not None
    assert first.keys() == second.keys()


def test_shares_add_up_and_are_grouped(digits: Path) -> None:
    report = diagnose(lt.load(digits / "r4"))
    assert sum(row["share"] for row in report.modules) == pytest.approx(1)
    for groups in (report.extra["layers"], report.extra["projections"]):
        assert len(groups) == 4
        assert sum(group["share"] for group in groups) == pytest.approx(1)
    assert {row["projection"] for row in report.modules} == {g["projection"] for g in report.extra["projections"]}


def test_zero_update_has_no_intruders() -> None:
    w = noise(np.random.default_rng(6), 30, 30)
    row = one(LowRank(np.zeros((30, 2), np.float32), np.ones((2, 30), np.float32)), w)
    assert (row["intruders"], row["relative_norm"], row["effective_rank"], row["certain"]) == (0, 0, 0, True)


def test_curve_agrees_with_the_cosines() -> None:
    rng = np.random.default_rng(7)
    w, update = noise(rng, 300, 290), LowRank(noise(rng, 300, 6), noise(rng, 6, 290), 0.3)
    row = one(update, w)
    truth = (
        np.linalg.svd(update.apply(w).astype(float))[0][:, :10].T
        @ np.linalg.svd(w.astype(float), full_matrices=False)[0]
    )
    for point in row["intruder_curve"]:
        count = int((np.abs(truth).max(axis=1) < point["eps"]).sum())
        assert point["at_least"] <= count <= point["at_most"]


def test_history_tells_how_it_came_about(digits: Path) -> None:
    first, last = lt.load(digits / "r4"), lt.load(digits / "r4-rslora")
    report = diagnose([first, last], base=digits / "base")
    assert report.total["intruders"] == diagnose(last, base=digits / "base").total["intruders"]
    steps = report.extra["history"]
    assert [step["total"]["modules"] for step in steps] == [16, 16]
    assert steps[0]["total"]["intruders"] == diagnose(first, base=digits / "base").total["intruders"]
    name = next(iter(last))
    (old, new) = (a[name].dense().astype(float) for a in (first, last))
    moved = next(m for m in steps[1]["modules"] if m["name"] == name)["moved"]
    assert moved == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(new), rel=1e-5)
    assert "Over 2 checkpoints" in report.extra["summary"][-1]


def test_checkpoints_of_different_trainings(digits: Path) -> None:
    half = lt.load(digits / "r4")
    part = replace(half, updates=dict(list(half.items())[:10]))
    with pytest.raises(MismatchError, match="differ in 6 parameters"):
        diagnose([half, part])


def test_real_checkpoints(real: Path) -> None:
    found = [lt.load(real / f"roberta-pt-r8-ckpt{n}") for n in (500, 8610)]
    report = diagnose(found)
    assert report.total["modules"] == 24
    norms = [step["total"]["frobenius_norm"] for step in report.extra["history"]]
    assert norms[0] < norms[1]
    assert report.to_json()


def test_whole_models(digits: Path) -> None:
    report = diagnose(whole_model(digits / "tuned"), base=digits / "base")
    weights, tuned = (load_file(digits / x / "model.safetensors") for x in ("base", "tuned"))
    assert report.total["certain"]
    for row in report.modules[::6]:
        w, t = (x[row["name"]].astype(np.float32).reshape(row["shape"][0], -1) for x in (weights, tuned))
        k = min(10, *w.shape)
        agree(row, {"intruder_index": dense_figures(w, t, k, 0.5)["intruder_index"]})


def same_figures(one: Report, other: Report) -> None:
    """Equal decisions, and equal numbers but for the order of sums: what is read lies in memory another way."""
    for mine, yours in zip(one.modules, other.modules, strict=True):
        for figure, value in mine.items():
            exact = not isinstance(value, float)
            assert yours[figure] == (value if exact else pytest.approx(value, rel=1e-5)), figure  # fp32 sums


def test_cache_gives_the_same_and_is_used(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = lt.load(digits / "r4")
    plain = diagnose(adapter, base=digits / "base")
    first = diagnose(adapter, base=digits / "base", cache=tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 16

    def forbidden(*args: object) -> None:
        raise AssertionError("computed although cached")

    with monkeypatch.context() as patched:
        patched.setattr(base_side, "base_side", forbidden)
        second = diagnose(adapter, base=digits / "base", cache=tmp_path / "c")
    assert plain.to_json() == first.to_json()
    same_figures(plain, second)
    for path in (tmp_path / "c").iterdir():
        path.write_bytes(b"damaged")
    same_figures(plain, diagnose(adapter, base=digits / "base", cache=tmp_path / "c"))


def test_cache_follows_the_content(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    w, update = noise(rng, 40, 40), LowRank(noise(rng, 40, 2), noise(rng, 2, 40))
    one(update, w, cache=tmp_path)
    other = one(update, 2 * w, cache=tmp_path)
    assert other["base_frobenius_norm"] == pytest.approx(2 * np.linalg.norm(w), rel=1e-6)
    assert len(list(tmp_path.iterdir())) == 2


def test_threads_do_not_matter(digits: Path) -> None:
    from loratools.core.pool import threads

    adapter = lt.load(digits / "r32")
    with threads(1):
        single = diagnose(adapter, base=digits / "base")
    with threads(4):
        assert diagnose(adapter, base=digits / "base").to_json() == single.to_json()


def test_rows_go_into_a_data_frame_and_json(digits: Path) -> None:
    report = diagnose(lt.load(digits / "r4"), base=digits / "base", rank_curve=True)
    assert isinstance(report, Report)
    assert len({tuple(row) for row in report.to_rows()}) == 1
    body = json.loads(report.to_json())
    assert body["schema"] == "loratools.diagnose/1"
    assert {"summary", "layers", "projections", "attention", "request"} <= body.keys()
    assert all(figure in report.units for figure in body["total"] if figure != "modules")


def test_library_of_the_base(library: Callable[[Any], Any]) -> None:
    rng = np.random.default_rng(9)
    w, b, a = noise(rng, 300, 280), noise(rng, 300, 3), noise(rng, 3, 280)
    ours = one(LowRank(b, a, 0.5), w)
    theirs = one(LowRank(library(b), library(a), 0.5), library(w))
    assert ours["intruder_index"] == theirs["intruder_index"]
    assert np.allclose(ours["singular_values"], theirs["singular_values"], rtol=1e-6)
    assert np.allclose(ours["max_cosine_upper"], theirs["max_cosine_upper"], atol=1e-2)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_wrong_base_by_name_and_by_shape(digits: Path) -> None:
    adapter = lt.load(digits / "r4")
    with pytest.raises(MismatchError, match="16 of 16 parameters"):
        diagnose(adapter, base={"other.weight": np.ones((3, 3), np.float32)})
    wrong = {name: np.ones((7, 9), np.float32) for name in adapter}
    with pytest.raises(MismatchError, match="16 of 16 parameters have another shape") as caught:
        diagnose(adapter, base=wrong)
    assert str(caught.value).count("base (7, 9)") == 3


def test_missing_modules_are_listed_and_skipped_only_on_demand(digits: Path) -> None:
    adapter = lt.load(digits / "r4")
    weights = load_file(digits / "base" / "model.safetensors")
    lost = next(iter(adapter))
    part = {name: w for name, w in weights.items() if name != lost}
    with pytest.raises(MismatchError, match="1 of 16") as caught:
        diagnose(adapter, base=part)
    assert lost in str(caught.value)
    assert "--skip-missing" in str(caught.value)
    report = diagnose(adapter, base=part, skip_missing=True)
    rows = {row["name"]: row for row in report.modules}
    assert rows[lost]["intruders"] is None
    assert any(lost in warning for warning in report.warnings)


def test_quantised_base(digits: Path) -> None:
    adapter = lt.load(digits / "r4")
    base = Base.open(digits / "base")
    base.config = {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(UnsupportedError, match="GPTQ"):
        diagnose(adapter, base=base)


def test_base_that_is_not_finite() -> None:
    w = noise(np.random.default_rng(0), 30, 30)
    w[2, 3] = np.inf
    with pytest.raises(NumericsError, match="not finite") as caught:
        one(LowRank(np.ones((30, 1), np.float32), np.ones((1, 30), np.float32)), w)
    assert caught.value.parameter == NAME


@pytest.mark.parametrize("options", [{"k": 0}, {"eps": 0.0}, {"eps": 1.0}])
def test_impossible_requests(options: dict[str, Any], digits: Path) -> None:
    with pytest.raises(UsageError, match="nothing to diagnose"):
        diagnose(lt.load(digits / "r4"), **options)
    with pytest.raises(UsageError):
        diagnose([])


def test_a_head_of_another_size_and_vectors_have_no_difference() -> None:
    head, bias = "head.weight", "head.bias"
    updates = {
        head: Replace(np.ones((5, 8), np.float32)),
        bias: Dense(np.ones(5, np.float32)),
        "new.weight": Replace(np.ones((2, 8), np.float32)),
    }
    report = diagnose(Adapter(updates), base={head: np.ones((3, 8), np.float32), bias: np.ones(5, np.float32)})
    assert [row.get("relative_norm") for row in report.modules] == [None] * 3
    assert report.total["modules"] == 0
    assert "no matrix" in report.extra["summary"][0]
