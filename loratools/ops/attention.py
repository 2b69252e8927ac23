"""How far an adapter can push attention logits, head by head, whatever the input.

After a layer norm the input of an attention layer is gain * y + bias with |y| <= sqrt(d). Hence the logit of two tokens
is at most (d / sqrt(d_h)) |Gain W_Q^T W_K Gain|_2 for each head; a bias of norm or projection counts as one more
input, constant and 1. Real models lie far above the threshold below which fast attention exists (arXiv:2406.03136), so
only the change says something: the ratio of the bounds with and without the adapter. Rotary embeddings preserve it; a
norm on queries and keys, or a cap on logits, limits the logits further. Where no norm before the attention is found its
gain is taken as 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.core.update import Update, shape_of
from loratools.io.base import Base
from loratools.leaf import Array
from loratools.linalg.namespace import namespace, up

PAIRS = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"), ("to_q", "to_k"), ("query_proj", "key_proj"))
NORMS = ("input_layernorm", "layer_norm1", "layernorm_before", "self_attn_layer_norm", "ln_1", "norm1")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KEY_HEADS = ("num_key_value_heads", "n_head_kv")


@dataclass(frozen=True)
class Site:
    """One attention layer: base names of query and key weights, of the norm before them (if found), and its heads."""

    layer: str
    query: str
    key: str
    norm: str | None
    heads: int
    key_heads: int


def sites(base: Base, adapted: Mapping[str, str]) -> list[Site]:
    """Return the attention layers of which query or key is adapted: ``adapted`` base name -> adapter name.

    Layers whose heads the config does not tell, or that keep query and key in one matrix, are left out.
    """
    found = {}
    for name in adapted:
        site = _site(base, name)
        if site is not None:
            found[site.layer] = site
    return list(found.values())


def _site(base: Base, name: str) -> Site | None:
    owner, _, last = name.removesuffix(".weight").rpartition(".")
    pair = next((pair for pair in PAIRS if last in pair), None)
    if pair is None or not name.endswith(".weight"):
        return None
    query, key = (f"{owner}.{x}.weight" for x in pair)
    if query not in base or key not in base:
        return None
    rows, width = base.shapes[query]
    counts = _heads(base.config, width)
    if counts is None or rows % counts[0] or base.shapes[key][0] % counts[1] or base.shapes[key][1] != width:
        return None
    return Site(owner, query, key, _norm(base, owner), *counts)


def _heads(config: Mapping[str, Any], width: int) -> tuple[int, int] | None:
    """Return the numbers of query and key heads from the part of the config whose hidden size is ``width``."""
    nested = [part for part in config.values() if isinstance(part, Mapping)]
    fitting = [part for part in (config, *nested) if part.get("hidden_size", part.get("n_embd")) == width]
    for part in fitting:
        heads = next((part[name] for name in HEADS if isinstance(part.get(name), int)), None)
        if heads:
            keys = next((part[name] for name in KEY_HEADS if isinstance(part.get(name), int)), heads)
            return int(heads), int(keys)
    return None


def _norm(base: Base, owner: str) -> str | None:
    """Return the module path of the norm before the attention: beside it, or one module further up."""
    above = owner
    while "." in above:
        above = above.rpartition(".")[0]
        found = next((f"{above}.{norm}" for norm in NORMS if f"{above}.{norm}.weight" in base), None)
        if found or above.rpartition(".")[2].isdecimal():
            return found
    return None


def attention_row(site: Site, base: Base, updates: Mapping[str, Update]) -> dict[str, Any]:
    """Return the bounds per head before and after, and the largest ratio: ``updates`` base name -> update.

    Cost 2 d^2 d_h multiply-adds per head and matrix; memory one matrix.
    """
    queries = [_grams(site, site.query, site.heads, base, u) for u in (None, updates.get(site.query))]
    keys = [_grams(site, site.key, site.key_heads, base, u) for u in (None, updates.get(site.key))]
    rows, width = base.shapes[site.query]
    factor = (width + _has_constant(site, base)) / (rows // site.heads) ** 0.5
    before, after = (_bounds(q, k, factor) for q, k in zip(queries, keys, strict=True))
    ratios = [a / b if b else 1.0 for a, b in zip(after, before, strict=True)]
    return {
        "layer": site.layer,
        "query": site.query,
        "key": site.key,
        "norm": site.norm,
        "before": before,
        "after": after,
        "ratios": ratios,
        "attention_ratio": max(ratios),
    }


def _grams(site: Site, name: str, heads: int, base: Base, update: Update | None) -> Array:
    """Return W_h W_h^T per head, (heads, d_h, d_h) in fp64, of the projection on normalised inputs."""
    w = up(base[name])
    if update is not None:
        w = update.apply(w)
    xp = namespace(w)
    gain, shift = (_stored(base, f"{site.norm}.{x}") if site.norm else None for x in ("weight", "bias"))
    if gain is not None and str(base.config.get("model_type", "")).startswith("gemma"):
        gain = 1.0 + gain  # Gemma stores the gain's distance from 1
    bias = _stored(base, f"{name.removesuffix('.weight')}.bias")
    constant = (w @ shift if shift is not None else xp.zeros_like(w[:, 0])) + (0.0 if bias is None else bias)
    seen = w if gain is None else w * gain
    seen = xp.concat([seen, constant[:, None]], axis=1).reshape(heads, w.shape[0] // heads, w.shape[1] + 1)
    return up(seen @ seen.mT, "float64")


def _has_constant(site: Site, base: Base) -> bool:
    """Tell whether a bias makes for one more input, the constant 1."""
    owners = (site.norm, *(name.removesuffix(".weight") for name in (site.query, site.key)))
    return any(f"{owner}.bias" in base for owner in owners)


def _stored(base: Base, name: str) -> Array | None:
    return up(base[name]) if name in base and len(shape_of(base.leaf(name))) == 1 else None


def _bounds(queries: Array, keys: Array, factor: float) -> list[float]:
    """Return factor |W_Q,h^T W_K,h|_2 for every query head; key heads are shared by consecutive ones."""
    xp = namespace(queries)
    shared = queries.shape[0] // keys.shape[0]
    mu, x = xp.linalg.eigh(queries)
    half = xp.sqrt(xp.clip(mu, 0.0, None))[:, :, None] * x.mT
    both = half @ xp.repeat(keys, shared, axis=0) @ half.mT
    return [factor * max(float(top), 0.0) ** 0.5 for top in xp.linalg.eigvalsh(both)[:, -1]]
