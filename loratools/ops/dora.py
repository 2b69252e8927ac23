"""Between LoRA and DoRA: a LoRA is a DoRA with the right magnitudes; a DoRA is of full rank, a LoRA comes near it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from typing import Any

from loratools.core import pool
from loratools.core.adapter import Adapter
from loratools.core.generic import Operator, need_delta
from loratools.core.rows import row_ranges, rowwise
from loratools.core.update import Update, namespace
from loratools.errors import LoratoolsError, MismatchError, UsageError
from loratools.files import BaseLike, open_base
from loratools.io.base import Base
from loratools.kinds.dora import Dora, DoraDelta, sum_norms
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg.dense import thin_svd
from loratools.linalg.namespace import down, dtype_name, up
from loratools.linalg.rsvd import rsvd
from loratools.linalg.seeds import key_of
from loratools.ops.fold import square
from loratools.report import Report

POWER = 4
BLOCK_BYTES = 4 << 20  # of a difference formed at once, where only its norm is wanted
UNITS = {
    "rank_before": "columns of the direction as stored",
    "rank_after": "columns of the factors as written",
    "energy": "share of |W' - W|^2 (Frobenius) that the new factors hold",
    "relative_error": "Frobenius norm of (written - (W' - W)) / that of W' - W",
    "gain": "mean of magnitude / |row of W + D|: what the magnitude does beyond the direction",
}


def to_dora(adapter: Adapter, base: BaseLike) -> Adapter:
    """Return the adapter with every low-rank update as a DoRA of the same function: magnitude = |W + D| by rows.

    Exact up to fp32 rounding: the gain is 1. ``base`` must be the one of training, in the same precision. Cost
    O(m n r) per module, in blocks of rows. Updates that are DoRA already, and what is no low-rank matrix, are carried.
    """

    def one(name: str, u: Update, opened: Base, stored: str) -> Update:
        if not isinstance(u, LowRank):
            return u
        axis = 1 if adapter.meta.layout.get(name, {}).get("stored") == "in_out" else 0
        return Dora(u, down(sum_norms(opened.leaf(stored), u, axis), "float32"), axis)

    done = _mapped(adapter, base, one)
    return _with_flag(done, use_dora=True).with_history("convert lora to dora")


def to_lora(
    adapter: Adapter, base: BaseLike, *, rank: int | None = None, exact: bool = False, seed: int = 0
) -> Adapter:
    """Return the adapter with every DoRA as the nearest plain LoRA of ``rank`` (default: its direction's).

    W' - W = (g - 1) W + g D is of full rank; its leading part is found by randomised SVD of the operator, which is
    never formed (``exact``: by dense SVD). The report tells the error of every module: nothing is dropped in silence.
    """
    if rank is not None and rank < 1:
        raise UsageError("rank out of range", expected="an integer of at least 1", got=rank)
    rows: list[dict[str, Any]] = []

    def one(name: str, u: Update, opened: Base, stored: str) -> Update:
        if not isinstance(u, Dora):
            return u
        update, row = _nearest(name, u, u.delta(opened[stored]), rank, exact, seed)
        rows.append(row)
        return update

    done = _with_flag(_mapped(adapter, base, one), use_dora=False).with_history("convert dora to lora")
    return replace(done, report=_report(rows, adapter))


def _mapped(adapter: Adapter, base: BaseLike, one: Callable[[str, Update, Base, str], Update]) -> Adapter:
    """Apply ``one(name, update, base, base name)`` to the low-rank updates, one large matrix after another."""
    opened = open_base(base)
    assert opened is not None  # only None opens as None
    wanted = [name for name, u in adapter.items() if low_rank(u) is not None]
    names = opened.resolve(wanted)
    for name in wanted:
        if opened.shapes[names[name]] != adapter[name].shape:
            raise MismatchError(
                "the update has another shape than its parameter", file=opened.path, parameter=name,
                expected=opened.shapes[names[name]], got=adapter[name].shape,
            )  # fmt: skip
    updates: dict[str, Update] = {}
    for name, u in adapter.items():
        try:
            updates[name] = one(name, u, opened, names[name]) if name in names else u
        except LoratoolsError as error:
            raise error.at(file=adapter.meta.path, parameter=name) from error
    return replace(adapter, updates=updates)


def _with_flag(adapter: Adapter, *, use_dora: bool) -> Adapter:
    """Return the adapter whose PEFT config, where it has one, says what the tensors are."""
    config = adapter.meta.config
    return replace(adapter, meta=replace(adapter.meta, config={**config, "use_dora": use_dora} if config else config))


def _nearest(
    name: str, dora: Dora, d: DoraDelta, rank: int | None, exact: bool, seed: int
) -> tuple[LowRank, dict[str, Any]]:
    direction = low_rank(dora)
    assert direction is not None  # only such come here
    k = min(rank or direction.rank, *d.matrix_shape)
    with pool.all_blas_threads():
        svd = thin_svd(d.dense().reshape(d.matrix_shape)) if exact else rsvd(
            Operator(d), k, power=POWER, key=key_of(seed, name)
        )  # fmt: skip
    xp = namespace(svd.s)
    s = up(svd.s[:k], "float64")
    root = up(xp.sqrt(s), dtype_name(svd.u))
    b, a = svd.u[:, :k] * root, root[:, None] * svd.vh[:k, :]
    new = LowRank(down(b, dtype_name(direction.b)), down(a, dtype_name(direction.a)), 1.0, dora.shape)
    total, lost = _squares(d, new)
    row = {
        "name": name,
        "rank_before": direction.rank,
        "rank_after": k,
        "energy": min(float(xp.sum(s**2)) / total, 1.0) if total else 1.0,
        "relative_error": sqrt(lost / total) if total else 0.0,
        "gain": float(xp.mean(up(d.gain, "float64"))),
    }
    return new, row


def _squares(d: DoraDelta, new: LowRank) -> tuple[float, float]:
    """Return |D|^2 and |new - D|^2, some rows at a time where the rows stand alone."""
    rows, others = rowwise(d), rowwise(new)
    if rows is None or others is None:
        dense = d.dense()
        return square(dense), square(new.dense() - dense)
    total = lost = 0.0
    for start, stop in row_ranges(d.base, BLOCK_BYTES):
        part = need_delta(rows(start, stop)).dense()
        total += square(part)
        lost += square(need_delta(others(start, stop)).dense() - part)
    return total, lost


def _report(rows: list[dict[str, Any]], adapter: Adapter) -> Report:
    total = {
        "modules": len(rows),
        "rank_after": max((row["rank_after"] for row in rows), default=None),
        "relative_error": max((row["relative_error"] for row in rows), default=0.0),
        "energy": min((row["energy"] for row in rows), default=1.0),
    }
    return Report("loratools.dora-to-lora/1", tuple(rows), total, UNITS, adapter.meta.remarks)
