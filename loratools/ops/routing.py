"""routing: how a router uses its experts, from a file of its weights (or logits), one row per token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools.core.update import Array, Leaf, namespace, shape_of
from loratools.errors import FormatError, UsageError
from loratools.io.read import open_bundle
from loratools.linalg.namespace import cast, up
from loratools.report import Report, Row

SCHEMA = "loratools.routing/1"
UNITS = {
    "tokens": "rows",
    "experts": "columns",
    "effective_experts": "mean over tokens of (sum w)^2 / sum w^2: how many experts a token really uses",
    "at_most_two": "share of tokens whose effective number is at most 2",
    "entropy": "mean over tokens of -sum p log p, nats",
    "load_effective": "the same number of the mean weights: how many experts are used at all",
    "dominant": "share of the whole weight on the most used expert",
}
EPS = 1e-6  # beyond 2, of an effective number that rounding left there


def routing(source: str | Path | Mapping[str, Array], *, logits: bool = False, top_k: int | None = None) -> Report:
    """Return the effective number of experts, entropy and load per router; ``source``: tensors (tokens, experts).

    ``logits``: rows go through a softmax; ``top_k`` keeps the largest of each row and normalises them. Raises
    FormatError for negative or all-zero weights and tensors of another form, UsageError for an impossible ``top_k``.
    """
    rows: list[Row] = [_row(name, w) for name, w in router_weights(source, logits=logits, top_k=top_k).items()]
    tokens = sum(row["tokens"] for row in rows)
    means = ("effective_experts", "at_most_two", "entropy")
    total = {"modules": len(rows), "tokens": tokens}
    total |= {figure: sum(row[figure] * row["tokens"] for row in rows) / tokens for figure in means}
    return Report(SCHEMA, tuple(rows), total, UNITS)


def router_weights(
    source: str | Path | Mapping[str, Array], *, logits: bool = False, top_k: int | None = None
) -> dict[str, Array]:
    """Return the weights (tokens, experts) of every router, fp64, of rows that sum to more than nothing."""
    tensors: Mapping[str, Leaf | Array] = source if isinstance(source, Mapping) else open_bundle(source).tensors
    if not tensors:
        raise FormatError("no router weights in this file", expected="tensors (tokens, experts)")
    return {name: _weights(name, up(t, "float64"), logits, top_k) for name, t in tensors.items()}


def _weights(name: str, w: Array, logits: bool, top_k: int | None) -> Array:
    xp = namespace(w)
    if len(shape_of(w)) < 2 or 0 in shape_of(w):
        raise FormatError(
            "router weights are rows of experts", parameter=name, expected="(tokens, experts)", got=w.shape
        )
    w = w.reshape(-1, w.shape[-1])
    if logits:
        w = xp.exp(w - xp.max(w, axis=1, keepdims=True))
        w = w / xp.sum(w, axis=1, keepdims=True)
    if not bool(xp.all(w >= 0)) or not bool(xp.all(xp.sum(w, axis=1) > 0)):
        raise FormatError("router weights are not negative, and each token has one", parameter=name, hint="--logits?")
    if top_k is None:
        return w
    if isinstance(top_k, bool) or not 1 <= top_k <= w.shape[1]:
        raise UsageError("more experts asked for than there are", expected=f"1 to {w.shape[1]}", got=top_k)
    order = xp.argsort(xp.argsort(-w, axis=1, stable=True), axis=1, stable=True)
    kept = xp.where(order < top_k, w, xp.zeros_like(w))
    return kept / xp.sum(kept, axis=1, keepdims=True)


def effective(w: Array) -> Array:
    """Return (sum w)^2 / sum w^2 over the last axis: 1 for one expert, n for n equal ones."""
    xp = namespace(w)
    return xp.sum(w, axis=-1) ** 2 / xp.sum(w * w, axis=-1)


def _row(name: str, w: Array) -> Row:
    xp = namespace(w)
    counts = effective(w)
    p = w / xp.sum(w, axis=1, keepdims=True)
    load = xp.mean(p, axis=0)
    logs = xp.log(xp.where(p > 0, p, xp.ones_like(p)))
    return {
        "name": name,
        "tokens": int(w.shape[0]),
        "experts": int(w.shape[1]),
        "effective_experts": float(xp.mean(counts)),
        "at_most_two": float(xp.mean(cast(counts <= 2 + EPS, "float64"))),
        "entropy": float(xp.mean(-xp.sum(p * logs, axis=1))),
        "load_effective": float(effective(load)),
        "dominant": float(xp.max(load)),
        "load": [float(x) for x in load],
    }
