"""Squeezing in the norm of statistics: against the dense optimum, the plain squeeze, and names that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.errors import FormatError, MismatchError, NeedsBaseError, UsageError
from loratools.io.base import Base
from loratools.kinds.dense import Dense
from loratools.kinds.hadamard import Hadamard
from loratools.kinds.lowrank import LowRank
from loratools.kinds.stack import Stack
from loratools.linalg.namespace import to_numpy
from loratools.ops.norm_gains import norm_gains

M, N, R = 20, 12, 6
EXCESS = 2e-6  # of a truncation (1e-6) and of factors stored in fp32, relative to |D|


def low(seed: int, scale: float = 2.0) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.standard_normal((M, R)).astype("f4"), rng.standard_normal((R, N)).astype("f4"), scale)


def two() -> Adapter:
    return Adapter({"a.q.weight": low(1), "a.v.weight": low(2), "a.q.bias": Dense(np.ones(M, np.float32))})


def diagonals(seed: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"in_diag": N, "out_diag": M}
    return {f"a.{m}.{k}": rng.uniform(0.01, 9, n).astype("f4") for m in "qv" for k, n in sizes.items()}


def grams(seed: int = 4, count: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    xs = {m: rng.standard_normal((count, N)) * np.logspace(0, -1, N) for m in "qv"}
    return {f"a.{m}.in_gram": (x.T @ x / count).astype("f4") for m, x in xs.items()}


def roots(stats: dict[str, np.ndarray], m: str) -> tuple[np.ndarray, np.ndarray]:
    p = stats.get(f"a.{m}.out_diag", np.ones(M)).astype(float)
    if f"a.{m}.in_gram" in stats:
        mu, x = np.linalg.eigh(stats[f"a.{m}.in_gram"].astype(float))
        return np.diag(p**0.5), (x * np.sqrt(np.clip(mu, 0, None))) @ x.T
    return np.diag(p**0.5), np.diag(stats[f"a.{m}.in_diag"].astype(float) ** 0.5)


@pytest.mark.parametrize("stats", [diagonals(), grams(), grams(count=5)], ids=["diagonals", "gram", "singular"])
@pytest.mark.parametrize("k", [1, 3, R])
def test_both_errors_are_told_and_the_weighted_one_is_the_optimum(stats: dict[str, np.ndarray], k: int) -> None:
    done, plain = lt.squeeze(two(), rank=k, stats=stats), lt.squeeze(two(), rank=k)
    assert done.report is not None
    rows = {row["name"]: row for row in done.report.modules}
    for m in "qv":
        name = f"a.{m}.weight"
        p, q = roots(stats, m)
        d, cut, other = (x[name].dense().astype(float) for x in (two(), done, plain))  # type: ignore[attr-defined]
        s = np.linalg.svd(p @ d @ q, compute_uv=False)
        size = np.linalg.norm(s)
        error = np.linalg.norm(p @ (d - cut) @ q)
        assert error <= np.linalg.norm(s[k:]) + EXCESS * size
        assert error <= np.linalg.norm(p @ (d - other) @ q) + EXCESS * size
        assert rows[name]["weighted_error"] == pytest.approx(error / size, rel=1e-4, abs=1e-6)
        assert rows[name]["relative_error"] == pytest.approx(
            np.linalg.norm(d - cut) / np.linalg.norm(d), rel=1e-4, abs=1e-6
        )
        assert rows[name]["energy"] == pytest.approx(1 - (np.linalg.norm(s[k:]) / size) ** 2, abs=1e-5)
    assert "weighted_error" in done.report.total
    assert done["a.q.bias"] is not None
    assert done.report.warnings == ()


def test_without_statistics_nothing_is_weighed() -> None:
    report = lt.squeeze(two(), rank=2).report
    assert report is not None
    assert "weighted_error" not in report.total
    ones = {f"a.{m}.in_diag": np.ones(N, np.float32) for m in "qv"}
    same = lt.squeeze(two(), rank=2, stats=ones)
    for name in ("a.q.weight", "a.v.weight"):
        assert np.allclose(same[name].dense(), lt.squeeze(two(), rank=2)[name].dense(), atol=1e-5)  # type: ignore[attr-defined]


def test_targets_are_weighted() -> None:
    stats = diagonals()
    done = lt.squeeze(two(), error=0.3, stats=stats)
    assert done.report is not None
    assert all(row["weighted_error"] <= 0.3 + 1e-6 for row in done.report.modules if row["rank_after"])
    one = {k: v * (1e-8 if k.startswith("a.v") else 1.0) for k, v in stats.items()}
    budget = lt.squeeze(two(), size=1800, format="native", stats=one)
    assert budget.report is not None
    ranks = {row["name"]: row["rank_after"] for row in budget.report.modules}
    assert ranks["a.v.weight"] == 1  # what v does hardly counts, so q gets the bytes
    assert ranks["a.q.weight"] > 2
    with pytest.raises(UsageError, match="noise"):
        lt.squeeze(two(), rank="noise", stats=stats)


def test_missing_and_further_modules_are_said() -> None:
    stats = {k: v for k, v in diagonals().items() if k.startswith("a.q")} | {"x.in_diag": np.ones(3, np.float32)}
    done = lt.squeeze(two(), rank=2, stats=stats)
    assert done.report is not None
    assert any(
        "no statistics for 1 of 2 modules, which stay unweighted (a.v.weight)" in w for w in done.report.warnings
    )
    assert any("1 modules that the adapter does not change (x)" in w for w in done.report.warnings)
    plain = lt.squeeze(two(), rank=2)
    assert np.array_equal(done["a.v.weight"].dense(), plain["a.v.weight"].dense())  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="statistics of every module"):
        lt.squeeze(two(), size=1600, stats=stats)


@pytest.mark.parametrize(
    ("stats", "error", "match"),
    [
        ({"a.q.in_diag": np.ones(N + 1, np.float32)}, MismatchError, "1 statistics do not fit"),
        ({"a.q.in_diag": np.ones(M, np.float32)}, MismatchError, "20 inputs, not 12"),
        ({"a.q.out_diag": np.ones(N, np.float32)}, MismatchError, "12 outputs, not 20"),
        ({"z.q.in_diag": np.ones(N, np.float32)}, MismatchError, "of no module"),
        ({"a.q.in_diag": np.zeros(N, np.float32)}, FormatError, "all zero"),
        ({"a.q.in_gram": np.full((N, N), np.nan, np.float32)}, FormatError, "not finite"),
        ({"a.q.in_diag": np.full(N, np.nan, np.float32)}, FormatError, "no mean of squares"),
        ("norm", NeedsBaseError, "gains"),
    ],
)
def test_refusals(stats: Any, error: type[Exception], match: str) -> None:
    for tolerant in (False, True):
        with pytest.raises(error, match=match):
            lt.squeeze(two(), rank=2, stats=stats, allow_nonfinite=tolerant)


def test_parameters_stored_in_out() -> None:
    """GPT-2's Conv1D and embeddings: the inputs weigh the rows of the stored parameter."""
    turned = Adapter({"h.c.weight": low(5)}, Meta(layout={"h.c.weight": {"stored": "in_out"}}))
    rng = np.random.default_rng(6)
    stats = {"h.c.in_diag": rng.uniform(0.1, 9, M).astype("f4"), "h.c.out_diag": rng.uniform(0.1, 9, N).astype("f4")}
    straight = Adapter({"h.c.weight": LowRank(low(5).a.T, low(5).b.T, 2.0)})
    one, other = lt.squeeze(turned, rank=2, stats=stats), lt.squeeze(straight, rank=2, stats=stats)
    assert np.allclose(one["h.c.weight"].dense(), other["h.c.weight"].dense().T, atol=1e-4)  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match="12 inputs, not 20"):
        lt.squeeze(turned, rank=2, stats={"h.c.in_diag": np.ones(N, np.float32)})


