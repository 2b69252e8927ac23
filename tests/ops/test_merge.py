from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from loratools.core.adapter import Adapter
from loratools.errors import ExistsError, FileError, MismatchError, NumericsError, UnsupportedError, UsageError
from loratools.io.base import Base
from loratools.io.safetensors import read_header
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.kinds.replace_rows import ReplaceRows
from loratools.ops.merge import merge, merged

Model = Callable[..., Path]
Make = Callable[..., Adapter]
EPS = float(np.finfo(np.float32).eps)
BF16 = ml_dtypes.bfloat16


def low(rng: np.random.Generator, m: int, n: int, r: int = 2, scale: float = 0.5) -> LowRank:
    return LowRank(
        rng.standard_normal((m, r)).astype(np.float32), rng.standard_normal((r, n)).astype(np.float32), scale
    )


def weight(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> Any:
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def test_files_names_order_dtypes_and_metadata_are_the_bases(
    model: Model, adapter_of: Make, rng: Any, tmp_path: Path
) -> None:
    tensors = {f"l.{i}.weight": weight(rng, 6, 5, dtype=d) for i, d in enumerate([BF16, np.float16, np.float32, BF16])}
    tensors |= {"n.bias": weight(rng, 6), "ids": np.arange(3), "s": np.array(2, np.float32)}
    base = model(tensors, shards=3, model_type="x")
    updates = {f"l.{i}.weight": low(rng, 6, 5) for i in range(4)}
    out = tmp_path / "out"
    report = merge(base, [adapter_of(updates)], out)
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()}
    for shard in base.glob("*.safetensors"):
        before, after = read_header(shard), read_header(out / shard.name)
        assert (
            shard.read_bytes()[: min(e.start for e in before.entries.values())]
            == (out / shard.name).read_bytes()[: min(e.start for e in after.entries.values())]
        )
        for name, array in load_file(out / shard.name).items():
            old = np.asarray(tensors[name])
            if name in updates:
                exact = old.astype(np.float64) + updates[name].dense()
                # one rounding to the dtype (half an ulp), and a few of fp32 arithmetic before it
                half = float(ml_dtypes.finfo(old.dtype).eps) / 2
                assert np.abs(array.astype(np.float64) - exact).max() <= (half + 8 * EPS) * np.abs(exact).max()
            else:
                assert array.tobytes() == old.tobytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"] == {"note": "kept", "total_size": sum(np.asarray(t).nbytes for t in tensors.values())}
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert "merged" in (out / "README.md").read_text()
    assert report.total["parameters"] == 4


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    r=st.integers(1, 5),
    w=st.floats(-2, 2),
    bits=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_every_update_meets_the_same_original(m: int, n: int, r: int, w: float, bits: str) -> None:
    rng = np.random.default_rng(m * 41 + n)
    dtype = BF16 if bits == "bfloat16" else np.dtype(bits)
    base = {"x.weight": weight(rng, m, n, dtype=dtype)}
    one, two = low(rng, m, n, r), Dora(low(rng, m, n, r), (rng.random(m) + 0.5).astype(np.float32))
    adapters = [Adapter({"x.weight": one}), Adapter({"x.weight": two})]
    w0 = base["x.weight"].astype(np.float64)
    exact = w0 + w * one.dense() + 0.5 * (two.apply(w0) - w0)
    found = dict(merged(base, adapters, weights=[w, 0.5]))["x.weight"]
    other = dict(merged(base, adapters[::-1], weights=[0.5, w]))["x.weight"]
    scale = np.abs(w0).max() + 4 * r * 10  # |update| of standard normal factors, generously
    half = float(ml_dtypes.finfo(dtype).eps) / 2
    assert found.dtype == dtype
    assert np.abs(found.astype(np.float64) - exact).max() <= half * np.abs(exact).max() + 64 * EPS * scale
    # the order changes the order of one fp32 addition, nothing else
    assert (
        np.abs(found.astype(np.float64) - other.astype(np.float64)).max()
        <= 2 * half * np.abs(exact).max() + 8 * EPS * scale
    )


