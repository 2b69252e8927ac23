"""Composed: several updates of one parameter, one after the other."""

from __future__ import annotations

from typing import Self

from loratools.core.coat import Coat
from loratools.core.generic import transposed
from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta, Update, kind
from loratools.errors import FormatError
from loratools.kinds.multiplied import Multiplied
from loratools.kinds.scaled import Scaled
from loratools.kinds.sum import Sum
from loratools.linalg import seeds


@kind("composed")
class Composed(Coat):
    """W' = last(... second(first(W))), of equal shapes, at least one."""

    parts: tuple[Update, ...]

    def __post_init__(self) -> None:
        if not self.parts or any(p.shape != self.parts[0].shape for p in self.parts):
            got = ", ".join(str(p.shape) for p in self.parts)
            raise FormatError("the steps of an update differ", expected="one shape", got=got)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return self.parts[0].shape

    def delta(self, w: Array) -> Delta:
        """Return the sum of what every step adds to what the steps before it made; each but the last is formed."""
        base = self.checked(w)
        added: list[Delta] = []
        for i, part in enumerate(self.parts):
            base = base if i == 0 else base + added[-1].dense()
            added.append(part.delta(base))
        return Sum(tuple(added))

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 8 parameter turned, then scaled by rows: one level of BOFT."""
        gain = seeds.uniform(seeds.key_of(seed, "composed"), 5, 1)[:, 0] + 0.5
        return cls((Multiplied.example(seed), Scaled(gain, (5, 8))))


@rowwise.register(Composed)
def _(u: Composed) -> Rows | None:
    parts = [rows for rows in map(rowwise, u.parts) if rows is not None]
    if len(parts) < len(u.parts):
        return None
    return lambda start, stop: Composed(tuple(rows(start, stop) for rows in parts))


@transposed.register(Composed)
def _(u: Composed) -> Composed:
    return Composed(tuple(transposed(part) for part in u.parts))