def test_experts_share_their_inputs() -> None:
    rng = np.random.default_rng(7)
    b, a = rng.standard_normal((2, M, R)).astype("f4"), rng.standard_normal((2, R, N)).astype("f4")
    q = rng.uniform(0.1, 9, N).astype("f4")
    done = lt.squeeze(Adapter({"m.experts.up": Stack(b, a)}), rank=2, stats={"m.experts.up.in_diag": q})
    for e in range(2):
        alone = lt.squeeze(Adapter({"x.weight": LowRank(b[e], a[e])}), rank=2, stats={"x.in_diag": q})
        got = to_numpy(done["m.experts.up"].dense())[e]  # type: ignore[attr-defined]
        assert np.allclose(got, alone["x.weight"].dense(), atol=1e-4)  # type: ignore[attr-defined]


def test_updates_without_factors_are_weighted_too() -> None:
    u = Hadamard.example(0)
    q = np.linspace(0.1, 3, u.shape[1])
    done = lt.squeeze(Adapter({"h.weight": u}), rank=2, stats={"h.in_diag": q})
    d = u.dense().astype(float)
    s = np.linalg.svd(d * q**0.5, compute_uv=False)
    error = np.linalg.norm((d - done["h.weight"].dense()) * q**0.5)  # type: ignore[attr-defined]
    assert error <= np.linalg.norm(s[2:]) + EXCESS * np.linalg.norm(s)