def test_rounding_loss_is_the_share_of_the_update_that_rounding_makes_wrong(
    model: Model, adapter_of: Make, rng: Any, tmp_path: Path
) -> None:
    w = weight(rng, 64, 64, dtype=BF16)
    u = low(rng, 64, 64, 2, 1e-3)
    base = model({"x.weight": w})
    row = merge(base, [adapter_of({"x.weight": u})], tmp_path / "out").modules[0]
    out = load_file(tmp_path / "out" / "model.safetensors")["x.weight"].astype(np.float64)
    exact = w.astype(np.float64) + u.dense()
    norm = np.linalg.norm(u.dense())
    assert row["rounding_loss"] == pytest.approx(np.linalg.norm(out - exact) / norm, rel=1e-3)
    assert row["relative_norm"] == pytest.approx(norm / np.linalg.norm(w.astype(np.float64)), rel=1e-5)
    assert row["rounding_loss"] > 0.1  # an update of 0.2% in bf16
    assert merge(base, [adapter_of({"x.weight": u})], tmp_path / "b", measure=False).modules[0]["rounding_loss"] is None


def test_stochastic_rounding_keeps_small_updates_on_average(model: Model, adapter_of: Make, tmp_path: Path) -> None:
    base = model({"x.weight": np.ones((64, 256), BF16)})
    u = LowRank(np.full((64, 1), 2.0**-10, np.float32), np.ones((1, 256), np.float32))
    for mode, mean in (("nearest", 0.0), ("stochastic", 2.0**-10)):
        merge(base, [adapter_of({"x.weight": u})], tmp_path / mode, rounding=mode, seed=3)
        change = load_file(tmp_path / mode / "model.safetensors")["x.weight"].astype(np.float64) - 1
        # 16384 draws of 0 or 2^-7 with odds 1/8: standard deviation of the mean 2^-7 * 0.33 / 128
        assert abs(change.mean() - mean) <= 5 * 2.0**-7 * 0.331 / 128
    merge(base, [adapter_of({"x.weight": u})], tmp_path / "again", rounding="stochastic", seed=3)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "stochastic" / "model.safetensors"
    ).read_bytes()


