"""What stands between some adapters and a base: experts stored one by one, updates that are no change of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from loratools.core.adapter import Adapter
from loratools.core.rows import slice_rows
from loratools.core.update import Update
from loratools.errors import MismatchError, UnsupportedError
from loratools.io.base import Base
from loratools.io.experts import Apart, stacked_shape, stored_apart
from loratools.kinds.lowrank import LowRank, low_ranks
from loratools.kinds.stack import Stack


def one_by_one(adapter: Adapter, base: Base) -> Adapter:
    """Return the adapter with every stack that the base stores apart as updates of its tensors; the rest as it is.

    Exact: an expert's matrices are stretches of rows, so that b is cut and a is shared. Raises :class:`MismatchError`
    where the sizes differ.
    """
    apart = stored_apart((n for n, u in adapter.items() if isinstance(u, Stack) and n not in base), base.shapes)
    if not apart:
        return adapter
    updates: dict[str, Update] = {}
    for name, update in adapter.items():
        updates |= dict(_split(name, update, apart[name], base)) if name in apart else {name: update}
    return replace(adapter, updates=updates)


def refuse_unmergeable(adapter: Adapter) -> None:
    """Raise :class:`UnsupportedError` for an update that the reader of its file says cannot be added to a weight."""
    for name, why in adapter.meta.unmergeable.items():
        if name in adapter:
            raise UnsupportedError(why, parameter=name, file=adapter.meta.path)


def _split(name: str, u: Update, parts: Apart, base: Base) -> Iterator[tuple[str, Update]]:
    expected = stacked_shape(parts, base.shapes)
    if u.shape != expected:
        raise MismatchError("the experts do not fit the base's", parameter=name, expected=expected, got=u.shape)
    for names, pair in zip(parts, low_ranks(u) or (), strict=True):
        start = 0
        for part in names:
            stop = start + base.shapes[part][0]
            yield part, LowRank(slice_rows(pair.b, start, stop), pair.a, pair.scale)
            start = stop