def test_resize_takes_statistics() -> None:
    stats = diagonals()
    done = lt.resize(two(), rank=2, stats=stats)
    assert done["a.q.weight"].scale == 2.0  # type: ignore[attr-defined]
    cut = lt.squeeze(two(), rank=2, stats=stats)
    assert np.allclose(done["a.q.weight"].dense(), cut["a.q.weight"].dense(), atol=1e-5)  # type: ignore[attr-defined]
    assert done.report is not None
    assert "weighted_error" in done.report.total


def test_torch_tensors(library: Callable[[Any], Any]) -> None:
    u = low(1)
    done = lt.squeeze(Adapter({"a.q.weight": LowRank(library(u.b), library(u.a), 2.0)}), rank=2, stats=grams())
    want = lt.squeeze(Adapter({"a.q.weight": u}), rank=2, stats=grams())
    assert np.allclose(to_numpy(done["a.q.weight"].dense()), want["a.q.weight"].dense(), atol=1e-4)  # type: ignore[attr-defined]


# --- the base's norms -------------------------------------------------------------------------------------------------


def llama(**config: Any) -> Base:
    rng, home = np.random.default_rng(8), "model.layers.0."
    linear = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    tensors = {f"{home}{n}.weight": np.zeros((6, 4), np.float32) for n in linear}
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    for norm in norms[: 4 if config.get("four") else 2]:
        tensors[f"{home}{norm}.weight"] = rng.uniform(0.1, 3, 4).astype("f4")
    tensors["model.norm.weight"], tensors["lm_head.weight"] = np.arange(1, 5, dtype="f4"), np.zeros((9, 4), np.float32)
    held = Base.open(tensors)
    held.config = {"model_type": config.get("model_type", "llama")}
    return held


def gains(base: Base, norm: str, plus: float = 0.0) -> np.ndarray:
    square = (plus + base[norm].astype(float)) ** 2
    return square / square.mean()


def test_readers_of_norms_are_known() -> None:
    base = llama()
    names = [n for n in base if "norm" not in n]
    found = norm_gains(names, base)
    assert found.keys() == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    }
    for name, norm in (
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("lm_head.weight", "model.norm.weight"),
    ):
        assert np.allclose(found[name].in_diag.read(), gains(base, norm), rtol=1e-5)  # type: ignore[union-attr]


def test_gemma_stores_the_gain_minus_one_and_norms_outputs_too() -> None:
    base = llama(model_type="gemma2", four=True)
    found = norm_gains(["layers.0.mlp.up_proj.weight"], base)["layers.0.mlp.up_proj.weight"]
    want = gains(base, "model.layers.0.pre_feedforward_layernorm.weight", 1.0)
    assert np.allclose(found.in_diag.read(), want, rtol=1e-5)  # type: ignore[union-attr]


def test_norms_of_outputs_are_not_taken_for_norms_of_inputs() -> None:
    """OLMo 2 has post_attention_layernorm and post_feedforward_layernorm behind its blocks, none before."""
    base = llama(four=True)
    kept = {n: base[n] for n in base if "input_layernorm" not in n and "pre_feedforward" not in n}
    assert norm_gains(["model.layers.0.mlp.up_proj.weight"], Base.open(kept)) == {}


def test_norm_gains_of_the_digits_model(digits: Path) -> None:
    adapter = lt.load(digits / "r32")
    done = lt.squeeze(adapter, rank=4, stats="norm", base=digits / "base")
    assert done.report is not None
    assert any("4 of 16 modules read no norm's output" in w for w in done.report.warnings)
    weighted = [row["name"] for row in done.report.modules if row.get("weighted_error") is not None]
    assert len(weighted) == 12
    assert not any("fc2" in name for name in weighted)
    base = Base.open(digits / "base")
    stats = norm_gains([weighted[0]], base)[weighted[0]]
    norm = "vision_model.encoder.layers.0.layer_norm2"
    square = base[f"{norm}.weight"].astype(float) ** 2 + base[f"{norm}.bias"].astype(float) ** 2
    assert np.allclose(stats.in_diag.read(), square / square.mean(), rtol=1e-5)  # type: ignore[union-attr]


def test_a_foreign_base_is_refused() -> None:
    with pytest.raises(MismatchError, match="none of the adapter's parameters"):
        lt.squeeze(two(), rank=2, stats="norm", base={"x.weight": np.ones((3, 3), np.float32)})