def test_replacements(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    base = model({"a.weight": weight(rng, 4, 3, dtype=BF16), "a.bias": weight(rng, 4)})
    value, head = weight(rng, 4, 3), weight(rng, 2, 4)
    one = adapter_of(
        {"a.weight": Replace(value), "head.weight": Replace(head), "a.bias": Dense(np.ones(4, np.float32))}
    )
    report = merge(base, [one, adapter_of({"a.weight": Replace(value.copy())})], tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(out["a.weight"], value.astype(BF16))
    assert np.array_equal(out["head.weight"], head)
    assert any("head.weight" in line for line in report.warnings)
    with pytest.raises(MismatchError, match="different values"):
        merge(base, [one, adapter_of({"a.weight": Replace(value + 1)})], tmp_path / "b")
    with pytest.raises(UsageError, match="no weight"):
        merge(base, [one], tmp_path / "b", weights=[0.5])
    with pytest.raises(UsageError, match="one finite weight"):
        merge(base, [one], tmp_path / "b", weights=[1.0, 1.0])
    assert not (tmp_path / "b").exists()


def test_stored_rows_come_out_exactly_and_only_once(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    w = 1000 * weight(rng, 6, 4)
    base = model({"e.weight": w})
    rows = 1e-6 * weight(rng, 2, 4)
    one = adapter_of({"e.weight": ReplaceRows(rows, (1, 4), (6, 4))})
    two = adapter_of({"e.weight": ReplaceRows(rows[1:], (4,), (6, 4))})
    merge(base, [one, two], tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")["e.weight"]
    assert np.array_equal(out[[1, 4]], rows)
    assert np.array_equal(out[[0, 2, 3, 5]], w[[0, 2, 3, 5]])
    with pytest.raises(MismatchError, match="different values"):
        merge(base, [one, adapter_of({"e.weight": ReplaceRows(rows[:1], (4,), (6, 4))})], tmp_path / "b")
    with pytest.raises(UsageError, match="no weight"):
        merge(base, [one], tmp_path / "b", weights=[2.0])


def test_names_and_shapes_are_checked_before_the_first_byte(
    model: Model, adapter_of: Make, rng: Any, tmp_path: Path
) -> None:
    base = model({f"l.{i}.weight": weight(rng, 4, 3) for i in range(5)})
    wrong = adapter_of({f"l.{i}.weight": low(rng, 4, 5) for i in range(4)})
    with pytest.raises(MismatchError, match="4 of 4 updates") as caught:
        merge(base, [wrong], tmp_path / "out")
    assert str(caught.value.got).count(";") == 2  # the first three
    with pytest.raises(MismatchError, match="1 of 1 parameters"):
        merge(base, [adapter_of({"k.9.weight": low(rng, 4, 3)})], tmp_path / "out")
    with pytest.raises(MismatchError, match="no floating"):
        merge(
            model({"i.weight": np.ones((4, 3), np.int32)}, folder="i"),
            [adapter_of({"i.weight": low(rng, 4, 3)})],
            tmp_path / "out",
        )
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_outputs_never_touch_inputs_or_each_other(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    base = model({"x.weight": weight(rng, 4, 3)})
    a = adapter_of({"x.weight": low(rng, 4, 3)})
    with pytest.raises(FileError, match="input"):
        merge(base, [a], base, overwrite=True)
    merge(base, [a], tmp_path / "out")
    with pytest.raises(ExistsError):
        merge(base, [a], tmp_path / "out")
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    merge(base, [a], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_single_file_stays_a_single_file(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    base = model({"x.weight": weight(rng, 4, 3)}) / "model.safetensors"
    merge(base, [adapter_of({"x.weight": low(rng, 4, 3)})], tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}


@pytest.mark.parametrize(
    ("value", "update", "told"),
    [(np.nan, 1.0, "base itself"), (1.0, np.inf, "update is not finite"), (60000.0, 9000.0, "too large for float16")],
)
def test_results_that_are_not_finite_name_the_parameter(
    value: float, update: float, told: str, model: Model, adapter_of: Make, tmp_path: Path
) -> None:
    base = model({"x.weight": np.full((4, 3), value, np.float16)})
    u = LowRank(np.full((4, 1), update, np.float32), np.ones((1, 3), np.float32))
    with pytest.raises(NumericsError, match=told) as caught:
        merge(base, [adapter_of({"x.weight": u})], tmp_path / "out")
    assert caught.value.parameter == "x.weight"
    assert [p for p in tmp_path.iterdir() if "out" in p.name] == []


def tied(rng: Any) -> dict[str, Any]:
    return {"model.embed_tokens.weight": weight(rng, 8, 4), "model.layers.0.q.weight": weight(rng, 4, 4)}


def test_tied_weights_part_only_when_allowed(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    tensors = tied(rng)
    base = model(tensors, architectures=["XForCausalLM"], tie_word_embeddings=True, vocab_size=8)
    u = low(rng, 8, 4)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        with pytest.raises(MismatchError, match="ties lm_head"):
            merge(base, [adapter_of({name: u})], tmp_path / "out")
        merge(base, [adapter_of({name: u})], tmp_path / name, untie=True)
        out = load_file(tmp_path / name / "model.safetensors")
        other = ({"lm_head.weight", "model.embed_tokens.weight"} - {name}).pop()
        w = tensors["model.embed_tokens.weight"]
        assert np.allclose(out[name], w + u.dense(), atol=16 * EPS * 10)
        assert np.array_equal(out[other], w)
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_an_adapter_means_for_both_sides_of_a_tie_stays_tied(
    model: Model, adapter_of: Make, rng: Any, tmp_path: Path
) -> None:
    base = model(tied(rng), architectures=["XForCausalLM"], tie_word_embeddings=True, vocab_size=8)
    value = weight(rng, 9, 4)  # with a new token
    both = adapter_of({"model.embed_tokens.weight": Replace(value), "lm_head.weight": Replace(value.copy())})
    merge(base, [both], tmp_path / "both")
    out = load_file(tmp_path / "both" / "model.safetensors")
    assert set(out) == set(tied(rng))
    assert np.array_equal(out["model.embed_tokens.weight"], value)
    assert json.loads((tmp_path / "both" / "config.json").read_text())["vocab_size"] == 9
    merge(base, [adapter_of({"model.embed_tokens.weight": ReplaceRows(value[:1], (2,), (8, 4))})], tmp_path / "rows")
    merge(
        base,
        [adapter_of({"model.embed_tokens.weight": low(rng, 8, 4)}, ensure_weight_tying=True)],
        tmp_path / "ensured",
    )
    assert "lm_head.weight" not in load_file(tmp_path / "ensured" / "model.safetensors")


def test_a_wrong_base_is_noticed_by_doras_magnitudes(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    tensors = {
        f"l.{i}.weight": weight(rng, 64, 32) * np.exp(0.1 * rng.standard_normal((64, 1))).astype(np.float32)
        for i in range(4)
    }
    other = {name: weight(rng, 64, 32) for name in tensors}
    updates = {
        name: Dora(
            low(rng, 64, 32, 2, 0.05),
            (np.linalg.norm(w, axis=1) * (1 + 0.01 * rng.standard_normal(64))).astype(np.float32),
        )
        for name, w in tensors.items()
    }
    right = merge(model(tensors), [adapter_of(updates)], tmp_path / "right")
    wrong = merge(model(other, folder="other"), [adapter_of(updates)], tmp_path / "wrong")
    assert right.total["magnitude_agreement"] > 0.9
    assert abs(wrong.total["magnitude_agreement"]) < 0.15
    assert not right.warnings
    assert any("is this the base" in line for line in wrong.warnings)


def test_adapters_of_altered_bases_are_refused(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    base = model({"x.weight": weight(rng, 4, 3)})
    raw = adapter_of({"x.weight": low(rng, 4, 3)}, init_lora_weights="pissa_niter_4")
    with pytest.raises(UnsupportedError, match="pissa_niter_4"):
        merge(base, [raw], tmp_path / "out")
    merge(base, [raw], tmp_path / "out", altered_base=True)


def test_pickled_shards_become_safetensors(adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    folder = tmp_path / "base"
    folder.mkdir()
    w = weight(rng, 4, 3)
    for i in (1, 2):
        torch.save({f"l.{i}.weight": torch.from_numpy(w * i)}, folder / f"pytorch_model-0000{i}-of-00002.bin")
    table = {f"l.{i}.weight": f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    u = low(rng, 4, 3)
    merge(folder, [adapter_of({"l.2.weight": u})], tmp_path / "out")
    out = Base.open(tmp_path / "out")
    assert {p.name for p in out.files.values()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert np.array_equal(out["l.1.weight"], w)
    assert np.allclose(out["l.2.weight"], 2 * w + u.dense(), atol=32 * EPS * 10)


def test_torch_models_in_memory(adapter_of: Make, rng: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    w, u = weight(rng, 5, 4), low(rng, 5, 4)
    turned = LowRank(torch.from_numpy(u.b), torch.from_numpy(u.a), u.scale)
    found = dict(merged({"x.weight": torch.from_numpy(w)}, [adapter_of({"x.weight": turned})]))["x.weight"]
    assert isinstance(found, torch.Tensor)
    assert np.allclose(found.numpy(), w + u.dense(), atol=16 * EPS * 10)
