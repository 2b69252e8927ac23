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

from loratools.core.adapter import Adapter
from loratools.errors import MismatchError, NumericsError, UnsupportedError, UsageError
from loratools.files import load, save
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.kinds.stack import Stack
from loratools.ops.extract import extract
from loratools.ops.merge import merge, merged

Model = Callable[..., Path]
EPS = float(np.finfo(np.float32).eps)
BF16 = ml_dtypes.bfloat16


def weight(rng: Any, *shape: int, dtype: Any = np.float32) -> Any:
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(2, 40), n=st.integers(2, 40), r=st.integers(1, 6), scale=st.sampled_from([1e-2, 1.0]))
def test_merge_then_extract_returns_the_adapter(m: int, n: int, r: int, scale: float) -> None:
    rng = np.random.default_rng(m * 41 + n)
    r = min(r, m, n)
    u = LowRank(weight(rng, m, r), weight(rng, r, n), scale)
    base = {"l.q.weight": weight(rng, m, n)}
    tuned = dict(merged(base, [Adapter({"l.q.weight": u})]))
    found = extract(base, tuned, rank=r)["l.q.weight"]
    assert isinstance(found, LowRank)
    assert found.rank == r
    exact = u.dense()
    # the merge rounds each entry of W + D by half an eps of it; the factors round once more
    noise = EPS * np.linalg.norm(tuned["l.q.weight"])
    assert np.linalg.norm(found.dense() - exact) <= 2 * noise + 16 * EPS * np.linalg.norm(exact)


@pytest.mark.parametrize("exact", [False, True])
def test_error_is_within_half_a_percent_of_the_optimum_and_told_right(exact: bool, rng: Any) -> None:
    d = (rng.standard_normal((120, 60)) * np.arange(1, 61) ** -0.5).astype(np.float32)  # a slow decay: the hard case
    base = {"l.q.weight": weight(rng, 120, 60)}
    tuned = {"l.q.weight": base["l.q.weight"] + d}
    d = tuned["l.q.weight"] - base["l.q.weight"]
    done = extract(base, tuned, rank=8, exact=exact)
    error = np.linalg.norm(done["l.q.weight"].dense() - d) / np.linalg.norm(d)  # type: ignore[attr-defined]
    s = np.linalg.svd(d.astype(np.float64), compute_uv=False)
    best = np.linalg.norm(s[8:]) / np.linalg.norm(s)
    assert best * (1 - 1e-6) <= error <= best * (1 + (1e-5 if exact else 5e-3))
    row = done.report.modules[0]  # type: ignore[union-attr]
    assert row["relative_error"] == pytest.approx(error, rel=1e-5)
    assert row["energy"] == pytest.approx(1 - error**2, rel=1e-5)
    assert row["relative_norm"] == pytest.approx(np.linalg.norm(d) / np.linalg.norm(base["l.q.weight"]), rel=1e-5)
    assert row["noise_floor"] is None


@pytest.mark.parametrize(("target", "expected"), [({"energy": 0.9}, "energy"), ({"error": 0.2}, "error")])
def test_targets_choose_the_smallest_rank(target: dict[str, float], expected: str, rng: Any) -> None:
    s = 0.8 ** np.arange(150)
    u, _ = np.linalg.qr(rng.standard_normal((200, 150)))
    v, _ = np.linalg.qr(rng.standard_normal((160, 150)))
    d = ((u * s) @ v.T).astype(np.float32)
    base = {"l.q.weight": np.zeros((200, 160), np.float32)}
    found = extract(base, {"l.q.weight": d}, **target)["l.q.weight"]  # type: ignore[arg-type]
    kept = np.cumsum(s**2) / np.sum(s**2)
    share = 0.9 if expected == "energy" else 1 - 0.2**2
    assert found.rank == 1 + int((kept < share).sum())  # type: ignore[attr-defined]


