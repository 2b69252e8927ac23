"""One matrix of a full fine-tune as a low-rank update, or a stack of experts as one each."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

from loratools.core import pool
from loratools.core.update import Leaf, Update
from loratools.kinds.lowrank import LowRank
from loratools.kinds.stack import stacked
from loratools.linalg.dense import thin_svd
from loratools.linalg.factored import SVD, Truncation
from loratools.linalg.namespace import down, namespace, up
from loratools.linalg.rsvd import rsvd
from loratools.linalg.seeds import key_of
from loratools.ops.difference import NOISY, Difference, difference
from loratools.ops.ranks import Target
from loratools.ops.tally import rounding

POWER = 4  # power iterations: within 0.1% of the optimum on slowly decaying spectra
FIRST = 32  # singular values asked for first where the rank is not known beforehand


@dataclass(frozen=True)
class Plan:
    """What holds for every module."""

    target: Target
    exact: bool
    seed: int
    dtype: str | None


def decomposed(name: str, base: Leaf, tuned: Leaf, plan: Plan) -> tuple[Update | None, dict[str, Any] | None]:
    """Return the update of one parameter and its row: (None, None) where nothing changed."""
    if len(tuned.shape) == 3:
        return _stack(name, base, tuned, plan)
    found = difference(base, tuned)
    if not found.square:
        return None, None
    result = _truncated(found, plan, name)
    if result is None:
        return None, _row(name, "left", 0, found, 0.0, 1.0)
    written = _stored(result, plan.dtype or _like(tuned), tuned.shape)
    return written, _row(name, "lowrank", result.rank, found, result.energy, _error(result, written))


def _stack(name: str, base: Leaf, tuned: Leaf, plan: Plan) -> tuple[Update | None, dict[str, Any] | None]:
    """Decompose a stack of experts (E, out, in) expert by expert; the row tells the whole stack."""
    shape, parts, sums = tuned.shape[1:], [], [0.0] * 5
    for e in range(tuned.shape[0]):
        old, new = (_slice(leaf, e) for leaf in (base, tuned))
        found = difference(old, new)
        result = _truncated(found, plan, f"{name}#{e}") if found.square else None
        if result is None:
            like = up(new.rows(0, 1))
            xp = namespace(like)
            parts.append(LowRank(xp.zeros((shape[0], 1), dtype=like.dtype), xp.zeros((1, shape[1]), dtype=like.dtype)))
            lost = found.square
        else:
            parts.append(_stored(result, plan.dtype or _like(tuned), shape))
            lost = _error(result, parts[-1]) ** 2 * found.square
        kept = 0.0 if result is None else result.energy * found.square
        sums = [
            a + b for a, b in zip(sums, (found.square, lost, kept, found.base_square, found.noise or 0.0), strict=True)
        ]
    square, lost, kept, before, noise = sums
    if not square:
        return None, None
    dtype = plan.dtype or _like(tuned)
    update = stacked([LowRank(down(p.b, dtype), down(p.a, dtype)) for p in parts], tuned.shape)
    row = {
        "name": name,
        "kind": "stack",
        "rank": update.rank,
        "energy": kept / square,
        "relative_error": sqrt(lost / square),
        "noise_floor": min(sqrt(noise / square), 1.0) if tuned.dtype in NOISY else None,
        "noise_edge": None,
        "update_norm": sqrt(square),
        "relative_norm": sqrt(square / before) if before else None,
    }
    return update, row


def _slice(leaf: Leaf, e: int) -> Leaf:
    """Return expert ``e`` of a stacked parameter, as a matrix in memory."""
    array = leaf.rows(e, e + 1).read()[0, ...]
    return Leaf(leaf.shape[1:], leaf.dtype, lambda out: array)


def _truncated(found: Difference, plan: Plan, name: str) -> Truncation | None:
    """Return the truncation that the target asks for; None where nothing stands above the noise."""
    svd = _svd(found, plan, name)
    rank = _rank(svd, found, plan.target)
    if rank == 0:
        return None
    s = svd.s[:rank]
    xp = namespace(s)
    kept = min(float(xp.sum(s**2)) / found.square, 1.0)
    root = xp.sqrt(s)
    tall, wide = up(svd.u, "float64")[:, :rank] * root, root[:, None] * up(svd.vh, "float64")[:rank, :]
    return Truncation(tall, wide, svd.s, rank, kept, sqrt(1.0 - kept), "dense" if plan.exact else "rsvd")


def _svd(found: Difference, plan: Plan, name: str) -> SVD:
    """Return enough singular triplets for the target: more and more of them until its rank lies within."""
    most = min(found.d.shape)
    with pool.all_blas_threads():
        if plan.exact:
            return _wide(thin_svd(found.d))
        k = min(plan.target.rank or FIRST, most)
        while True:
            if 2 * k > most:  # as cheap, and exact
                return _wide(thin_svd(found.d))
            svd = rsvd(found.d, k, power=POWER, key=key_of(plan.seed, name))
            if plan.target.rank is not None or _rank(svd, found, plan.target) < k:
                return _wide(svd)
            k = min(2 * k, most)


def _wide(svd: SVD) -> SVD:
    return SVD(svd.u, up(svd.s, "float64"), svd.vh)


def _rank(svd: SVD, found: Difference, target: Target) -> int:
    """Return the rank for a target, at most the number of triplets; what these do not hold counts as one more value."""
    xp = namespace(svd.s)
    s = up(svd.s, "float64")
    if target.noise:
        assert found.noise_edge is not None  # _check_noise
        return min(int(xp.sum(s > found.noise_edge)), target.cap)
    rest = sqrt(max(found.square - float(xp.sum(s**2)), 0.0))
    beyond = xp.zeros_like(s[:1]) + rest
    return min(target.rank_for(xp.concat([s, beyond])), int(s.shape[0]))


def _stored(result: Truncation, dtype: str, shape: tuple[int, ...]) -> LowRank:
    return LowRank(down(result.b, dtype), down(result.a, dtype), 1.0, shape)


def _error(result: Truncation, written: LowRank) -> float:
    """Return the relative error with the rounding of the factors, which is orthogonal to what was cut."""
    s = result.singular_values[: result.rank]
    total = float((s**2).sum()) / result.energy
    return sqrt(result.error**2 + rounding(result, written) / total)


def _like(tuned: Leaf) -> str:
    return tuned.dtype if tuned.dtype in (*NOISY, "float32") else "float32"


def _row(name: str, kind: str, rank: int, found: Difference, energy: float, error: float) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "rank": rank,
        "energy": energy,
        "relative_error": error,
        "noise_floor": found.noise_floor,
        "noise_edge": found.noise_edge,
        "update_norm": sqrt(found.square),
        "relative_norm": sqrt(found.square / found.base_square) if found.base_square else None,
    }
