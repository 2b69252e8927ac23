"""Rebased: an update of a base parameter that the adapter brings along whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from loratools.core.update import Array, Delta, Leaf, Update, kind, shape_of, working_dtype
from loratools.errors import FormatError, MismatchError
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank, low_rank, low_ranks, with_low_rank, with_low_ranks
from loratools.kinds.replace import Replace
from loratools.linalg.namespace import up


@kind("rebased")
class Rebased(Update):
    """W' = update(value): the base's own parameter does not matter, and may lack or have another size.

    PEFT saves the whole embedding beside the factors that adapt it.
    """

    value: Leaf | Array
    update: Update

    def __post_init__(self) -> None:
        if shape_of(self.value) != self.update.shape:
            raise FormatError("the saved base does not fit its update", expected=self.update.shape, got=self.shape)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the value."""
        return shape_of(self.value)

    def apply(self, w: Array | None) -> Array:
        """Return the updated value, in the dtype of ``w`` where there is one."""
        return self.update.apply(Replace(self.value).apply(w))

    def delta(self, w: Array) -> Delta:
        """Return W' - W; both must have one shape."""
        if shape_of(w) != self.shape:
            raise MismatchError("the replaced parameter has another shape", expected=self.shape, got=shape_of(w))
        dtype = working_dtype(w, self.value)
        value = up(self.value, dtype)
        return Dense(value - up(w, dtype) + self.update.delta(value).dense())

    @classmethod
    def example(cls, seed: int) -> Self:
        """A low-rank update of a 5 x 7 value."""
        return cls(Replace.example(seed).value, LowRank.example(seed))


@low_rank.register(Rebased)
def _(u: Rebased) -> LowRank | None:
    return low_rank(u.update)


@with_low_rank.register(Rebased)
def _(u: Rebased, new: LowRank) -> Update:
    return replace(u, update=with_low_rank(u.update, new))


@low_ranks.register(Rebased)
def _(u: Rebased) -> tuple[LowRank, ...] | None:
    return low_ranks(u.update)


@with_low_ranks.register(Rebased)
def _(u: Rebased, new: Sequence[LowRank]) -> Update:
    return replace(u, update=with_low_ranks(u.update, new))