@pytest.mark.parametrize("profile", ["even", "uneven rows", "uneven columns"])
def test_the_noise_rule_keeps_what_stands_above_the_rounding(profile: str, rng: Any) -> None:
    w = weight(rng, 256, 192) * np.float32(0.02)
    if profile != "even":
        w = w * np.exp(rng.standard_normal((256, 1) if "rows" in profile else (1, 192))).astype(np.float32)
    base = {"l.q.weight": w.astype(BF16)}
    u = LowRank(weight(rng, 256, 6), weight(rng, 6, 192), 1e-3)
    tuned = dict(merged(base, [Adapter({"l.q.weight": u})]))
    done = extract(base, tuned, rank="noise")
    assert done["l.q.weight"].rank == 6  # type: ignore[attr-defined]
    row = done.report.modules[0]  # type: ignore[union-attr]
    exact = w.astype(BF16).astype(np.float64) + u.dense()
    noise = np.linalg.norm(tuned["l.q.weight"].astype(np.float64) - exact)
    # the formula takes rounding errors as uniform; their share of |D| is known to a few percent
    assert row["noise_floor"] == pytest.approx(noise / np.linalg.norm(u.dense()), rel=0.1)
    with pytest.raises(UsageError, match="full precision") as caught:
        extract({"l.q.weight": w}, {"l.q.weight": w + np.float32(1)}, rank="noise")
    assert "--energy" in str(caught.value.hint)


def test_nothing_above_the_noise_is_told(rng: Any) -> None:
    w = weight(rng, 64, 48, dtype=BF16)
    other = w.copy()
    other.view(np.uint16)[0, 0] ^= 1  # one ulp
    done = extract({"l.q.weight": w, "l.k.weight": w}, {"l.q.weight": other, "l.k.weight": w}, rank="noise")
    assert not done.updates
    assert done.report is not None
    assert done.report.total["unchanged"] == 1
    assert any("nothing above" in line for line in done.report.warnings)


def llama(rng: Any, dtype: Any = np.float32) -> dict[str, Any]:
    return {
        "model.embed_tokens.weight": weight(rng, 16, 8, dtype=dtype),
        "model.layers.0.q_proj.weight": weight(rng, 8, 8, dtype=dtype),
        "model.layers.0.q_proj.bias": weight(rng, 8, dtype=dtype),
        "model.layers.0.norm.weight": weight(rng, 8, dtype=dtype),
        "lm_head.weight": weight(rng, 16, 8, dtype=dtype),
    }


def test_what_is_no_matrix_is_kept_whole_or_named(rng: Any) -> None:
    base = llama(rng)
    tuned = {name: w + np.float32(0.5) for name, w in base.items()}
    done = extract(base, tuned, rank=2)
    assert {name: u.kind for name, u in done.items()} == {
        name: "lowrank" if name in ("model.layers.0.q_proj.weight", "lm_head.weight") else "replace" for name in base
    }
    assert done.meta.config["modules_to_save"] == ["model.layers.0.norm"]
    named = extract(base, tuned, rank=2, carry=False)
    assert {u.kind for u in named.values()} == {"lowrank"}
    assert any("model.embed_tokens.weight" in line and "left out" in line for line in named.report.warnings)  # type: ignore[union-attr]


def test_prefixes_vocabularies_and_ties_are_found_and_explained(rng: Any) -> None:
    base = {name.removeprefix("model."): w for name, w in llama(rng).items()}
    base.pop("lm_head.weight")
    tuned = {**{f"model.{name}": w + np.float32(0.1) for name, w in base.items()}}
    tuned["model.embed_tokens.weight"] = weight(rng, 18, 8)
    tuned["score.weight"] = weight(rng, 3, 8)
    done = extract(base, tuned, rank=1)
    told = " ".join(done.report.warnings)  # type: ignore[union-attr]
    assert "names differ" in told
    assert "resized vocabulary" in told
    assert "score.weight" in told
    assert set(done) == set(tuned)
    assert isinstance(done["model.embed_tokens.weight"], Replace)
    again = {**tuned, "lm_head.weight": tuned["model.embed_tokens.weight"]}
    assert isinstance(extract(base, again, rank=1)["lm_head.weight"], Replace)


