"""compare: every figure is that of the dense updates, however adapters are divided into blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from loratools.core import pool
from loratools.core.adapter import Adapter, Meta
from loratools.core.update import Update
from loratools.errors import MismatchError, NeedsBaseError, UsageError
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.kinds.stack import Stack
from loratools.ops import compare as room
from loratools.ops import compare_pairs, compare_signs
from loratools.ops.compare import compare
from loratools.ops.compare_graph import communities
from loratools.ops.compare_signs import sampled_rows_and_columns
from loratools.ops.compare_words import recommendation, verdict

M, N = 20, 14
# bases and overlaps are fp32; sums of at most 20 of them
CLOSE = {"rel": 20 * float(np.finfo(np.float32).eps) * 10, "abs": 2e-5}
DEGREES = {"abs": 0.05}  # acos of an fp32 cosine near 1: sqrt(2 * 6e-8) rad = 0.02 degrees, and again for rounding


def low(rank: int, seed: int, scale: float = 1.0) -> LowRank:
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((M, rank)), rng.standard_normal((rank, N))
    return LowRank(b.astype(np.float32), a.astype(np.float32), scale)


def adapter(*updates: LowRank | Update | None, base: str | None = None) -> Adapter:
    names = ("m.layers.0.q.weight", "m.layers.1.q.weight", "m.layers.0.v.weight")
    return Adapter({n: u for n, u in zip(names, updates, strict=False) if u is not None}, Meta(base_id=base))


def several() -> list[Adapter]:
    return [
        adapter(low(3, 1), low(2, 2, 2.0), low(1, 3)),
        adapter(low(3, 4), low(4, 5), None),
        adapter(low(1, 6, -1.0), None, low(2, 7)),
        adapter(low(3, 8), low(2, 9), low(1, 10)),
    ]


def row(report: Any, i: int, j: int) -> Any:
    return next(r for r in report.modules if (r["a"], r["b"]) == (f"adapter {i + 1}", f"adapter {j + 1}"))


def dense(a: Adapter, name: str) -> np.ndarray:
    return np.asarray(a[name].dense(), np.float64) if name in a else np.zeros((M, N))  # type: ignore[attr-defined]


def projected(x: np.ndarray, y: np.ndarray) -> float:
    """|P_y x P_y|^2."""
    u, s, vh = np.linalg.svd(y)
    k = int(np.sum(s > 1e-6 * max(s[0], 1e-30)))
    return float(np.sum((u[:, :k].T @ x @ vh[:k].T) ** 2))


@pytest.mark.parametrize(("i", "j"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_figures_are_those_of_the_dense_updates(i: int, j: int) -> None:
    parts = several()
    found = row(compare(parts), i, j)
    for names, said in [
        (list(parts[0]), found),
        (["m.layers.0.q.weight", "m.layers.1.q.weight"], found["groups"]["q"]),
        (["m.layers.0.v.weight"], found["groups"]["v"]),
    ]:
        x, y = ([dense(parts[k], n) for n in names] for k in (i, j))
        own, other = (sum(np.sum(d * d) for d in part) for part in (x, y))
        if not own * other:
            assert said["cosine"] is None
            continue
        pairs = list(zip(x, y, strict=True))
        inside, outside = sum(projected(p, q) for p, q in pairs), sum(projected(q, p) for p, q in pairs)
        both = [(p, q) for p, q in pairs if p.any() and q.any()]
        assert said["cosine"] == pytest.approx(sum(np.sum(p * q) for p, q in pairs) / np.sqrt(own * other), **CLOSE)
        assert said["a_in_b"] == pytest.approx(inside / own, **CLOSE)
        assert said["b_in_a"] == pytest.approx(outside / other, **CLOSE)
        assert said["interference"] == pytest.approx(np.sqrt((inside + outside) / (own + other)), **CLOSE)
        assert said["norm_ratio"] == pytest.approx(np.sqrt(other / own), **CLOSE)
        spaces = [(np.degrees(_angles(p, q)), np.degrees(_angles(p.T, q.T))) for p, q in both]
        assert said["angle_output"] == pytest.approx(np.mean([np.mean(out) for out, _ in spaces]), **DEGREES)
        assert said["angle_input"] == pytest.approx(np.mean([np.mean(back) for _, back in spaces]), **DEGREES)
        assert said["least_output"] == pytest.approx(min(np.min(out) for out, _ in spaces), **DEGREES)
        signs = [(np.sign(p) * np.sign(q) < 0).sum() for p, q in both]
        assert said["sign_conflict"] == pytest.approx(sum(signs) / (len(both) * M * N), abs=2 / (M * N))  # near zeros


def _angles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    rank = [np.linalg.matrix_rank(d, tol=1e-5 * np.linalg.norm(d)) for d in (x, y)]
    bases = [np.linalg.svd(d)[0][:, :k] for d, k in zip((x, y), rank, strict=True)]
    return np.asarray(subspace_angles(*bases))


def test_blocks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = several()
    whole = compare(parts)
    monkeypatch.setattr(room, "BLOCK_BYTES", 4 * 3 * (M + N))
    monkeypatch.setattr(compare_pairs, "BLOCK", 1)
    monkeypatch.setattr(compare_signs, "CHUNK", 1)
    with pool.threads(3):
        divided = compare(parts)
    for one, other in zip(whole.modules, divided.modules, strict=True):
        for figure, value in one.items():
            if isinstance(value, float):
                tolerance = DEGREES if figure.startswith(("angle", "least")) else CLOSE
                assert other[figure] == pytest.approx(value, **tolerance), figure


def test_the_gauge_does_not_matter_and_twins_are_alike() -> None:
    one = adapter(low(3, 1))
    u = one["m.layers.0.q.weight"]
    g = np.random.default_rng(0).standard_normal((3, 3)) + 2 * np.eye(3)
    assert isinstance(u, LowRank)
    twin = adapter(LowRank(u.b @ g, np.linalg.solve(g, u.a), 1.0))
    found = row(compare([one, twin]), 0, 1)
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["interference"] == pytest.approx(1, abs=1e-5)
    assert found["angle_output"] <= 0.1
    assert found["sign_conflict"] <= 2 / (M * N)
    assert found["verdict"] == "alike"


def test_the_sample_is_fixed_bounded_and_said() -> None:
    rows, columns = sampled_rows_and_columns(4096, 11008, 1 << 18)
    assert 0.95 * (1 << 18) <= len(rows) * len(columns) <= 1 << 18
    assert max(rows) < 4096
    assert max(columns) < 11008
    assert sampled_rows_and_columns(3, 5, 1 << 20) == ([0, 1, 2], [0, 1, 2, 3, 4])
    assert sampled_rows_and_columns(1, 10**7, 100)[0] == [0]
    assert compare(several(), sample=100).extra["sample"]["entries_per_module"] == 100
    for wrong in (0, (1 << 20) + 1):
        with pytest.raises(UsageError, match="no such sample"):
            compare(several(), sample=wrong)


def test_a_small_sample_estimates_the_whole() -> None:
    rng = np.random.default_rng(0)
    parts = [adapter(LowRank(rng.standard_normal((300, 8)), rng.standard_normal((8, 200)))) for _ in range(2)]
    x, y = (p["m.layers.0.q.weight"].dense() for p in parts)  # type: ignore[attr-defined]
    whole = np.mean(np.sign(x) != np.sign(y))
    # 2500 entries of rank-8 matrices: fewer independent than counted, so ten standard deviations of half
    assert row(compare(parts, sample=2500), 0, 1)["sign_conflict"] == pytest.approx(whole, abs=10 * 0.5 / 50)


def test_experts_and_dora_are_compared() -> None:
    rng = np.random.default_rng(0)
    stacks = [
        adapter(
            Stack(rng.standard_normal((3, M, 2)).astype(np.float32), rng.standard_normal((3, 2, N)).astype(np.float32))
        )
        for _ in range(2)
    ]
    x, y = (np.asarray(a["m.layers.0.q.weight"].dense(), np.float64) for a in stacks)  # type: ignore[attr-defined]
    found = row(compare(stacks), 0, 1)
    assert found["cosine"] == pytest.approx(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y), **CLOSE)

    w = rng.standard_normal((M, N)).astype(np.float32)
    coat = adapter(Dora(low(2, 1), rng.uniform(0.5, 2, M).astype(np.float32)))
    with pytest.raises(NeedsBaseError):
        compare([coat, adapter(low(3, 2))])
    true = np.asarray(coat["m.layers.0.q.weight"].apply(w), np.float64) - w
    other = dense(adapter(low(3, 2)), "m.layers.0.q.weight")
    report = compare([coat, adapter(low(3, 2))], base={"m.layers.0.q.weight": w})
    expected = np.sum(true * other) / np.linalg.norm(true) / np.linalg.norm(other)
    assert row(report, 0, 1)["cosine"] == pytest.approx(expected, abs=1e-4)


def test_updates_of_full_rank_say_how_much_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.ops import compare_bases

    monkeypatch.setattr(compare_bases, "FULL_RANK", 2)
    rng = np.random.default_rng(0)
    w = rng.standard_normal((M, N)).astype(np.float32)
    coat = adapter(Dora(low(2, 1), rng.uniform(0.5, 2, M).astype(np.float32)))
    report = compare([coat, adapter(low(3, 2))], base={"m.layers.0.q.weight": w})
    assert any("leading directions" in line for line in report.warnings)


def test_zero_updates_have_no_cosine_and_nothing_breaks() -> None:
    empty = adapter(LowRank(np.zeros((M, 2), np.float32), np.ones((2, N), np.float32)))
    found = row(compare([empty, adapter(low(2, 1))]), 0, 1)
    assert found["cosine"] is None
    assert found["angle_output"] == 90
    assert found["interference"] == 0
    assert found["verdict"] == "empty"
    told = compare([empty, adapter(low(2, 1))]).extra["recommendation"]
    assert told[0] == "Empty: adapter 1: the update is zero (untrained?)."
    assert row(compare([empty, empty]), 0, 1)["interference"] is None


def test_what_is_stored_whole_is_left_out_and_told() -> None:
    parts = [adapter(low(2, i), Replace(np.ones(3))) for i in (1, 2)]
    report = compare(parts)
    assert list(report.extra["groups"]) == ["q"]
    assert "stored whole, not compared: m.layers.1.q.weight (1)" in report.warnings


def test_different_bases_are_refused_and_one_input_is_a_report_without_pairs() -> None:
    with pytest.raises(MismatchError, match="different bases"):
        compare([adapter(low(2, 1), base="a/x"), adapter(low(2, 1), base="a/y")])
    report = compare([adapter(low(2, 1))])
    assert (report.modules, report.total["pairs"]) == ((), 0)
    assert report.extra["recommendation"] == ["Nothing to compare: it takes two adapters with additive updates."]


def test_communities_of_planted_groups() -> None:
    rng = np.random.default_rng(0)
    centres = [low(3, seed) for seed in (1, 2)]
    parts = []
    for centre in (centres[0], centres[1], centres[0], centres[1], centres[0]):
        noise = rng.standard_normal((M, 3)).astype(np.float32) / 3
        parts.append(adapter(LowRank(centre.b + noise, centre.a)))
    report = compare([*parts, adapter(low(3, 99))])
    assert report.extra["communities"] == [
        ["adapter 1", "adapter 3", "adapter 5"], ["adapter 2", "adapter 4"], ["adapter 6"],
    ]  # fmt: skip
    told = report.extra["recommendation"]
    assert told[0].startswith("Community 1: adapter 1, adapter 3, adapter 5")
    assert any(line.startswith("Like no other: adapter 6; the largest cosine is ") for line in told)
    assert any(line.startswith("Alike (4 pairs)") for line in told)


def test_communities_do_not_need_edges() -> None:
    assert communities(["a", "b"], {("a", "b"): 0.0}, 0) == [["a"], ["b"]]
    assert communities(["a"], {}, 0) == [["a"]]


@pytest.mark.parametrize(
    ("cosine", "interference", "expected"),
    [
        (0.9, 0.9, "alike"),
        (-0.2, 0.5, "opposed"),
        (0.01, 0.05, "separate"),
        (0.05, 0.6, "crowded"),
        (None, None, "empty"),
    ],
)
def test_verdicts(cosine: float | None, interference: float | None, expected: str) -> None:
    assert verdict({"cosine": cosine, "interference": interference}) == expected


def test_long_lists_are_cut_with_a_count() -> None:
    rows = [
        {"a": "x", "b": str(i), "cosine": 0.0, "interference": 0.5 + i / 100, "verdict": "crowded", "groups": {}}
        for i in range(9)
    ]
    (told,) = recommendation(rows, [])
    assert "9 pairs" in told
    assert "x and 8: cosine 0.00, interference 0.58" in told
    assert told.endswith("; and 4 more.")
