"""Which entries a sparse adapter keeps: a score per entry, the highest stay (the masks of SHiRA, arXiv:2406.13175).

``magnitude`` |D|, the best K-sparse approximation; ``weight`` |W|; ``snip`` |W D|, a stand-in for weight times
gradient; ``random``; ``struct``, the diagonal and evenly spaced rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loratools.core.update import Array, Leaf, namespace
from loratools.errors import MismatchError, NeedsBaseError, UsageError
from loratools.linalg.namespace import down, up
from loratools.linalg.seeds import key_of, uniform

MASKS = ("magnitude", "weight", "snip", "random", "struct")
NEEDS_BASE = ("weight", "snip")


def checked(mask: str) -> str:
    """Return a known mask. Raises UsageError otherwise."""
    if mask not in MASKS:
        raise UsageError("unknown mask", expected=", ".join(MASKS), got=mask)
    return mask


@dataclass(frozen=True)
class Scorer:
    """Scores of one parameter of shape (m, n): ``weight`` its stored base, ``keep`` about how many will stay."""

    mask: str
    name: str
    shape: tuple[int, int]
    keep: int
    weight: Leaf | None = None
    seed: int = 0

    def __call__(self, start: int, stop: int, block: Array) -> Array:
        """Return the scores of rows start .. stop, fp32, not negative; ``block`` are the update's entries there."""
        return _SCORES[self.mask](self, start, stop, block)

    def base(self, start: int, stop: int) -> Array:
        """Return rows of the base parameter. Raises NeedsBaseError where there is none."""
        if self.weight is None:
            raise NeedsBaseError(f"the mask {self.mask} scores by the base weights", hint="pass --base")
        if self.weight.shape[0] != self.shape[0]:
            raise MismatchError("the base parameter has another shape", expected=self.shape, got=self.weight.shape)
        return up(self.weight.rows(start, stop)).reshape(stop - start, self.shape[1])

    def spacing(self) -> float:
        """Return the distance of the rows that ``struct`` keeps beside the diagonal."""
        m, n = self.shape
        wanted = max(0, self.keep - min(m, n)) / n
        return m / max(1.0, -(-wanted // 1))


def _magnitude(s: Scorer, start: int, stop: int, block: Array) -> Array:
    return abs(block)


def _weight(s: Scorer, start: int, stop: int, block: Array) -> Array:
    return abs(s.base(start, stop))


def _snip(s: Scorer, start: int, stop: int, block: Array) -> Array:
    return abs(block * s.base(start, stop))


def _random(s: Scorer, start: int, stop: int, block: Array) -> Array:
    return down(uniform(key_of(s.seed, f"mask:{s.name}"), range(start, stop), s.shape[1], like=block), "float32")


def _struct(s: Scorer, start: int, stop: int, block: Array) -> Array:
    """Return 2 on the diagonal, 1 in every f-th row, 0 elsewhere."""
    xp, f = namespace(block), s.spacing()
    row = xp.arange(start, stop, dtype=xp.int64)[:, None]
    column = xp.arange(s.shape[1], dtype=xp.int64)[None, :]
    chosen = xp.asarray([[1.0 if int(i // f) > int((i - 1) // f) else 0.0] for i in range(start, stop)])
    return up(xp.where(row == column, 2.0, chosen)) + xp.zeros_like(block)


_SCORES: dict[str, Callable[[Scorer, int, int, Array], Array]] = {
    "magnitude": _magnitude, "weight": _weight, "snip": _snip, "random": _random, "struct": _struct,
}  # fmt: skip