def test_a_head_stored_twice_is_the_embeddings(model: Model, rng: Any) -> None:
    tensors = llama(rng)
    tensors.pop("lm_head.weight")
    base = model(tensors, architectures=["XForCausalLM"], tie_word_embeddings=True)
    tuned = {name: w + np.float32(0.1) for name, w in tensors.items()}
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].copy()
    done = extract(base, model(tuned, folder="tuned", architectures=["XForCausalLM"], tie_word_embeddings=True), rank=1)
    assert "lm_head.weight" not in done
    assert any("stored twice" in line for line in done.report.warnings)  # type: ignore[union-attr]


def test_wrong_shapes_are_found_before_the_work(rng: Any) -> None:
    with pytest.raises(MismatchError, match="1 of 2 parameters have another shape"):
        extract(
            {"a.weight": weight(rng, 4, 3), "b.weight": weight(rng, 4, 3)},
            {"a.weight": weight(rng, 4, 5), "b.weight": weight(rng, 4, 3)},
            rank=1,
        )
    with pytest.raises(MismatchError, match="share no parameter"):
        extract({"a.weight": weight(rng, 4, 3)}, {"b.other": weight(rng, 4, 3)}, rank=1)
    with pytest.raises(UsageError, match="exactly one target"):
        extract({}, {})
    with pytest.raises(NumericsError) as caught:
        extract({"a.weight": weight(rng, 4, 3)}, {"a.weight": np.full((4, 3), np.inf, np.float32)}, rank=1)
    assert caught.value.parameter == "a.weight"


def test_quantised_models_are_refused(rng: Any) -> None:
    with pytest.raises(UnsupportedError, match="quantised"):
        extract({"a.weight": np.zeros((4, 3), np.uint8), "a.weight.absmax": np.zeros(3)}, {}, rank=1)


def test_experts_are_decomposed_one_by_one(rng: Any) -> None:
    base = {"m.experts.up_proj": weight(rng, 3, 10, 8)}
    parts = [weight(rng, 10, 2) @ weight(rng, 2, 8) for _ in range(3)]
    tuned = {"m.experts.up_proj": base["m.experts.up_proj"] + np.stack(parts)}
    found = extract(base, tuned, rank=2)["m.experts.up_proj"]
    assert isinstance(found, Stack)
    assert np.abs(found.dense() - np.stack(parts)).max() <= 64 * EPS * 10


def test_convolutions(rng: Any) -> None:
    d = (weight(rng, 6, 2) @ weight(rng, 2, 36)).reshape(6, 4, 3, 3)
    base = {"c.weight": weight(rng, 6, 4, 3, 3)}
    found = extract(base, {"c.weight": base["c.weight"] + d}, rank=2)["c.weight"]
    assert found.shape == (6, 4, 3, 3)
    assert np.abs(found.dense() - d).max() <= 64 * EPS * 10  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_peft_loads_what_was_extracted(name: str, make: Callable[..., Any], model: Model, tmp_path: Path) -> None:
    """At full rank the base with the extracted adapter, as PEFT applies it, is the tuned model."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = {"llama": ["q_proj"], "gpt2": ["c_attn"], "bert": ["query"]}[name]
    made = make(name, r=2, target_modules=targets, fan_in_fan_out=name == "gpt2")
    fresh = make(name, r=2, target_modules=targets, fan_in_fan_out=name == "gpt2").model.unload()
    generator = torch.Generator().manual_seed(5)
    tuned = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in fresh.named_parameters()}
    config = {**json.loads(made.base.config.to_json_string()), "architectures": [type(made.base).__name__]}
    base = model({k: v for k, v in made.weights.items() if k in tuned}, **config)
    changed = model({k: v.detach().numpy() for k, v in tuned.items()}, folder="tuned", **config)
    done = extract(base, changed, rank=64)
    folder = save(done, tmp_path / "extracted")
    loaded = peft.PeftModel.from_pretrained(fresh, folder).eval()
    logits = made.logits(loaded)
    plain = make(name, r=2, target_modules=targets, fan_in_fan_out=name == "gpt2").model.unload()
    plain.load_state_dict(tuned, strict=False)
    expected = made.logits(plain.eval())
    # two layers of fp32 products of factors of full rank
    assert torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))
    merge(base, [load(folder, base=base)], tmp_path / "again")
