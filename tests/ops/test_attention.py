"""Bounds on attention logits against dense computation and sampled logits."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank
from loratools.ops.attention import attention_row, sites

D, HEADS, KEY_HEADS, SIZE = 48, 6, 3, 8
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def model(rng: np.random.Generator, *, bias: bool, norm_bias: bool, **config: object) -> Base:
    tensors = {
        Q: rng.standard_normal((HEADS * SIZE, D)),
        K: rng.standard_normal((KEY_HEADS * SIZE, D)),
        "model.layers.0.input_layernorm.weight": rng.uniform(0.5, 2, D),
    }
    if norm_bias:
        tensors["model.layers.0.input_layernorm.bias"] = rng.standard_normal(D)
    if bias:
        tensors[Q.replace("weight", "bias")] = rng.standard_normal(HEADS * SIZE)
    base = Base.open({name: x.astype(np.float32) for name, x in tensors.items()})
    said = {"hidden_size": D, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    base.config = {"text_config": said, **config}  # nested, as in vision-language models
    return base


def update(rng: np.random.Generator, rows: int) -> LowRank:
    return LowRank(rng.standard_normal((rows, 2)), rng.standard_normal((2, D)), 0.5)


def logits(base: Base, updates: dict[str, LowRank], x: np.ndarray) -> np.ndarray:
    """Return the largest |logit| per head over pairs of the normalised inputs x (count, d)."""
    norm = "model.layers.0.input_layernorm"
    y = x * base[f"{norm}.weight"] + base.get(f"{norm}.bias", 0.0)
    both = []
    for name, heads in ((Q, HEADS), (K, KEY_HEADS)):
        w = updates[name].apply(base[name]) if name in updates else base[name]
        bias = name.replace("weight", "bias")
        both.append((y @ w.T + base.get(bias, 0.0)).reshape(len(x), heads, SIZE))
    q, k = both[0], np.repeat(both[1], HEADS // KEY_HEADS, axis=1)
    return np.abs(np.einsum("ihd,jhd->hij", q, k)).max(axis=(1, 2)) / SIZE**0.5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm_bias", [False, True])
def test_bounds_are_never_exceeded(bias: bool, norm_bias: bool) -> None:
    rng = np.random.default_rng(0)
    base = model(rng, bias=bias, norm_bias=norm_bias)
    updates = {Q: update(rng, HEADS * SIZE), K: update(rng, KEY_HEADS * SIZE)}
    (site,) = sites(base, {Q: Q})
    row = attention_row(site, base, updates)
    x = rng.standard_normal((400, D))
    x *= D**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
    assert (logits(base, {}, x) <= row["before"]).all()
    assert (logits(base, updates, x) <= row["after"]).all()
    assert row["attention_ratio"] == max(a / b for a, b in zip(row["after"], row["before"], strict=True))
    assert row["norm"] == "model.layers.0.input_layernorm"


def test_the_bound_is_the_spectral_norm() -> None:
    rng = np.random.default_rng(1)
    base = model(rng, bias=False, norm_bias=False)
    (site,) = sites(base, {K: K})
    row = attention_row(site, base, {})
    gain = base["model.layers.0.input_layernorm.weight"].astype(float)
    for head in range(HEADS):
        q = base[Q][head * SIZE : (head + 1) * SIZE] * gain
        k = base[K][head // 2 * SIZE : (head // 2 + 1) * SIZE] * gain
        exact = D / SIZE**0.5 * np.linalg.norm(q.T.astype(float) @ k, 2)
        assert row["before"][head] == pytest.approx(exact, rel=1e-5)  # fp32 products of 48 terms
    assert row["before"] == row["after"]
    assert row["attention_ratio"] == 1.0


def test_twice_the_queries_twice_the_bound() -> None:
    rng = np.random.default_rng(2)
    base = model(rng, bias=False, norm_bias=False)
    (site,) = sites(base, {Q: Q})
    w = base[Q].astype(float)
    row = attention_row(site, base, {Q: LowRank(w, np.eye(D), 1.0)})
    assert row["ratios"] == pytest.approx([2.0] * HEADS, rel=1e-5)


def test_gemma_stores_the_gain_less_one() -> None:
    plain, gemma = (
        model(np.random.default_rng(3), bias=False, norm_bias=False, **c) for c in ({}, {"model_type": "gemma2"})
    )
    (site,) = sites(plain, {Q: Q})
    assert attention_row(site, gemma, {})["before"][0] > attention_row(site, plain, {})["before"][0]


def test_no_heads_no_bound() -> None:
    rng = np.random.default_rng(4)
    base = model(rng, bias=False, norm_bias=False)
    base.config = {}
    assert sites(base, {Q: Q}) == []
    assert sites(base, {"model.layers.0.mlp.up_proj.weight": "x"}) == []
