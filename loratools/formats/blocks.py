"""Exact surgery on the rows of updates: taking, permuting, splitting and joining fused projections.

Rows of W' depend on the same rows of W and of the update alone, for plain updates and for magnitudes over the output
axis: what is fused may be split, and what is split joined, without loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loratools.core.update import Array, Leaf, Update, shape_of
from loratools.errors import ConversionError
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.linalg.namespace import down, dtype_name, namespace, to_numpy, up

Tensor = Leaf | Array
Rows = slice | Sequence[int]


def taken(u: Update, rows: Rows) -> Update:
    """Return the update of the rows alone, in their order; ConversionError for kinds whose rows hang together."""
    match u:
        case LowRank():
            b = rows_of(u.b, rows)
            return LowRank(b, u.a, u.scale, (shape_of(b)[0], *u.shape[1:]))
        case Dense():
            return Dense(rows_of(u.d, rows), u.scale)
        case Replace():
            return Replace(rows_of(u.value, rows))
        case Dora(axis=0):
            return Dora(_delta(taken(u.direction, rows)), rows_of(u.magnitude, rows), 0, u.eps)
    raise ConversionError(f"a {u.kind} update cannot be taken apart by rows", got=u.shape)


def rows_of(t: Tensor, rows: Rows) -> Tensor:
    """Return rows of a tensor; of a leaf, when it is read."""
    index: Any = rows if isinstance(rows, slice) else np.asarray(rows)
    count = len(range(*rows.indices(t.shape[0]))) if isinstance(rows, slice) else len(rows)
    if isinstance(t, Leaf):
        return Leaf((count, *t.shape[1:]), t.dtype, lambda out: np.ascontiguousarray(to_numpy(t.read())[index]))
    return t[index]


def split(u: Update, sizes: Sequence[int]) -> list[Update]:
    """Return the parts of ``sizes`` rows each. Columns that are zero in a part (block-diagonal joins) leave it."""
    stops = np.cumsum(sizes)
    if int(stops[-1]) != u.shape[0]:
        raise ConversionError("the parts do not add up to the parameter", expected=u.shape[0], got=list(sizes))
    parts = [taken(u, slice(int(stop) - size, int(stop))) for stop, size in zip(stops, sizes, strict=True)]
    return [trimmed(part) for part in parts]


def trimmed(u: Update) -> Update:
    """Return a low-rank update without the columns of ``b`` that are exactly zero (one stays): nothing changes."""
    if isinstance(u, Dora):
        return replace(u, direction=_delta(trimmed(u.direction)))
    if not isinstance(u, LowRank):
        return u
    used = np.flatnonzero(np.any(to_numpy(u.b) != 0, axis=0))
    if len(used) == u.rank:
        return u
    keep = used if len(used) else np.asarray([0])
    return LowRank(rows_of(u.b.T, keep.tolist()).T, rows_of(u.a, keep.tolist()), u.scale, u.shape)


def is_block_diagonal(u: LowRank, sizes: Sequence[int]) -> bool:
    """True if ``b`` holds one block of columns per part of ``sizes`` rows and exact zeros elsewhere."""
    n = len(sizes)
    if u.rank % n:
        return False
    stops, r = np.cumsum(sizes), u.rank // n
    b = to_numpy(u.b)
    rows = (b[int(stop) - size : int(stop)] for stop, size in zip(stops, sizes, strict=True))
    return all(
        not (np.any(x[:, : i * r] != 0) or np.any(x[:, (i + 1) * r :] != 0)) and bool(np.any(x != 0))
        for i, x in enumerate(rows)
    )


def is_zero(u: Update) -> bool:
    """True if an additive update is exactly zero."""
    tensor = u.b if isinstance(u, LowRank) else u.d if isinstance(u, Dense) else None
    return tensor is not None and not np.any(to_numpy(tensor))


def joined(parts: Sequence[Update | None], sizes: Sequence[int]) -> Update:
    """Return the update of the stacked parameter; parts that are None change nothing.

    Equal ``a`` factors are shared, others give block-diagonal factors of the sum of ranks. Magnitudes must be there for
    every part. Raises :class:`ConversionError` for kinds that cannot be stacked.
    """
    present = [p for p in parts if p is not None]
    coats = [p for p in present if isinstance(p, Dora)]
    if coats:
        if len(coats) != len(parts) or any(p.axis != 0 or p.eps != coats[0].eps for p in coats):
            raise ConversionError("magnitudes of some parts of a fused parameter cannot be joined")
        magnitude = _stacked([to_numpy(p.magnitude) for p in coats])
        return Dora(_delta(joined([p.direction for p in coats], sizes)), magnitude, 0, coats[0].eps)
    if all(isinstance(p, LowRank) for p in present):
        return _joined_pairs([p if isinstance(p, LowRank) else None for p in parts], sizes)
    if all(isinstance(p, Dense) for p in present):
        like = next(p for p in present if isinstance(p, Dense))
        blocks = [_whole(p, like, n) for p, n in zip(parts, sizes, strict=True)]
        return Dense(_stacked(blocks))
    raise ConversionError("parts of different kinds cannot be joined", got=", ".join(sorted({p.kind for p in present})))


def _whole(p: Update | None, like: Dense, size: int) -> Array:
    if isinstance(p, Dense):
        return to_numpy(p.d) if p.scale == 1.0 else down(to_numpy(p.dense()), dtype_name(p.d))
    return np.zeros((size, *like.shape[1:]), to_numpy(like.d).dtype)


def _joined_pairs(parts: Sequence[LowRank | None], sizes: Sequence[int]) -> LowRank:
    present = [p for p in parts if p is not None]
    scale = present[0].scale
    arrays = [None if p is None else (_scaled(p, scale), to_numpy(p.a)) for p in parts]
    known = [pair for pair in arrays if pair is not None]
    width = known[0][1].shape[1]
    shared = all(a.shape == known[0][1].shape and a.tobytes() == known[0][1].tobytes() for _, a in known)
    rank = known[0][1].shape[0] if shared else sum(a.shape[0] for _, a in known)
    rows, at = [], 0
    for pair, size in zip(arrays, sizes, strict=True):
        block = np.zeros((size, rank), known[0][0].dtype)
        if pair is not None:
            r = pair[1].shape[0]
            block[:, at : at + r] = pair[0]
            at += 0 if shared else r
        rows.append(block)
    a = known[0][1] if shared else _stacked([a for _, a in known])
    return LowRank(_stacked(rows), a, scale, (sum(sizes), width))


def _scaled(p: LowRank, scale: float) -> Array:
    """Return ``b`` so that it acts at ``scale``."""
    b = to_numpy(p.b)
    return b if p.scale == scale else down(up(b) * (p.scale / scale), dtype_name(b))


def _stacked(arrays: Sequence[Array]) -> Array:
    return namespace(*arrays).concat(list(arrays), axis=0)


def _delta(u: Update) -> Any:
    return u


def baked(u: LowRank) -> LowRank:
    """Return the pair at scale 1, the scale multiplied into ``b``."""
    return u if u.scale == 1.0 else LowRank(down(up(u.b) * u.scale, dtype_name(u.b)), u.a, 1.0, u.shape)


def with_rows_below(u: LowRank, count: int) -> LowRank:
    """Return the update of a parameter with ``count`` more rows, which it leaves alone."""
    out, rank = shape_of(u.b)
    return LowRank(_grown(u.b, 0, count, (out + count, rank)), u.a, u.scale, (out + count, *u.shape[1:]))


def _grown(t: Tensor, above: int, below: int, shape: tuple[int, int]) -> Leaf:
    """Return a leaf of a matrix with zero rows above and below it."""

    def load(out: Array | None) -> Array:
        x = to_numpy(t)
        return _stacked([np.zeros((above, shape[1]), x.dtype), x, np.zeros((below, shape[1]), x.dtype)])

    return Leaf(shape, dtype_name(t), load)
