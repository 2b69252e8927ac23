"""``--type lora``: plain low-rank factors; exact where there are some, else the nearest, and its error told."""

from __future__ import annotations

from math import sqrt
from typing import Any

from loratools.core import pool
from loratools.core.adapter import Adapter
from loratools.core.generic import Operator, need_delta
from loratools.core.rows import row_ranges, rowwise
from loratools.core.update import Array, Delta, Leaf, Update, namespace, tensors
from loratools.errors import UsageError
from loratools.files import BaseLike
from loratools.kinds.dora import Dora, DoraDelta, axis_norms
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg.dense import thin_svd
from loratools.linalg.namespace import down, dtype_name, is_float, up, working_dtype
from loratools.linalg.rsvd import rsvd
from loratools.linalg.seeds import key_of
from loratools.ops.fold import agreement, correlation, square
from loratools.ops.types.base import adapter_type
from loratools.ops.types.walk import as_factors, finished, walk

POWER = 4  # power iterations: within 0.1% of the optimum on slowly decaying spectra
BLOCK_BYTES = 4 << 20  # of a difference formed at once, where only its norm is wanted


@adapter_type("lora")
def to_lora(
    adapter: Adapter, base: BaseLike | None = None, *, rank: int | None = None, exact: bool = False, seed: int = 0
) -> Adapter:
    """Plain LoRA: exact where an update has factors, else the nearest of --rank; DoRA on its base (--base).

    W' - W = (g - 1) W + g D of a DoRA is of full rank; its leading part (``rank``, by default the direction's) is found
    by randomised SVD of the operator, which is never formed (``exact``: by dense SVD). The report tells the error of
    every module and of all: nothing is dropped in silence. LoRA, stacks of experts and what is no weight of a layer
    are carried.

    Raises UsageError where an update without factors has no rank to go by, NeedsBaseError, MismatchError.
    """
    if rank is not None and rank < 1:
        raise UsageError("rank out of range", expected="an integer of at least 1", got=rank)

    def one(name: str, u: Update, w: Leaf | Array | None) -> tuple[Update, dict[str, Any]]:
        factors = as_factors(u)
        if factors is not None and (rank is None or factors.rank <= rank):
            return factors, _row(name, factors.rank, factors.rank)
        delta = u.delta(up(w, working_dtype(w)) if w is not None else None)
        bounded = low_rank(delta)
        if bounded is not None and (rank is None or bounded.rank <= rank):
            return bounded, _row(name, bounded.rank, bounded.rank)
        direction = factors or low_rank(u) or bounded
        if rank is None and direction is None:
            raise UsageError(f"a {u.kind} update has no rank of its own", expected="--rank N")
        k = min(rank or direction.rank, *delta.matrix_shape)  # type: ignore[union-attr]  # one of them is there
        new, row = _nearest(name, delta, k, direction, exact=exact, key=key_of(seed, name))
        if isinstance(u, Dora) and isinstance(delta, DoraDelta):
            row["magnitude_agreement"] = correlation(agreement(u, axis_norms(delta.base, u.axis)))
        return new, row

    plain = (lambda u: isinstance(u, LowRank), lambda u: isinstance(u, Delta))
    done, rows = walk(adapter, base, lambda u: not plain[0](u), lambda u: not plain[1](u), one)
    return finished(done, adapter, rows, "lora")


def _nearest(
    name: str, d: Delta, k: int, like: LowRank | None, *, exact: bool, key: Any
) -> tuple[LowRank, dict[str, Any]]:
    with pool.all_blas_threads():
        svd = thin_svd(d.matrix()) if exact else rsvd(Operator(d), k, power=POWER, key=key)
    xp = namespace(svd.s)
    s = up(svd.s[:k], "float64")
    root = up(xp.sqrt(s), dtype_name(svd.u))
    types = (dtype_name(like.b), dtype_name(like.a)) if like is not None else (_stored(d),) * 2
    b, a = down(svd.u[:, :k] * root, types[0]), down(root[:, None] * svd.vh[:k, :], types[1])
    new = LowRank(b, a, 1.0, d.shape)
    total, lost = _squares(d, new)
    more = {
        "update_norm": sqrt(total),
        "energy": min(float(xp.sum(s**2)) / total, 1.0) if total else 1.0,
        "gain": float(xp.mean(up(d.gain, "float64"))) if isinstance(d, DoraDelta) else None,
    }
    row = _row(name, None if like is None else like.rank, k, sqrt(lost / total) if total else 0.0)
    return new, {**row, **more}


def _row(name: str, before: int | None, after: int, error: float = 0.0) -> dict[str, Any]:
    return {"name": name, "rank_before": before, "rank_after": after, "relative_error": error}


def _stored(d: Delta) -> str:
    """Return the dtype in which the update is stored, for its factors."""
    found = (dtype_name(t) for _, t in tensors(d))
    return next((name for name in found if is_float(name)), "float32")


def _squares(d: Delta, new: LowRank) -> tuple[float, float]:
    """Return |D|^2 and |new - D|^2, some rows at a time where the rows stand alone."""
    rows, others = rowwise(d), rowwise(new)
    if rows is None or others is None:
        dense = d.dense()
        return square(dense), square(new.dense() - dense)
    total = lost = 0.0
    for start, stop in row_ranges(Leaf(d.shape, "float32", lambda out: out), BLOCK_BYTES):
        part = need_delta(rows(start, stop)).dense()
        total += square(part)
        lost += square(need_delta(others(start, stop)).dense() - part)
    return total, lost
