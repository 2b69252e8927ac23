from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.core import pool
from loratools.core.adapter import Adapter, Meta
from loratools.errors import FormatError, LoratoolsError, NumericsError, UsageError
from loratools.files import written_size
from loratools.kinds.dora import Dora
from loratools.kinds.hadamard import Hadamard
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.kinds.sum import Sum
from loratools.leaf import Leaf
from loratools.linalg.namespace import down, to_numpy, up


def low_rank(
    m: int, r: int, n: int, *, seed: int = 0, scale: float = 1.0, dtype: str = "float32", decay: float = 0.7
) -> LowRank:
    rng = np.random.default_rng(seed)
    b = rng.standard_normal((m, r)) * decay ** np.arange(r)
    a = rng.standard_normal((r, n))
    return LowRank(down(b.astype(np.float32), dtype), down(a.astype(np.float32), dtype), scale)


def one(u: Any) -> Adapter:
    return Adapter({"layer.weight": u}, Meta())


def dense(u: LowRank) -> np.ndarray[Any, Any]:
    b, a = to_numpy(up(u.b)).astype(np.float64), to_numpy(up(u.a)).astype(np.float64)
    return u.scale * b @ a


def excess(u: LowRank, v: LowRank) -> float:
    """(|D - D'| - |D - D_opt|) / |D|, judged by a dense SVD in float64."""
    d = dense(u)
    s = np.linalg.svd(d, compute_uv=False)
    optimum = np.sqrt((s[v.rank :] ** 2).sum())
    return float((np.linalg.norm(d - dense(v)) - optimum) / max(np.linalg.norm(d), 1e-300))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(
    m=st.integers(1, 40), r=st.integers(1, 24), n=st.integers(1, 40), k=st.integers(1, 30),
    scale=st.sampled_from([1.0, 2.0, -0.5, 1e-3]), decay=st.sampled_from([1.0, 0.7, 0.3]), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_optimal_for_every_shape(
    dtype: str, m: int, r: int, n: int, k: int, scale: float, decay: float, seed: int
) -> None:
    u = low_rank(m, r, n, seed=seed, scale=scale, dtype=dtype, decay=decay)
    v = lt.squeeze(one(u), rank=k, dtype="float32")["layer.weight"]
    assert v.rank == min(k, r, m, n)
    assert v.scale == 1.0
    assert excess(u, v) <= 1e-6  # the guarantee


def test_factors_come_back_balanced() -> None:
    v = lt.squeeze(one(low_rank(30, 8, 20)), rank=4)["layer.weight"]
    assert np.allclose(v.b.T @ v.b, v.a @ v.a.T, atol=1e-4 * np.linalg.norm(v.a) ** 2)
    assert np.all(np.diff(np.diag(v.a @ v.a.T)) < 0)


def test_keep_alpha_keeps_the_scale_and_the_function() -> None:
    u = low_rank(12, 6, 9, scale=-4.0)
    kept, folded = (lt.squeeze(one(u), rank=3, keep_alpha=k)["layer.weight"] for k in (True, False))
    assert (kept.scale, folded.scale) == (-4.0, 1.0)
    assert np.allclose(dense(kept), dense(folded), atol=1e-5 * np.linalg.norm(dense(u)))


@pytest.mark.parametrize(
    ("energy", "rank"), [(1.0, 3), (0.999999, 3), (0.5, 1), (1e-9, 1), (13 / 14, 2), (13.1 / 14, 3)]
)
def test_energy_at_both_ends(energy: float, rank: int) -> None:
    """Exact spectrum 3, 2, 1: cumulative shares 9/14, 13/14, 14/14. An exactly rank-3 update never gets rank 4."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0].astype(np.float32)
    u = LowRank(q[:, :5] * np.array([3, 2, 1, 0, 0], np.float32), q[:5], 1.0)
    assert lt.squeeze(one(u), energy=energy)["layer.weight"].rank == rank


@pytest.mark.parametrize(("error", "rank"), [(0.0, 3), (0.2, 3), (0.3, 2), (0.62, 1), (0.99, 1)])
def test_error_target(error: float, rank: int) -> None:
    """Relative errors of rank 1 and 2 of the spectrum 3, 2, 1: sqrt(5/14) = 0.598, sqrt(1/14) = 0.267."""
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((8, 8)))[0].astype(np.float32)
    u = LowRank(q[:, :5] * np.array([3, 2, 1, 0, 0], np.float32), q[:5], 2.0)
    assert lt.squeeze(one(u), error=error)["layer.weight"].rank == rank


def test_max_rank_joins_any_target() -> None:
    assert lt.squeeze(one(low_rank(30, 8, 20)), energy=1.0, max_rank=2)["layer.weight"].rank == 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reported_error_includes_rounding(dtype: str) -> None:
    u = low_rank(60, 12, 50, dtype=dtype)
    for rank in (3, 12):
        squeezed = lt.squeeze(one(u), rank=rank)
        assert squeezed.report is not None
        (row,) = squeezed.report.modules
        true = np.linalg.norm(dense(u) - dense(squeezed["layer.weight"])) / np.linalg.norm(dense(u))
        # second order in the rounding, and fp32 noise where nothing is cut
        assert row["relative_error"] == pytest.approx(true, rel=0.02, abs=3e-7)
        s = np.linalg.svd(dense(u), compute_uv=False)
        assert row["energy"] == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), abs=1e-6)


def test_report_adds_up() -> None:
    adapter = Adapter(
        {
            "a.weight": low_rank(20, 6, 10),
            "b.weight": low_rank(10, 4, 30, seed=1),
            "c.bias": Replace(np.ones(7, np.float32)),
        }
    )
    report = lt.squeeze(adapter, rank=2).report
    assert report is not None
    assert [row["name"] for row in report.modules] == list(adapter)
    assert report.total["bytes_before"] == adapter.nbytes == sum(row["bytes_before"] for row in report.modules)
    assert report.total["bytes_after"] == sum(row["bytes_after"] for row in report.modules)
    weights = [np.linalg.norm(dense(adapter[n])) ** 2 for n in ("a.weight", "b.weight")]
    errors = [row["relative_error"] ** 2 for row in report.modules[:2]]
    assert report.total["relative_error"] == pytest.approx(np.sqrt(np.average(errors, weights=weights)), rel=1e-6)
    assert (report.total["rank_before"], report.total["rank_after"]) == (6, 2)


def test_a_sum_becomes_one_update() -> None:
    u, v = low_rank(10, 3, 8), low_rank(10, 2, 8, seed=5, scale=3.0)
    out = lt.squeeze(one(Sum((u, v))), rank=5)["layer.weight"]
    assert np.allclose(dense(out), dense(u) + dense(v), atol=1e-4)


def test_dora_keeps_its_magnitude_or_refits_it_to_the_base() -> None:
    w = np.random.default_rng(3).standard_normal((10, 8)).astype(np.float32)
    u = Dora(low_rank(10, 4, 8, scale=0.3), np.linalg.norm(w, axis=1).astype(np.float32))
    kept = lt.squeeze(one(u), rank=1)["layer.weight"]
    refit = lt.squeeze(one(u), rank=1, base={"layer.weight": w})["layer.weight"]
    assert np.array_equal(kept.magnitude, u.magnitude)
    assert np.linalg.norm(refit.apply(w) - u.apply(w)) < np.linalg.norm(kept.apply(w) - u.apply(w))


def test_an_untrained_adapter_stays_a_valid_zero_adapter() -> None:
    u = LowRank(np.zeros((6, 4), np.float32), np.ones((4, 5), np.float32), 2.0)
    squeezed = lt.squeeze(one(u), rank=2)
    v = squeezed["layer.weight"]
    assert v.rank == 2
    assert not v.dense().any()
    assert np.isfinite(v.a).all()
    assert v.a.any()  # the channels can still be trained
    assert squeezed.report is not None
    assert any("zero" in line for line in squeezed.report.warnings)


def test_non_finite_input_is_named_or_carried_untouched() -> None:
    u = low_rank(6, 3, 5)
    u.b[2, 1] = np.nan
    with pytest.raises(NumericsError) as caught:
        lt.squeeze(one(u), rank=2)
    assert caught.value.parameter == "layer.weight"
    squeezed = lt.squeeze(one(u), rank=2, allow_nonfinite=True)
    assert squeezed["layer.weight"] is u
    assert squeezed.report is not None
    assert any("not finite" in line for line in squeezed.report.warnings)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"rank": 2, "energy": 0.5},
        {"rank": 0},
        {"rank": -1},
        {"rank": True},
        {"rank": 1.5},
        {"energy": 0.0},
        {"energy": 1.01},
        {"error": -0.1},
        {"error": 1.0},
        {"energy": float("nan")},
        {"rank": 2, "max_rank": 0},
        {"rank": 2, "dtype": "int8"},
    ],
)
def test_contradicting_targets_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        lt.squeeze(one(low_rank(6, 3, 5)), **wrong)


def test_results_do_not_depend_on_threads_or_order() -> None:
    modules = {f"m{i}.weight": low_rank(600, 64, 500, seed=i) for i in range(60)}
    with pool.threads(1):
        single = lt.squeeze(Adapter(modules), rank=5)
    with pool.threads(2):
        double = lt.squeeze(Adapter(dict(reversed(modules.items()))), rank=5)
    for name in modules:
        assert np.array_equal(single[name].b, double[name].b)
        assert np.array_equal(single[name].a, double[name].a)


def test_input_is_left_alone_and_history_grows(digits: Path) -> None:
    adapter = lt.load(digits / "r32")
    before = [to_numpy(up(u.b)).copy() for u in adapter.values() if isinstance(u, LowRank)]
    squeezed = lt.squeeze(lt.squeeze(adapter, rank=8), energy=0.9)
    after = [to_numpy(up(u.b)) for u in adapter.values() if isinstance(u, LowRank)]
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
    assert squeezed.meta.history == ("squeeze rank=8", "squeeze energy=0.9")


def test_torch_tensors_give_the_same_answer(library: Callable[[Any], Any]) -> None:
    u = low_rank(40, 8, 30)
    v = lt.squeeze(one(LowRank(library(u.b), library(u.a), u.scale)), rank=3)["layer.weight"]
    assert type(v.b) is type(library(u.b))
    assert excess(u, LowRank(to_numpy(v.b), to_numpy(v.a))) <= 1e-6


def test_from_state_dict_and_save(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    b, a = torch.randn(6, 2, dtype=torch.bfloat16), torch.randn(2, 5, dtype=torch.bfloat16)
    tensors = {"base_model.model.q.lora_B.weight": b, "base_model.model.q.lora_A.weight": a}
    adapter = lt.from_state_dict(tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    out = lt.save(lt.squeeze(adapter, rank=1), tmp_path / "out")
    said = json.loads((out / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"]) == (1, 1)
    again = lt.load(out)["q.weight"]
    assert again.b.dtype == "bfloat16"
    with pytest.raises(LoratoolsError, match="exists"):
        lt.save(adapter, out)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_bound_on_rounding_holds(dtype: str, size: float) -> None:
    """Also where half of the entries are subnormal in fp16."""
    from loratools.linalg import factored
    from loratools.ops.tally import rounding, rounding_bound

    u = low_rank(60, 12, 50)
    result = factored.truncate(u.b * size, u.a * size, lambda s: 5)
    stored = LowRank(down(result.b, dtype), down(result.a, dtype))
    assert rounding(result, stored) <= rounding_bound(result, stored)


@pytest.mark.parametrize(
    "u",
    [
        Dora(low_rank(6, 3, 5), np.array([1, 1, np.nan, 1, 1, 1], np.float32)),
        Replace(np.array([1, np.inf], np.float32)),
    ],
)
def test_what_is_not_finite_beside_the_factors_is_named_too(u: Any) -> None:
    adapter = Adapter({"good.weight": low_rank(4, 2, 4), "bad.weight": u})
    with pytest.raises(NumericsError) as caught:
        lt.squeeze(adapter, rank=2)
    assert caught.value.parameter == "bad.weight"
    report = lt.squeeze(adapter, rank=2, allow_nonfinite=True).report
    assert report is not None
    assert np.isnan(report.total["relative_error"])
    assert any("bad.weight: not finite" in line for line in report.warnings)


def test_budgets_pass_over_modules_that_are_not_finite() -> None:
    u = low_rank(6, 3, 5, seed=4)
    u.b[0, 0] = np.nan
    adapter = Adapter({"good.weight": low_rank(40, 8, 40), "bad.weight": u})
    squeezed = lt.squeeze(adapter, size=3000, format="native", allow_nonfinite=True)
    assert squeezed["bad.weight"] is u
    with pytest.raises(NumericsError):
        lt.squeeze(adapter, size=3000, format="native")


@pytest.mark.parametrize(("scale", "size"), [(0.01, 1e-5), (16.0, 1e4), (5.656854, 1.0)])
def test_folding_a_scale_without_a_cut_neither_overflows_nor_underflows(scale: float, size: float) -> None:
    rng = np.random.default_rng(0)
    b, a = (size * rng.random((6, 3)) + size).astype(np.float16), rng.standard_normal((3, 5)).astype(np.float16)
    u = LowRank(b, a, scale)
    squeezed = lt.squeeze(one(u), rank=3)
    assert squeezed["layer.weight"].scale == 1.0
    # two factors, each rounded to fp16 (2^-11 relative, rms 0.6 of that), over a condition number of a few
    assert np.linalg.norm(dense(squeezed["layer.weight"]) - dense(u)) <= 3e-3 * np.linalg.norm(dense(u))


def test_a_refit_needs_a_base_that_fits() -> None:
    w = np.random.default_rng(3).standard_normal((10, 8)).astype(np.float32)
    u = Dora(low_rank(10, 4, 8, scale=0.3), np.linalg.norm(w, axis=1).astype(np.float32))
    for wrong in (w[:1], w.T, w.astype(np.int8), w * np.nan):
        with pytest.raises(LoratoolsError):
            lt.squeeze(one(u), rank=1, base={"layer.weight": wrong})
    zero_row = np.where(np.arange(10)[:, None] == 3, -u.direction.dense(), w).astype(np.float32)
    refit = lt.squeeze(one(u), rank=1, base={"layer.weight": zero_row})["layer.weight"]
    assert np.isfinite(refit.magnitude).all()


def test_method_rsvd_is_near_the_optimum_and_says_its_error(digits: Path) -> None:
    adapter = lt.load(digits / "r32")
    exact, done = lt.squeeze(adapter, rank=4, method="exact"), lt.squeeze(adapter, rank=4, method="rsvd")
    assert done.report is not None
    assert exact.report is not None
    assert done.meta.history == ("squeeze rank=4 method=rsvd",)
    for name, u in adapter.items():
        row, best = (next(r for r in x.report.modules if r["name"] == name) for x in (done, exact))  # type: ignore[union-attr]
        whole = u.dense()  # type: ignore[attr-defined]
        error = np.linalg.norm(whole - done[name].dense()) / np.linalg.norm(whole)  # type: ignore[attr-defined]
        assert row["relative_error"] == pytest.approx(error, rel=1e-4)
        assert best["relative_error"] <= row["relative_error"] * (
            1 + 5e-4
        )  # roundings too small to matter are left out
        assert row["relative_error"] <= 1.003 * best["relative_error"]
        assert row["energy"] == pytest.approx(1 - error**2, abs=1e-5)
    again = lt.squeeze(adapter, rank=4, method="rsvd")
    other = lt.squeeze(adapter, rank=4, method="rsvd", seed=1)
    name = next(iter(adapter))
    assert np.array_equal(again[name].dense(), done[name].dense())  # type: ignore[attr-defined]
    assert not np.array_equal(other[name].dense(), done[name].dense())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [{"energy": 0.9}, {"error": 0.1}, {"size": "1MB"}, {"rank": 4, "uniform": True}, {"rank": 4, "nested": True},
     {"rank": 4, "stats": {"q.in_diag": np.ones(3)}}],
)  # fmt: skip
def test_method_rsvd_knows_no_spectrum(digits: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="serves --rank N alone"):
        lt.squeeze(lt.load(digits / "r4"), method="rsvd", **options)
    with pytest.raises(UsageError, match="no such method"):
        lt.squeeze(lt.load(digits / "r4"), rank=2, method="svd")


def test_method_exact_forms_what_has_no_factors() -> None:
    u = Hadamard.example(0)
    adapter = Adapter({"h.weight": u})
    exact = lt.squeeze(adapter, rank=1, method="exact")["h.weight"].dense()  # type: ignore[attr-defined]
    left, s, right = np.linalg.svd(u.dense().astype(float), full_matrices=False)
    assert np.allclose(exact, s[0] * np.outer(left[:, 0], right[0]), atol=1e-5)


def test_a_batch_names_the_module_whose_factor_cannot_be_read() -> None:
    def broken(out: Any) -> Any:
        raise FormatError("the tensor is damaged")

    updates = {f"m{i}.weight": low_rank(8, 4, 6, seed=i) for i in range(3)}
    u = updates["m1.weight"]
    updates["m1.weight"] = LowRank(Leaf((8, 4), "float32", broken), u.a)
    with pytest.raises(FormatError) as caught:
        lt.squeeze(Adapter(updates, Meta()), rank=2)
    assert caught.value.parameter == "m1.weight"


def test_a_module_gets_the_same_bits_alone_and_in_a_crowd() -> None:
    updates = {f"m{i}.weight": low_rank(8 + i % 3, 4, 6, seed=i, dtype=("float16", "float32")[i % 2]) for i in range(9)}
    crowd = lt.squeeze(Adapter(updates, Meta()), rank=2)
    for name, u in updates.items():
        alone = lt.squeeze(Adapter({name: u}, Meta()), rank=2)[name]
        for field in ("b", "a"):
            assert np.array_equal(to_numpy(getattr(alone, field)), to_numpy(getattr(crowd[name], field)))


def test_a_budget_for_a_format_of_one_rank_gives_one_rank() -> None:
    adapter = lt.load(Path(__file__).parents[2] / "fixtures" / "digits" / "r32")
    small = lt.squeeze(adapter, size=200_000, format="mlx")
    assert small.report is not None
    assert len({row["rank_after"] for row in small.report.modules if row["rank_after"]}) == 1
    assert written_size(small, format="mlx") <= 200_000


@pytest.mark.real
def test_a_budget_that_values_would_decide_is_refused(real: Path) -> None:
    with pytest.raises(UsageError, match="cannot be planned"):
        lt.squeeze(lt.load(real / "sam-vitb-r4"), size=100_000)
