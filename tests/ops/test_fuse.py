"""fuse: what goes in may differ in every way that files differ; what comes out is one adapter of true updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.core.update import Leaf, Update
from loratools.errors import MismatchError, MissingScaleError, NeedsBaseError, UnsupportedError, UsageError
from loratools.io.spool import Spool
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace import Replace
from loratools.kinds.stack import Stack
from loratools.ops import fuse_work
from loratools.ops.fuse import fuse

EPS = float(np.finfo(np.float32).eps)
M, N = 20, 12


def low(rank: int, seed: int, scale: float = 1.0, dtype: type = np.float32) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.standard_normal((M, rank)).astype(dtype), rng.standard_normal((rank, N)).astype(dtype), scale)


def adapter(base: str | None = None, **updates: Update) -> Adapter:
    return Adapter({name.replace("_", "."): u for name, u in updates.items()}, Meta(base_id=base))


def dense(u: Any) -> np.ndarray:
    return np.asarray(u.dense(), np.float64)


def close(found: Any, expected: np.ndarray, tolerance: float = 100 * EPS) -> bool:
    return bool(np.linalg.norm(dense(found) - expected) <= tolerance * np.linalg.norm(expected))


def test_ranks_scales_dtypes_and_modules_may_differ() -> None:
    one = adapter(q_weight=low(3, 1, 2.0, np.float16), v_weight=low(2, 2))
    two = adapter(q_weight=low(5, 3, 0.5), k_weight=low(1, 4, -1.0))
    done = fuse([one, two], weights=[0.5, -2.0])
    assert list(done) == ["q.weight", "v.weight", "k.weight"]
    assert close(done["q.weight"], 0.5 * dense(one["q.weight"]) - 2 * dense(two["q.weight"]))
    assert close(done["v.weight"], 0.5 * dense(one["v.weight"]))
    assert close(done["k.weight"], -2 * dense(two["k.weight"]))
    assert [u.rank for u in done.values()] == [8, 2, 1]  # type: ignore[attr-defined]
    assert done.report is not None
    assert "adapter 2 lacks 1 of 3 modules, which count as zero: v.weight" in done.report.warnings
    assert done.report.total["weight_sum"] == -1.5
    assert done.meta.history[-1] == "fuse linear of adapter 1 (0.5), adapter 2 (-2)"


def test_one_adapter_at_weight_one_is_itself() -> None:
    one = adapter(q_weight=low(3, 1, 2.0))
    assert close(fuse([one])["q.weight"], dense(one["q.weight"]))
    assert close(fuse([one], method="ties", density=1.0)["q.weight"], dense(one["q.weight"]))


@pytest.mark.parametrize(("kind", "dtype"), [("float16", "float16"), ("mixed", "float32"), ("float64", "float64")])
def test_storage_dtype(kind: str, dtype: str) -> None:
    first = {"float16": np.float16, "mixed": np.float16, "float64": np.float64}[kind]
    second = {"float16": np.float16, "mixed": np.float32, "float64": np.float32}[kind]
    done = fuse([adapter(q_weight=low(2, 1, dtype=first)), adapter(q_weight=low(2, 2, dtype=second))])
    assert done["q.weight"].b.dtype == dtype  # type: ignore[attr-defined]
    assert fuse([done], dtype="bfloat16")["q.weight"].b.dtype.name == "bfloat16"  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="no dtype to store factors in"):
        fuse([done], dtype="int8")


def test_rank_and_energy_recompress_optimally() -> None:
    parts = [adapter(q_weight=low(4, seed)) for seed in (1, 2, 3)]
    total = sum(dense(a["q.weight"]) for a in parts)
    u, s, vh = np.linalg.svd(total)
    cut = fuse(parts, rank=3)
    assert close(cut["q.weight"], u[:, :3] * s[:3] @ vh[:3])
    assert cut.report is not None
    error = np.sqrt(np.sum(s[3:] ** 2) / np.sum(s**2))
    assert cut.report.total["relative_error"] == pytest.approx(
        error, rel=1e-4
    )  # the squeeze's own 1e-6 of |D|, and fp32
    assert cut.report.total["from_sum"] == pytest.approx(error, rel=1e-4)
    k = 1 + int(np.sum(np.cumsum(s**2) < 0.9 * np.sum(s**2)))
    assert fuse(parts, energy=0.9)["q.weight"].rank == k  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="two targets"):
        fuse(parts, rank=3, energy=0.9)
    for wrong in (0, -1, "all"):
        with pytest.raises(UsageError, match="no such rank"):
            fuse(parts, rank=wrong)


def test_the_rank_is_constructed_by_tucker() -> None:
    parts = [adapter(q_weight=low(4, seed)) for seed in (1, 2, 3)]
    done = fuse(parts, method="tucker", rank=2)
    assert done["q.weight"].rank == 2  # type: ignore[attr-defined]
    assert done.report is not None
    assert done.report.extra["method"] == "tucker rank=2 iterations=50 --rank 2"
    truncated = fuse(parts, rank=2).report
    assert truncated is not None
    assert sum(done.report.total["covered"]) > sum(truncated.total["covered"])  # covers the tasks better,
    assert done.report.total["from_sum"] > truncated.total["from_sum"]  # and fits their sum worse


def test_results_without_factors_are_cut_and_say_so() -> None:
    parts = [adapter(q_weight=low(2, seed)) for seed in (1, 2)]
    done = fuse(parts, method="ties", density=0.3)
    whole = fuse(parts, method="ties", density=0.3, rank="full")
    assert isinstance(whole["q.weight"], Dense)
    target = dense(whole["q.weight"])
    s = np.linalg.svd(target)[1]
    assert done["q.weight"].rank == 4  # type: ignore[attr-defined]
    error = np.linalg.norm(dense(done["q.weight"]) - target) / np.linalg.norm(target)
    optimum = np.sqrt(np.sum(s[4:] ** 2) / np.sum(s**2))
    assert optimum * (1 - 1e-5) <= error <= optimum * 1.003  # linalg.rsvd: within 0.3 % of the optimum
    assert done.report is not None
    assert done.report.total["relative_error"] == pytest.approx(error, rel=1e-4)
    assert any("no exact low rank" in line for line in done.report.warnings)
    assert fuse(parts, method="ties", rank=2)["q.weight"].rank == 2  # type: ignore[attr-defined]
    kept = fuse(parts, method="ties", density=0.3, energy=0.95)["q.weight"]
    need = 1 + int(np.sum(np.cumsum(s**2) < 0.95 * np.sum(s**2)))
    assert need <= kept.rank <= need + 1  # type: ignore[attr-defined]


def test_large_updates_are_decomposed_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.fusion import tiles
    from loratools.ops import fuse_cut

    parts = [adapter(q_weight=low(2, seed)) for seed in (1, 2)]
    once = dense(fuse(parts, method="ties", rank=3)["q.weight"])
    monkeypatch.setattr(fuse_cut, "KEPT_BYTES", 0)
    monkeypatch.setattr(tiles, "TILE", 50)
    assert close(fuse(parts, method="ties", rank=3)["q.weight"], once)


def test_dora_is_fused_as_its_true_update() -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((M, N)).astype(np.float32)
    coat = Dora(low(2, 1), rng.uniform(0.5, 2, M).astype(np.float32))
    parts = [adapter(q_weight=coat), adapter(q_weight=low(3, 2))]
    with pytest.raises(NeedsBaseError, match="1 updates of kind dora"):
        fuse(parts)
    expected = 0.5 * (dense(Replace(coat.apply(w)).delta(w))) + 0.25 * dense(parts[1]["q.weight"])
    whole = fuse(parts, weights=[0.5, 0.25], base={"q.weight": w}, rank="full")
    assert close(whole["q.weight"], expected)
    s = np.linalg.svd(expected, compute_uv=False)
    cut = fuse(parts, weights=[0.5, 0.25], base={"q.weight": w})["q.weight"]
    assert cut.rank == 5  # type: ignore[attr-defined]
    optimum = np.linalg.norm(s[5:]) / np.linalg.norm(s)
    error = np.linalg.norm(dense(cut) - expected) / np.linalg.norm(s)
    assert error <= 1.003 * optimum  # linalg.rsvd
    # weights 1, 0 give the first adapter's effect back
    alone = fuse(parts, weights=[1.0, 0.0], base={"q.weight": w}, rank=N)["q.weight"]
    assert close(Dense(alone.apply(w)), np.asarray(coat.apply(w), np.float64), 1e-4)  # fp32 SVD of |W'| beside |D|


def test_norms_kept_shares_and_interference_are_those_of_the_dense_updates() -> None:
    parts = [adapter(q_weight=low(2, 1, 2.0), v_weight=low(1, 5)), adapter(q_weight=low(3, 2))]
    done = fuse(parts, method="tsv", weights=[0.5, 1.5])
    assert done.report is not None
    row = done.report.modules[0]
    x, y, f = (dense(u) for u in (parts[0]["q.weight"], parts[1]["q.weight"], done["q.weight"]))
    tight = {"rel": 1e-5}  # fp32 storage of the result, measured in fp64
    assert row["norms"] == pytest.approx([np.linalg.norm(x), np.linalg.norm(y)], **tight)
    assert row["norm_before"] == pytest.approx(np.linalg.norm(0.5 * x + 1.5 * y), **tight)
    assert row["norm_after"] == pytest.approx(np.linalg.norm(f), **tight)
    assert row["kept"] == pytest.approx([np.sum(f * d) / np.sum(d * d) for d in (x, y)], **tight)
    assert row["cosine"] == pytest.approx(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-4)
    assert row["from_sum"] == pytest.approx(np.linalg.norm(f - 0.5 * x - 1.5 * y) / row["norm_before"], **tight)
    assert row["interference"] == pytest.approx(_sti(x, y, 2, 3), **tight)
    u, _, vh = np.linalg.svd(f)
    covered = [np.sum((u[:, :5].T @ d @ vh[:5].T) ** 2) / np.sum(d * d) for d in (x, y)]
    assert row["covered"] == pytest.approx(covered, **tight)
    pair = done.report.extra["pairs"][0]
    v = dense(parts[0]["v.weight"])
    cosine = np.sum(x * y) / np.sqrt((np.sum(x * x) + np.sum(v * v)) * np.sum(y * y))
    assert pair["cosine"] == pytest.approx(cosine, rel=1e-4)


def test_interference_is_told_for_updates_without_factors() -> None:
    rng = np.random.default_rng(6)
    w = rng.standard_normal((M, N)).astype(np.float32)
    coat = Dora(low(2, 1), rng.uniform(0.5, 2, M).astype(np.float32))
    done = fuse([adapter(q_weight=coat), adapter(q_weight=low(3, 2))], base={"q.weight": w}, rank="full")
    assert done.report is not None
    x, y = dense(Replace(coat.apply(w)).delta(w)), dense(low(3, 2))
    row, k = done.report.modules[0], min(M, N)
    assert row["interference"] == pytest.approx(_sti(x, y, k, 3), rel=1e-4)  # fp32, all directions within LEADING
    u, _, vh = np.linalg.svd(x + y)
    covered = [np.sum((u[:, :k].T @ d @ vh[:k].T) ** 2) / np.sum(d * d) for d in (x, y)]
    assert row["covered"] == pytest.approx(covered, rel=1e-4)
    assert row["from_sum"] == 0
    assert done.report.total["rank_after"] is None


def _sti(x: np.ndarray, y: np.ndarray, rx: int, ry: int) -> float:
    """|(U^T U - 1) S (V^T V - 1)| / |S| from stacked singular vectors, as defined."""
    (u1, s1, v1), (u2, s2, v2) = np.linalg.svd(x), np.linalg.svd(y)
    u = np.concatenate([u1[:, :rx], u2[:, :ry]], axis=1)
    v = np.concatenate([v1[:rx], v2[:ry]], axis=0).T
    s = np.diag(np.concatenate([s1[:rx], s2[:ry]]))
    eye = np.eye(rx + ry)
    return float(np.linalg.norm((u.T @ u - eye) @ s @ (v.T @ v - eye)) / np.linalg.norm(s))


def test_experts_are_fused_one_by_one() -> None:
    rng = np.random.default_rng(0)
    stacks = [
        Stack(rng.standard_normal((3, M, r)).astype(np.float32), rng.standard_normal((3, r, N)).astype(np.float32), s)
        for r, s in ((2, 1.0), (1, 2.0))
    ]
    done = fuse([adapter(x_weight=s) for s in stacks], weights=[0.5, 0.25])
    assert isinstance(done["x.weight"], Stack)
    assert close(done["x.weight"], 0.5 * dense(stacks[0]) + 0.25 * dense(stacks[1]))
    twins = fuse([adapter(x_weight=stacks[0])] * 2, method="tsv", weights=[1.0, 1.0])
    assert close(twins["x.weight"], dense(stacks[0]))  # two equal adapters share their directions: nothing blows up
    with pytest.raises(MismatchError, match="stack of experts"):
        fuse([adapter(x_weight=stacks[0]), adapter(x_weight=Dense(np.ones((3, M, N), np.float32)))])


def test_biases_are_summed() -> None:
    parts = [adapter(b_bias=Dense(np.full(4, x, np.float32), 2.0)) for x in (1.0, 3.0)]
    done = fuse(parts, weights=[1.0, 0.5], rank="full")
    assert close(done["b.bias"], np.full(4, 5.0))


def test_replacements_must_be_equal_or_chosen(tmp_path: Path) -> None:
    head = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = [adapter(q_weight=low(2, i), head_weight=Replace(head.copy())) for i in (1, 2)]
    assert np.array_equal(fuse(same)["head.weight"].apply(None), head)
    other = adapter(q_weight=low(2, 3), head_weight=Replace(head + 1))
    lacking = adapter(q_weight=low(2, 4))
    for parts, why in (([*same, other], "adapter 1 and adapter 3 differ"), ([*same, lacking], "adapter 3 lacks it")):
        with pytest.raises(MismatchError, match="1 parameters are stored whole") as caught:
            fuse(parts)
        assert caught.value.got == f"head.weight ({why})"
        assert "--take" in str(caught.value.hint)
    assert np.array_equal(fuse([*same, other], take="adapter 3")["head.weight"].apply(None), head + 1)
    assert np.array_equal(fuse([*same, other], take="1")["head.weight"].apply(None), head)
    assert "head.weight" not in fuse([*same, lacking], take="adapter 3")
    with pytest.raises(UsageError, match="no input named 'adaptr 2'") as usage:
        fuse(same, take="adaptr 2")
    assert "did you mean" in str(usage.value.hint)


def test_an_embedding_saved_beside_its_factors_is_whole() -> None:
    rows = np.ones((M, N), np.float32)
    parts = [adapter(e_weight=Rebased(rows, low(2, 1)), q_weight=low(1, 9)) for _ in range(2)]
    assert fuse(parts)["e.weight"] is parts[0]["e.weight"]
    parts[1] = adapter(e_weight=Rebased(rows, low(2, 2)), q_weight=low(1, 9))
    with pytest.raises(MismatchError, match="stored whole"):
        fuse(parts)


def test_different_bases_are_refused() -> None:
    parts = [adapter(base=b, q_weight=low(2, 1)) for b in ("a/x", "a/y", "a/x", "a/z")]
    with pytest.raises(MismatchError, match=r"different bases \(2 differences\)") as caught:
        fuse(parts)
    assert "adapter 2: a/y" in str(caught.value.got)
    assert fuse(parts, same_base=True).meta.base_id == "a/x"
    shapes = adapter(**{f"m{i}_weight": low(2, i) for i in range(5)})
    others = adapter(**{f"m{i}_weight": LowRank(np.ones((M, 1)), np.ones((1, N + 1))) for i in range(5)})
    with pytest.raises(MismatchError, match=r"different shapes.*\(5 differences\)") as caught:
        fuse([shapes, others], same_base=True)
    assert str(caught.value.got).count(";") == 2  # the first three


def test_names_in_the_way_are_refused_or_settled_by_the_base() -> None:
    one = Adapter({"model.layers.0.q_proj.weight": low(2, 1)})
    two = Adapter({"layers.0.q_proj.weight": low(2, 2)})
    with pytest.raises(MismatchError, match="no parameter in common"):
        fuse([one, two])
    done = fuse([one, two], base={"model.layers.0.q_proj.weight": np.zeros((M, N), np.float32)})
    assert list(done) == ["model.layers.0.q_proj.weight"]
    assert done["model.layers.0.q_proj.weight"].rank == 4  # type: ignore[attr-defined]
    kohya = Adapter({"lora_unet_layers_0_q_proj.weight": low(2, 2)})
    with pytest.raises(MismatchError, match="in different ways"):
        fuse([one, kohya])
    apart = Adapter({"model.layers.0.v_proj.weight": low(2, 2)})
    report = fuse([one, apart]).report
    assert report is not None
    assert "adapter 2 has no module in common with the others" in report.warnings


def test_weights_settings_and_counts_are_checked_first() -> None:
    def unread(out: Any) -> Any:
        raise AssertionError("read before the check")

    lazy = LowRank(Leaf((M, 2), "float32", unread), Leaf((2, N), "float32", unread))
    parts = [adapter(q_weight=lazy)] * 2
    wrong: list[dict[str, Any]] = [
        {"weights": [1.0]},
        {"weights": [1.0, float("nan")]},
        {"method": "tie"},
        {"method": "ties", "densty": 0.3},
        {"method": "della", "density": 0.9, "epsilon": 0.2},
        {"method": "breadcrumbs", "density": 1.0, "gamma": 0.5},
        {"method": "slerp", "weights": [1.0, -1.0]},
        {"method": "regmean"},
        {"stats": [{}, {}]},
        {"rank": 0},
    ]
    for options in wrong:
        with pytest.raises(UsageError):
            fuse(parts, **options)
    with pytest.raises(UsageError, match="wrong number"):
        fuse([*parts, parts[0]], method="slerp")
    with pytest.raises(UsageError):
        fuse([])


def test_files_that_would_be_fused_wrong_are_refused() -> None:
    unscaled = replace(adapter(q_weight=low(2, 1)), meta=Meta(format="loralib", scaled=False))
    with pytest.raises(MissingScaleError, match="loralib"):
        fuse([unscaled])
    altered = replace(adapter(q_weight=low(2, 1)), meta=Meta(config={"init_lora_weights": "pissa"}))
    with pytest.raises(UnsupportedError, match="pissa"):
        fuse([altered])


def test_activated_loras_of_different_invocations_are_refused() -> None:
    parts = [
        replace(adapter(q_weight=low(2, i)), meta=Meta(config={"alora_invocation_tokens": tokens}))
        for i, tokens in enumerate(([1, 2], [1, 2], None))
    ]
    assert fuse(parts[:2])["q.weight"].rank == 4  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="activated LoRAs"):
        fuse(parts)


def test_experts_may_be_stored_one_by_one_in_the_base() -> None:
    stack = Stack(np.ones((2, M, 1), np.float32), np.ones((2, 1, N), np.float32))
    base = {"q.weight": np.zeros((M, N), np.float32)}
    done = fuse([adapter(q_weight=low(2, 1), x_weight=stack)] * 2, base=base)
    assert done["x.weight"].shape == (2, M, N)
    with pytest.raises(MismatchError, match="1 of 2 parameters are not in the base"):
        fuse([adapter(q_weight=low(2, 1), v_weight=low(2, 1))], base=base)


def test_regmean_takes_statistics_by_name() -> None:
    rng = np.random.default_rng(0)
    parts = [adapter(q_weight=low(2, i)) for i in (1, 2)]
    stats = [{"q.in_diag": rng.uniform(1, 2, N)} for _ in parts]
    done = fuse(parts, method="regmean", stats=stats)
    g, h = (s["q.in_diag"] for s in stats)
    assert close(done["q.weight"], (dense(parts[0]["q.weight"]) * g + dense(parts[1]["q.weight"]) * h) / (g + h))
    for wrong in ({"q.in_diag": np.ones(N + 1)}, {"q.out_diag": np.ones(M)}, {"v.in_diag": np.ones(N)}):
        with pytest.raises(MismatchError, match=r"no module of the adapter|no statistics of their inputs that fit"):
            fuse(parts, method="regmean", stats=[wrong] * 2)
    turned = [replace(p, meta=replace(p.meta, layout={"q.weight": {"stored": "in_out"}})) for p in parts]
    with pytest.raises(UnsupportedError, match="which 1 parameters have as their rows"):
        fuse(turned, method="regmean", stats=stats)


def test_results_wait_on_the_disk_beyond_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [adapter(q_weight=low(3, 1), v_weight=low(3, 2)), adapter(q_weight=low(2, 3))]
    kept = fuse(parts)
    monkeypatch.setattr(fuse_work.Spool, "__init__", lambda self: Spool_init(self, 0))
    spooled = fuse(parts)
    assert isinstance(spooled["q.weight"].b, Leaf)  # type: ignore[attr-defined]
    for name, u in kept.items():
        assert np.array_equal(u.dense(), spooled[name].dense())  # type: ignore[attr-defined]


Spool_init = Spool.__init__


def test_threads_and_order_do_not_change_the_bytes() -> None:
    from loratools.core import pool

    parts = [Adapter({f"m.{i}.q.weight": low(3, 10 * j + i) for i in range(6)}) for j in range(3)]
    with pool.threads(1):
        alone = fuse(parts, method="knots", rule="dare-ties", seed=3)
    with pool.threads(4):
        many = fuse(parts, method="knots", rule="dare-ties", seed=3)
    for name, u in alone.items():
        assert np.array_equal(u.dense(), many[name].dense())  # type: ignore[attr-defined]


@pytest.fixture
def made() -> Callable[..., Path]:
    return lambda name: Path(__file__).parents[2] / "fixtures" / "digits" / name


def test_the_result_loads_in_peft_and_does_the_sum(made: Callable[..., Path], tmp_path: Path) -> None:
    """rsLoRA beside plain LoRA of another rank: PEFT's own model with the fused file gives W + sum of true updates."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    parts = [lt.load(made(name)) for name in ("r4-rslora", "r1", "group-56")]
    weights = [0.5, 1.0, -0.25]
    folder = lt.save(fuse(parts, weights=weights), tmp_path / "fused")
    base = transformers.CLIPForImageClassification.from_pretrained(made("base"), dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    for name in parts[0]:
        total = sum(w * dense(a[name]) for w, a in zip(weights, parts, strict=True))
        added = (merged[name].double() - before[name].double()).numpy()
        # stored in the fixtures' 16-bit floats: b is rounded once (2^-8 at worst), and W + D once in fp32
        assert np.linalg.norm(added - total) <= 2**-8 * np.linalg.norm(total) + 1e-5
    assert set(merged) == set(before)


def test_a_union_of_targets_is_named_module_by_module(tmp_path: Path) -> None:
    def peft_adapter(name: str, targets: list[str]) -> Adapter:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets, "layers_to_transform": [0]}
        return Adapter({name: low(2, 1)}, Meta(format="peft", config=config))

    done = fuse([peft_adapter("m.layers.0.q.weight", ["q"]), peft_adapter("m.layers.0.v.weight", ["v"])])
    config = done.meta.config
    assert config["target_modules"] == ["m.layers.0.q", "m.layers.0.v"]
    assert "layers_to_transform" not in config
    assert config["use_dora"] is False
    again = lt.load(lt.save(done, tmp_path / "out"))
    assert list(again) == list(done)
