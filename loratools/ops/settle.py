"""DoRA with magnitudes on columns (Conv1D, embeddings): one pass over the base for its norms, then rows stand alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock
from typing import NamedTuple, TypeVar

from loratools.core.generic import need_delta
from loratools.core.rows import Rows, row_ranges, rowwise, slice_rows
from loratools.core.update import Array, Delta, Leaf, Update, namespace
from loratools.kinds.dora import Dora, DoraDelta
from loratools.linalg.namespace import up, working_dtype
from loratools.ops.fold import agreement

T = TypeVar("T")
RANGE_BYTES = 4 << 20  # of the base, read at once


@dataclass(frozen=True)
class Settled(Update):
    """A :class:`Dora` whose ``gain`` along ``axis`` on its base is known: W' = gain (W + D)."""

    direction: Delta
    gain: Array
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return self.direction.shape

    def apply(self, w: Array | None) -> Array:
        """Return W' in the dtype of ``w``."""
        assert w is not None
        return self.delta(w).apply(w)

    def delta(self, w: Array) -> Delta:
        """Return (g - 1) W + g D."""
        return DoraDelta(up(w, working_dtype(w, self.gain)), self.direction, self.gain, self.axis)

    @classmethod
    def example(cls, seed: int) -> Settled:
        """The example of :class:`Dora`, along its columns."""
        direction = Dora.example(seed).direction
        return cls(direction, up(direction.dense()[0, ...]), 1)


class Pass(NamedTuple):
    """What one pass over the base tells: the settled update, and the sums of its agreement with the base."""

    update: Settled
    sums: dict[str, float]


def can_settle(u: Update) -> bool:
    """True for a Dora on another axis than the rows whose direction passes in rows."""
    return isinstance(u, Dora) and u.axis != 0 and rowwise(u.direction) is not None


def settle(u: Dora, w: Leaf | Array) -> Pass:
    """Read the base once, in blocks of rows, for the norms of W + D and of W along the axis. Memory: a few MB."""
    source = w.read() if isinstance(w, Leaf) and not hasattr(w.load, "rows") else w
    rows, dtype = rowwise(u.direction), working_dtype(w, u.magnitude)
    assert rows is not None  # can_settle
    others = tuple(i for i in range(len(u.shape)) if i != u.axis)
    total = alone = 0.0
    for i, j in row_ranges(w, RANGE_BYTES):
        base = up(slice_rows(source, i, j), dtype)
        both, xp = base + need_delta(rows(i, j)).dense(), namespace(base)
        total = total + up(xp.sum(both * both, axis=others), "float64")
        alone = alone + up(xp.sum(base * base, axis=others), "float64")
    xp = namespace(total)
    gain = up(u.gain_of(xp.sqrt(total)), dtype)
    return Pass(Settled(u.direction, gain, u.axis), agreement(u, xp.sqrt(alone)))


def once(make: Callable[[], T]) -> Callable[[], T]:
    """Return ``make`` as a function that is run by the first thread that asks; the others wait for its result."""
    lock, made = Lock(), list[T]()

    def get() -> T:
        with lock:
            if not made:
                made.append(make())
            return made[0]

    return get


@rowwise.register(Settled)
def _(u: Settled) -> Rows | None:
    rows = rowwise(u.direction)
    return None if rows is None else lambda start, stop: replace(u, direction=need_delta(rows(start, stop)))
