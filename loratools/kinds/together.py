"""Together: several updates of one parameter, each of the same base, their changes added."""

from __future__ import annotations

from typing import Self

from loratools.core.coat import Coat
from loratools.core.generic import transposed
from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta, Update, kind
from loratools.errors import FormatError
from loratools.kinds.lowrank import LowRank
from loratools.kinds.modulated import Modulated
from loratools.kinds.sum import Sum


@kind("together")
class Together(Coat):
    """W' = W + sum_i (u_i(W) - W), of equal shapes, at least one; a Sum where some parts need the base."""

    parts: tuple[Update, ...]

    def __post_init__(self) -> None:
        if not self.parts or any(p.shape != self.parts[0].shape for p in self.parts):
            got = ", ".join(str(p.shape) for p in self.parts)
            raise FormatError("the parts of an update differ", expected="one shape", got=got)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return self.parts[0].shape

    def delta(self, w: Array) -> Delta:
        """Return the sum of what every part adds to W."""
        base = self.checked(w)
        return Sum(tuple(part.delta(base) for part in self.parts))

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 parameter modulated, and a low-rank update of it: GLoRA's."""
        return cls((Modulated.example(seed), LowRank.example(seed + 1)))


@rowwise.register(Together)
def _(u: Together) -> Rows | None:
    parts = [rows for rows in map(rowwise, u.parts) if rows is not None]
    if len(parts) < len(u.parts):
        return None
    return lambda start, stop: Together(tuple(rows(start, stop) for rows in parts))


@transposed.register(Together)
def _(u: Together) -> Together:
    return Together(tuple(transposed(part) for part in u.parts))
