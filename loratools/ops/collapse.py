"""collapse: a routed mixture as a static adapter, for the experts and weights that a router would have chosen.

Exact for that routing; a routed model is no static adapter, so the report says how far other choices are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb, isfinite, sqrt
from pathlib import Path
from typing import Any

from loratools.core import generic
from loratools.core.adapter import Adapter, Meta
from loratools.core.lazy import computed
from loratools.core.pool import parallel_map
from loratools.core.update import Array, Delta, Leaf, Update, nbytes, shape_of, working_dtype
from loratools.errors import FormatError, LoratoolsError, UsageError
from loratools.formats.mixtures import Mixture, read_mixture
from loratools.formats.spaces import worlds
from loratools.io.read import open_bundle
from loratools.kinds.lowrank import LowRank, concatenate, low_rank
from loratools.kinds.sum import Sum
from loratools.linalg.namespace import down, up
from loratools.ops.routing import router_weights
from loratools.report import Report, Row

SCHEMA = "loratools.collapse/1"
MOST_SUBSETS = 4096
UNITS = {
    "experts": "in the mixture",
    "rank_after": "columns of the static factors, where there are factors",
    "effective_experts": "E^2 / sum of squared cosines between experts: 1 where all say the same, E where none overlap",
    "spread_rms": "||D_S - D|| / ||D||, Frobenius, root mean square over all choices S of as many experts",
    "spread_max": "the same, of the choice farthest away; null where there are too many to look at each",
    "bytes_after": "bytes of the tensors",
}


def collapse(
    source: str | Path | Mixture,
    *,
    experts: Sequence[int] | None = None,
    mean: bool = False,
    routing: str | Path | Mapping[str, Array] | None = None,
    logits: bool = False,
    top_k: int | None = None,
    omega: float | None = None,
    scale: float | None = None,
) -> Adapter:
    """Return sum_e w_e D_e for every parameter of a mixture, exactly: factors side by side, added where one is shared.

    One of ``experts`` (their numbers; each weighs ``omega``, by default 1 / how many), ``mean`` (all, alike) and
    ``routing`` (a file of router weights, averaged over its tokens per router; ``logits`` and ``top_k`` as for
    :func:`loratools.ops.routing.routing`). ``scale``: of the factors, where no config says it. Cost: E^2 inner products
    per parameter for the report. Raises UsageError for a choice that is none, FormatError for a file without experts.
    """
    if (experts is not None) + mean + (routing is not None) != 1:
        raise UsageError("say which routing", expected="one of experts, mean and routing")
    mixture = source if isinstance(source, Mixture) else read_mixture(open_bundle(source), scale=scale)
    weights = _weights(mixture, experts, mean, routing, logits, top_k, omega)
    choice = len(experts) if experts is not None else top_k or 1
    names = list(mixture.experts)

    def run(name: str) -> tuple[Update, Row]:
        try:
            return _collapsed(name, mixture.experts[name], weights[name], choice)
        except LoratoolsError as error:
            raise error.at(parameter=name) from error

    sizes = [sum(map(nbytes, mixture.experts[name])) for name in names]
    done = dict(zip(names, parallel_map(run, names, weights=sizes, threaded=True), strict=True))
    updates = {**mixture.plain, **{name: update for name, (update, _) in done.items()}}
    line = "collapsed from a mixture: " + _words(experts, routing, weights[names[0]], mixture)
    meta = Meta(namespace=worlds(updates), base_id=mixture.base_id, history=(line,), path=mixture.path)
    return Adapter(updates, meta, _report(mixture, [row for _, row in done.values()], weights, experts, top_k))


def _weights(
    mixture: Mixture, experts: Sequence[int] | None, mean: bool, routing: Any, logits: bool, top_k: int | None,
    omega: float | None,
) -> dict[str, list[float]]:  # fmt: skip
    """Return the weight of every expert, per parameter."""
    count = len(mixture.numbers)
    if routing is not None:
        if omega is not None:
            raise UsageError("router weights say how much experts weigh", got=f"omega {omega}")
        found = {n: w.mean(0) for n, w in router_weights(routing, logits=logits, top_k=top_k).items()}
        return {name: _routed(name, found, count) for name in mixture.experts}
    chosen = list(mixture.numbers) if experts is None else list(experts)
    unknown = [e for e in chosen if e not in mixture.numbers]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        expected = f"different ones of {', '.join(map(str, mixture.numbers))}"
        raise UsageError("no such choice of experts", expected=expected, got=", ".join(map(str, chosen)) or "none")
    each = 1.0 / len(chosen) if omega is None else omega
    if not isfinite(each) or each == 0:
        raise UsageError("a weight of experts is a number other than 0", got=omega)
    weights = [each if e in chosen else 0.0 for e in mixture.numbers]
    return {name: list(weights) for name in mixture.experts}


def _routed(name: str, found: Mapping[str, Array], count: int) -> list[float]:
    """Return the mean weights of the router that lies nearest above a parameter; a single one is for all."""
    path = name.removesuffix(".weight")
    above = [key for key in found if path == _home(key) or path.startswith(f"{_home(key)}.")]
    key = max(above, key=len) if above else next(iter(found)) if len(found) == 1 else None
    if key is None:
        what = "no router of the file lies above this parameter"
        raise FormatError(what, parameter=name, expected="names like model.layers.0", got=", ".join(list(found)[:3]))
    if found[key].shape[0] != count:
        raise FormatError(
            "the router has another number of experts", parameter=name, expected=count, got=len(found[key])
        )
    return [float(x) for x in found[key]]


def _home(key: str) -> str:
    """Return what a router belongs to: its own name without what says that it is one."""
    head, _, last = key.removesuffix(".weight").rpartition(".")
    return head if head and last in ("gate", "router", "moe_gate", "lora_route", "lora_router") else key


def _collapsed(name: str, experts: Sequence[Delta], weights: Sequence[float], choice: int) -> tuple[Update, Row]:
    static = weighted(experts, weights)
    gram = [[generic.inner(u, v) for v in experts] for u in experts]
    norm = sqrt(max(_square(gram, weights), 0.0))
    each = sum(weights) / choice
    rms, most = spread(gram, weights, choice, each)
    flat = low_rank(static)
    lengths = [sqrt(max(gram[i][i], 0.0)) or 1.0 for i in range(len(gram))]
    cosines = sum((x / (lengths[i] * lengths[j])) ** 2 for i, row in enumerate(gram) for j, x in enumerate(row))
    return static, {
        "name": name,
        "kind": static.kind,
        "experts": len(experts),
        "rank_after": None if flat is None else flat.rank,
        "effective_experts": len(experts) ** 2 / cosines if cosines else 0.0,
        "norm": norm,
        "spread_rms": rms / norm if norm else 0.0,
        "spread_max": None if most is None else most / norm if norm else 0.0,
        "bytes_after": nbytes(static),
        "weights": list(weights),
    }


def weighted(experts: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Return sum_e w_e D_e: factors side by side; added where all share the other one, which keeps the rank."""
    used = [(u, w) for u, w in zip(experts, weights, strict=True) if w]
    flats = [(low_rank(u), w) for u, w in used]
    pairs = [(u, w) for u, w in flats if u is not None]
    if len(pairs) < len(used):
        return Sum(tuple(_times(u, w) for u, w in used))
    if all(u.a is pairs[0][0].a for u, _ in pairs):
        return LowRank(_added([(u.b, u.scale * w) for u, w in pairs]), pairs[0][0].a, 1.0, pairs[0][0].shape)
    if all(u.b is pairs[0][0].b for u, _ in pairs):
        return LowRank(pairs[0][0].b, _added([(u.a, u.scale * w) for u, w in pairs]), 1.0, pairs[0][0].shape)
    return concatenate(tuple(LowRank(u.b, u.a, u.scale * w, u.shape) for u, w in pairs))


def _times(u: Delta, weight: float) -> Delta:
    from dataclasses import replace

    if isinstance(u, Sum):
        return Sum(tuple(_times(part, weight) for part in u.parts))
    if not hasattr(u, "scale"):
        raise UsageError(f"an expert of kind {u.kind} cannot be weighted")
    return replace(u, scale=u.scale * weight)  # type: ignore[type-var]


def _added(parts: Sequence[tuple[Leaf | Array, float]]) -> Leaf:
    dtype = working_dtype(*(t for t, _ in parts))

    def run() -> Array:
        total = up(parts[0][0], "float64") * parts[0][1]
        for t, w in parts[1:]:
            total = total + w * up(t, "float64")
        return down(total, dtype)

    return computed(shape_of(parts[0][0]), run, dtype)


def spread(
    gram: Sequence[Sequence[float]], weights: Sequence[float], choice: int, each: float
) -> tuple[float, float | None]:
    """Return the root mean square and the largest ||D_S - D|| over all S of ``choice`` experts that weigh ``each``.

    The mean over all subsets is closed: with m = each choice / E for every expert, ||D_m - D||^2 plus
    each^2 choice (E - choice) / (E (E - 1)) sum_e ||D_e - mean||^2.
    """
    count = len(gram)
    middle = [each * choice / count] * count
    around = sum(gram[i][i] for i in range(count)) - _square(gram, [1.0] * count) / count
    varies = each**2 * choice * (count - choice) / (count * (count - 1)) * around if count > 1 else 0.0
    off = _square(gram, [m - w for m, w in zip(middle, weights, strict=True)])
    rms = sqrt(max(off + varies, 0.0))
    if comb(count, choice) > MOST_SUBSETS:
        return rms, None
    subsets = combinations(range(count), choice)
    gaps = (_square(gram, [(each if e in s else 0.0) - weights[e] for e in range(count)]) for s in map(set, subsets))
    return rms, sqrt(max(0.0, *gaps))


def _square(gram: Sequence[Sequence[float]], x: Sequence[float]) -> float:
    return sum(x[i] * x[j] * gram[i][j] for i in range(len(x)) for j in range(len(x)))


def _words(experts: Sequence[int] | None, routing: Any, weights: Sequence[float], mixture: Mixture) -> str:
    if experts is not None:
        return f"experts {', '.join(map(str, experts))} at {max(weights, key=abs):g}"
    return "mean weights of a routing file" if routing is not None else f"the mean of {len(mixture.numbers)} experts"


def _report(
    mixture: Mixture, rows: Sequence[Row], weights: Mapping[str, Sequence[float]], experts: Sequence[int] | None,
    top_k: int | None,
) -> Report:  # fmt: skip
    several = any(sum(x != 0 for x in w) > 1 for w in weights.values())
    warnings = list(mixture.remarks) if several else []
    square = sum(row["norm"] ** 2 for row in rows) or 1.0
    known = [row["spread_max"] for row in rows]
    total = {
        "modules": len(rows),
        "plain": len(mixture.plain),
        "experts": len(mixture.numbers),
        "exact": mixture.linear or not several,
        "effective_experts": sum(row["effective_experts"] for row in rows) / max(len(rows), 1),
        "spread_rms": sqrt(sum((row["spread_rms"] * row["norm"]) ** 2 for row in rows) / square),
        "spread_max": None if None in known else max(known),
        "bytes_after": sum(row["bytes_after"] for row in rows),
    }
    if mixture.routers:
        warnings.append(f"{len(mixture.routers)} routers are left behind: a static adapter has none")
    return Report(SCHEMA, tuple(rows), total, UNITS, warnings=tuple(warnings))
